"""Numbers as sums of bfloat16 parts, on the host and in kernels."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from dfkernels.ops.common.triton.parts import PARTS, split, split_parts


@triton.jit
def split_kernel(t, out, N: tl.constexpr):
    i = tl.arange(0, N)
    first, second, third = split_parts(tl.load(t + i))
    tl.store(out + i, first)
    tl.store(out + N + i, second)
    tl.store(out + 2 * N + i, third)


def numbers(n):
    """Of all magnitudes, some of whole powers and their neighbours."""
    generator = torch.Generator().manual_seed(5)
    t = torch.randn(n, generator=generator) * 10 ** torch.linspace(-30, 30, n)
    t[:4] = torch.tensor([0.0, -1.0, 1 + 2.0**-8, 1 - 2.0**-24])
    return t


def test_three_parts_are_a_float32():
    t = numbers(1024)
    inside = torch.empty(3, 1024, dtype=torch.bfloat16)
    split_kernel[(1,)](t, inside, N=1024)
    for parts in (split(t), inside):
        assert parts.dtype == torch.bfloat16
        assert torch.equal(parts.double().sum(0), t.double())
    assert bool((split(t)[1].abs() <= 2.0**-8 * t.abs()).all())


@pytest.mark.parametrize("dtype, parts", PARTS.items(), ids=str)
def test_so_many_parts_hold_the_numbers_of_a_dtype(dtype, parts):
    t = torch.arange(256.0) if dtype == torch.uint8 else numbers(1024).clamp(-6e4, 6e4)
    t = t.to(dtype).float()
    assert torch.equal(split(t, parts).double().sum(0), t.double())
    if parts > 1:
        assert not torch.equal(split(t, parts - 1).double().sum(0), t.double())


def test_of_any_shape():
    t = numbers(12).view(3, 4).mT
    assert split(t, 2).shape == (2, 4, 3)
    assert split(t.new_empty(0, 5)).shape == (3, 0, 5)
