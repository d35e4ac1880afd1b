"""draw in plain PyTorch: the posterior weights, then Gumbel-max in two stages. Materialises
[B, N, d]."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._constants import DRAW_BLOCK as BLOCK
from ..._torch.types import Level
from ..posterior.reference import weights
from .gumbel import gumbel


def draw(
    x: Tensor,
    y: Tensor,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    seed: int,
    scale: float = 1.0,
    offset: float = 0.0,
    queries: Tensor | None = None,
) -> Tensor:
    """The number of one atom per query, drawn with the weights w of the posterior.

    Row i of y belongs to block i // 64. With g independent standard Gumbel noise, the block is
    argmax_k (log sum_{i in k} w_i + g(seed, query, k, stage 0)), and the atom is the argmax of
    log w_i + g(seed, query, i, stage 1) in that block. Either argmax is a draw with the
    probabilities that its logarithms stand for, so that the atom is one with probability w. g is
    that of `gumbel`, in float64: a function of its arguments alone, so that a draw does not depend
    on the order in which atoms are visited, nor on the other queries. The first of equal maxima
    counts.

    Args:
        x, y, alpha, sigma, log_prior, scale, offset: As in `posterior`.
        seed: From 0 to 2^63 - 1.
        queries: Numbers of the queries, int64 [B]; by default 0, 1, ..., B - 1.

    Returns:
        Row numbers of y, int64 [B].
    """
    w = weights(x.detach(), y.detach(), alpha, sigma, log_prior, scale=scale, offset=offset)[5]
    B, N = w.shape
    if queries is None:
        queries = torch.arange(B, dtype=torch.int64, device=w.device)
    padded = torch.nn.functional.pad(w.double(), (0, -N % BLOCK)).unflatten(1, (-1, BLOCK))
    numbers = torch.arange(padded.shape[1], dtype=torch.int64, device=w.device)
    score = torch.log(padded.sum(2)) + gumbel(seed, queries[:, None], numbers, 0)
    block = score.argmax(1)
    rows = BLOCK * block[:, None] + torch.arange(BLOCK, dtype=torch.int64, device=w.device)
    chosen = padded[torch.arange(B, dtype=torch.int64, device=w.device), block]
    score = torch.log(chosen) + gumbel(seed, queries[:, None], rows, 1)
    return rows.gather(1, score.argmax(1, keepdim=True))[:, 0]
