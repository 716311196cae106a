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
    Family("BERT", "BertForMaskedLM", ("layer", "attention", "norm", "residual", "feed_forward")),
    Family("RoBERTa", "RobertaForMaskedLM", ("layer", "attention", "norm", "residual", "feed_forward")),
    Family("CamemBERT", "CamembertForMaskedLM", ("layer", "attention", "norm", "residual", "feed_forward")),
    Family("ELECTRA", "ElectraForMaskedLM", ("layer", "attention", "norm", "residual", "feed_forward")),
    Family("ALBERT", "AlbertForMaskedLM", ("layer", "attention", "norm", "feed_forward")),
    Family("DistilBERT", "DistilBertForMaskedLM", ("layer", "attention", "norm", "feed_forward")),
    Family("FlauBERT", "FlaubertWithLMHeadModel", ("attention", "norm", "feed_forward")),
    Family(
        "DeBERTaV3",
        "DebertaV2ForMaskedLM",
        ("attention", "norm", "residual", "feed_forward"),
        "its disentangled scores as a dense bias",
    ),
    Family("GPT-2", "GPT2LMHeadModel", ("attention", "norm", "feed_forward")),
    Family("GPT-J", "GPTJForCausalLM", ("attention", "norm", "feed_forward")),
    Family("GPT-Neo", "GPTNeoForCausalLM", ("attention", "norm", "feed_forward")),
    Family("GPT-NeoX-20B", "GPTNeoXForCausalLM", ("attention", "norm", "feed_forward")),
    Family("LLaMA 1, 2, 3", "LlamaForCausalLM", ("attention", "norm", "feed_forward")),
    Family("CodeLlama", "LlamaForCausalLM", ("attention", "norm", "feed_forward")),
    Family("Gemma", "GemmaForCausalLM", ("attention", "norm", "feed_forward")),
    Family("Gemma 2", "Gemma2ForCausalLM", ("attention", "norm", "feed_forward")),
    Family("Mistral", "MistralForCausalLM", ("attention", "norm", "feed_forward")),
    Family("Falcon 7B, 40B, RW", "FalconForCausalLM", ("attention", "norm", "feed_forward")),
    Family("Phi-3", "Phi3ForCausalLM", ("attention", "norm", "feed_forward")),
    Family("OPT", "OPTForCausalLM", ("attention", "norm", "feed_forward")),
    Family("Qwen2.5", "Qwen2ForCausalLM", ("attention", "norm", "feed_forward")),
    Family(
        "XLNet", "XLNetLMHeadModel", ("attention", "norm", "feed_forward"), "its relative positions as a dense bias"
    ),
    Family(
        "GLM-130B",
        "GlmForCausalLM",
        ("attention", "norm", "feed_forward"),
        "as GLM-4: transformers has no class of the 130B model's",
    ),
    Family("DeepSeek-V3", "DeepseekV3ForCausalLM", ("attention", "norm", "feed_forward", "experts")),
    Family("T5", "T5ForConditionalGeneration", ("layer", "attention", "norm", "feed_forward")),
    Family("FLAN-T5", "T5ForConditionalGeneration", ("layer", "attention", "norm", "feed_forward")),
    Family("BART", "BartForConditionalGeneration", ("layer", "attention", "norm", "residual")),
    Family("PEGASUS", "PegasusForConditionalGeneration", ("layer", "attention", "norm", "residual")),
    Family("MarianMT", "MarianMTModel", ("layer", "attention", "norm", "residual")),
    Family("MBart", "MBartForConditionalGeneration", ("layer", "attention", "norm", "residual")),
    Family("Mixtral", "MixtralForCausalLM", ("attention", "norm", "experts")),
    Family("Qwen2MoE", "Qwen2MoeForCausalLM", ("attention", "norm", "feed_forward", "experts")),
    Family(
        "NLLB-MoE",
        "NllbMoeForConditionalGeneration",
        ("attention", "norm", "feed_forward", "experts"),
        "its router reads the mask: dense",
    ),
    Family(
        "SwitchTransformers",
        "SwitchTransformersForConditionalGeneration",
        ("attention", "norm", "feed_forward", "experts"),
    ),
    Family("gpt-oss", "GptOssForCausalLM", ("attention", "norm"), "its experts, of a gate of their own, run as before"),
    Family("Mamba", "MambaForCausalLM", ("norm", "recurrence")),
    Family("RWKV", "RwkvForCausalLM", ("norm", "feed_forward", "recurrence")),
    Family("Zamba", "ZambaForCausalLM", ("attention", "norm", "feed_forward", "recurrence")),
    Family("Jamba", "JambaForCausalLM", ("attention", "norm", "feed_forward", "experts", "recurrence")),
    Family("RecurrentGemma", "RecurrentGemmaForCausalLM", ("attention", "norm", "feed_forward", "recurrence")),
    Family("CodeGen", "CodeGenForCausalLM", ("attention", "norm", "feed_forward")),
    Family("Starcoder2", "Starcoder2ForCausalLM", ("attention", "norm", "feed_forward")),
    Family("BioGPT", "BioGptForCausalLM", ("attention", "norm", "feed_forward")),
    Family(
        "Longformer",
        "LongformerForMaskedLM",
        ("attention", "norm", "residual", "feed_forward"),
        "its window and its global tokens as two softmaxes, joined",
    ),
    Family(
        "BigBird",
        "BigBirdForMaskedLM",
        ("attention", "norm", "residual", "feed_forward"),
        "its blocks as a batch of short attentions",
    ),
    Family("Transformer-XL", "", (), "gone from transformers 5: tfm.nn.TransformerXLDecoderLayer takes its weights"),
    Family("GPT-4.5", "", (), "closed: no weights to accelerate"),
    Family("Claude 3", "", (), "closed: no weights to accelerate"),
    Family("Gemini 1.5", "", (), "closed: no weights to accelerate"),
)
