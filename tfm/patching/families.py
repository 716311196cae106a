"""The families of models that people arrive with, and what accelerate() serves of each: a table for people.

Nothing is decided by it: a module is served for what it is. tests/huggingface holds every row against what
accelerate() says of a small model of the family.
"""

from __future__ import annotations

from typing import NamedTuple

# The oldest and the newest transformers that the tests run with.
TRIED = ("5.17.0", "5.23.0")


class Family(NamedTuple):
    """One family.

    Attributes:
        name: as people call it.
        model: the class in transformers that the tests make; empty where there is none.
        served: kinds of work, of `tfm.patching.KINDS`, that run fused.
        note: what is special, or why something is left.
    """

    name: str
    model: str
    served: tuple[str, ...] = ()
    note: str = ""


FAMILIES = (
    Family(
        "BERT",
        "BertForMaskedLM",
        ("layer", "attention", "norm", "residual", "feed_forward", "embedding", "cross_entropy"),
    ),
    Family(
        "RoBERTa",
        "RobertaForMaskedLM",
        ("layer", "attention", "norm", "residual", "feed_forward", "embedding", "cross_entropy"),
    ),
    Family(
        "CamemBERT",
        "CamembertForMaskedLM",
        ("layer", "attention", "norm", "residual", "feed_forward", "embedding", "cross_entropy"),
    ),
    Family(
        "ELECTRA",
        "ElectraForMaskedLM",
        ("layer", "attention", "norm", "residual", "feed_forward", "embedding", "cross_entropy"),
    ),
    Family("ALBERT", "AlbertForMaskedLM", ("layer", "attention", "norm", "feed_forward", "embedding", "cross_entropy")),
    Family(
        "DistilBERT",
        "DistilBertForMaskedLM",
        ("layer", "attention", "norm", "feed_forward", "embedding", "cross_entropy"),
    ),
    Family("FlauBERT", "FlaubertWithLMHeadModel", ("attention", "norm", "feed_forward")),
    Family(
        "DeBERTaV3",
        "DebertaV2ForMaskedLM",
        ("attention", "norm", "residual", "feed_forward", "cross_entropy"),
        "its disentangled scores as a dense bias",
    ),
    Family("GPT-2", "GPT2LMHeadModel", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family("GPT-J", "GPTJForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family("GPT-Neo", "GPTNeoForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family("GPT-NeoX-20B", "GPTNeoXForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family("LLaMA 1, 2, 3", "LlamaForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family("CodeLlama", "LlamaForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family("Gemma", "GemmaForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family("Gemma 2", "Gemma2ForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family("Mistral", "MistralForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family("Falcon 7B, 40B, RW", "FalconForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family("Phi-3", "Phi3ForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family("OPT", "OPTForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family("Qwen2.5", "Qwen2ForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family(
        "XLNet",
        "XLNetLMHeadModel",
        ("attention", "norm", "feed_forward", "cross_entropy"),
        "its relative positions as a dense bias",
    ),
    Family(
        "GLM-130B",
        "GlmForCausalLM",
        ("attention", "norm", "feed_forward", "cross_entropy"),
        "as GLM-4: transformers has no class of the 130B model's",
    ),
    Family("DeepSeek-V3", "DeepseekV3ForCausalLM", ("attention", "norm", "feed_forward", "experts", "cross_entropy")),
    Family("T5", "T5ForConditionalGeneration", ("layer", "attention", "norm", "feed_forward", "cross_entropy")),
    Family("FLAN-T5", "T5ForConditionalGeneration", ("layer", "attention", "norm", "feed_forward", "cross_entropy")),
    Family("BART", "BartForConditionalGeneration", ("layer", "attention", "norm", "residual", "cross_entropy")),
    Family("PEGASUS", "PegasusForConditionalGeneration", ("layer", "attention", "norm", "residual", "cross_entropy")),
    Family("MarianMT", "MarianMTModel", ("layer", "attention", "norm", "residual", "cross_entropy")),
    Family("MBart", "MBartForConditionalGeneration", ("layer", "attention", "norm", "residual", "cross_entropy")),
    Family("Mixtral", "MixtralForCausalLM", ("attention", "norm", "experts", "cross_entropy")),
    Family("Qwen2MoE", "Qwen2MoeForCausalLM", ("attention", "norm", "feed_forward", "experts", "cross_entropy")),
    Family(
        "NLLB-MoE",
        "NllbMoeForConditionalGeneration",
        ("attention", "norm", "feed_forward", "experts", "cross_entropy"),
        "its router reads the mask: dense",
    ),
    Family(
        "SwitchTransformers",
        "SwitchTransformersForConditionalGeneration",
        ("attention", "norm", "feed_forward", "experts", "cross_entropy"),
    ),
    Family(
        "gpt-oss",
        "GptOssForCausalLM",
        ("attention", "norm", "cross_entropy"),
        "its experts, of a gate of their own, run as before",
    ),
    Family("Mamba", "MambaForCausalLM", ("norm", "recurrence", "cross_entropy")),
    Family("RWKV", "RwkvForCausalLM", ("norm", "feed_forward", "recurrence", "cross_entropy")),
    Family("Zamba", "ZambaForCausalLM", ("attention", "norm", "feed_forward", "recurrence", "cross_entropy")),
    Family(
        "Jamba", "JambaForCausalLM", ("attention", "norm", "feed_forward", "experts", "recurrence", "cross_entropy")
    ),
    Family(
        "RecurrentGemma",
        "RecurrentGemmaForCausalLM",
        ("attention", "norm", "feed_forward", "recurrence", "cross_entropy"),
    ),
    Family("CodeGen", "CodeGenForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family("Starcoder2", "Starcoder2ForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family("BioGPT", "BioGptForCausalLM", ("attention", "norm", "feed_forward", "cross_entropy")),
    Family(
        "Longformer",
        "LongformerForMaskedLM",
        ("attention", "norm", "residual", "feed_forward", "embedding", "cross_entropy"),
        "its window and its global tokens as two softmaxes, joined",
    ),
    Family(
        "BigBird",
        "BigBirdForMaskedLM",
        ("attention", "norm", "residual", "feed_forward", "embedding", "cross_entropy"),
        "its blocks as a batch of short attentions",
    ),
    Family("Transformer-XL", "", (), "gone from transformers 5: tfm.nn.TransformerXLDecoderLayer takes its weights"),
    Family("GPT-4.5", "", (), "closed: no weights to accelerate"),
    Family("Claude 3", "", (), "closed: no weights to accelerate"),
    Family("Gemini 1.5", "", (), "closed: no weights to accelerate"),
)
