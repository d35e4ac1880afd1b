"""Sets of points, a blur and a reach: what the half-steps of Sinkhorn's algorithm are made of.

Potentials are here those of the points about their means, in units of unit^2, and in float64. A
kernel in float32 rounds log b + g/eps when it takes it for log_prior, and its result, to 2^-24 of
the largest logits: that is how well a marginal can be known (`Problem.rounding`).

Where the marginals are relaxed, by rho KL(P 1 | a) + rho KL(P^T 1 | b) with rho = reach^2, the dual
is, up to what does not depend on f and g,

    D(f, g) = rho <a, 1 - e^(-f/rho)> + rho <b, 1 - e^(-g/rho)> - eps (|P| - |a| |b|)

and a half-step, which maximises it in one of them, is damped: f = S(g)/(1 + eps/rho). Then the rows
of P add up to a e^(-f/rho). The best g for this f would leave columns b e^(-g/rho), and what they
add up to besides is the marginal error. The primal at P is above the dual by rho KL(columns of P |
b e^(-g/rho)): all its other terms cancel. With 1/rho = 0 all this is the problem with marginals
that are kept.
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
    """G transport problems; with x and y the same object, those of sets with themselves."""

    x: Points
    y: Points
    sigma: float  # the blur in units, as the dtype of computation holds it
    rho: float | None  # reach^2 in units^2; None: the marginals are kept

    @property
    def eps(self) -> float:
        return self.sigma * self.sigma

    @property
    def damping(self) -> float:
        """What a half-step keeps of S."""
        return 1.0 if self.rho is None else 1 / (1 + self.eps / self.rho)

    @property
    def transposed(self) -> Problem:
        return Problem(self.y, self.x, self.sigma, self.rho)

    def of(self, problems: Tensor) -> Problem:
        """Some of the problems."""
        if len(problems) == len(self.x.rows):
            return self
        x = self.x.of(problems)
        y = x if self.y is self.x else self.y.of(problems)
        return Problem(x, y, self.sigma, self.rho)

    def level(self, rows: Tensor | None = None) -> Tensor:
        """What the potential of points as given has more than that of x, or of others of their
        frame, about the mean, in units^2, [G, n]: see _points.py."""
        gap = (self.x.mean - self.y.mean) / self.x.unit
        rows = self.x.rows if rows is None else rows
        lean = (rows.double() @ gap[..., None])[..., 0]
        return lean + gap.square().sum(1, keepdim=True) / 4

    def log_prior(self, potential: Tensor) -> Tensor:
        """log b + g/eps [G, m] up to a constant, in the dtype of computation."""
        logits = potential / self.eps
        middle = torch.linalg.vecdot(self.log_part(potential).exp(), logits)
        logits = logits - middle[:, None]  # small where mass is, so that rounding costs little
        return (logits + self.y.log_weights).to(self.y.rows.dtype)

    def atoms(self, potential: Tensor) -> tuple[Tensor, Tensor]:
        """The points y [G, m, d] and the log_prior of g, in the order of y."""
        rows, prior, order = self.y.rows, self.log_prior(potential), self.y.order
        if order is None:
            return rows, prior
        return rows.gather(1, order[..., None].expand_as(rows)), prior.gather(1, order)

    def softmin(self, potential: Tensor, rows: Tensor | None = None) -> Tensor:
        """S(g) at the points x, or at others of their frame, [G, n] in float64."""
        rows = self.x.rows if rows is None else rows
        y, prior = self.atoms(potential)
        log_prob = ops.log_prob(rows, y, 1.0, self.sigma, prior, batched=True)
        return self.from_log_prob(log_prob, potential)

    def from_log_prob(self, log_prob: Tensor, potential: Tensor) -> Tensor:
        """S(g) from the log-density that an op has found with the log_prior of g."""
        log_norm = self.y.rows.shape[2] * math.log(self.sigma * math.sqrt(2 * math.pi))
        total = (self.y.log_weights + potential / self.eps).logsumexp(1, keepdim=True)
        return -self.eps * (log_prob.double() + (log_norm + total))

    def half_step(self, potential: Tensor) -> Tensor:
        """The best f for g."""
        return self.damping * self.softmin(potential)

    def log_share(self, potential: Tensor) -> Tensor:
        """-f/rho, the logarithm of what a relaxed marginal keeps of a; 0 where it is kept."""
        if self.rho is None:
            return torch.zeros_like(potential)
        return -potential / self.rho

    def log_part(self, g: Tensor) -> Tensor:
        """log of the part of its whole mass that g leaves at each y, b e^(-g/rho), [G, m]."""
        if self.rho is None:
            return self.y.log_weights
        return (self.y.log_weights + self.log_share(g)).log_softmax(1)

    def dual(self, f: Tensor, g: Tensor) -> Tensor:
        """The dual objective of f, the best for g, and g, [G], up to a constant."""
        if self.rho is None:
            return self.x.total(f) + self.y.total(g)
        first = self.x.total(self.log_share(f).expm1())
        second = self.y.total(self.log_share(g).expm1())
        return -(self.rho + self.eps) * first - self.rho * second

    def rise(self, before: tuple[Tensor, Tensor], f: Tensor, g: Tensor) -> Tensor:
        """By how much the dual of f, the best for g, and g is above that of two such before, [G],
        over `_size` of those."""
        if self.rho is None:
            return self.dual(f - before[0], g - before[1])
        size = self._size(*before)
        first = self._share(before[0], size) * ((before[0] - f) / self.rho).expm1()
        second = self._share(before[1], size) * ((before[1] - g) / self.rho).expm1()
        return -(self.rho + self.eps) * self.x.total(first) - self.rho * self.y.total(second)

    def sure_gain(self, f: Tensor, g: Tensor, image: Tensor) -> Tensor:
        """The rise from f, the best for g, and g to image, the best for f, and f; [G]."""
        excess = self._excess(g, image)
        if self.rho is None:
            return self.y.total(self.eps * excess.expm1() - (g - image))
        rest = (self.rho + self.eps) * ((1 - self.damping) * excess).expm1()
        share = self._share(g, self._size(f, g))
        return self.y.total(share * (self.eps * excess.expm1() - rest))

    def _size(self, f: Tensor, g: Tensor) -> Tensor:
        """The logarithm of the mass that relaxed marginals have, over which rises of the dual
        neither overflow nor vanish; [G]."""
        rows = (self.x.log_weights + self.log_share(f)).logsumexp(1)
        columns = (self.y.log_weights + self.log_share(g)).logsumexp(1)
        return torch.maximum(rows, columns)

    def _share(self, potential: Tensor, size: Tensor) -> Tensor:
        return (self.log_share(potential) - size[:, None]).exp()

    def _excess(self, g: Tensor, image: Tensor) -> Tensor:
        """log of the columns' sums over what g would leave, b e^(-g/rho), [G, m], for f, the best
        for g, and image, the best g for f."""
        return (g - image) / (self.eps * self.damping)

    def marginal_error(self, g: Tensor, image: Tensor) -> Tensor:
        """sum_j |columns of P - b e^(-g/rho)|_j over sum_j (b e^(-g/rho))_j, [G], of the plan with
        the best f for g, and g; image is the best g for that f."""
        excess, log_part = self._excess(g, image), self.log_part(g)
        larger = (log_part + excess.clamp(min=0)).exp()  # of the two: neither may overflow alone
        return (larger * -(-excess.abs()).expm1()).sum(1)

    def gap(self, g: Tensor, image: Tensor) -> Tensor:
        """The primal less the dual of the same plan, rho KL(columns of P | b e^(-g/rho)), [G]."""
        if self.rho is None:
            return torch.full_like(self.y.mass, math.inf)
        excess = self._excess(g, image)
        larger = (self.y.log_weights + self.log_share(g) + excess.clamp(min=0)).exp()
        ratio = torch.where(
            excess > 0, excess + (-excess).expm1(), excess * excess.exp() - excess.expm1()
        )
        return self.rho * (larger * ratio).sum(1)

    def rounding(self, image: Tensor) -> Tensor:
        """The part of a marginal error that rounding may make, for potentials of this size."""
        largest = torch.linalg.vecdot(self.log_part(image).exp(), (image / self.eps).abs())
        return 4 * torch.finfo(self.y.rows.dtype).eps * (1 + largest)
