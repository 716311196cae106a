"""The families of models that people arrive with, and what accelerate() serves of each: a table for people.

Nothing is decided by it: a module is served for what it is. tests/huggingface holds every row against what
accelerate() says of a small model of the family.
"""

from __future__ import annotations

from typing import NamedTuple

# The oldest and the newest transformers that the tests run with.
TRIED = ("5.17.0", "5.23.0")

ENCODER = ("attention", "norm", "residual", "feed_forward")
DECODER = ("attention", "norm", "feed_forward")


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
    Family("BERT", "BertForMaskedLM", ENCODER),
    Family("RoBERTa", "RobertaForMaskedLM", ENCODER),
    Family("CamemBERT", "CamembertForMaskedLM", ENCODER),
    Family("ELECTRA", "ElectraForMaskedLM", ENCODER),
    Family("ALBERT", "AlbertForMaskedLM", DECODER),
    Family("DistilBERT", "DistilBertForMaskedLM", DECODER),
    Family("FlauBERT", "FlaubertWithLMHeadModel", DECODER),
    Family("DeBERTaV3", "DebertaV2ForMaskedLM", ENCODER, "its disentangled scores as a dense bias"),
    Family("GPT-2", "GPT2LMHeadModel", DECODER),
    Family("GPT-J", "GPTJForCausalLM", DECODER),
    Family("GPT-Neo", "GPTNeoForCausalLM", DECODER),
    Family("GPT-NeoX-20B", "GPTNeoXForCausalLM", DECODER),
    Family("LLaMA 1, 2, 3", "LlamaForCausalLM", DECODER),
    Family("CodeLlama", "LlamaForCausalLM", DECODER),
    Family("Gemma", "GemmaForCausalLM", DECODER),
    Family("Gemma 2", "Gemma2ForCausalLM", DECODER),
    Family("Mistral", "MistralForCausalLM", DECODER),
    Family("Falcon 7B, 40B, RW", "FalconForCausalLM", DECODER),
    Family("Phi-3", "Phi3ForCausalLM", DECODER),
    Family("OPT", "OPTForCausalLM", DECODER),
    Family("Qwen2.5", "Qwen2ForCausalLM", DECODER),
    Family("XLNet", "XLNetLMHeadModel", DECODER, "its relative positions as a dense bias"),
    Family("GLM-130B", "GlmForCausalLM", DECODER, "as GLM-4: transformers has no class of the 130B model's"),
    Family("DeepSeek-V3", "DeepseekV3ForCausalLM", (*DECODER, "experts")),
    Family("T5", "T5ForConditionalGeneration", DECODER),
    Family("FLAN-T5", "T5ForConditionalGeneration", DECODER),
    Family("BART", "BartForConditionalGeneration", DECODER),
    Family("PEGASUS", "PegasusForConditionalGeneration", DECODER),
    Family("MarianMT", "MarianMTModel", DECODER),
    Family("MBart", "MBartForConditionalGeneration", DECODER),
    Family("Mixtral", "MixtralForCausalLM", ("attention", "norm", "experts")),
    Family("Qwen2MoE", "Qwen2MoeForCausalLM", (*DECODER, "experts")),
    Family("NLLB-MoE", "NllbMoeForConditionalGeneration", (*DECODER, "experts"), "its router reads the mask: dense"),
    Family("SwitchTransformers", "SwitchTransformersForConditionalGeneration", (*DECODER, "experts")),
    Family("gpt-oss", "GptOssForCausalLM", ("attention", "norm", "experts")),
    Family("Mamba", "MambaForCausalLM", ("norm", "recurrence")),
    Family("RWKV", "RwkvForCausalLM", ("norm", "feed_forward", "recurrence")),
    Family("Zamba", "ZambaForCausalLM", (*DECODER, "recurrence")),
    Family("Jamba", "JambaForCausalLM", (*DECODER, "experts", "recurrence")),
    Family("RecurrentGemma", "RecurrentGemmaForCausalLM", (*DECODER, "recurrence")),
    Family("CodeGen", "CodeGenForCausalLM", DECODER),
    Family("Starcoder2", "Starcoder2ForCausalLM", DECODER),
    Family("BioGPT", "BioGptForCausalLM", DECODER),
    Family("Longformer", "LongformerForMaskedLM", ENCODER, "its window and its global tokens as two softmaxes, joined"),
    Family("BigBird", "BigBirdForMaskedLM", ENCODER, "its blocks as a batch of short attentions"),
    Family("Transformer-XL", "", (), "gone from transformers 5: the layer is tfm.nn's own"),
    Family("GPT-4.5", "", (), "closed: no weights to accelerate"),
    Family("Claude 3", "", (), "closed: no weights to accelerate"),
    Family("Gemini 1.5", "", (), "closed: no weights to accelerate"),
)
