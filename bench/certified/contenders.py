"""What is compared, and the truth in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dfkernels as df

faiss: Any = import_module("faiss") if find_spec("faiss") else None  # optional

TOLERANCE = 1e-6
CONTENDERS = {"dense": None, "certified": TOLERANCE}


class Values(NamedTuple):
    """log_prob [B], mean [B, d], tr F [B]."""

    log_prob: Tensor
    mean: Tensor
    trace: Tensor


def fisher(
    x: Tensor, cloud: df.PointCloud, sigma: float, tolerance: float | None
) -> df.DiffusionFisher:
    return df.DiffusionFisher(x, cloud, 1.0, sigma, tolerance=tolerance)


def values(x: Tensor, cloud: df.PointCloud, sigma: float, tolerance: float | None) -> Values:
    found = fisher(x, cloud, sigma, tolerance)
    return Values(found.log_prob, found.denoised, found.trace())


class Nearest:
    """What people do today: the k nearest atoms by faiss, exactly, and a softmax over these."""

    def __init__(self, y: Tensor, k: int, threads: int) -> None:
        faiss.omp_set_num_threads(threads)
        self.y, self.k = y, k
        self.index = faiss.IndexFlatL2(y.shape[1])
        self.index.add(y.numpy())

    def search(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """(|x - y|^2, atom), each [B, k]."""
        distance, atoms = self.index.search(x.numpy(), self.k)
        return torch.from_numpy(distance), torch.from_numpy(atoms)

    def values(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """log_prob [B], mean [B, d], atoms [B, k]."""
        distance, atoms = self.search(x, sigma)
        logits = -distance / (2 * sigma**2)
        weights = logits.softmax(1)
        # rows whose weight underflows to 0 are not gathered: that is the peer at its best
        mean = [w[w > 0] @ self.y[a[w > 0]] for w, a in zip(weights, atoms, strict=True)]
        constant = math.log(len(self.y)) + x.shape[1] / 2 * math.log(2 * math.pi * sigma**2)
        return logits.logsumexp(1) - constant, torch.stack(mean), atoms


class Truth:
    """log_prob, mean and all weights of some queries in float64, alpha = 1: two passes over the
    atoms."""

    def __init__(self, y: Tensor, x: Tensor, sigma: Tensor) -> None:
        """y [N, d], x [Q, d], sigma [Q]; all queries together, so that y is converted twice
        only."""
        x, variance = x.double(), sigma.double()[:, None] ** 2
        logits = torch.empty(len(x), len(y), dtype=torch.float64)
        # the expanded form: in float64, |x|^2 2^-53 / sigma^2 is 1e-9 at the least sigma
        for start, rows in self._blocks(y):
            squares = x.square().sum(1, keepdim=True) + rows.square().sum(1)
            logits[:, start : start + len(rows)] = (x @ rows.T - squares / 2) / variance
        constant = math.log(len(y)) + x.shape[1] / 2 * torch.log(2 * math.pi * variance[:, 0])
        self.log_prob = logits.logsumexp(1) - constant
        self.weights = logits.softmax(1)
        self.mean = torch.zeros(len(x), y.shape[1], dtype=torch.float64)
        for start, rows in self._blocks(y):
            self.mean += self.weights[:, start : start + len(rows)] @ rows

    @staticmethod
    def _blocks(y: Tensor) -> Iterator[tuple[int, Tensor]]:
        start = 0
        for rows in y.split(4096):
            yield start, rows.double()
            start += len(rows)

    def errors(self, log_prob: Tensor, mean: Tensor, q: slice) -> tuple[Tensor, Tensor]:
        """|log_prob - true|, |mean - true| / |true|, each [B]."""
        apart = (mean.double() - self.mean[q]).norm(dim=1) / self.mean[q].norm(dim=1)
        return (log_prob.double() - self.log_prob[q]).abs(), apart

    def missing(self, atoms: Tensor, q: slice) -> Tensor:
        """The weight of all but these atoms [B, k], [B]."""
        return self.weights[q].scatter(1, atoms, 0.0).sum(1)
