# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""draw on CUDA: the scores of all blocks from the logits of a pass, then the atom of the block that
comes first, by exact differences. The noise is that of gumbel.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._constants import DRAW_BLOCK
from ..common.triton.density import density, scratch
from ..common.triton.device import device_of
from ..common.triton.functions import any_true, load_atoms, valid_atoms
from ..common.triton.launch import even_splits, in_query_groups
from ..common.triton.problem import Problem

BLOCKS = 16  # blocks of atoms of a tile


@triton.jit
def gumbel_noise(seed, query, number, stage: tl.constexpr):
    """-log(-log((word + 1/2) 2^-32)) in double, for int64 numbers of blocks or atoms."""
    zero = (number * 0).to(tl.uint32)
    group = (number // 4).to(tl.uint32)
    low, high = zero + query.to(tl.uint32), zero + (query >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, group, low, high, zero + stage)
    place = number % 4
    word = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
    return -tl.log(-tl.log((word.to(tl.float64) + 0.5) * 2.3283064365386963e-10))


@triton.jit
def first_of(score, number):
    """The largest score, and the smallest number that has it."""
    best = tl.max(score)
    return best, tl.min(tl.where(score == best, number, 0x7FFFFFFFFFFFFFFF))


@triton.jit
def draw_block_kernel(
    logits,  # [B, N], base 2
    max_logit,  # [B]
    queries,  # [B], int64: their numbers
    scores,  # out [B, splits], double: the best
    blocks,  # out [B, splits], int64: its block
    N,
    seed,
    splits,
    span,  # blocks of a split
    gap,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """log(sum of a block's weights) + noise: one program has one query and one split."""
    b = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
    query, b_max_logit = tl.load(queries + b), tl.load(max_logit + b)
    number = split * span + tl.arange(0, BLOCKS)
    i = tl.arange(0, BLOCK)[None, :]
    end = tl.minimum((split + 1) * span, tl.cdiv(N, BLOCK))
    best = tl.full((BLOCKS,), -float("inf"), tl.float64)
    best_number = number
    for _ in range(tl.cdiv(end - split * span, BLOCKS)):
        mask = (i < N - number[:, None] * BLOCK) & (number < end)[:, None]
        p_logit = logits + b * N + number[:, None] * BLOCK + i
        logit = tl.load(p_logit, mask=mask, other=-float("inf")) - b_max_logit
        total = tl.sum(tl.where(logit < -gap, 0.0, tl.exp2(logit)), 1)
        if any_true(total > 0):
            score = tl.log(total.to(tl.float64)) + gumbel_noise(seed, query, number, 0)
            better = (score > best) & (total > 0)
            best = tl.where(better, score, best)
            best_number = tl.where(better, number, best_number)
        number += BLOCKS
    best, first = first_of(best, best_number)
    tl.store(scores + b * splits + split, best)
    tl.store(blocks + b * splits + split, first)


@triton.jit
def draw_atom_kernel(
    x,  # [B, d]
    y,  # [N, d], rows y_stride apart; the atoms are scale * y + offset
    alpha,  # [B]
    sigma,  # [B]
    log_pi,  # [N], or None
    queries,  # [B], int64
    blocks,  # [B], int64: the block that came first
    out,  # out [B], int64: the row that comes first in it
    N,
    d,
    y_stride,
    seed,
    scale,
    offset,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """logit + noise, with logits by differences that are added up in double: one query."""
    T = x.dtype.element_ty
    b = tl.program_id(0).to(tl.int64)
    start = tl.load(blocks + b) * BLOCK
    i = tl.arange(0, BLOCK)[:, None]
    valid = valid_atoms(log_pi, start, i, N, PRIOR)
    b_alpha, b_sigma = tl.load(alpha + b), tl.load(sigma + b).to(tl.float64)
    total = tl.zeros((BLOCK, D), T)
    for c in range(tl.cdiv(d, D)):
        k = c * D + tl.arange(0, D)[None, :]
        b_y = load_atoms(y, start, i, k, valid, y_stride, d, scale, offset, T, AFFINE)
        u = tl.load(x + b * d + k, mask=k < d, other=0.0) - b_alpha * b_y
        total += u * u
    score = -0.5 * tl.sum(total.to(tl.float64), 1) / (b_sigma * b_sigma)
    row = start + tl.arange(0, BLOCK)
    if PRIOR:
        score += tl.load(log_pi + row, mask=row < N, other=0.0).to(tl.float64)
    score += gumbel_noise(seed, tl.load(queries + b), row, 1)
    score = tl.where(row < N, score, -float("inf"))
    _, first = first_of(score, row)
    tl.store(out + b, tl.minimum(first, N - 1))  # where no number is the largest, all are NaN


def _launch(p: Problem, seed: int, queries: Tensor) -> Tensor:
    (B, d), N = p.x.shape, p.y.shape[0]
    found = density(p, keep=True)
    number = triton.cdiv(N, DRAW_BLOCK)
    splits = min(triton.cdiv(4 * device_of(p.x).multiprocessors, B), triton.cdiv(number, BLOCKS))
    span, splits = even_splits(number, splits, BLOCKS)
    scores = p.x.new_empty(B, splits, dtype=torch.float64)
    blocks = queries.new_empty(B, splits)
    draw_block_kernel[(B * splits,)](
        logits=found.logits,
        max_logit=found.max_logit,
        queries=queries,
        scores=scores,
        blocks=blocks,
        N=N,
        seed=seed,
        splits=splits,
        span=span,
        gap=p.gap,
        BLOCK=DRAW_BLOCK,
        BLOCKS=BLOCKS,
        num_warps=4,
    )
    first = blocks.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    out = torch.empty_like(first)
    draw_atom_kernel[(B,)](
        **p.atom_arguments,
        x=p.x,
        alpha=p.alpha,
        sigma=p.sigma,
        queries=queries,
        blocks=first,
        out=out,
        seed=seed,
        BLOCK=DRAW_BLOCK,
        D=max(16, min(64, triton.next_power_of_2(d))),
        num_warps=4,
    )
    return out


def launch(x, y, alpha, sigma, log_prior, scale, offset, seed, queries, total):
    """The op without lists for flat tensors on one GPU."""
    if x.shape[0] == 0:
        return x.new_empty(0, dtype=torch.int64)
    given = (x, y, None, alpha, sigma, log_prior, scale, offset)
    begin = 0

    def some(p: Problem) -> Tensor:
        nonlocal begin
        end = begin + len(p.x)
        begin, part = end, queries[begin:end].contiguous()
        return _launch(p, seed, part)

    return in_query_groups(some, *given, scratch=scratch(x, y.shape[0], keep=True))
