"""transport_chain on the GPU: all steps of a few chains in one launch.

A tensor is [rows, columns, lanes], a lane a chain, so that a thread holds columns of one chain and
sums over rows stay inside it. A step reads the atoms three times: their largest logit; the mean,
tiles of atoms along the columns; C about that mean, column by column of it. As in
csrc/simd/transport_chain.h, chains run about a point among the atoms, and A is multiplied by 2^-e,
which is exact.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..._constants import CHAIN_MOST_D
from ..common.triton import device
from ..common.triton.functions import LOG2E, along
from .reference import coefficients

CHAIN = tl.constexpr(128)  # tiles, or atoms, summed in one chain of additions
COLUMNS = tl.constexpr(6)  # of `steps`


@triton.jit
def _logits(x, atoms, prior, level, half):
    """[D, 1, lanes] and [D, n, 1] -> [1, n, lanes], base 2."""
    u = x - level * atoms
    return prior - half * tl.sum(u * u, 0, keep_dims=True)


@triton.jit
def _tile(y_i, prior, tile, i, n, wide, N, d):
    """Atoms n of a tile: log prior, and coordinates i of as many columns and lanes as `wide`
    has."""
    here = tile * n.shape[1] + n.to(tl.int64)
    pi = tl.load(prior + here, mask=here < N, other=-float("inf"))
    return pi, tl.load(y_i + here * d + wide, mask=(here < N) & (i < d), other=0.0)


@triton.jit
def _rescaled(A, exponent):
    """A times 2^-e, with its largest entry in [2^e, 2^(e+1)); exponent + e."""
    largest = tl.max(tl.max(tl.abs(A), 0, keep_dims=True), 1, keep_dims=True)
    if A.dtype == tl.float32:
        e = (largest.to(tl.int32, bitcast=True) >> 23) - 127
        scale = ((127 - e) << 23).to(tl.float32, bitcast=True)
    else:
        e = (largest.to(tl.int64, bitcast=True) >> 52) - 1023
        scale = ((1023 - e) << 52).to(tl.float64, bitcast=True)
    return A * scale, exponent + e


@triton.jit
def _chains(
    x,  # [B, d], less alpha times the centre, and so is end
    y,  # [N, d], less the centre
    prior,  # [N], base 2, at most 0
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
    LANES: tl.constexpr,
):
    T = x.dtype.element_ty
    b = tl.program_id(0).to(tl.int64) * LANES + along(LANES, 2)
    one = tl.num_programs(
        1
    )  # hides from Triton that rows are contiguous: it would spread them over threads
    i, j, n = along(D, 0), along(D, 1), along(ATOMS, 1)
    y_i = y + i * one
    wide = tl.zeros((1, WIDTH, LANES), tl.int32)
    xs = tl.load(x + b * d + i * one + wide, mask=(b < B) & (i < d), other=0.0)
    A = tl.zeros((D, D, LANES), T) + ((i == j) & (i < d)).to(T)
    exponent = tl.zeros((1, 1, LANES), tl.int32 if tl.float32 == T else tl.int64)
    tiles = tl.cdiv(N, ATOMS)
    for step in range(M):
        at = steps + step * COLUMNS
        level, half = tl.load(at), tl.load(at + 1)

        top = tl.full((1, ATOMS, LANES), -float("inf"), T)
        for tile in range(tiles):
            pi, atoms = _tile(y_i, prior, tile, i, n, wide, N, d)
            top = tl.maximum(top, _logits(xs, atoms, pi, level, half))
        top = tl.max(top, 1, keep_dims=True)

        mass = tl.zeros((1, ATOMS, LANES), T)
        first = tl.zeros((D, ATOMS, LANES), T)
        for begin in range(0, tiles, CHAIN):
            some_mass = tl.zeros_like(mass)
            some = tl.zeros_like(first)
            for tile in range(begin, tl.minimum(begin + CHAIN, tiles)):
                pi, atoms = _tile(y_i, prior, tile, i, n, wide, N, d)
                e = tl.exp2(_logits(xs, atoms, pi, level, half) - top)
                some_mass += e
                some += e * atoms
            mass += some_mass
            first += some
        mass = tl.sum(mass, 1, keep_dims=True)
        mean = tl.sum(first, 1, keep_dims=True) / mass

        across = tl.sum(tl.where(i == j, mean, 0.0), 0, keep_dims=True)  # [1, D, lanes]
        cov = tl.zeros_like(A)
        for begin in range(0, N, CHAIN):
            some = tl.zeros_like(A)
            for atom in range(begin, tl.minimum(begin + CHAIN, N)):
                row = tl.full((), atom, tl.int64) * d
                down = tl.load(y_i + row + wide, mask=i < d, other=0.0)
                right = tl.load(y + row + j * one, mask=j < d, other=0.0)
                e = tl.exp2(_logits(xs, down, tl.load(prior + atom), level, half) - top)
                some += (e * (down - mean)) * (right - across)
            cov += some
        cov = (cov + tl.permute(cov, (1, 0, 2))) / (
            2 * mass
        )  # symmetric to the bit, or A would rotate

        xs = tl.load(at + 2) * xs + tl.load(at + 3) * mean
        product = tl.zeros_like(A)
        for k in range(d):
            column = tl.sum(tl.where(j == k, cov, 0.0), 1, keep_dims=True)
            product += column * tl.sum(tl.where(i == k, A, 0.0), 0, keep_dims=True)
        new = tl.load(at + 4) * A + tl.load(at + 5) * product
        if TRANSPOSED:
            new = A + tl.permute(new, (1, 0, 2))
        A, exponent = _rescaled(new, exponent)

    square = tl.sum(tl.sum(A * A, 0, keep_dims=True), 1, keep_dims=True).to(tl.float64)
    size = tl.sqrt(square / d)
    tl.store(end + b * d + i, tl.max(xs, 1, keep_dims=True), mask=(b < B) & (i < d))
    tl.store(jacobian + b * d * d + i * d + j, (A / size).to(T), mask=(b < B) & (i < d) & (j < d))
    tl.store(
        log_norm + b,
        (0.6931471805599453 * exponent.to(tl.float64) + tl.log(size)).to(T),
        mask=b < B,
    )


def sizes(d: int) -> dict[str, int]:
    """D > 4: a thread has one column of a chain's A, and its own copy of x. Else all of a chain."""
    D = triton.next_power_of_2(d)
    if D > 4:
        return {"D": D, "WIDTH": D, "ATOMS": D, "LANES": 8, "num_warps": D // 4}
    return {"D": D, "WIDTH": 1, "ATOMS": 4, "LANES": 32, "num_warps": 1}


def middle(y, real):
    """[d] in double: the median of the atoms that are `real`. A mean would follow an atom that is
    far away and has no weight, and cost the others their digits.
    """
    in_order = torch.where(real, y, math.inf).sort(0).values
    return in_order.gather(0, (real.sum() // 2).expand(1, y.shape[1]))[0].double()


def launch(x, y, alpha, sigma, log_prior, rates, transposed):
    """As the op."""
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
    prior, real = x.new_zeros(N), x.new_ones(N, 1, dtype=torch.bool)
    if log_prior is not None:
        prior = (log_prior - log_prior.amax()) * LOG2E.value
        real = (prior != -math.inf)[:, None]
    centre = middle(y, real)
    alpha = alpha.double()
    keep, pull, identity, spread = coefficients(alpha, sigma, rates)
    half = 0.5 * LOG2E.value / sigma[:-1].double() ** 2
    steps = torch.stack([alpha[:-1], half, keep, pull, identity - int(transposed), spread], 1).to(
        x.dtype
    )
    moved = (x - alpha[0] * centre).to(x.dtype).contiguous()
    atoms = torch.where(real, y - centre, 0).to(x.dtype).contiguous()
    kept = sizes(d)
    with torch.cuda.device_of(x):
        _chains[(triton.cdiv(B, kept["LANES"]),)](
            *(moved, atoms, prior, steps, end, A, log_norm, B, N, d, M),
            TRANSPOSED=transposed,
            **kept,
        )
    return (end + alpha[-1] * centre).to(x.dtype), A, log_norm
