"""Bounds on the logits of a shard's atoms, in units that all shards share.

bounds.py takes logits relative to those of one index's centre. Between shards they are compared as
they are,

    l_i = -|x - alpha y_i|^2/(2 sigma^2),

in nats. With L_i the logit of bounds.py, l_i = (L_i - |z|^2/2)/sigma^2: the rounding of |z|^2 is
that of a sum of d squares (`exact_logit`), and `coordinate_error` covers that of z itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bounds import ProductError, Queries, Sought
from .index import CloudIndex
from .rounding import COORDINATES, UNIT, exact_logit
from .stored_index import AtomCodes

__all__ = ["ShardQueries", "log_sum", "lower_logits"]


class ShardQueries(Queries):
    """Some queries, and bounds on the logits of a shard's atoms, block by block.

    Args:
        x: [Q, d], with alpha and sigma [Q] in float64.
        index: of the shard, without its atoms.
    """

    def __init__(self, x: Tensor, alpha: Tensor, sigma: Tensor, index: CloudIndex) -> None:
        super().__init__(Sought(x, x[:0], alpha, sigma, None, 1.0, 0.0), index, 0.0)
        self.a = self.z @ index.basis.double().T
        self.shared = self.z_norm**2 / 2 * (1 - exact_logit(x.shape[1]))

    def coarse(self, atoms: AtomCodes) -> tuple[Tensor, Tensor, Tensor]:
        """(product, estimate, upper bound) of the logits at the first level, each [Q, n]; -inf for
        the atoms without codes, which `remote` bounds. `product` is what `fine` goes on from.
        """
        codes = atoms.codes.double()
        product = (self.a * self.index.axis_scale) @ codes.T * atoms.code_scale.double()
        return product, *self._logits(atoms, product, self.coarse_error(self.a))

    def fine(self, atoms: AtomCodes, product: Tensor) -> tuple[Tensor, Tensor]:
        """(estimate, upper bound) at the second level of atoms with these products, each [Q, m]."""
        codes = atoms.codes[:, : self.x.shape[1]].double()
        product = product + self.z @ codes.T * atoms.code_scale.double()
        return self._logits(atoms, product, self.fine_error(self.a))

    def remote(self) -> Tensor:
        """An upper bound of the log of the sum over the remote atoms, [Q]; -inf where there are
        none."""
        return self._in_nats(self.remote_logit)[:, 0] + self.limits.remote_count.log()

    def _logits(
        self, atoms: AtomCodes, product: Tensor, error: ProductError
    ) -> tuple[Tensor, Tensor]:
        norm, scale, remainder, on_axes = (t.double() for t in atoms[1:])
        self.log_prior = torch.zeros_like(norm).masked_fill(scale == 0, -torch.inf)
        each = torch.arange(len(norm), dtype=torch.int64, device=norm.device)
        bound = error.bound(norm, remainder, on_axes)
        estimate, upper = self.bounds(each, product, norm**2, bound)
        estimate = (estimate - self.shared) / self.variance
        return estimate.nan_to_num(-torch.inf, torch.inf, -torch.inf), self._in_nats(upper)

    def _in_nats(self, upper: Tensor) -> Tensor:
        """Where numbers overflow, nothing is known: inf."""
        upper = (upper + self.coordinate_error - self.shared) / self.variance
        return upper.nan_to_num(torch.inf, torch.inf, -torch.inf)


def lower_logits(x: Tensor, alpha: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
    """The logits [M] of pairs of a query and an atom, x and y [M, d], by differences, less what
    rounding may have added; -inf where they cannot be had."""
    distance = (x - alpha[:, None] * y).square().sum(1)
    coordinates = x.norm(dim=1) + alpha.abs() * y.norm(dim=1)
    lost = exact_logit(x.shape[1]) * distance + COORDINATES * coordinates * distance.sqrt()
    return (-(distance / 2 + lost) / sigma**2).nan_to_num(-torch.inf, -torch.inf, -torch.inf)


def log_sum(a: Tensor, b: Tensor) -> Tensor:
    """log(exp a + exp b) from above."""
    total = torch.logaddexp(a, b)
    return total + 8 * UNIT * total.abs().masked_fill(total.isinf(), 0)
