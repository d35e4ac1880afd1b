"""Time of one posterior pass against plain PyTorch and SDPA, same inputs, same run."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkernels import ops

from .data import Data

PEERS = ("dfkernels", "plain PyTorch", "SDPA + bias")


@dataclass(frozen=True)
class Speed:
    """Milliseconds (median) for B queries, one column per entry of PEERS."""

    data: Data
    batch: list[int]
    ms: list[list[float]]


def speed(data: Data, batches: list[int], step: Callable[[str], None]) -> Speed:
    """log q, mean, tr F and ESS of B queries at sigma = 1; SDPA gives log q and the mean only."""
    y = data.cloud.y.flatten(1)
    rows = []
    for b in batches:
        pick = torch.randint(len(y), (b,), generator=torch.Generator().manual_seed(b))
        x = y[pick] + torch.randn(b, y.shape[1], generator=torch.Generator().manual_seed(b + 1))
        runs = (
            lambda x=x: ops.posterior(x, y, 1.0, 1.0),
            lambda x=x: plain(x, y, 1.0),
            lambda x=x: sdpa(x, y, 1.0),
        )
        rows.append([_median_ms(run) for run in runs])
        step(f"{data.name}: speed")
    return Speed(data, batches, rows)


def plain(x: Tensor, y: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """addmm, softmax, mm; the [B, N] weights are formed."""
    square = y.square().sum(1)
    logits = torch.addmm(square * (-0.5 / sigma**2), x, y.T, alpha=1 / sigma**2)
    log_sum = torch.logsumexp(logits, 1)
    w = torch.exp(logits - log_sum[:, None])
    mean = w @ y
    d = x.shape[1]
    log_prob = log_sum - x.square().sum(1) * (0.5 / sigma**2) - _constant(len(y), d, sigma)
    trace = d / sigma**2 - (w @ square - mean.square().sum(1)) / sigma**4
    return log_prob, mean, trace, 1 / w.square().sum(1)


def sdpa(x: Tensor, y: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    """Fused attention with q = x/sigma^2, k = v = y and bias -|y|^2/(2 sigma^2): log q and mean."""
    bias = (y.square().sum(1) * (-0.5 / sigma**2)).view(1, 1, 1, -1)
    query, atoms = (x / sigma**2).view(1, 1, *x.shape), y.view(1, 1, *y.shape)
    mean, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, atoms, atoms, attn_mask=bias.expand(1, 1, len(x), -1), scale=1.0
    )
    log_prob = (
        log_sum.view(-1)
        - x.square().sum(1) * (0.5 / sigma**2)
        - _constant(len(y), x.shape[1], sigma)
    )
    return log_prob, mean.view(x.shape)


def _constant(n: int, d: int, sigma: float) -> float:
    return math.log(n) + d / 2 * math.log(2 * math.pi * sigma**2)


def _median_ms(run: Callable[[], object]) -> float:
    """Median of up to 7 calls after one to warm up, within about a second."""
    run()
    times: list[float] = []
    while len(times) < 7 and (len(times) < 3 or sum(times) < 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
