# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""Numbers as sums of two float16 halves, for products of many rows on tensor cores.

A float16 has 11 significant bits: the halves hold a float32 to 2^-22 of it, and the first of them a
float16, a bfloat16, or a whole number up to 2048. Three products of halves, all but that of the two
second ones, do the work of six products of bfloat16 parts. But a float16 has exponents from -14 to
15 only. So numbers that are added up together are divided by one power of two, their scale, so that
the largest of them is between 2^14 and 2^15; what is lost of much smaller ones is below 2^-39 of
the largest. After Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores while
surpassing the FP32 theoretical peak performance" (2022), where scales are fixed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALLEST = tl.constexpr(2.0**-112)  # what the largest counts as, at least: 1/scale is finite


def padded(d: int) -> int:
    """The numbers of a row of halves in memory: without a multiple of 16, loads would be of single
    numbers."""
    return triton.cdiv(d, 16) * 16


def halves(t: Tensor) -> tuple[Tensor, Tensor]:
    """The halves [2, R, padded(d)] of the rows of a float32 t [R, d], and their scales [R]."""
    largest = t.abs().amax(1).clamp_min(SMALLEST.value)
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 15)
    t = torch.nn.functional.pad(t / scale[:, None], (0, padded(t.shape[1]) - t.shape[1]))
    first = t.half()
    return torch.stack([first, (t - first.float()).half()]), scale


@triton.jit
def split_halves(t):
    """The halves of a float32 block of numbers below 2^15."""
    first = t.to(tl.float16)
    return first, (t - first.to(tl.float32)).to(tl.float16)


@triton.jit
def scale_of(largest):
    """(scale, 1/scale) of numbers of which the largest, in size, is given."""
    largest = tl.maximum(largest, SMALLEST)
    exponent = largest.to(tl.int32, bitcast=True) & 0x7F800000
    power = exponent.to(tl.float32, bitcast=True)  # the largest power of two in it
    return power * 2.0**-14, 2.0**14 / power
