"""The cases of every kernel: one file for each file of kernels/. A new kernel adds its function to ALL."""

from tools.check_kernels.cases.attention import attention_cases
from tools.check_kernels.cases.cross_entropy import cross_entropy_cases
from tools.check_kernels.cases.decode_attention import decode_attention_cases
from tools.check_kernels.cases.embedding import embedding_cases
from tools.check_kernels.cases.feed_forward import feed_forward_cases
from tools.check_kernels.cases.norm import norm_cases
from tools.check_kernels.cases.rotary import rotary_cases
from tools.check_kernels.cases.short_attention import score_cases, short_attention_cases

ALL = (
    attention_cases,
    cross_entropy_cases,
    decode_attention_cases,
    feed_forward_cases,
    norm_cases,
    embedding_cases,
    rotary_cases,
    score_cases,
    short_attention_cases,
)
