"""The interpreter, as conftest.py sets it up, computes what a GPU would."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensor_cores
import torch
import triton
import triton.language as tl


@triton.jit
def product_kernel(
    a, b, out, factor, N: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr
):
    """out = factor a @ b, the operands cut into bfloat16 parts where PARTS > 0."""
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    b_a, b_b = tl.load(a + i * N + j), tl.load(b + i * N + j)
    product = tl.zeros((N, N), tl.float32)
    if PARTS == 0:
        product = tl.dot(b_a, b_b, product, input_precision=PRECISION)
    for _ in tl.static_range(PARTS):
        part = b_a.to(tl.bfloat16)
        product = tl.dot(part, b_b.to(tl.bfloat16), product)
        b_a -= part.to(tl.float32)
    tl.store(out + i * N + j, factor * product)


def product(a, b, factor=1.0, parts=0, precision="ieee"):
    out = torch.empty_like(a, dtype=torch.float32)
    product_kernel[(1,)](a, b, out, factor, N=len(a), PARTS=parts, PRECISION=precision)
    return out


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(7)
    a, b = (torch.randn(64, 64, generator=generator) for _ in range(2))
    return a, b.bfloat16().float()


def test_a_float_argument_is_a_float32(operands):
    a, b = operands
    third = float(np.float32(1 / 3))
    assert torch.equal(product(a, b, 1 / 3), third * product(a, b))


@pytest.mark.parametrize("parts, least, most", [(1, 5e-4, 3e-3), (2, 1e-6, 1e-5), (3, 0, 1e-6)])
def test_parts_of_bfloat16(operands, parts, least, most):
    """Each part takes eight bits, rounded to nearest; three are a float32."""
    a, b = operands
    exact = a.double() @ b.double()
    error = float((product(a, b, parts=parts).double() - exact).norm() / exact.norm())
    assert least <= error <= most
    rest = a - a.bfloat16().float()
    third = (rest - rest.bfloat16().float()).bfloat16().float()
    assert torch.equal(a.bfloat16().float() + rest.bfloat16().float() + third, a)


def test_bfloat16_operands_are_no_bit_patterns(operands):
    a, b = (t.bfloat16() for t in operands)
    exact = a.double() @ b.double()
    assert float((product(a, b).double() - exact).abs().max()) <= 1e-6 * float(exact.abs().max())


@pytest.mark.parametrize(
    "precision, least, most", [("tf32", 1e-4, 1e-3), ("tf32x3", 0, 1e-6), ("ieee", 0, 1e-6)]
)
def test_precisions(operands, precision, least, most):
    a, b = operands
    b = b + 1e-3 * a
    exact = a.double() @ b.double()
    error = float((product(a, b, precision=precision).double() - exact).norm() / exact.norm())
    assert least <= error <= most


def test_rounding():
    """To nearest, ties to even; NaN and infinity stay what they are; towards zero is towards it."""
    t = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, math.inf, math.nan], np.float32)
    bits = tensor_cores.to_bits(t)
    want = [1, 1 + 2**-6, -1 - 2**-7, math.inf, math.nan]
    np.testing.assert_array_equal(tensor_cores.from_bits(bits), np.array(want, np.float32))
    as_torch = torch.from_numpy(t[:-1]).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(bits[:-1], as_torch)
    np.testing.assert_array_equal(
        tensor_cores.to_tf32(np.array([1 + 2**-11, 1 + 2**-12, -math.inf], np.float32)),
        np.array([1 + 2**-10, 1, -math.inf], np.float32),
    )
    cut = tensor_cores.towards_zero(np.array([1 + 2**-24 + 2**-25, -1 - 2**-23 - 2**-24]))
    assert cut.tolist() == [1, -1 - 2**-23]
