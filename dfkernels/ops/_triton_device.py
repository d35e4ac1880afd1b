"""Device functions that several kernels of the data-set ops call."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def along(n: tl.constexpr, axis: tl.constexpr):
    """0 .. n - 1 along one of three axes."""
    i = tl.arange(0, n)
    if axis == 0:
        return i[:, None, None]
    elif axis == 1:
        return i[None, :, None]
    else:
        return i[None, None, :]


@triton.jit
def add_exactly(sum, lost, more):
    """(sum + more, lost + what its rounding lost)."""
    new = sum + more
    back = new - sum
    return new, lost + ((sum - (new - back)) + (more - back))


@triton.jit
def load_atoms(y, start, i, k, ldy, N, d, scale, offset, T: tl.constexpr, AFFINE: tl.constexpr):
    """Atoms start + i at coordinates k, zero beyond N and d."""
    real = (i < N - start) & (k < d)
    at = tl.load(y + start * ldy + (i * ldy + k), mask=real, other=0.0).to(T)
    if AFFINE:
        at = tl.where(k < d, at * scale + offset, 0.0)
    return at
