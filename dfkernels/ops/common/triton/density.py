# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""Weights of the atoms without moments: for log_prob, for averages of other values, for draws.

Where d is small and queries are many, one kernel computes the logits and adds up exp(logit); else
they come from logits.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..about_mean import log_norm
from . import launch
from .device import device_of
from .functions import LOG2E, any_true, index_along, load_atoms, valid_atoms
from .logits import by_differences, compute_logits
from .problem import Problem

SMALL_D = 16


@triton.jit
def density_kernel(
    x,  # [B, d]
    y,  # [N, d], rows y_stride apart; the atoms are scale * y + offset
    alpha,  # [B]
    sigma,  # [B]
    log_pi,  # [N], or None
    logits,  # [B, N], base 2: read if GIVEN; else written, or None
    max_logit,  # out [splits, B]
    weight_sum,  # out [splits, B]: sum of 2^(logit - max_logit)
    N,
    d,
    y_stride,
    B,
    span,  # atoms of a split
    scale,
    offset,
    GIVEN: tl.constexpr,
    PRIOR: tl.constexpr,
    AFFINE: tl.constexpr,
    D: tl.constexpr,
    ATOMS: tl.constexpr,
    QUERIES: tl.constexpr,
    COORD_AXIS: tl.constexpr,
):
    """One program has QUERIES queries and one split of the atoms. Every place in its tile has a sum
    of its own, which are added up at the end."""
    T = x.dtype.element_ty
    blocks = tl.cdiv(B, QUERIES)
    split = (tl.program_id(0) // blocks).to(tl.int64)
    i_block = (tl.program_id(0) % blocks).to(tl.int64)
    i_query = i_block * QUERIES + index_along(QUERIES, 2 - COORD_AXIS)
    active = i_query < B
    i = index_along(ATOMS, 1)
    begin = split * span
    tiles = tl.cdiv(tl.minimum(span, N - begin).to(tl.int32), ATOMS)
    if not GIVEN:
        k = index_along(D, COORD_AXIS)
        b_x = tl.load(x + i_query * d + k, mask=active & (k < d), other=0.0)
        b_alpha = tl.load(alpha + i_query, mask=active, other=0.0)
        b_sigma = tl.load(sigma + i_query, mask=active, other=1.0)
        factor = -0.5 * LOG2E / (b_sigma * b_sigma)
    total = tl.zeros_like(i_query + i).to(T)
    largest = total - float("inf")
    for tile in range(tiles):
        start = begin + tile * ATOMS
        exists = (i < N - start) & active
        i_pair = i_query * N + start + i
        if GIVEN:
            logit = tl.load(logits + i_pair, mask=exists, other=-float("inf"))
        else:
            valid = valid_atoms(log_pi, start, i, N, PRIOR)
            b_y = load_atoms(y, start, i, k, valid, y_stride, d, scale, offset, T, AFFINE)
            u = b_x - b_alpha * b_y
            logit = factor * tl.sum(u * u, COORD_AXIS, keep_dims=True)
            if any_true(~(logit > -float("inf"))):  # an outlier keeps -inf; what is no number, NaN
                logit += tl.sum(0.0 * b_x + 0.0 * b_y, COORD_AXIS, keep_dims=True)
            if PRIOR:
                logit += LOG2E * tl.load(log_pi + start + i, mask=exists, other=0.0)
            logit = tl.where(exists, logit, -float("inf"))
            if logits is not None:
                tl.store(logits + i_pair, logit, mask=exists)
        new = tl.maximum(largest, logit)
        safe = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp2(largest - safe) + tl.exp2(logit - safe)
        largest = new
    new = tl.max(largest, 1, keep_dims=True)
    safe = tl.where(new == -float("inf"), 0.0, new)
    total = tl.sum(total * tl.exp2(largest - safe), 1, keep_dims=True)
    tl.store(max_logit + split * B + i_query, new, mask=active)
    tl.store(weight_sum + split * B + i_query, total, mask=active)


class Density(NamedTuple):
    """What all atoms weigh together, and each of them."""

    log_sum: Tensor  # [B], double: log sum_i pi_i exp(-|u_i|^2/2)
    max_logit: Tensor  # [B], base 2
    logits: Tensor | None  # [B, N], base 2, less what all atoms share; below max_logit - gap only
    # upper bounds


def density_sizes(B: int, d: int, itemsize: int, given: bool) -> dict[str, int]:
    """The tile of `density_kernel`: a query per thread, or, where logits are given, a row of
    them."""
    if given:
        return {"D": 1, "ATOMS": 1024, "QUERIES": 1, "COORD_AXIS": 2}
    D = triton.next_power_of_2(d)
    return {"D": D, "ATOMS": max(2, min(16, 32 // D)), "QUERIES": 128, "COORD_AXIS": 0}


def is_fused(B: int, d: int, itemsize: int) -> bool:
    """Whether one kernel computes logits and adds up their exponentials."""
    return triton.next_power_of_2(d) * itemsize**2 <= 256 and B >= 64


def scratch(x: Tensor, N: int, keep: bool) -> int:
    """Numbers of scratch memory for each query."""
    fused = is_fused(*x.shape, x.element_size())
    return 64 + (0 if fused and not keep else 2 * N)


def density(p: Problem, *, keep: bool) -> Density:
    """keep: whether the logits will be read."""
    (B, d), N = p.x.shape, p.y.shape[0]
    fused = is_fused(B, d, p.x.element_size())
    if fused:
        logits, common = p.x.new_empty(B, N) if keep else None, 0.0
    elif d <= SMALL_D:
        logits, common = by_differences(p), p.queries.common
    else:
        found = compute_logits(p)
        logits, common = found.value, found.common
    sizes = density_sizes(B, d, p.x.element_size(), not fused)
    blocks = triton.cdiv(B, sizes["QUERIES"])
    span, splits = launch.spans(N, blocks, sizes["ATOMS"], device_of(p.x))
    max_logit, weight_sum = p.x.new_empty(splits, B), p.x.new_empty(splits, B)
    density_kernel[(blocks * splits,)](
        **p.atom_arguments,
        x=p.x,
        alpha=p.alpha,
        sigma=p.sigma,
        logits=logits,
        max_logit=max_logit,
        weight_sum=weight_sum,
        B=B,
        span=span,
        GIVEN=not fused,
        **sizes,
        num_warps=4,
    )
    largest = max_logit.amax(0)
    total = (torch.exp2((max_logit - largest).double()) * weight_sum).sum(0)
    log_sum = math.log(2) * largest.double() + torch.log(total) + common
    if p.log_pi is None:
        log_sum = log_sum - math.log(N)
    return Density(log_sum, largest, logits if keep else None)


def weights(p: Problem, found: Density) -> Tensor:
    """2^(logit - max_logit) [B, N] in place of the logits, 0 for a negligible atom."""
    e = found.logits.sub_(found.max_logit[:, None])
    negligible = e < -p.gap
    return e.exp2_().masked_fill_(negligible, 0)


def log_density(p: Problem, log_sum: Tensor) -> Tensor:
    """log_prob [B] in the compute dtype."""
    return (log_sum - log_norm(p.sigma.double(), p.x.shape[1])).to(p.x.dtype)
