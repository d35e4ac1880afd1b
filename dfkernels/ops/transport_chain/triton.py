# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""transport_chain on CUDA: all steps of a few chains in one launch.

A tensor is [rows, columns, chains], so that a thread holds columns of one chain and sums over rows
stay inside it. A step reads the atoms three times: for their largest logit; for the mean, with
tiles of atoms along the columns; for C about that mean, column by column. As in
csrc/simd/transport_chain.h, the chains run about a point among the atoms, and A is multiplied by
2^-e, which is exact.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._constants import CHAIN_MOST_D
from ..common.triton import device
from ..common.triton.functions import LOG2E, index_along
from .reference import coefficients

RUN = tl.constexpr(128)  # tiles, or atoms, that are added up in one chain of additions
COLUMNS = tl.constexpr(6)  # of `steps`


@triton.jit
def tile_logits(x, b_y, b_log_pi, alpha, half):
    """log2 pi - half |x - alpha y|^2 for x [D, 1, chains] and b_y [D, n, 1]: [1, n, chains]."""
    u = x - alpha * b_y
    return b_log_pi - half * tl.sum(u * u, 0, keep_dims=True)


@triton.jit
def load_tile(p_y, log_pi, tile, i, n, wide, N, d):
    """Atoms n of a tile: log2 pi, and coordinates i in as many columns and chains as `wide` has."""
    i_atom = tile * n.shape[1] + n.to(tl.int64)
    b_log_pi = tl.load(log_pi + i_atom, mask=i_atom < N, other=-float("inf"))
    return b_log_pi, tl.load(p_y + i_atom * d + wide, mask=(i_atom < N) & (i < d), other=0.0)


@triton.jit
def rescale(A, exponent):
    """(2^-e A, exponent + e), where A's largest entry is in [2^e, 2^(e+1))."""
    largest = tl.max(tl.max(tl.abs(A), 0, keep_dims=True), 1, keep_dims=True)
    if A.dtype == tl.float32:
        e = (largest.to(tl.int32, bitcast=True) >> 23) - 127
        scale = ((127 - e) << 23).to(tl.float32, bitcast=True)
    else:
        e = (largest.to(tl.int64, bitcast=True) >> 52) - 1023
        scale = ((1023 - e) << 52).to(tl.float64, bitcast=True)
    return A * scale, exponent + e


@triton.jit
def chains_kernel(
    x,  # [B, d], less alpha times the centre, and so is end
    y,  # [N, d], less the centre
    log_pi,  # [N], base 2, at most 0
    steps,  # [M, 6]: alpha, log2(e)/(2 sigma^2), keep, pull, identity, spread
    end,  # out [B, d]
    jacobian,  # out [B, d, d]
    log_norm,  # out [B]
    B,
    N,
    d,
    M,
    TRANSPOSED: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ATOMS: tl.constexpr,
    CHAINS: tl.constexpr,
):
    """x <- keep x + pull mean;  A <- identity A + spread C A, or TRANSPOSED: A + A^T (M - I)."""
    T = x.dtype.element_ty
    b = tl.program_id(0).to(tl.int64) * CHAINS + index_along(CHAINS, 2)
    # hides from Triton that rows are contiguous: it would spread them over threads
    one = tl.num_programs(1)
    i, j, n = index_along(D, 0), index_along(D, 1), index_along(ATOMS, 1)
    p_y = y + i * one
    wide = tl.zeros((1, WIDTH, CHAINS), tl.int32)
    b_x = tl.load(x + b * d + i * one + wide, mask=(b < B) & (i < d), other=0.0)
    A = tl.zeros((D, D, CHAINS), T) + ((i == j) & (i < d)).to(T)
    exponent = tl.zeros((1, 1, CHAINS), tl.int32 if tl.float32 == T else tl.int64)
    tiles = tl.cdiv(N, ATOMS)
    for step in range(M):
        p_step = steps + step * COLUMNS
        alpha, half = tl.load(p_step), tl.load(p_step + 1)

        max_logit = tl.full((1, ATOMS, CHAINS), -float("inf"), T)
        for tile in range(tiles):
            b_log_pi, b_y = load_tile(p_y, log_pi, tile, i, n, wide, N, d)
            max_logit = tl.maximum(max_logit, tile_logits(b_x, b_y, b_log_pi, alpha, half))
        max_logit = tl.max(max_logit, 1, keep_dims=True)

        weight_sum = tl.zeros((1, ATOMS, CHAINS), T)
        first_moment = tl.zeros((D, ATOMS, CHAINS), T)
        for begin in range(0, tiles, RUN):
            run_weight = tl.zeros_like(weight_sum)
            run_moment = tl.zeros_like(first_moment)
            for tile in range(begin, tl.minimum(begin + RUN, tiles)):
                b_log_pi, b_y = load_tile(p_y, log_pi, tile, i, n, wide, N, d)
                e = tl.exp2(tile_logits(b_x, b_y, b_log_pi, alpha, half) - max_logit)
                run_weight += e
                run_moment += e * b_y
            weight_sum += run_weight
            first_moment += run_moment
        weight_sum = tl.sum(weight_sum, 1, keep_dims=True)
        mean = tl.sum(first_moment, 1, keep_dims=True) / weight_sum

        mean_row = tl.sum(tl.where(i == j, mean, 0.0), 0, keep_dims=True)  # [1, D, chains]
        cov = tl.zeros_like(A)
        for begin in range(0, N, RUN):
            run_cov = tl.zeros_like(A)
            for atom in range(begin, tl.minimum(begin + RUN, N)):
                i_row = tl.full((), atom, tl.int64) * d
                column = tl.load(p_y + i_row + wide, mask=i < d, other=0.0)
                row = tl.load(y + i_row + j * one, mask=j < d, other=0.0)
                logit = tile_logits(b_x, column, tl.load(log_pi + atom), alpha, half)
                e = tl.exp2(logit - max_logit)
                run_cov += (e * (column - mean)) * (row - mean_row)
            cov += run_cov
        # symmetric to the bit, or A would rotate
        cov = (cov + tl.permute(cov, (1, 0, 2))) / (2 * weight_sum)

        b_x = tl.load(p_step + 2) * b_x + tl.load(p_step + 3) * mean
        product = tl.zeros_like(A)
        for k in range(d):
            column = tl.sum(tl.where(j == k, cov, 0.0), 1, keep_dims=True)
            product += column * tl.sum(tl.where(i == k, A, 0.0), 0, keep_dims=True)
        new = tl.load(p_step + 4) * A + tl.load(p_step + 5) * product
        if TRANSPOSED:
            new = A + tl.permute(new, (1, 0, 2))
        A, exponent = rescale(new, exponent)

    square = tl.sum(tl.sum(A * A, 0, keep_dims=True), 1, keep_dims=True).to(tl.float64)
    size = tl.sqrt(square / d)
    b_log_norm = 0.6931471805599453 * exponent.to(tl.float64) + tl.log(size)
    tl.store(end + b * d + i, tl.max(b_x, 1, keep_dims=True), mask=(b < B) & (i < d))
    tl.store(jacobian + b * d * d + i * d + j, (A / size).to(T), mask=(b < B) & (i < d) & (j < d))
    tl.store(log_norm + b, b_log_norm.to(T), mask=b < B)


def sizes(d: int) -> dict[str, int]:
    """A thread has one column of a chain's A, and its own copy of x; for D <= 4 a whole chain."""
    D = triton.next_power_of_2(d)
    if D > 4:
        return {"D": D, "WIDTH": D, "ATOMS": D, "CHAINS": 8, "num_warps": D // 4}
    return {"D": D, "WIDTH": 1, "ATOMS": 4, "CHAINS": 32, "num_warps": 1}


def centre_of(y: Tensor, valid: Tensor) -> Tensor:
    """The median of the `valid` atoms, [d] in double. A mean would follow an outlier, which has no
    weight, and cost the others their digits.
    """
    in_order = torch.where(valid, y, math.inf).sort(0).values
    return in_order.gather(0, (valid.sum() // 2).expand(1, y.shape[1]))[0].double()


def launch(x, y, alpha, sigma, log_prior, rates, transposed):
    """The op for flat tensors on one GPU."""
    (B, d), N, M = x.shape, y.shape[0], alpha.shape[0] - 1
    if d > CHAIN_MOST_D:
        raise RuntimeError(
            f"x: expected shape [B, d] with d <= {CHAIN_MOST_D}, got {list(x.shape)}"
        )
    device.expect(
        x, y=(y, (N, d)), **({} if log_prior is None else {"log_prior": (log_prior, (N,))})
    )
    device.expect(
        alpha, sigma=(sigma, (M + 1,)), **({} if rates is None else {"rates": (rates, (M, 2))})
    )
    end, A, log_norm = x.new_empty(B, d), x.new_empty(B, d, d), x.new_empty(B)
    if B == 0:
        return end, A, log_norm
    log_pi, valid = x.new_zeros(N), x.new_ones(N, 1, dtype=torch.bool)
    if log_prior is not None:
        log_pi = (log_prior - log_prior.amax()) * LOG2E.value
        valid = (log_pi != -math.inf)[:, None]
    centre = centre_of(y, valid)
    alpha = alpha.double()
    keep, pull, identity, spread = coefficients(alpha, sigma, rates)
    half = 0.5 * LOG2E.value / sigma[:-1].double() ** 2
    steps = torch.stack([alpha[:-1], half, keep, pull, identity - int(transposed), spread], 1)
    tile = sizes(d)
    with torch.cuda.device_of(x):
        chains_kernel[(triton.cdiv(B, tile["CHAINS"]),)](
            x=(x - alpha[0] * centre).to(x.dtype).contiguous(),
            y=torch.where(valid, y - centre, 0).to(x.dtype).contiguous(),
            log_pi=log_pi,
            steps=steps.to(x.dtype),
            end=end,
            jacobian=A,
            log_norm=log_norm,
            B=B,
            N=N,
            d=d,
            M=M,
            TRANSPOSED=transposed,
            **tile,
        )
    return (end + alpha[-1] * centre).to(x.dtype), A, log_norm
