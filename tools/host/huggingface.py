"""A layer of BERT's and a block of T5's, accelerated, in training, with a mask of padding."""

from __future__ import annotations

import copy
from functools import partial

import torch
from transformers import BertConfig, BertModel, T5Config, T5EncoderModel

import tfm
from tools.host.call import Call
from tools.host.sizes import CLASSES, HALF, HEADS, HIDDEN, LENGTH, SENTENCES, WIDTH, leaf


def huggingface_cases() -> list[Call]:
    """Returns the calls, beside the same of the model as it was made."""
    found = []
    # As masks.py has it: which keys are no padding.
    mask = torch.ones(SENTENCES, 1, 1, LENGTH, dtype=torch.bool)
    mask[0, ..., LENGTH // 2 :] = False
    bert = BertConfig(
        vocab_size=CLASSES, hidden_size=WIDTH, num_attention_heads=HEADS, num_hidden_layers=1, intermediate_size=HIDDEN
    )
    t5 = T5Config(vocab_size=CLASSES, d_model=WIDTH, d_kv=WIDTH // HEADS, num_heads=HEADS, num_layers=1, d_ff=HIDDEN)
    models: tuple[tuple[str, torch.nn.Module, str], ...] = (
        ("BERT layer", BertModel(bert), "encoder.layer.0"),
        ("T5 block", T5EncoderModel(t5), "encoder.block.0"),
    )
    for name, model, path in models:
        for is_ours in (False, True):
            one = copy.deepcopy(model).to(HALF).train()
            if is_ours:
                tfm.accelerate(one)
            layer, x = one.get_submodule(path), leaf(SENTENCES, LENGTH, WIDTH)
            call = partial(_first, layer, x, mask)
            label = f"{name}, accelerated" if is_ours else f"{name} of transformers"
            found.append(Call(label, call, (x, *(p for p in layer.parameters() if p.requires_grad))))
    return found


def _first(layer: torch.nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    result = layer(x, mask)
    return result[0] if isinstance(result, tuple) else result
