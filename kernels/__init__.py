"""The operators with hand-written Triton kernels, one file each: formula, plain PyTorch reference, kernel, function.

Read next: kernels/attention.py
"""

from kernels.attention import HEAD_SIZES, attention, attention_qkvpacked, attention_reference
from kernels.backend import set_backend, uses_triton
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.fp8 import Scales
from kernels.fp8_layers import FEED_FORWARD, LINEAR, fp8_feed_forward, fp8_linear
from kernels.geglu import geglu, geglu_reference
from kernels.layernorm import dropout_add_layernorm, dropout_add_layernorm_reference
from kernels.muon import look_ahead, look_ahead_reference, move, move_reference

__all__ = [
    "FEED_FORWARD",
    "HEAD_SIZES",
    "LINEAR",
    "Scales",
    "attention",
    "attention_qkvpacked",
    "attention_reference",
    "dropout_add_layernorm",
    "dropout_add_layernorm_reference",
    "fp8_feed_forward",
    "fp8_linear",
    "geglu",
    "geglu_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "look_ahead",
    "look_ahead_reference",
    "move",
    "move_reference",
    "set_backend",
    "uses_triton",
]
