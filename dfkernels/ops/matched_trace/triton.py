# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
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
def trace_of(
    m, alpha, sigma, b, exists, square, d, alpha_stride, sigma_stride, m_stride, PAPER: tl.constexpr
):
    """(d - (d m alpha^2 - square)/sigma^2)/sigma^2, or d (1 - m)/sigma^2, of samples b in
    float64."""
    b_m = tl.load(m + b * m_stride, mask=exists, other=0.0).to(tl.float64)
    b_sigma = tl.load(sigma + b * sigma_stride, mask=exists, other=1.0).to(tl.float64)
    if PAPER:
        b_alpha = tl.load(alpha + b * alpha_stride, mask=exists, other=0.0).to(tl.float64)
        moment = d * b_m * b_alpha * b_alpha
        inside = d - (moment - square.to(tl.float64)) / (b_sigma * b_sigma)
    else:
        inside = d * (1.0 - b_m)
    return inside / (b_sigma * b_sigma)


@triton.jit
def squares_kernel(
    m,  # [B], m_stride apart; alpha and sigma likewise
    eps,  # [B, d]
    x,  # [B, d]
    alpha,
    sigma,
    out,  # [B]: the trace; with several pieces their sums, [B, pieces]
    B,
    d,
    pieces,  # of a row
    length,  # of a piece, a multiple of BLOCK
    alpha_stride,
    sigma_stride,
    m_stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,  # one piece
):
    """sum_i (x_i - sigma eps_i)^2 over a piece of a row; WHOLE: the trace made of it."""
    program = tl.program_id(0)
    piece = program % pieces
    b = (program // pieces).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = b < B
    b_sigma = tl.load(sigma + b * sigma_stride, mask=exists, other=1.0)[:, None]
    total = tl.zeros([ROWS, BLOCK], dtype=b_sigma.dtype)
    first = piece * length
    for start in range(first, tl.minimum(first + length, d), BLOCK):
        i = start + tl.arange(0, BLOCK)
        mask = exists[:, None] & (i < d)[None, :]
        i_sample = b[:, None] * d + i[None, :]
        b_x = tl.load(x + i_sample, mask=mask, other=0.0)
        r = b_x - b_sigma * tl.load(eps + i_sample, mask=mask, other=0.0)
        total += r * r
    square = gpu.row_sums(total)
    if WHOLE:
        value = trace_of(
            m, alpha, sigma, b, exists, square, d, alpha_stride, sigma_stride, m_stride, True
        )
        tl.store(out + b, value, mask=exists)
    else:
        tl.store(out + b * pieces + piece, square, mask=exists)


@triton.jit
def finish_kernel(
    m,
    squares,  # [B, pieces], or None in the residual form
    alpha,
    sigma,
    out,  # [B]
    B,
    d,
    pieces,
    alpha_stride,
    sigma_stride,
    m_stride,
    PAPER: tl.constexpr,
    ROWS: tl.constexpr,
    PADDED: tl.constexpr,  # at least pieces
):
    """d (1 - m)/sigma^2, or PAPER: the trace from m and the sums of the pieces."""
    b = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = b < B
    square = b.to(tl.float32)
    if PAPER:
        j = tl.arange(0, PADDED)
        mask = exists[:, None] & (j < pieces)[None, :]
        p_square = squares + b[:, None] * pieces + j[None, :]
        square = tl.sum(tl.load(p_square, mask=mask, other=0.0), 1)
    value = trace_of(
        m, alpha, sigma, b, exists, square, d, alpha_stride, sigma_stride, m_stride, PAPER
    )
    tl.store(out + b, value, mask=exists)


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
    """The op for tensors on one GPU: m [B], eps and x [B, d], alpha and sigma [B] -> [B]."""
    B, d = eps.shape
    gpu.expect(eps, m=(m, (B,)), alpha=(alpha, (B,)), sigma=(sigma, (B,)))
    out = m.new_empty(B)
    if B == 0:
        return out
    levels = {
        "m": m,
        "alpha": alpha,
        "sigma": sigma,
        "alpha_stride": alpha.stride(0),
        "sigma_stride": sigma.stride(0),
        "m_stride": m.stride(0),
        "B": B,
        "d": d,
    }
    with torch.cuda.device_of(m):
        squares, pieces = None, 1
        if form == "paper":
            gpu.expect(eps, x=(x, (B, d)))
            p = plan(B, d, eps.element_size(), gpu.device_of(eps), gpu.CLUSTERS)
            pieces = p.pieces
            squares = out if pieces == 1 else m.new_empty(B * pieces)
            squares_kernel[(triton.cdiv(B, p.rows) * pieces,)](
                **levels,
                eps=eps.contiguous(),
                x=x.contiguous(),
                out=squares,
                pieces=pieces,
                length=p.length,
                ROWS=p.rows,
                BLOCK=p.block,
                WHOLE=pieces == 1,
                num_warps=p.warps,
                num_ctas=p.ctas,
            )
        if form != "paper" or pieces > 1:
            rows = 256 if pieces == 1 else 4
            finish_kernel[(triton.cdiv(B, rows),)](
                **levels,
                squares=squares,
                out=out,
                pieces=pieces,
                PAPER=form == "paper",
                ROWS=rows,
                PADDED=triton.next_power_of_2(pieces),
            )
    return out
