# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""Device functions that several kernels of the data-set ops call."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def index_along(n: tl.constexpr, axis: tl.constexpr):
    """0 .. n - 1 along one of three axes."""
    i = tl.arange(0, n)
    if axis == 0:  # one return alone: Triton would compare the types of several
        i = i[:, None, None]
    elif axis == 1:
        i = i[None, :, None]
    else:
        i = i[None, None, :]
    return i


@triton.jit
def any_true(condition):
    """Whether the condition holds anywhere in the block."""
    return tl.max(condition.to(tl.int32)) > 0


@triton.jit
def add_compensated(total, lost, more):
    """(total + more, lost + what the rounding of that addition lost): Knuth's two-sum."""
    new = total + more
    back = new - total
    return new, lost + ((total - (new - back)) + (more - back))


@triton.jit
def exponential(t):
    """e^t. In float32 the whole part of t in base 2 is taken off first, exactly enough: tl.exp
    would round t log2(e), and so cost 2^-24 |t| of the result."""
    if t.dtype == tl.float64:
        out = tl.exp(t)
    else:
        inside = tl.where(t < -100, -100.0, t)  # also -inf, of which nothing can be taken off
        whole = tl.floor(inside * LOG2E + 0.5)
        rest = (inside - whole * 0.693359375) + whole * 2.1219444e-4  # 9 bits of ln 2, then others
        out = tl.where(t < -100, 0.0, tl.exp2(whole) * tl.exp2(rest * LOG2E))
    return out


@triton.jit
def valid_atoms(log_pi, start, i, N, PRIOR: tl.constexpr):
    """Which of the atoms start + i exist and are not masked; a masked atom may hold NaN."""
    valid = i < N - start
    if PRIOR:  # a log_pi that is NaN counts as valid, so that it shows in the result
        b_log_pi = tl.load(log_pi + start + i, mask=valid, other=-float("inf"))
        valid = valid & (b_log_pi != -float("inf"))
    return valid


@triton.jit
def load_atoms(
    y, start, i, k, valid, y_stride, d, scale, offset, T: tl.constexpr, AFFINE: tl.constexpr
):
    """Coordinates k of the atoms start + i in dtype T; zero beyond d and where not `valid`."""
    mask = valid & (k < d)
    b_y = tl.load(y + start * y_stride + (i * y_stride + k), mask=mask, other=0.0).to(T)
    if AFFINE:
        b_y = tl.where(mask, b_y * scale + offset, 0.0)
    return b_y


@triton.jit
def list_of(first, i_target, vectors_per_query):
    """Of the list of a target's query: how many atoms it has; where they begin among those of all
    lists; and where what belongs to the target and to these atoms does, target after target."""
    p_first = first + i_target // vectors_per_query
    begin = tl.load(p_first)
    count = tl.load(p_first + 1) - begin
    return count, begin, begin * vectors_per_query + i_target % vectors_per_query * count


@triton.jit
def listed_rows(atoms, i_pair, start, i, exists, N):
    """The rows start + i of y that stand at places start + i of the list which begins at i_pair; N
    where none `exists`. Without lists they are the same."""
    if atoms is not None:
        i = tl.load(atoms + i_pair + start + i, mask=exists, other=N)
        start = tl.zeros((), tl.int64)
    return start, i
