"""The law of the data: what a data set of points and a mixture of Gaussians have in common, and all
that the rest of the package asks of either.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from ._torch import check
from ._torch.errors import Unsupported
from ._torch.objects import Object, Watched, plain
from .certified.certificate import Certificate
from .ops.transport_chain import Chain
from .ops.transport_chain.reference import advance, coefficients, normalised

__all__ = [
    "Drawn",
    "Law",
    "checked_law",
    "checked_rows",
    "checked_tolerance",
    "different_points",
    "per_channel",
]

_NUMBERS = 1 << 22  # of the vectors that are multiplied together
_SHUFFLED = 1 << 22  # points, in whose order a permutation is drawn


class Drawn(NamedTuple):
    """What `Law.draw` returns for each query: the number of a component, int64 [B], and an x_0 from
    it, [B, *E].
    """

    index: Tensor
    x_0: Tensor


class Law(Object, abc.ABC):
    """The law q_0 of the data, a mixture of N components with log weights log pi_i, immutable: base
    of `PointCloud`, whose components are points, of `ShardedCloud`, whose points are in files, and
    of `GaussianMixture`, whose components have a width. Whatever takes a `cloud` takes any of them.

    With alpha and sigma a number or [B] each, and queries x [B, *E], the methods below give what a
    subclass knows of q_t, the law of alpha x_0 + sigma eps. `DiffusionFisher` has the same as an
    object that keeps its results.

    `log_prior`, [N] floating or None for uniform, need not be normalised; `scale` and `offset` map
    the stored points to their values, scale * stored + offset.
    """

    log_prior: Watched[Tensor | None] = Watched()
    scale: float
    offset: float
    _posterior_type: type = ops.Posterior

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot set {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot delete {name}")

    @property
    @abc.abstractmethod
    def _y(self) -> Tensor:
        """The stored points for their shape, dtype and device, which a change in place leaves."""

    def __len__(self) -> int:
        return self._y.shape[0]

    @property
    def event_shape(self) -> torch.Size:
        """The shape E of one x_0."""
        return self._y.shape[1:]

    @property
    def d(self) -> int:
        """The numbers in one x_0, prod(E)."""
        return self.event_shape.numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the points are stored; computation follows the query's."""
        return self._y.dtype

    @property
    def device(self) -> torch.device:
        return self._y.device

    @abc.abstractmethod
    def to(self, *args: Any, **kwargs: Any) -> Law:
        """The same law with its tensors moved or cast as by `Tensor.to`."""

    @abc.abstractmethod
    def posterior(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor
    ) -> ops.Posterior | ops.MixturePosterior:
        """log q_t, the posterior mean of x_0, tr F and the ESS of the components."""

    @abc.abstractmethod
    def _eps(self, p: Any, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The ideal noise prediction -sigma score, [B, *E], by what `posterior` has found."""

    @abc.abstractmethod
    def _score(self, p: Any, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The gradient of log q_t at x, [B, *E], by what `posterior` has found."""

    @abc.abstractmethod
    def fisher_matvec(
        self, x: Tensor, v: Tensor, alpha: float | Tensor, sigma: float | Tensor
    ) -> Tensor:
        """F v for v [B, *E] or [B, K, *E]."""

    @abc.abstractmethod
    def fisher_diagonal(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """diag F, [B, *E]."""

    def fisher_dense(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, **given: Any
    ) -> Tensor:
        """F as [B, d, d]; `given`: what `fisher_matvec` takes beside these."""
        return torch.cat([rows for _, rows in self._rows(x, alpha, sigma, **given)], 1)

    def _rows(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, **given: Any
    ) -> Iterator[tuple[int, Tensor]]:
        """(i, rows i, i + 1, ... of F as [B, k, d]), block by block."""
        eye, start = torch.eye(self.d, dtype=x.dtype, device=x.device), 0
        for rows in eye.split(max(1, _NUMBERS // max(1, x.numel()))):
            k = len(rows)
            v = rows.reshape(1, k, *self.event_shape).expand(len(x), k, *self.event_shape)
            yield start, self.fisher_matvec(x, v, alpha, sigma, **given).reshape(len(x), k, self.d)
            start += k

    @abc.abstractmethod
    def draw(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor, *, seed: int) -> Drawn:
        """One x_0 per query, drawn from its posterior: a component by its posterior weight, then
        the point that it is, or the Gaussian that x_0 is, given x and the component.

        Args:
            x: [B, *E], float32 or float64.
            alpha, sigma: float, 0-d or [B]; sigma > 0.
            seed: from 0 to 2^63 - 1. A call repeated gives the same draws.

        Returns:
            The components and the draws, which carry no graph.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.
        """

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draws from q_0, [count, *E] in float64 on the law's device.

        Args:
            count: how many.
            generator: on the CPU, so that the draws are the same on every device.

        Raises:
            TypeError, ValueError: An argument is wrong; the message names it.
        """
        count = check.integer("count", count, 0)
        check.cpu_generator(generator)
        return self._sampled(self._drawn_rows(count, generator), generator)

    def _drawn_rows(self, count: int, generator: torch.Generator) -> Tensor:
        """Numbers of components, drawn by their weights, [count] on the law's device."""
        u = torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
        log_pi = self._log_pi(torch.float64)
        if log_pi is None:
            rows = (u * len(self)).long().clamp_max(len(self) - 1)
        else:
            total = log_pi.cpu().exp().cumsum(0)
            rows = torch.searchsorted(total, u * total[-1], right=True)
        return rows.to(self.device)

    @abc.abstractmethod
    def _sampled(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """One draw from each of the components of these numbers, [count, *E] in float64."""

    def _without_repeats(self, count: int, generator: torch.Generator) -> Tensor:
        """As `sample`, but no value twice where that can be had."""
        return self.sample(count, generator)

    @abc.abstractmethod
    def _k_heaviest(self, x: Tensor, alpha: Tensor, sigma: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The numbers of the k components with the largest posterior weights, heaviest first, and
        their log weights in float64, each [B, k]. Levels are [B].
        """

    def _k_heaviest_within(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, k: int, tolerance: float
    ) -> tuple[Tensor, Tensor] | None:
        """As `_k_heaviest`, for a law with a `_certificate`: the same components, whose normaliser
        may miss that part of the mass. None for all others.
        """
        return None

    def _chain(
        self,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        rates: Tensor | None,
        transposed: bool,
    ) -> Chain:
        """`ops.transport_chain` over this law, step by step: the covariance of x_0 given x is
        (sigma/alpha)^2 (I - sigma^2 F).
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise Unsupported("transport_test has no derivatives, but x requires grad: detach it")
        A = torch.eye(self.d, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
        log_norm = x.new_zeros(len(x))
        steps = torch.stack([alpha[:-1], sigma[:-1], *coefficients(alpha, sigma, rates)], 1)
        for a, s, keep, pull, identity, spread in steps.tolist():
            mean = self.posterior(x, a, s).mean
            columns = A.mT.reshape(len(x), self.d, *self.event_shape)
            product = self.fisher_matvec(x, columns, a, s).reshape(A.shape).mT
            covariance = (s / a) ** 2 * (A - s**2 * product)
            A, log_norm = normalised(advance(A, covariance, identity, spread, transposed), log_norm)
            x = keep * x + pull * mean
        return Chain(x, A.contiguous(), log_norm)

    def _width(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The least standard deviation w of a component of q_t, [B]: F <= I/w^2."""
        return sigma

    def _points_behind(self, ess: Tensor) -> Tensor:
        """How many data points stand behind a posterior mean whose components have this ESS."""
        return ess

    @abc.abstractmethod
    def _mapped(self, a: Tensor, b: Tensor, most: int) -> Law:
        """The law of a x_0 + b, with numbers for all entries, [1], or for each channel (the first
        axis of E), [C], in float64. In the second case some of the components, of at most `most`
        numbers, may stand for all.
        """

    @abc.abstractmethod
    def _fingerprint(self) -> str:
        """Text that tells this law apart from others."""

    @abc.abstractmethod
    def _no_index(self) -> str | None:
        """Why `tolerance=` cannot be had, after the argument's name; None where it can."""

    def _certificate(
        self, x: Tensor, alpha: Tensor, sigma: Tensor, tolerance: float
    ) -> Certificate | None:
        """What is certain of results with a tolerance, for a law whose methods take one; None for
        a law that has lists of atoms found by `certified.select_atoms`.
        """
        return None

    def _log_pi(self, dtype: torch.dtype) -> Tensor | None:
        """The log weights, normalised in float64 and then rounded to a dtype: a constant that all
        share costs no digits, and no call has to normalise them anew.
        """
        prior = self.log_prior
        if prior is None:
            return None
        results = vars(self).setdefault("_results", {})
        if dtype not in results:
            with plain(self.device):
                results[dtype] = prior.double().log_softmax(0).to(dtype)
        return results[dtype]

    def _log_pi_of_all(self) -> Tensor:
        """The normalised log weights in float64, [N], uniform ones too."""
        log_pi = self._log_pi(torch.float64)
        if log_pi is not None:
            return log_pi
        uniform = torch.full((), -math.log(len(self)), dtype=torch.float64, device=self.device)
        return uniform.expand(len(self))

    def __repr__(self) -> str:
        parts = [
            f"N={len(self)}",
            f"event_shape={tuple(self.event_shape)}",
            str(self.dtype),
            str(self.device),
        ]
        if Law.log_prior.peek(self) is not None:
            parts.append("log_prior=[N]")
        if (self.scale, self.offset) != (1.0, 0.0):
            parts.append(f"scale={self.scale:g}, offset={self.offset:g}")
        return f"{type(self).__name__}({', '.join(parts)})"


def different_points(law: Law, count: int, generator: torch.Generator) -> Tensor:
    """`Law._without_repeats` of a law of points: none twice where all have the same weight. Of very
    many, one may come twice by chance.
    """
    if law.log_prior is not None or len(law) > _SHUFFLED:
        return law.sample(count, generator)
    rows = torch.randperm(len(law), generator=generator, dtype=torch.int64, device="cpu")
    return law._sampled(rows[:count].to(law.device), generator)


def checked_rows(numbers: Tensor, count: int) -> Tensor:
    """Refuses what are no numbers of points, int64 [n], of a law of `count` points."""
    check.tensor("numbers", numbers)
    if numbers.dtype != torch.int64 or numbers.dim() != 1:
        got = f"{numbers.dtype} {list(numbers.shape)}"
        raise TypeError(f"numbers: expected an int64 tensor [n], got {got}")
    outside = numbers[(numbers < 0) | (numbers >= count)]
    if len(outside):
        raise check.mismatch("numbers", f"atoms from 0 to {count - 1}", outside[0].item())
    return numbers


def per_channel(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers [1] or [C] in a shape that goes with values [n, *E], in their dtype."""
    numbers = numbers.to(like)
    return numbers.view(-1, *[1] * (like.ndim - 2)) if len(numbers) > 1 else numbers


def checked_law(name: str, value: object) -> Law:
    """Refuses what is no law of data."""
    if not isinstance(value, Law):
        raise TypeError(
            f"{name}: expected a PointCloud, a ShardedCloud or a GaussianMixture, got "
            f"{type(value).__name__}; wrap it: PointCloud(y)"
        )
    return value


def checked_tolerance(tolerance: float | None, law: Law) -> float | None:
    """Refuses what is no tolerance, or cannot be had of this law."""
    if tolerance is None:
        return None
    value = check.constant("tolerance", tolerance)
    if not 0 < value < 1:
        raise check.mismatch("tolerance", "a number in (0, 1), or None for all atoms", tolerance)
    if (reason := law._no_index()) is not None:
        raise ValueError(f"tolerance: {reason}")
    return value
