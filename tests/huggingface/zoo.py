"""Every family of tfm.patching.families as small models from a config: nothing is downloaded, all takes seconds."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

CLASSES, LENGTH, TARGETS = 64, 17, 9
# Kinds of models: of masked tokens, of next tokens, of sequences to sequences.
MASKED, CAUSAL, SEQ2SEQ = "masked", "causal", "seq2seq"


@dataclass(frozen=True)
class Species:
    """One small model.

    Attributes:
        name: of the test.
        family: its row of tfm.patching.families.
        model: the class in transformers.
        config: the class of its config.
        kind: one of the kinds above.
        options: of the config.
    """

    name: str
    family: str
    model: str
    config: str
    kind: str
    options: dict[str, Any] = field(hash=False)

    def make(self) -> nn.Module:
        """Makes the model in evaluation, without dropout; all parameters are shaken, so that one ignored would show."""
        torch.manual_seed(0)
        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**self.options))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
        return model.eval()


TOKENS = {"vocab_size": CLASSES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = TOKENS | {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44,
    "max_position_embeddings": 66,
}  # fmt: skip
LLAMA = BERT | {"num_key_value_heads": 2}
GPT2 = TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FALCON = TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
T5 = {
    "vocab_size": CLASSES, "d_model": 32, "d_kv": 8, "d_ff": 44, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2, "dropout_rate": 0.0,
}  # fmt: skip
BART = TOKENS | {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 44, "decoder_ffn_dim": 44, "max_position_embeddings": 64,
    "decoder_start_token_id": 1, "forced_eos_token_id": None, "dropout": 0.0,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
MAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False, "attn_layer_offset": 1}


def _masked(name: str, family: str, prefix: str, options: dict[str, Any], head: str = "ForMaskedLM") -> Species:
    return Species(name, family, prefix + head, prefix + "Config", MASKED, options)


def _causal(name: str, family: str, prefix: str, options: dict[str, Any], head: str = "ForCausalLM") -> Species:
    return Species(name, family, prefix + head, prefix + "Config", CAUSAL, options)


def _seq2seq(
    name: str, family: str, prefix: str, options: dict[str, Any], head: str = "ForConditionalGeneration"
) -> Species:
    return Species(name, family, prefix + head, prefix + "Config", SEQ2SEQ, options)


ZOO = (
    _masked("bert", "BERT", "Bert", BERT),
    _masked("roberta", "RoBERTa", "Roberta", BERT),
    _masked("camembert", "CamemBERT", "Camembert", BERT),
    _masked("electra", "ELECTRA", "Electra", BERT | {"embedding_size": 24}),
    _masked("albert", "ALBERT", "Albert", BERT | {"embedding_size": 24}),
    _masked(
        "distilbert", "DistilBERT", "DistilBert",
        TOKENS | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 44, "max_position_embeddings": 64},
    ),
    _masked(
        "flaubert", "FlauBERT", "Flaubert",
        TOKENS | {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64, "pad_index": 0},
        "WithLMHeadModel",
    ),
    _masked(
        "deberta", "DeBERTaV3", "DebertaV2",
        BERT | {
            "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
            "norm_rel_ebd": "layer_norm", "position_biased_input": False,
        },
    ),
    _causal("gpt2", "GPT-2", "GPT2", GPT2, "LMHeadModel"),
    _causal("gptj", "GPT-J", "GPTJ", GPT2 | {"rotary_dim": 4}),
    _causal(
        "gptneo", "GPT-Neo", "GPTNeo",
        TOKENS | {
            "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 44, "window_size": 4,
            "max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]],
        },
    ),
    _causal("neox", "GPT-NeoX-20B", "GPTNeoX", BERT | {"rotary_pct": 0.25, "hidden_act": "gelu_fast"}),
    _causal("llama", "LLaMA 1, 2, 3", "Llama", LLAMA),
    _causal("codellama", "CodeLlama", "Llama", LLAMA | {"rope_theta": 1e6, "num_key_value_heads": 1}),
    _causal("gemma", "Gemma", "Gemma", LLAMA | {"num_key_value_heads": 1, "head_dim": 12}),
    # A cap near the scores: one that is ignored would show, as sdpa ignores it in transformers 5.17.
    _causal(
        "gemma2", "Gemma 2", "Gemma2",
        LLAMA | {
            "head_dim": 12, "sliding_window": 4, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 9, "attn_implementation": "eager",
        },
    ),
    _causal("mistral", "Mistral", "Mistral", LLAMA | {"sliding_window": 4}),
    _causal(
        "falcon7b", "Falcon 7B, 40B, RW", "Falcon",
        FALCON | {"multi_query": True, "parallel_attn": True, "bias": False, "new_decoder_architecture": False},
    ),
    _causal(
        "falcon40b", "Falcon 7B, 40B, RW", "Falcon", FALCON | {"num_kv_heads": 2, "new_decoder_architecture": True}
    ),
    _causal(
        "falconrw", "Falcon 7B, 40B, RW", "Falcon",
        FALCON | {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
    ),
    _causal("phi3", "Phi-3", "Phi3", LLAMA),
    _causal("opt", "OPT", "OPT", BERT | {"ffn_dim": 44, "word_embed_proj_dim": 32}),
    _causal("qwen2", "Qwen2.5", "Qwen2", LLAMA | WINDOW),
    _causal(
        "xlnet", "XLNet", "XLNet", TOKENS | {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 44}, "LMHeadModel"
    ),
    _causal("glm", "GLM-130B", "Glm", LLAMA | {"head_dim": 8}),
    _causal(
        "deepseek", "DeepSeek-V3", "DeepseekV3",
        BERT | {
            "num_key_value_heads": 4, "moe_intermediate_size": 20, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "n_shared_experts": 1,
        },
    ),
    _seq2seq("t5", "T5", "T5", T5),
    _seq2seq("flan", "FLAN-T5", "T5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    _seq2seq("bart", "BART", "Bart", BART),
    _seq2seq("pegasus", "PEGASUS", "Pegasus", BART | {"activation_function": "relu"}),
    _seq2seq("marian", "MarianMT", "Marian", BART | {"activation_function": "swish"}, "MTModel"),
    _seq2seq("mbart", "MBart", "MBart", BART),
    _causal("mixtral", "Mixtral", "Mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    _causal(
        "qwen2moe", "Qwen2MoE", "Qwen2Moe",
        LLAMA | WINDOW | {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 20,
        },
    ),
    _seq2seq(
        "nllbmoe", "NLLB-MoE", "NllbMoe",
        BART | {"num_experts": 4, "expert_capacity": 64, "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    ),
    _seq2seq(
        "switch", "SwitchTransformers", "SwitchTransformers",
        T5 | {
            "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_decoder_layers": 2,
            "expert_capacity": 64, "router_jitter_noise": 0.0,
        },
    ),
    _causal(
        "gptoss", "gpt-oss", "GptOss",
        LLAMA | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    _causal("mamba", "Mamba", "Mamba", TOKENS | {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    _causal(
        "rwkv", "RWKV", "Rwkv",
        TOKENS | {
            "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 44,
            "context_length": 64, "use_cache": False,
        },
    ),
    _causal(
        "zamba", "Zamba", "Zamba",
        LLAMA | MAMBA | {"num_key_value_heads": 4, "num_hidden_layers": 5, "attn_layer_period": 2, "n_mamba_heads": 2},
    ),
    _causal(
        "jamba", "Jamba", "Jamba",
        LLAMA | MAMBA | {
            "num_hidden_layers": 4, "attn_layer_period": 2, "expert_layer_period": 2, "expert_layer_offset": 1,
            "num_experts": 4, "num_experts_per_tok": 2,
        },
    ),
    _causal(
        "recurrentgemma", "RecurrentGemma", "RecurrentGemma",
        LLAMA | {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8},
    ),
    _causal("codegen", "CodeGen", "CodeGen", GPT2 | {"n_ctx": 64, "rotary_dim": 4}),
    _causal("starcoder2", "Starcoder2", "Starcoder2", LLAMA | {"sliding_window": 4}),
    _causal("biogpt", "BioGPT", "BioGpt", BERT),
    _masked("longformer", "Longformer", "Longformer", BERT | {"attention_window": 4}),
    _masked("bigbird", "BigBird", "BigBird", BERT | {"block_size": 2, "num_random_blocks": 1}),
    _masked("bigbird full", "BigBird", "BigBird", BERT | {"attention_type": "original_full"}),
)  # fmt: skip


@functools.cache
def batch(kind: str, padding: str) -> dict[str, Tensor]:
    """Returns the arguments of a step: three sentences, padded at the "right", the "left" or not at all ("none").

    Padding has no labels, nor has what a model of next tokens says of the last of it.
    """
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, CLASSES, (3, LENGTH), generator=generator)
    valid = torch.ones_like(tokens)
    for row, count in ((1, 12), (2, 6)):
        if padding == "left":
            valid[row, :count] = 0
        elif padding == "right":
            valid[row, LENGTH - count :] = 0
    tokens = tokens.masked_fill(valid == 0, 0)
    given = {"input_ids": tokens} | ({} if padding == "none" else {"attention_mask": valid})
    if kind == SEQ2SEQ:
        labels = torch.randint(3, CLASSES, (3, TARGETS), generator=generator)
        labels[1, 4:] = -100
        return given | {"labels": labels}
    first = (valid.cumsum(1) == 1) & (valid == 1)
    labels = tokens.masked_fill((valid == 0) | (first if padding == "left" else torch.zeros_like(first)), -100)
    return given | {"labels": labels}
