"""DF-TM's trace on the GPU: every input is read once.

residual: d (1 - m) / sigma^2
paper:    (d - (d m alpha^2 - |x - sigma eps|^2) / sigma^2) / sigma^2

A program sums the squares of whole rows; few and long rows are cut into pieces, which a second
launch adds up, always in the same order, or, where Triton can reduce over a cluster of CTAs, are
shared by one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common.triton import device as gpu


@triton.jit
def _trace(
    m, alpha, sigma, b, real, square, d, alpha_step, sigma_step, m_step, PAPER: tl.constexpr
):
    """Of samples b, in float64, as there are few."""
    value = tl.load(m + b * m_step, mask=real, other=0.0).to(tl.float64)
    s = tl.load(sigma + b * sigma_step, mask=real, other=1.0).to(tl.float64)
    if PAPER:
        a = tl.load(alpha + b * alpha_step, mask=real, other=0.0).to(tl.float64)
        inside = d - (d * value * a * a - square.to(tl.float64)) / (s * s)
    else:
        inside = d * (1.0 - value)
    return inside / (s * s)


@triton.jit
def _squares(
    m,  # [B], m_step apart, and so on
    eps,  # [B, d]
    x,  # [B, d]
    alpha,
    sigma,
    out,  # [B], or the sums of the pieces, [B, pieces]
    B,
    d,
    pieces,  # of a row
    length,  # of a piece, a multiple of BLOCK
    alpha_step,
    sigma_step,
    m_step,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # one piece
):
    """sum_i (x_i - sigma eps_i)^2, and with one piece the trace."""
    program = tl.program_id(0)
    piece = program % pieces
    b = (program // pieces).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = b < B
    s = tl.load(sigma + b * sigma_step, mask=real, other=1.0)[:, None]
    total = tl.zeros([ROWS, BLOCK], dtype=s.dtype)
    first = piece * length
    for start in range(first, tl.minimum(first + length, d), BLOCK):
        i = start + tl.arange(0, BLOCK)
        live = real[:, None] & (i < d)[None, :]
        here = b[:, None] * d + i[None, :]
        r = tl.load(x + here, mask=live, other=0.0) - s * tl.load(eps + here, mask=live, other=0.0)
        total += r * r
    square = gpu.row_sums(total)
    if WHOLE:
        value = _trace(m, alpha, sigma, b, real, square, d, alpha_step, sigma_step, m_step, True)
        tl.store(out + b, value, mask=real)
    else:
        tl.store(out + b * pieces + piece, square, mask=real)


@triton.jit
def _finish(
    m,
    squares,  # [B, pieces]; none in the residual form
    alpha,
    sigma,
    out,  # [B]
    B,
    d,
    pieces,
    alpha_step,
    sigma_step,
    m_step,
    PAPER: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,  # at least pieces
):
    """The trace from the sums of the pieces, or from m alone."""
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = b < B
    square = b.to(tl.float32)
    if PAPER:
        j = tl.arange(0, PADDED)
        kept = real[:, None] & (j < pieces)[None, :]
        square = tl.sum(
            tl.load(squares + b[:, None] * pieces + j[None, :], mask=kept, other=0.0), 1
        )
    value = _trace(m, alpha, sigma, b, real, square, d, alpha_step, sigma_step, m_step, PAPER)
    tl.store(out + b, value, mask=real)


class Plan(NamedTuple):
    rows: int  # per program
    block: int  # numbers of a row that a program reads together
    pieces: int  # per row; more than one: a second launch adds them up
    length: int  # of a piece
    warps: int
    ctas: int  # in a cluster, for one program


def plan(B: int, d: int, itemsize: int, device: gpu.Device, clusters: bool) -> Plan:
    """Enough programs to fill the device; a thread reads 16 words of x and of eps together."""
    room = 4096 * 4 // itemsize  # numbers of each for 256 threads
    enough = 4 * device.multiprocessors
    block, rows, pieces, ctas = min(room, triton.next_power_of_2(d)), 1, 1, 1
    if block < room // 2:
        rows = min(room // 2 // block, triton.next_power_of_2(triton.cdiv(B, enough)))
    elif device.multiprocessors > B and 2 * room <= d:
        if clusters and device.cc >= 90 and device.multiprocessors <= 8 * B:
            ctas = min(8, triton.next_power_of_2(d) // room)
            block *= ctas
        else:
            pieces = min(triton.cdiv(d, room), triton.cdiv(enough, B))
    length = triton.cdiv(triton.cdiv(d, pieces), block) * block
    warps = max(1, min(8, (8 if rows == 1 else 32) * rows * block // ctas // room))
    return Plan(rows, block, triton.cdiv(d, length), length, warps, ctas)


def launch(m, eps, x, alpha, sigma, form):
    """As the op: m [B], eps and x [B, d], alpha and sigma [B] -> [B]."""
    B, d = eps.shape
    gpu.expect(eps, m=(m, (B,)), alpha=(alpha, (B,)), sigma=(sigma, (B,)))
    out = m.new_empty(B)
    if B == 0:
        return out
    steps = alpha.stride(0), sigma.stride(0), m.stride(0)
    with torch.cuda.device_of(m):
        squares, pieces = m, 1
        if form == "paper":
            gpu.expect(eps, x=(x, (B, d)))
            p = plan(B, d, eps.element_size(), gpu.device_of(eps), gpu.CLUSTERS)
            pieces = p.pieces
            squares = out if pieces == 1 else m.new_empty(B * pieces)
            _squares[(triton.cdiv(B, p.rows) * pieces,)](
                *(
                    m,
                    eps.contiguous(),
                    x.contiguous(),
                    alpha,
                    sigma,
                    squares,
                    B,
                    d,
                    pieces,
                    p.length,
                    *steps,
                ),
                ROWS=p.rows,
                BLOCK=p.block,
                WHOLE=pieces == 1,
                num_warps=p.warps,
                num_ctas=p.ctas,
            )
        if form != "paper" or pieces > 1:
            rows = 256 if pieces == 1 else 4
            _finish[(triton.cdiv(B, rows),)](
                *(m, squares, alpha, sigma, out, B, d, pieces, *steps),
                PAPER=form == "paper",
                ROWS=rows,
                PADDED=triton.next_power_of_2(pieces),
            )
    return out
