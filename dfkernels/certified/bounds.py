"""Bounds on the logits of all atoms for some queries, from the codes of an index, in float64.

docs/certified.md derives them; the rounding terms are those of rounding.py. A logit is taken times
sigma^2 and without -|z|^2 / 2, z = x - alpha centre, which all atoms of a query share:

    alpha <z, t> - alpha^2 |t|^2 / 2 + sigma^2 log pi.

Only <z, t> is not known. Each level of the index gives an approximate product and the coefficients
of a bound on its error.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.common.moments import load
from .index import CloudIndex, check_layout
from .rounding import COORDINATES, STORED_NORM, double_sums, exact_logit


class Sought(NamedTuple):
    """The queries and atoms that a search is about: the first arguments of `select_atoms`."""

    x: Tensor  # [Q, d]
    y: Tensor  # [N, d], the stored atoms
    alpha: Tensor  # [Q]
    sigma: Tensor  # [Q]
    log_prior: Tensor | None  # [N]
    scale: float  # with offset, maps the stored numbers to the data
    offset: float

    def part(self, queries: slice) -> Sought:
        """Some of the queries, and all atoms."""
        x, alpha, sigma = (t[queries] for t in (self.x, self.alpha, self.sigma))
        return self._replace(x=x, alpha=alpha, sigma=sigma)


def parsed(args: tuple) -> tuple[Sought, CloudIndex, float, int]:
    """The arguments of `select_atoms` as (what is sought, index, gap, k).

    Raises:
        RuntimeError: A tensor of the index cannot be read as the index declares it, gap is not
            finite or is negative, or k is not from 1 to N.
    """
    sought = Sought(*args[: len(Sought._fields)])
    *tensors, gap, k = args[len(Sought._fields) :]
    index, N = CloudIndex(*tensors), len(sought.y)
    check_layout(index, sought.y.shape, sought.x.device)
    if not 0 <= gap < torch.inf:
        raise RuntimeError(f"gap: expected a finite number >= 0, got {gap}")
    if not 1 <= k <= N:
        raise RuntimeError(f"k: expected 1 <= k <= {N}, got {k}")
    return sought, CloudIndex(*(t.contiguous() for t in index)), gap, k


class ProductError(NamedTuple):
    """Coefficients [Q, 1] of a bound on |<z, t> - product| at one level of the index."""

    query_remainder: Tensor  # |z_r|, the part of z across the axes; times remainder_norm
    query_on_axes: Tensor  # |V z|; times axis_error
    code_error: Tensor  # skew axes and rounding; times the norm of the codes

    def bound(self, atom_norm: Tensor, remainder_norm: Tensor, axis_error: Tensor) -> Tensor:
        """The bound, [Q, n], for atoms with these entries of the index, each [n]."""
        code_norm = atom_norm * (1 + STORED_NORM) + axis_error
        return (
            self.query_remainder * remainder_norm
            + self.query_on_axes * axis_error
            + self.code_error * code_norm
        )


class Queries:
    """Some queries, and how well the logits of all atoms are known at each level of an index.

    Args:
        sought: the queries and the atoms.
        index: of these atoms.
        gap: an atom whose logit is certainly more than this below the k-th largest is left out.

    Attributes:
        variance: [Q, 1], sigma^2.
        log_prior: [N], relative to the largest; -inf for atoms without codes.
        z: [Q, d], x - alpha centre; z_norm [Q, 1].
        gap: [Q, 1], times sigma^2.
        coordinate_error: [Q, 1], rounding of coordinates that are large beside their differences.
        kth_logit: [Q, 1], a lower bound of the k-th largest logit.
    """

    def __init__(self, sought: Sought, index: CloudIndex, gap: float) -> None:
        x, y, alpha, sigma, log_prior, scale, offset = sought
        self.y, self.scale, self.offset, self.index = y, scale, offset, index
        self.x, self.alpha = x.double(), alpha.double()[:, None]
        self.variance = sigma.double()[:, None] ** 2
        self.limits = index.named_limits
        self.coded = index.code_scale[0] > 0
        prior = torch.zeros_like(index.atom_norm, dtype=torch.float64)
        if log_prior is not None:
            prior = log_prior.double() - log_prior.max()
        unknown = ~self.coded & (index.atom_norm == 0) & (prior > -torch.inf)
        self.has_unknown_atom = unknown.any()
        self.log_prior = prior.masked_fill(~self.coded, -torch.inf)  # `remote_weight` bounds those
        self.z = self.x - self.alpha * index.centre
        self.z_norm = self.z.norm(dim=1, keepdim=True)
        self.gap = gap * self.variance
        alpha_size = self.alpha.abs()
        coordinates = self.x.norm(dim=1, keepdim=True) + self.limits.coordinate_norm * alpha_size
        differences = self.z_norm + self.limits.radius * alpha_size
        self.coordinate_error = COORDINATES * coordinates * differences
        self.kth_logit = torch.full_like(self.z_norm, -torch.inf)

    def exact_logits(self, atoms: Tensor) -> Tensor:
        """Logits [Q, m] of atoms [Q, m] by differences, less what rounding may add to them."""
        rows = load(self.y[atoms], torch.float64, self.scale, self.offset)
        distance = (self.x[:, None] - self.alpha[..., None] * rows).square().sum(-1)
        prior = self.variance * self.log_prior[atoms]
        sizes = distance + self.z_norm**2 + abs(prior)
        return prior + (self.z_norm**2 - distance) / 2 - exact_logit(self.x.shape[1]) * sizes

    def raise_kth_logit(self, sets: Tensor) -> None:
        """Takes note of sets of k atoms, [Q, sets, k]: all of a set reach its smallest logit."""
        found = self.exact_logits(sets.flatten(1)).view(sets.shape).amin(2).amax(1, keepdim=True)
        self.kth_logit = torch.maximum(self.kth_logit, found)

    @property
    def threshold(self) -> Tensor:
        """An atom whose upper bound lies below this, [Q, 1], cannot matter."""
        return self.kth_logit - self.gap - self.coordinate_error

    @cached_property
    def remote_logit(self) -> Tensor:
        """Upper bound [Q, 1] of every remote atom's logit.

        Each remote atom is counted (|t| / radius)^2 times, so that what it adds to a mean or a
        covariance is bounded like that of any other atom. The bound, alpha |z| t - alpha^2 t^2 / 2
        + variance log (t / radius)^2, falls for all larger t where it falls at the least t.
        """
        t = self.limits.remote_distance
        slope = self.alpha.abs() * self.z_norm * (1 + 1e-9)
        curvature = self.alpha**2 * (1 - 1e-9)
        count = 2 * self.variance * (t / self.limits.radius).clamp_min(1).log()
        falls = curvature * t > slope + 2 * self.variance / t
        bound = torch.where(falls, (slope - curvature / 2 * t) * t + count * (1 + 1e-9), torch.inf)
        return torch.where(self.limits.remote_count > 0, bound, -torch.inf)

    def remote_weight(self) -> Tensor:
        """Upper bound [Q, 1] of the remote atoms' weight, relative to that of the selected."""
        return self.limits.remote_count * self.relative_weight(self.remote_logit)

    def relative_weight(self, upper: Tensor) -> Tensor:
        """The weight that goes with an upper bound of a logit, relative to the selected atoms'."""
        return ((upper + self.coordinate_error - self.kth_logit) / self.variance).exp()

    def takes_all(self) -> Tensor:
        """bool [Q, 1]: an atom without codes may matter, or no logit is known."""
        remote_atoms_matter = ~(self.remote_logit < self.threshold)
        return self.has_unknown_atom | remote_atoms_matter | (self.kth_logit == -torch.inf)

    def _double_sums(self, K: int) -> float:
        return double_sums(self.x.shape[1], K)

    def coarse_error(self, a: Tensor) -> ProductError:
        """Error of the coarse codes' products with a = V z, [Q, K]."""
        z_square, a_square = self.z_norm**2, a.square().sum(1, keepdim=True)
        sums, skew = self._double_sums(a.shape[1]), self.limits.axis_skew
        on_axes = a_square.sqrt()
        remainder = (z_square - a_square).clamp_min(0)
        remainder = remainder + skew * a_square + sums * (z_square + a_square)
        return ProductError(remainder.sqrt(), on_axes, skew * on_axes + sums * self.z_norm)

    def fine_error(self, a: Tensor) -> ProductError:
        """Error when the fine codes' products are added: both levels' codes are at most 4 |t|."""
        code_error = 4 * self._double_sums(a.shape[1]) * self.z_norm
        return self.coarse_error(a)._replace(code_error=code_error)

    def bounds(
        self, atoms: Tensor, product: Tensor, norm_square: Tensor, error: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(estimate, upper bound) of the logits of atoms [n], each [Q, n].

        Args:
            atoms: the atoms' numbers.
            product: approximate <z, t>, [Q, n].
            norm_square: |t|^2, [n], of which only the root is known, in float32.
            error: bound on the product's error, [Q, n].
        """
        half_square = self.alpha**2 / 2 * norm_square
        estimate = self.alpha * product - half_square
        sizes = (self.alpha * product).abs() + half_square + self.alpha.abs() * error
        prior = self.variance * self.log_prior[atoms]
        estimate, sizes = estimate + prior, sizes + prior.abs().nan_to_num(posinf=0)
        return estimate, estimate + self.alpha.abs() * error + STORED_NORM * sizes
