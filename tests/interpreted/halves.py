"""Numbers as two float16 halves with a scale, on the host and in kernels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensor_cores
import torch
import triton
import triton.language as tl

from dfkernels.ops.common.triton import products
from dfkernels.ops.common.triton.halves import halves, scale_of, split_halves


@triton.jit
def split_kernel(t, out, scale, N: tl.constexpr):
    i = tl.arange(0, N)
    b_t = tl.load(t + i)
    unit, inverse = scale_of(tl.max(tl.abs(b_t)))
    first, second = split_halves(b_t * inverse)
    tl.store(out + i, first)
    tl.store(out + N + i, second)
    tl.store(scale, unit)


@pytest.mark.parametrize("size", [1e-28, 3e-5, 1.0, 2.0**15, 1e30])
def test_two_halves_are_a_float32_to_its_last_bits(size):
    """To 2^-22 of each number, and 2^-39 of the largest where that is more; no scale but a power of
    two changes anything."""
    t = torch.randn(1, 1024, generator=torch.Generator().manual_seed(5))
    t[0, :512] *= 10 ** torch.linspace(-12, 0, 512)
    t[0, :3] = torch.tensor([0.0, 1 - 2.0**-24, -(2.0**-30)])
    t *= size
    parts, scale = halves(t)
    inside, unit = torch.empty(2, 1024, dtype=torch.float16), torch.empty(1)
    split_kernel[(1,)](t, inside, unit, N=1024)
    assert torch.equal(inside, parts[:, 0]) and torch.equal(unit, scale)
    assert float(scale.log2() % 1) == 0 and 2**14 <= float((t / scale).abs().max()) < 2**15
    error = (scale.double() * parts.double().sum(0) - t.double()).abs()
    allowed = torch.maximum(2.0**-22 * t.double().abs(), 2.0**-39 * t.double().abs().max())
    assert bool((error <= allowed).all())
    assert float((error / allowed).max()) >= 0.4


def test_rows_of_zeros_and_of_what_is_not_finite():
    parts, scale = halves(torch.tensor([[0.0, 0.0], [math.inf, 1.0], [math.nan, 1.0]]))
    assert parts.shape == (2, 3, 16)  # for loads of many numbers
    assert parts[:, 0].abs().sum() == 0 and float(scale[0]) == 2.0**-126
    assert not bool(parts[:, 1:, 0].sum(0).isfinite().any())


def test_a_sum_of_one_sign():
    """CHAINS tiles, whose products are truncated and which are added in float32: no more than 1e-6
    of the sum is lost, and 3e-7 on average, as docs/design-notes.md says."""
    n = 64 * products.CHAINS
    weights = 0.5 + torch.rand(1, n, generator=torch.Generator().manual_seed(1))
    atoms = 1 + torch.rand(n, 64, generator=torch.Generator().manual_seed(2))
    (first, second), scale = halves(weights)
    a, b, z = first.numpy(), second.numpy(), atoms.bfloat16().float()
    total = np.zeros((1, 64), np.float32)
    for i in range(0, n, 64):
        tile = z[i : i + 64].numpy()
        more = tensor_cores.product(a[:, i : i + 64], tile, np.zeros_like(total))
        total += scale.numpy() * tensor_cores.product(b[:, i : i + 64], tile, more)
    exact = weights.double() @ z.double()
    lost = (exact - torch.from_numpy(total)) / exact
    assert 1e-7 <= float(lost.abs().max()) <= 1e-6 and float(lost.mean()) <= 3e-7
