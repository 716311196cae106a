"""Every language model of transformers that a small config makes: right after accelerate(), whatever it is."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from harness import far
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from zoo import CAUSAL, MASKED, SEQ2SEQ, batch

import tfm
from tfm import native

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(
        bool(native.why_unavailable(torch.device("cpu"))),
        reason="without native kernels a CPU runs everything as before",
    ),
]
KINDS = {
    CAUSAL: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MASKED: modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    SEQ2SEQ: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
MODELS = [(kind, name) for kind, names in KINDS.items() for name in names]
LARGEST = 20_000_000
# What configs call their sizes; of these each takes those that it has.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("sliding_window", "attention_window", "attention_chunk_size", "qk_rope_head_dim"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 44),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "v_head_dim", "state_size"), 8),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 20),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "max_window_layers"), 1),
    **dict.fromkeys(("dropout", "dropout_rate", "encoder_layerdrop"), 0.0),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 66),
    "vocab_size": 64,
    "use_sliding_window": True,
}  # fmt: skip


def make(kind: str, name: str) -> torch.nn.Module:
    """Makes a small model, or skips what is too large or takes other sizes than these."""
    names = KINDS[kind][name]
    model = getattr(transformers, names if isinstance(names, str) else names[0])
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    special |= {"decoder_start_token_id": 1} if kind == SEQ2SEQ else {}
    try:
        config_class = CONFIG_MAPPING[name]
        default = config_class()
        known = vars(default).keys() | getattr(default, "attribute_map", {}).keys()
        config = config_class(**{key: size for key, size in SIZES.items() if key in known}, **special)
        with torch.device("meta"):
            elements = sum(x.numel() for x in model(copy.deepcopy(config)).parameters())
        assert elements < LARGEST
        torch.manual_seed(0)
        made = model(config).eval().float()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
        return made
    except Exception as error:
        pytest.skip(f"no small one: {type(error).__name__}")


@functools.cache
def given(kind: str, padding: str) -> dict[str, torch.Tensor]:
    return {name: x for name, x in batch(kind, padding).items() if name != "labels" or kind == SEQ2SEQ}


@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_logits_are_those_of_the_model(kind, name):
    model = make(kind, name)
    with torch.no_grad():
        try:
            expected = {padding: model(**given(kind, padding)).logits for padding in ("right", "left")}
        except Exception as error:
            pytest.skip(f"takes other arguments: {type(error).__name__}")
        tfm.accelerate(model)
        for padding, logits in expected.items():
            found = model(**given(kind, padding)).logits
            valid = given(kind, padding)["attention_mask"].bool()
            if logits.shape[:2] == valid.shape:
                logits, found = logits[valid], found[valid]
            assert far(found, logits, logits.abs().max().item()) <= 3e-5
