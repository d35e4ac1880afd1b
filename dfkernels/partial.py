"""What a pass over a part of a data set leaves.

For a query x, the part k of a data set has atoms y_i with weights pi_i that need not be normalised,
and leaves

    weight   log sum_i pi_i                                     `log_weight`
    mass     log M_k = log sum_i pi_i N(x; alpha y_i, sigma^2 I) `log_mass`
    moments  of its own posterior weights w_i = pi_i N(x; alpha y_i, sigma^2 I)/M_k: the mean, the
             trace V of the covariance C, Q = sum_i w_i^2, and where they are asked for C v, diag C
             and the mean of values

Then log q = log mass - log weight. All of it is float64, whatever the dtype of x: in float32 a log
mass of thousands, usual in thousands of dimensions, would be rounded by more than a part may weigh.
How parts become one is in _merge.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ._torch import check, diagnosis, library
from ._torch.errors import UnusableValue
from ._torch.objects import plain
from ._torch.shapes import column
from ._torch.types import Level
from .certified.certificate import Certificate
from .cloud import PointCloud
from .ops import Posterior
from .ops.common import lists
from .ops.common.about_mean import about_mean, log_density_in_double
from .ops.common.derivatives import Stored
from .ops.common.moments import KINDS

__all__ = ["QUERIES", "Partial"]

QUERIES = ("x", "alpha", "sigma", "v")  # the attributes of a Partial that it was made for


@dataclass(frozen=True, eq=False, repr=False)
class Partial:
    """What a pass over a part of a data set leaves for queries x: made by `Partial.of`, put
    together by `merge`, and turned into results by its methods, which are those of the whole data
    set once all of its parts are merged.

    It holds some 2d numbers a query, however many atoms the part has, and pickles: parts can be
    computed by other processes and machines, in other sessions, or one file after another.

    Attributes:
        x: the queries, ``[B, *E]``.
        alpha, sigma: their levels, [B], in x's dtype.
        v: vectors to multiply with F, ``[B, *E]`` or ``[B, K, *E]``, or None.
        log_weight: log of the sum of the atoms' weights, which are 1 for every atom where there is
            no log_prior; [] in float64, as all that follows.
        log_mass: log sum_i pi_i N(x; alpha y_i, sigma^2 I), [B].
        mean: the part's posterior mean, ``[B, *E]``.
        variance: the trace of its posterior covariance C, [B].
        weight_square: the sum of its squared posterior weights, [B].
        covariance_product: C v in v's shape, or None.
        covariance_diagonal: diag C, ``[B, *E]``, or None.
        value_mean: the posterior mean of values of the atoms, ``[B, *P]``, or None.
        certificate: what is certain of atoms that were left out; None where none were.
    """

    x: Tensor
    alpha: Tensor
    sigma: Tensor
    v: Tensor | None
    log_weight: Tensor
    log_mass: Tensor
    mean: Tensor
    variance: Tensor
    weight_square: Tensor
    covariance_product: Tensor | None = None
    covariance_diagonal: Tensor | None = None
    value_mean: Tensor | None = None
    certificate: Certificate | None = None

    @classmethod
    def of(
        cls,
        x: Tensor,
        y: PointCloud | Tensor,
        alpha: Level,
        sigma: Level,
        log_prior: Tensor | None = None,
        *,
        v: Tensor | None = None,
        values: Tensor | None = None,
        diagonal: bool = False,
        scale: float = 1.0,
        offset: float = 0.0,
        atoms: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Partial:
        """One pass over a part of a data set, and another for each of v, values and diagonal.

        Args:
            x: Queries ``[B, *E]``, float32 or float64; the same for all parts.
            y: The part's atoms: a PointCloud, or a tensor ``[N, *E]`` as `ops.posterior` takes it,
                here N may be 0.
            alpha, sigma: Levels of the queries, numbers or [B].
            log_prior: Log weights [N] of the atoms, relative to those of all other parts; None
                gives each the weight 1. -inf masks an atom, here all of them may be masked. A
                PointCloud has its own: those that it was made with.
            v: Vectors ``[B, *E]`` or ``[B, K, *E]`` in x's dtype, for `fisher_matvec`.
            values: Values of the atoms ``[N, *P]``, for `average`.
            diagonal: Whether `fisher_diagonal` is wanted.
            scale, offset: What maps the stored atoms to the data, scale * y + offset. A PointCloud
                has its own.
            atoms, counts: Lists of atoms, as in `ops.posterior`: a query counts those of its list,
                while the weight of the part is still that of all its atoms.

        Differentiable as the ops are, in reverse and forward mode; not under vmap.

        Raises:
            TypeError: An argument has a wrong type or dtype; the message names it.
            ValueError: So for a shape, a device or a value; or all atoms are so far from a query
                that x's dtype cannot hold the distance.
        """
        check.query("x", x)
        check.choice("diagonal", diagonal, (False, True))
        with plain(x.device):
            if isinstance(y, PointCloud):
                if log_prior is not None or scale != 1.0 or offset != 0.0:
                    raise ValueError(
                        "log_prior, scale, offset: expected none of them with a PointCloud, which "
                        "has its own"
                    )
                given = (y.y, y._log_pi(x.dtype), y.scale, y.offset)
                log_weight = _log_weight(y.y, y.log_prior)
            else:
                check.tensor("y", y)
                if log_prior is not None:
                    check.tensor("log_prior", log_prior)
                given = (y, log_prior, scale, offset)
                log_weight = _log_weight(y, log_prior)
            args = _checked(x, alpha, sigma, *given)
            part = _queries(x, v, values, *args[1:4])
            if len(args[1]) == 0 or (log_prior is not None and bool(log_weight == -math.inf)):
                return _without_atoms(part, log_weight, values, diagonal)
            listed = lists.arguments(atoms, counts, None, args[0]) or (None, None)
            try:
                return _moments(part, args, log_weight, values, diagonal, listed)
            except UnusableValue as error:
                y, prior, *_ = given
                named = {"x": x, "y": y, "alpha": alpha, "sigma": sigma, "log_prior": prior}
                diagnosis.diagnose(named | {"v": v, "values": values}, error)
                raise

    def _moments(self) -> dict[str, Tensor]:
        """All that it holds beside its queries, by name."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: t for name, t in held.items() if name not in QUERIES and t is not None}

    def posterior(self) -> Posterior:
        """log_prob [B], mean ``[B, *E]``, fisher_trace [B] and ess [B] in x's dtype, as
        `ops.posterior` returns them.

        Raises:
            ValueError: No atom has any weight.
        """
        self._expect_atoms()
        d = math.prod(self.x.shape[1:])
        alpha, sigma = self.alpha.double(), self.sigma.double()
        trace = (d - (alpha / sigma) ** 2 * self.variance) / sigma**2
        log_prob = self.log_mass - self.log_weight
        outs = (log_prob, self.mean, trace, 1 / self.weight_square)
        return Posterior(*(t.to(self.x.dtype) for t in outs))

    def score(self) -> Tensor:
        """grad_x log q = (alpha mean - x)/sigma^2, ``[B, *E]``.

        Raises:
            ValueError: No atom has any weight.
        """
        self._expect_atoms()
        alpha, sigma = (column(t.double(), self.mean) for t in (self.alpha, self.sigma))
        return ((alpha * self.mean - self.x) / sigma**2).to(self.x.dtype)

    def fisher_matvec(self) -> Tensor:
        """F v = (v - (alpha/sigma)^2 C v)/sigma^2 for the v that the parts were made with, in its
        shape.

        Raises:
            ValueError: There is no v, or no atom has any weight.
        """
        return self._fisher(self.v, self.covariance_product, "v=...")

    def fisher_diagonal(self) -> Tensor:
        """diag F, ``[B, *E]``.

        Raises:
            ValueError: The parts were made without diagonal=True, or no atom has any weight.
        """
        one = torch.ones_like(self.mean)
        return self._fisher(one, self.covariance_diagonal, "diagonal=True")

    def average(self) -> Tensor:
        """The posterior mean of the atoms' values, ``[B, *P]``, as `ops.average` returns it.

        Raises:
            ValueError: The parts were made without values, or no atom has any weight.
        """
        return self._given(self.value_mean, "values=...").to(self.x.dtype)

    @property
    def dropped_mass(self) -> Tensor:
        """A bound on the mass of the atoms that were left out, relative to that of all others, [B]:
        0 where none were. Only a `ShardedCloud` with a tolerance leaves atoms out.
        """
        none = torch.zeros_like(self.log_mass)
        return none if self.certificate is None else self.certificate.dropped_mass()

    @property
    def log_prob_error(self) -> Tensor:
        """A bound on the error of log_prob, [B]: 0 <= log q - log_prob <= log(1 + dropped_mass),
        beside rounding.
        """
        return self.dropped_mass.log1p()

    @property
    def mean_error(self) -> Tensor:
        """A bound on the error of the mean in the 2-norm, [B]: dropped_mass R, R at least the
        distance of any atom left out from the mean; beside rounding.
        """
        return self.dropped_mass * self._reach()

    @property
    def fisher_error(self) -> Tensor:
        """A bound on the error of the trace and, in the 2-norm, of F, [B]: (alpha^2/sigma^4)
        dropped_mass max(R^2, V), R as in `mean_error`; beside rounding.
        """
        ratio = self.alpha.detach().double() / self.sigma.detach().double() ** 2
        size = torch.maximum(self._reach() ** 2, self.variance.detach())
        return ratio**2 * self.dropped_mass * size

    def _reach(self) -> Tensor:
        none = torch.zeros_like(self.log_mass)
        return none if self.certificate is None else self.certificate.reach(self.mean.detach())

    def __repr__(self) -> str:
        event = tuple(self.x.shape[1:])
        return f"Partial(B={len(self.x)}, event_shape={event}, {self.x.dtype}, {self.x.device})"

    def _fisher(self, v: Tensor | None, product: Tensor | None, argument: str) -> Tensor:
        product = self._given(product, argument)
        assert v is not None
        alpha, sigma = (column(t.double(), product) for t in (self.alpha, self.sigma))
        return ((v - (alpha / sigma) ** 2 * product) / sigma**2).to(self.x.dtype)

    def _given(self, moment: Tensor | None, argument: str) -> Tensor:
        if moment is None:
            raise ValueError(f"this Partial was made without it: call Partial.of(..., {argument})")
        self._expect_atoms()
        return moment

    def _expect_atoms(self) -> None:
        if bool(self.log_weight == -math.inf):
            raise ValueError("expected at least one atom with a weight, got parts without any")


def _log_weight(y: Tensor, log_prior: Tensor | None) -> Tensor:
    """The log-sum of the atoms' weights, [] in float64."""
    if log_prior is not None and y.dim() and log_prior.shape == y.shape[:1]:
        return log_prior.double().logsumexp(0)
    n = y.shape[0] if y.dim() else 0
    log_n = math.log(n) if n else -math.inf
    return torch.full((), log_n, dtype=torch.float64, device=y.device)


def _checked(x: Tensor, alpha: Level, sigma: Level, y: Tensor, prior, scale, offset) -> tuple:
    """The arguments of a pass, flat; a part without atoms is checked as one with an atom would
    be."""
    if y.dim() and y.shape[0] == 0:
        one = y.new_zeros((1, *y.shape[1:]))
        if prior is not None and prior.shape == (0,):
            prior = prior.new_zeros(1)
        flat, _, *rest = check.points(x, one, alpha, sigma, prior, scale, offset)
        return flat, y, *rest
    return check.points(x, y, alpha, sigma, prior, scale, offset)


def _queries(
    x: Tensor, v: Tensor | None, values, y: Tensor, alpha: Tensor, sigma: Tensor
) -> Partial:
    """A Partial for these queries whose moments are still to come."""
    if v is not None:
        check.vectors("v", v, "x", x, math.prod(x.shape[1:]))
    if values is not None:
        check.values(values, x, y)
    none = x.new_zeros(0, dtype=torch.float64)
    # copies: a query that is changed in place afterwards is another one
    own = x.clone(), alpha.clone(), sigma.clone(), None if v is None else v.clone()
    return Partial(*own, none, none, none, none, none)


def _without_atoms(part: Partial, log_weight: Tensor, values, diagonal: bool) -> Partial:
    """The Partial of no atoms."""
    x, like = part.x, {"dtype": torch.float64}
    numbers = x.new_zeros(len(x), **like)
    vectors = x.new_zeros(x.shape, **like)
    return replace(
        part,
        log_weight=log_weight,
        log_mass=numbers - math.inf,
        mean=vectors,
        variance=numbers,
        weight_square=numbers,
        covariance_product=None if part.v is None else part.v.new_zeros(part.v.shape, **like),
        covariance_diagonal=vectors if diagonal else None,
        value_mean=None if values is None else x.new_zeros(len(x), *values.shape[1:], **like),
    )


def _moments(
    part: Partial, args: tuple, log_weight: Tensor, values, diagonal: bool, listed: tuple
) -> Partial:
    """The moments of a part that has atoms."""
    flat, atoms, alpha, sigma, prior, scale, offset = args
    x, v, stored = part.x, part.v, Stored(scale, offset, *listed)

    def sums(kind: str, *own: Tensor):
        return about_mean(KINDS[kind], flat, atoms, alpha, sigma, prior, stored, own)

    z, found = sums("posterior")
    weight, first, square, weight_square = (t.double() for t in found)
    delta = first / weight[:, None]
    product = spread = value_mean = None
    if v is not None:
        rows = check.vectors("v", v, "x", x, flat.shape[1])
        product = _covariance(sums("matvec", rows)[1], rows).reshape(v.shape)
    if diagonal:
        spread = _covariance(sums("diagonal")[1], None).reshape(x.shape)
    if values is not None:
        rows = check.values(values, flat, atoms)
        op = library.overload("average")
        _, value_mean = op(flat, atoms, rows, alpha, sigma, prior, *stored)
        value_mean = value_mean.double().reshape(len(x), *values.shape[1:])
    return replace(
        part,
        log_weight=log_weight,
        log_mass=log_density_in_double(z, found[0]) + log_weight,
        mean=(z.reference.double() + delta).reshape(x.shape),
        variance=square / weight - (delta * delta).sum(1),
        weight_square=weight_square / weight**2,
        covariance_product=product,
        covariance_diagonal=spread,
        value_mean=value_mean,
    )


def _covariance(found: list[Tensor], v: Tensor | None) -> Tensor:
    """C v [B, K, d], or diag C [B, d], in float64 from the sums about the reference."""
    weight, first, second = (t.double() for t in found)
    delta = first / weight[:, None]
    if v is None:
        return second / weight[:, None] - delta * delta
    along = (v.double() * delta[:, None]).sum(-1, keepdim=True)
    return second / weight[:, None, None] - delta[:, None] * along
