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
    if axis == 1:
        return i[None, :, None]
    return i[None, None, :]


@triton.jit
def add_exactly(sum, lost, more):
    """(sum + more, lost + what its rounding lost)."""
    new = sum + more
    back = new - sum
    return new, lost + ((sum - (new - back)) + (more - back))


@triton.jit
def real_atoms(log_pi, start, i, N, PRIOR: tl.constexpr):
    """Which of atoms start + i are there and have weight: a masked atom may hold anything, NaN
    included."""
    real = i < N - start
    if PRIOR:  # a log_pi that is NaN is kept, and shows
        real = real & (tl.load(log_pi + start + i, mask=real, other=-float("inf")) != -float("inf"))
    return real


@triton.jit
def load_atoms(y, start, i, k, real, ldy, d, scale, offset, T: tl.constexpr, AFFINE: tl.constexpr):
    """Atoms start + i at coordinates k, zero beyond d and where not `real`, as `real_atoms`
    says."""
    cell = real & (k < d)
    at = tl.load(y + start * ldy + (i * ldy + k), mask=cell, other=0.0).to(T)
    if AFFINE:
        at = tl.where(cell, at * scale + offset, 0.0)
    return at
