# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""endpoint_matvec on CUDA: v, x0 and mean are read once, the result is written once.

    out = (v - (alpha/sigma)^2 (x0 <x0, v> - mean <mean, v>))/sigma^2
    centred: r <r, v> in place of the difference, r = x0 - mean

A program keeps whole rows in registers between the dot products and the result. A row that is too
long for one is cut into pieces: a first launch writes the pieces' dot products, a second adds them
up, always in the same order, and reads the pieces again, last ones first, as many as L2 still
holds. Where Triton can reduce over a cluster of CTAs, these share a row of up to 65,536 numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common.triton import device as gpu


@triton.jit
def endpoint_kernel(
    v,  # [B, K, d]
    x0,  # [B, d]
    mean,  # [B, d]
    alpha,  # [B], alpha_stride apart
    sigma,  # [B], sigma_stride apart
    out,  # [B, K, d], or None
    dots,  # [B, K, 2, pieces], or None
    B,
    K,
    d,
    vectors,  # K per program
    pieces,  # of a row
    alpha_stride,
    sigma_stride,
    CENTRED: tl.constexpr,
    STAGE: tl.constexpr,  # "row": all of it; "dots", then "result": in two launches
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED: tl.constexpr,  # at least pieces, where the result adds them up
):
    """out = (v - (alpha/sigma)^2 (x0 <x0, v> - mean <mean, v>))/sigma^2; CENTRED: r <r, v>."""
    program = tl.program_id(0)
    if STAGE == "result":  # the pieces that were read last are still in the cache
        program = tl.num_programs(0) - 1 - program
    piece = program % pieces
    b = (program // pieces).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i = piece * BLOCK + tl.arange(0, BLOCK)
    exists = b < B
    mask = exists[:, None] & (i < d)[None, :]
    i_sample = b[:, None] * d + i[None, :]
    b_x0 = tl.load(x0 + i_sample, mask=mask, other=0.0)
    b_mean = tl.load(mean + i_sample, mask=mask, other=0.0)
    if CENTRED:
        b_x0 = b_x0 - b_mean
    if STAGE != "dots":
        b_sigma = tl.load(sigma + b * sigma_stride, mask=exists, other=1.0).to(tl.float64)
        b_alpha = tl.load(alpha + b * alpha_stride, mask=exists, other=0.0).to(tl.float64)
        precision = (1.0 / (b_sigma * b_sigma)).to(b_x0.dtype)[:, None]
        ratio = (b_alpha * b_alpha / (b_sigma * b_sigma)).to(b_x0.dtype)[:, None]
    first = tl.program_id(1) * vectors
    for k in range(first, tl.minimum(first + vectors, K)):
        row = b * K + k
        i_v = row[:, None] * d + i[None, :]
        b_v = tl.load(v + i_v, mask=mask, other=0.0)
        part = row * (2 * pieces)
        if STAGE == "result":
            j = tl.arange(0, PADDED)
            part_mask = exists[:, None] & (j < pieces)[None, :]
            p_dots = dots + part[:, None] + j[None, :]
            x0_v = tl.sum(tl.load(p_dots, mask=part_mask, other=0.0), 1)
            if not CENTRED:
                mean_v = tl.sum(tl.load(p_dots + pieces, mask=part_mask, other=0.0), 1)
        else:
            x0_v = gpu.row_sums(b_x0 * b_v)
            if not CENTRED:
                mean_v = gpu.row_sums(b_mean * b_v)
        if STAGE == "dots":
            tl.store(dots + part + piece, x0_v, mask=exists)
            if not CENTRED:
                tl.store(dots + part + pieces + piece, mean_v, mask=exists)
        else:
            cov_v = b_x0 * x0_v[:, None]
            if not CENTRED:
                cov_v -= b_mean * mean_v[:, None]
            tl.store(out + i_v, (b_v - ratio * cov_v) * precision, mask=mask)


class Plan(NamedTuple):
    rows: int  # per program
    block: int  # numbers of a row per program
    pieces: int  # per row; more than one: two launches
    vectors: int  # of K, per program
    warps: int
    ctas: int  # in a cluster, for one program


def plan(B: int, K: int, d: int, itemsize: int, device: gpu.Device, clusters: bool) -> Plan:
    """Sizes by registers: a thread holds 16 words of each of the three arrays, 64 where a row needs
    it."""
    room = 4096 * 4 // itemsize  # numbers of each array for 256 threads
    enough = 4 * device.multiprocessors  # programs that fill the device
    block, rows, pieces, ctas = triton.next_power_of_2(d), 1, 1, 1
    if clusters and device.cc >= 90 and 2 * room < block <= 16 * room:
        ctas = block // (2 * room)
        while ctas < 8 and B * ctas < enough and block // ctas > room // 2:
            ctas *= 2
    elif block > 4 * room:
        block, pieces = room, triton.cdiv(d, room)
    elif block < room // 2:
        rows = min(room // 2 // block, triton.next_power_of_2(triton.cdiv(B, enough)))
    numbers = rows * block // ctas  # of each array, in one CTA
    warps = max(1, min(8, (8 if rows == 1 else 32) * numbers // room))
    tiles = triton.cdiv(B, rows) * pieces
    vectors = max(1, triton.cdiv(K, 65535), min(K, K * tiles * ctas // enough))
    return Plan(rows, block, pieces, vectors, warps, ctas)


def launch(v, x0, mean, alpha, sigma, form):
    """The op for tensors on one GPU: v [B, K, d], x0 and mean [B, d], alpha and sigma [B]."""
    B, K, d = v.shape
    gpu.expect(v, x0=(x0, (B, d)), mean=(mean, (B, d)), alpha=(alpha, (B,)), sigma=(sigma, (B,)))
    v, x0, mean = v.contiguous(), x0.contiguous(), mean.contiguous()
    out = torch.empty_like(v)
    if out.numel() == 0:
        return out
    p = plan(B, K, d, v.element_size(), gpu.device_of(v), gpu.CLUSTERS)
    whole = p.pieces == 1
    dots = None if whole else v.new_empty(B * K * 2 * p.pieces)
    grid = (triton.cdiv(B, p.rows) * p.pieces, triton.cdiv(K, p.vectors))
    with torch.cuda.device_of(v):
        for stage in ("row",) if whole else ("dots", "result"):
            endpoint_kernel[grid](
                v=v,
                x0=x0,
                mean=mean,
                alpha=alpha,
                sigma=sigma,
                out=None if stage == "dots" else out,
                dots=dots,
                B=B,
                K=K,
                d=d,
                vectors=p.vectors,
                pieces=p.pieces,
                alpha_stride=alpha.stride(0),
                sigma_stride=sigma.stride(0),
                CENTRED=form == "centred",
                STAGE=stage,
                ROWS=p.rows,
                BLOCK=p.block,
                PADDED=triton.next_power_of_2(p.pieces) if stage == "result" else 1,
                num_warps=p.warps,
                num_ctas=p.ctas,
            )
    return out
