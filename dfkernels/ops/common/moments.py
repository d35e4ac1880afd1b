"""Moment kinds: what an op over a data set sums over the atoms, in plain differentiable PyTorch.

Per query and atom there are t = y - reference and the weight

    e = exp(log_pi - (|u|^2 - |r|^2)/2 - shift),  u = (x - alpha y)/sigma,
                                                  r = (x - alpha reference)/sigma

The reference's own exponent |r|^2/2 is taken off: it is a factor that all atoms of a query share.
A kind is a family of sums over the atoms of products of e, t and tensors of its own; it is declared
once, as a `MomentKind`, in the directory of the op that needs it. Everything else follows from
that: the op without compiled kernels, and all derivatives (derivatives.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Inputs(NamedTuple):
    """The tensors of which every kind's sums are functions; `y` and `log_pi` are per atom, the
    others per query. A kind's own tensors come after them."""

    x: Tensor  # [B, d]
    y: Tensor  # [N, d], as stored
    alpha: Tensor  # [B]
    sigma: Tensor  # [B]
    log_pi: Tensor | None  # [N], normalised; None is -log N for every atom
    shift: Tensor  # [B], float64: taken off the logits, so that the weights are of order one
    reference: Tensor  # [B, d]: the point about which moments are taken


# with their dimensions, one more where clouds have their own
PER_ATOM = {"y": 2, "log_pi": 1, "values": 2, "variance": 2}
CONSTANTS = ("shift", "reference")  # what the ops return does not depend on them
KINDS: dict[str, MomentKind] = {}  # by name, as `pair_gradient` takes it


@dataclass(frozen=True)
class MomentKind:
    """A family of sums over the atoms.

    Attributes:
        name: Its name, unique in the package.
        sums: (e [B, N], t [B, N, d], *own), the sums over the atoms of one tile, a tuple of any
            number of tensors [B, ...].
        shapes: (x, *own), the shapes of these sums.
        own: Names of the kind's own tensors, per query but for those in PER_ATOM.
        op: The op that messages name, where that is not the kind's name.
    """

    name: str
    sums: Callable[..., tuple[Tensor, ...]]
    shapes: Callable[..., tuple[Shape, ...]]
    own: tuple[str, ...] = ()
    op: str | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of all tensors of which the sums are functions."""
        return (*Inputs._fields, *self.own)

    def shapes_for(self, tensors) -> tuple[Shape, ...]:
        """The shapes of the sums for these tensors, which begin with the inputs."""
        return self.shapes(tensors[0], *tensors[len(Inputs._fields) : len(self.inputs)])

    def on_tile(self, tensors, scale: float, offset: float) -> tuple[Tensor, ...]:
        """The sums over one tile, whose tensors are in the compute dtype already."""
        base = Inputs(*tensors[: len(Inputs._fields)])
        base = base._replace(y=load(base.y, base.y.dtype, scale, offset))
        return self.sums(*weights(base), *tensors[len(base) :])


def register(kind: MomentKind) -> MomentKind:
    """Makes a kind known by its name."""
    KINDS[kind.name] = kind
    return kind


def load(y: Tensor, dtype: torch.dtype, scale: float, offset: float) -> Tensor:
    """The atoms' values, scale * y + offset, in the compute dtype."""
    y = y.to(dtype)
    return y if scale == 1.0 and offset == 0.0 else torch.add(y.new_tensor(offset), y, alpha=scale)


def logits(x: Tensor, y: Tensor, alpha: Tensor, sigma: Tensor, log_prior: Tensor) -> Tensor:
    """log_prior - |x - alpha y|^2/(2 sigma^2) in the difference form.

    Args:
        x: [B, d] queries.
        y: [N, d] atoms or, one set per query, [B, N, d].
        alpha, sigma: [B].
        log_prior: [N] or [B, N].

    Returns:
        [B, N]; -inf for a masked atom, even one that holds NaN.
    """
    u = (x[:, None] - alpha[:, None, None] * y) / sigma[:, None, None]
    return torch.where(log_prior == -math.inf, -math.inf, log_prior - 0.5 * (u * u).sum(-1))


def without_weightless(
    weight: Tensor, y: Tensor, log_prior: Tensor, reference: Tensor
) -> tuple[Tensor, Tensor]:
    """Atoms and log priors per query in which a weightless atom cannot be seen.

    Zero times NaN or infinity is NaN, in a sum and in every derivative of it. So where the weight
    is 0, the query's reference takes the place of the atom before anything is computed, with a log
    prior of -inf. torch.where passes exactly 0 back to what it leaves out.

    Args:
        weight: [B, N].
        y: [N, d] or [B, N, d].
        log_prior: [N] or [B, N].
        reference: [B, d], finite.

    Returns:
        y [B, N, d] and log_prior [B, N].
    """
    weighs = weight != 0  # NaN counts: only an atom that is not masked can cause it
    return (
        torch.where(weighs[..., None], y, reference.detach()[:, None]),
        torch.where(weighs, log_prior, -math.inf),
    )


def residual(x: Tensor, alpha: Tensor, sigma: Tensor, reference: Tensor) -> Tensor:
    """r = (x - alpha reference)/sigma, [B, d]."""
    return (x - alpha[:, None] * reference) / sigma[:, None]


def half_square(x: Tensor, alpha: Tensor, sigma: Tensor, reference: Tensor) -> Tensor:
    """|r|^2/2 in float64, [B]: what is large in a logit and the same for all atoms."""
    r = residual(x.double(), alpha.double(), sigma.double(), reference.double())
    return 0.5 * (r * r).sum(1)


def weights(z: Inputs) -> tuple[Tensor, Tensor]:
    """e [B, N] and t [B, N, d] of the module's docstring; log_pi is not None on a tile."""
    assert z.log_pi is not None
    reference, shift = z.reference.detach()[:, None], z.shift.detach()[:, None]
    ratio = (z.alpha / z.sigma)[:, None]
    r = residual(z.x, z.alpha, z.sigma, z.reference.detach())[:, None]

    def exponential(t: Tensor, log_pi: Tensor) -> Tensor:
        """Only what differs between atoms is rounded: |u|^2 = |r|^2 - <t, 2 r - ratio t> ratio."""
        logit = log_pi + ratio * (t * (r - 0.5 * ratio[..., None] * t)).sum(-1)
        logit = torch.where(log_pi == -math.inf, -math.inf, logit)
        return torch.exp((logit - shift).to(t.dtype))

    with torch.no_grad():
        weight = exponential(z.y - reference, z.log_pi)
    y, log_pi = without_weightless(weight, z.y, z.log_pi, z.reference)
    t = y - reference
    return exponential(t, log_pi), t


def weight_sum(e: Tensor) -> Tensor:
    """sum e, [B]."""
    return e.sum(1)


def first_moment(e: Tensor, t: Tensor) -> Tensor:
    """sum e t, [B, d]."""
    return torch.einsum("bn,bnd->bd", e, t)
