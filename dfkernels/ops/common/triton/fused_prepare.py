# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""The kernels that prepare atoms and queries for one pass over the atoms (fused.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from .functions import LOG2E, load_atoms, valid_atoms
from .parts import split_parts


@triton.jit
def store_parts(parts, t, row, k, rows, D: tl.constexpr, PARTS: tl.constexpr):
    """Writes the first part, or where PARTS > 1 all three, of t [rows, D] to parts [*, rows, D]."""
    high, middle, low = split_parts(t)
    count = tl.full((), rows, tl.int64) * D
    out = parts + row.to(tl.int64) * D + k
    tl.store(out, high, mask=row < rows)
    if PARTS > 1:
        tl.store(out + count, middle, mask=row < rows)
        tl.store(out + 2 * count, low, mask=row < rows)


@triton.jit
def prepare_atoms_kernel(
    y,  # [N, d], rows y_stride apart; the atoms are scale * y + offset
    log_pi,  # [N], or None
    centre,  # [d]
    parts,  # out [PARTS, rows, D] bfloat16: of t = y - centre, 0 where there is no atom; the last
    # three of six of t * t
    whole,  # out [rows, W]: t, or None
    weights,  # out [rows, 2]: |t|^2, and log2 pi, -inf where there is no atom
    rows,  # N, made a multiple of what a program of the pass takes
    N,
    d,
    y_stride,
    scale,
    offset,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    PARTS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program has ROWS atoms. A masked atom, which may hold NaN, becomes 0."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    i = tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, D)[None, :]
    valid = valid_atoms(log_pi, start, i, N, PRIOR)
    t = load_atoms(y, start, i, k, valid, y_stride, d, scale, offset, tl.float32, AFFINE)
    t = tl.where(valid, t - tl.load(centre + k, mask=k < d, other=0.0), 0.0)
    square = t * t
    store_parts(parts, t, start + i, k, rows, D, PARTS)
    if PARTS == 6:
        store_parts(parts + 3 * tl.full((), rows, tl.int64) * D, square, start + i, k, rows, D, 3)
    if whole is not None:
        tl.store(whole + (start + i) * W + k, t, mask=(start + i < rows) & (k < W))
    bias = tl.where(valid, 0.0, -float("inf"))
    if PRIOR:
        bias = LOG2E * tl.load(log_pi + start + i, mask=i < N - start, other=-float("inf"))
    p_weights = weights + 2 * (start + i)
    tl.store(p_weights, tl.sum(square, 1, keep_dims=True), mask=start + i < rows)
    tl.store(p_weights + 1, bias, mask=start + i < rows)


@triton.jit
def prepare_rows_kernel(
    x,  # [rows, d]
    factor,  # [rows], or None
    parts,  # out [PARTS, rows, D] bfloat16: of factor x
    whole,  # out [rows, W]: factor x, or None
    rows,
    d,
    PARTS: tl.constexpr,
    W: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program has ROWS queries, or vectors."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, D)[None, :]
    t = tl.load(x + row * d + k, mask=(row < rows) & (k < d), other=0.0)
    if factor is not None:
        t = (t * tl.load(factor + row, mask=row < rows, other=0.0)).to(tl.float32)
    store_parts(parts, t, row, k, rows, D, PARTS)
    if whole is not None:
        tl.store(whole + row * W + k, t, mask=(row < rows) & (k < W))
