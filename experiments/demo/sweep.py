"""Everything the package knows about a data set over a sweep of noise levels, each number checked
against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkernels.fisher import DiffusionFisher
from dfkernels.ops.posterior.reference import posterior as reference

from .data import Data

CHECKS = ("log q", "score", "denoised", "tr F", "ESS", "eigenpairs")
# float32 against float64: a logit |u|^2/2 ~ d/2 is known to some eps d ~ 2e-5, and so are the
# weights
LIMIT = 3e-4
PAIRS = 3  # leading directions of the posterior, i.e. smallest eigenvalues of F


@dataclass(frozen=True)
class Sweep:
    """Results over S noise levels (alpha = 1) and Q queries, on the CPU, float32."""

    data: Data
    noisy: Tensor  # [S, Q, *E]
    denoised: Tensor  # [S, Q, *E]
    log_prob: Tensor  # [S, Q] nats
    score_rms: Tensor  # [S, Q]  sigma |score| / sqrt(d)
    trace: Tensor  # [S, Q]  sigma^2 tr F / d
    ess: Tensor  # [S, Q]
    small: Tensor  # [S, q, PAIRS]  smallest eigenvalues of sigma^2 F
    large: Tensor  # [S, q, 1]  largest eigenvalue of sigma^2 F
    vectors: Tensor  # [S, q, PAIRS + 1, *E]
    gaussian: Tensor  # [S]  sigma^2 tr F / d if the data were Gaussian with the same covariance
    errors: Tensor  # [S, len(CHECKS)]  largest error over the checked queries
    plain_trace_error: Tensor  # [S]  the same for tr F by E|y|^2 - |Ey|^2 in float32


def sweep(data: Data, step: Callable[[str], None]) -> Sweep:
    """One call for all queries at all noise levels (sigma differs per sample), then the checks
    level by level.
    """
    levels, q, event = len(data.sigma), len(data.clean), data.clean.shape[1:]
    noise = torch.randn(data.clean.shape, generator=torch.Generator().manual_seed(1))
    # the same noise at every level
    noisy = data.clean + data.sigma.view(-1, *[1] * data.clean.ndim) * noise
    fisher = DiffusionFisher(noisy.flatten(0, 1), data.cloud, 1.0, data.sigma.repeat_interleave(q))
    rms = fisher.score.flatten(1).norm(dim=1) * fisher.sigma / math.sqrt(data.cloud.d)
    per_dim = fisher.trace() * fisher.sigma.square() / data.cloud.d
    step(f"{data.name}: posterior")

    picked = noisy[:, _eigen_queries(data)]
    eigen = DiffusionFisher(
        picked.flatten(0, 1), data.cloud, 1.0, data.sigma.repeat_interleave(picked.shape[1])
    )
    low, low_vectors = eigen.eigsh(PAIRS, largest=False)
    high, high_vectors = eigen.eigsh(1, largest=True)
    values, vectors = torch.cat([low, high], 1), torch.cat([low_vectors, high_vectors], 1)
    step(f"{data.name}: eigenpairs")

    oracle = _Oracle(data)
    result = Sweep(
        data=data,
        noisy=noisy,
        denoised=fisher.denoised.view(levels, q, *event),
        log_prob=fisher.log_prob.view(levels, q),
        score_rms=rms.view(levels, q),
        trace=per_dim.view(levels, q),
        ess=fisher.ess.view(levels, q),
        small=(low * eigen.sigma.square()[:, None]).view(levels, -1, PAIRS),
        large=(high * eigen.sigma.square()[:, None]).view(levels, -1, 1),
        vectors=vectors.view(levels, -1, PAIRS + 1, *event),
        gaussian=oracle.gaussian(),
        errors=torch.zeros(levels, len(CHECKS)),
        plain_trace_error=torch.zeros(levels),
    )
    values = values.view(levels, -1, PAIRS + 1)
    scores = fisher.score.view(levels, q, *event)
    for s in range(levels):
        oracle.check(result, s, scores[s], values[s])
        step(f"{data.name}: float64 checks")
    return result


def _eigen_queries(data: Data) -> list[int]:
    """The shown query first, then the first others."""
    return [data.shown, *[i for i in range(len(data.clean)) if i != data.shown]][: data.eigen]


class _Oracle:
    """float64 twice over: the difference-form reference op, and autograd of log q (score by one
    derivative, F v by two).
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self.y = data.cloud.y.double()
        flat = self.y.flatten(1)
        self.centre = flat.mean(0)
        self.flat = flat - self.centre  # log q does not mind the origin, rounding does
        self.square = self.flat.square().sum(1)

    def gaussian(self) -> Tensor:
        """sigma^2 tr (S + sigma^2 I)^-1 / d for the data's covariance S, at each level."""
        variance = torch.linalg.eigvalsh(self.flat.T @ self.flat / len(self.flat)).clamp_min(0)
        noise = self.data.sigma.double().square()[:, None]
        return (noise / (variance + noise)).mean(1).float()

    def check(self, result: Sweep, s: int, score: Tensor, values: Tensor) -> None:
        """Fill result.errors[s]: relative for log q and ESS, per root dimension (x sigma) for score
        and images, per dimension (x sigma^2) for tr F, the residual of F v = l v over |F|_2 for
        eigenpairs."""
        data, sigma = self.data, float(self.data.sigma[s])
        d, root = data.cloud.d, math.sqrt(data.cloud.d)
        picked = _eigen_queries(data)
        checked = picked + [i for i in range(len(data.clean)) if i not in picked]
        checked = checked[: data.references]
        noisy = result.noisy[s]
        log_prob, mean, trace, ess = _reference(noisy[checked].double(), self.y, sigma)
        gradient = self._score(noisy[checked].flatten(1).double(), sigma)
        errors = {
            "log q": (result.log_prob[s, checked] - log_prob).abs() / log_prob.abs().clamp_min(1),
            "score": (score[checked].flatten(1) - gradient).norm(dim=1) * sigma / root,
            "denoised": (result.denoised[s, checked] - mean).flatten(1).norm(dim=1) / root,
            "tr F": (result.trace[s, checked] - trace * sigma**2 / d).abs(),
            "ESS": (result.ess[s, checked] / ess - 1).abs(),
            "eigenpairs": self._residuals(noisy[picked], result.vectors[s], values.double(), sigma),
        }
        result.errors[s] = torch.stack([errors[name].max().float() for name in CHECKS])
        plain = _plain_trace(noisy[checked], data.cloud.y, sigma) * sigma**2 / d
        result.plain_trace_error[s] = (plain - trace * sigma**2 / d).abs().max().float()

    def _log_prob(self, x: Tensor, sigma: float) -> Tensor:
        """log q(x) of flat x [b, d]; expanded, since in float64 that is exact enough and leaves
        autograd two matrix products.
        """
        x = x - self.centre
        logits = (x @ self.flat.T - (self.square + x.square().sum(1, keepdim=True)) / 2) / sigma**2
        return (
            torch.logsumexp(logits, 1)
            - math.log(len(self.flat))
            - x.shape[1] / 2 * math.log(2 * math.pi * sigma**2)
        )

    def _score(self, x: Tensor, sigma: float) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(self._log_prob(x, sigma).sum(), x)[0]

    def _residuals(self, x: Tensor, vectors: Tensor, values: Tensor, sigma: float) -> Tensor:
        """|H v + l v| / |F|_2 with H the autograd Hessian of log q; [q, PAIRS + 1]."""
        x = x.flatten(1).double().requires_grad_()
        gradient = torch.autograd.grad(self._log_prob(x, sigma).sum(), x, create_graph=True)[0]
        norm = values.abs().amax(1)  # both ends of the spectrum are among the values
        residuals = []
        for j in range(vectors.shape[1]):
            v = vectors[:, j].flatten(1).double()
            hv = torch.autograd.grad((gradient * v).sum(), x, retain_graph=True)[0]
            residuals.append((hv + values[:, j, None] * v).norm(dim=1) / norm)
        return torch.stack(residuals, 1)


def _reference(x: Tensor, y: Tensor, sigma: float) -> tuple[Tensor, ...]:
    """The reference op in blocks of queries, which bound its [b, N, d] memory."""
    block = max(1, 8_000_000 // y.numel())
    parts = [reference(rows, y, 1.0, sigma) for rows in x.split(block)]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def _plain_trace(x: Tensor, y: Tensor, sigma: float) -> Tensor:
    """tr F the usual way: logits from |x|^2 + |y|^2 - 2 x.y, variance as E|y|^2 - |Ey|^2, all in
    float32."""
    x, y = x.flatten(1), y.flatten(1)
    square = y.square().sum(1)
    w = torch.softmax((x @ y.T - square / 2) / sigma**2, 1)
    return x.shape[1] / sigma**2 - (w @ square - (w @ y).square().sum(1)) / sigma**4
