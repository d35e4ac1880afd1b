# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""Numbers as exact sums of bfloat16 parts, so that tensor cores multiply them to float32 accuracy.

A bfloat16 has 8 significant bits, a float32 has 24: three parts hold a float32 exactly, two a
float16, one a bfloat16 or a whole number up to 256. The product of two parts is exact in float32.
Of the nine products of three parts with three, the six with j + p < 3 are taken; the others are
below 2^-23 of the product of the two numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PARTS = {  # storage dtype: parts that hold its numbers exactly
    torch.float32: 3,
    torch.float16: 2,
    torch.bfloat16: 1,
    torch.uint8: 1,
}


def split(t: Tensor, parts: int = 3) -> Tensor:
    """The bfloat16 parts of t [...], largest first: [parts, ...], whose sum is t."""
    out = t.new_empty(parts, *t.shape, dtype=torch.bfloat16)
    for part in out:
        part.copy_(t)
        t = t - part.to(t.dtype)
    return out


@triton.jit
def split_parts(t):
    """The three bfloat16 parts of a float32 block, largest first."""
    first = t.to(tl.bfloat16)
    rest = t - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)
