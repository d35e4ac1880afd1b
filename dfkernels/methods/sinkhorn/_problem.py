"""Two sets of points and a blur: what the half-steps of Sinkhorn's algorithm are made of.

Potentials are here those of the points about their means, in units of unit^2, and in float64. A
kernel in float32 rounds log b + g/eps when it takes it for log_prior, and its result, to 2^-24 of
the largest logits: that is how well a marginal can be known (`Problem.rounding`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ._points import Points

__all__ = ["Problem"]


class Problem(NamedTuple):
    """A transport problem; with x and y the same object, that of a set with itself."""

    x: Points
    y: Points
    sigma: float  # the blur in units, as the dtype of computation holds it

    @property
    def eps(self) -> float:
        return self.sigma * self.sigma

    @property
    def transposed(self) -> Problem:
        return Problem(self.y, self.x, self.sigma)

    def log_prior(self, potential: Tensor) -> Tensor:
        """log b + g/eps [m] up to a constant, in the dtype of computation."""
        logits = potential / self.eps
        logits = logits - self.y.weights @ logits  # small, so that rounding costs little
        return (logits + self.y.log_weights).to(self.y.rows.dtype)

    def softmin(self, potential: Tensor, rows: Tensor | None = None) -> Tensor:
        """S(g) at the points x, or at others of their frame: a half-step, [n] in float64."""
        rows = self.x.rows if rows is None else rows
        prior = self.log_prior(potential)
        log_prob = ops.log_prob(rows, self.y.rows, 1.0, self.sigma, prior)
        return self.from_log_prob(log_prob, potential)

    def from_log_prob(self, log_prob: Tensor, potential: Tensor) -> Tensor:
        """S(g) from the log-density that an op has found with the log_prior of g."""
        log_norm = self.y.rows.shape[1] * math.log(self.sigma * math.sqrt(2 * math.pi))
        total = (self.y.log_weights + potential / self.eps).logsumexp(0)
        return -self.eps * (log_prob.double() + (log_norm + total))

    def dual(self, f: Tensor, g: Tensor) -> float:
        """The dual objective of f = S(g) and g."""
        return float(self.x.weights @ f + self.y.weights @ g)

    def sure_gain(self, g: Tensor, image: Tensor) -> float:
        """By how much the dual rises from S(g), g to S(g), image = S(S(g)): eps KL(b | P^T 1)."""
        return float(self.y.weights @ (image - g))

    def marginal_error(self, potential: Tensor, image: Tensor) -> float:
        """|P^T 1 - b|_1 of the plan with the potentials S(g) and g, image = S(S(g))."""
        excess = ((potential - image) / self.eps).expm1().abs()
        return float(self.y.weights @ excess)

    def rounding(self, image: Tensor) -> float:
        """The part of a marginal error that rounding may make, for potentials of this size."""
        largest = float((image / self.eps).abs() @ self.y.weights)
        return 4 * torch.finfo(self.y.rows.dtype).eps * (1 + largest)
