"""Calls that read some atoms only: lists of atoms, a certified search, the k heaviest atoms.

lists of n    the op with n atoms of each query's own; torch gathers their rows, [B, n, d]
tolerance     DiffusionFisher with tolerance=1e-6, search and sums; peers take all atoms
top_k         the weights of the K heaviest atoms; torch sorts those of all
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import dfkernels as df
from dfkernels.certified.reference import logits

from . import measure
from .cases import EXACT_QUERIES, Case

TOLERANCE = 1e-6


def ours(case: Case, inputs: dict) -> Callable:
    """The public function, on a cloud whose index is there."""
    if case.listed:
        if case.op == "posterior":
            return lambda: df.ops.posterior(**inputs).mean
        return lambda: getattr(df.ops, case.op)(**inputs)
    x, alpha, sigma = (inputs[k] for k in ("x", "alpha", "sigma"))
    cloud = df.PointCloud(inputs["y"])
    if case.way == "top_k":
        return lambda: df.top_k(x, cloud, alpha, sigma, case.K).weight
    cloud.index()
    return lambda: df.DiffusionFisher(x, cloud, alpha, sigma, tolerance=TOLERANCE).denoised


def exact(case: Case, inputs: dict) -> torch.Tensor:
    """The last queries in float64."""
    of_queries = ("x", "v", "alpha", "sigma")
    last = {k: t[-EXACT_QUERIES:] for k, t in inputs.items() if k in of_queries}
    if case.listed:
        rows = inputs["atoms"].view(len(inputs["x"]), -1)[-EXACT_QUERIES:]
        one = lambda b: {k: t[b : b + 1] for k, t in last.items()}
        found = [measure.exact(case.op, y=inputs["y"][r], **one(b)) for b, r in enumerate(rows)]
        return torch.cat(found)
    if case.way == "top_k":
        levels = last["alpha"], last["sigma"]
        found = logits(last["x"], inputs["y"], *levels, None, 1.0, 0.0)
        return torch.softmax(found, 1).topk(case.K).values
    return measure.exact(case.op, y=inputs["y"], **last)


def by_torch(case: Case, inputs: dict) -> Callable:
    """What a user of torch would write, float32; for a tolerance see peers.py."""
    return partial(_gathered if case.listed else partial(_sorted, case.K), **inputs)


def _gathered(x, y, alpha, sigma, atoms, counts, v=None):
    t = y[atoms].view(len(x), -1, y.shape[1])
    precision = (1 / sigma**2)[:, None]
    along = (t @ (x * alpha[:, None] * precision)[..., None])[..., 0]
    weights = torch.softmax(along - alpha[:, None] ** 2 * precision / 2 * t.square().sum(2), 1)
    mean = (weights[:, None] @ t)[:, 0]
    if v is None:
        return mean
    t = t - mean[:, None]
    spread = (weights[:, None] * (v @ t.mT)) @ t
    precision = precision[..., None]
    return (v - alpha[:, None, None] ** 2 * precision * spread) * precision


def _sorted(k, x, y, alpha, sigma):
    precision = (1 / sigma**2)[:, None]
    norms = y.square().sum(1)
    found = (x * alpha[:, None] * precision) @ y.T - alpha[:, None] ** 2 * precision / 2 * norms
    return torch.softmax(found, 1).topk(k).values


def bytes_needed(case: Case) -> int:
    """Of torch beside its inputs."""
    return 4 * case.B * (3 * case.listed * case.d if case.listed else 4 * case.N)
