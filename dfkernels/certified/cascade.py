"""kept_atoms by the cascade of bounds in PyTorch, in double: the path of devices without a kernel.

docs/certified.md derives the bounds. Everything is in units of sigma^2 and less -|z|^2 / 2, z = x -
alpha centre, which is the same for all atoms of a query.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..ops.common.moments import load

UNIT = 2.0**-53
BLOCK = 8  # queries that share what is read: `block` in csrc/simd/problem.h


class Width(NamedTuple):
    """How far <z, t> may be from what is known of it: three factors, [Q, 1], and what an index has,
    [n]."""

    reach: torch.Tensor
    along: torch.Tensor
    code: torch.Tensor

    def at(self, size, rest, shift):
        """[Q, n]; codes are at most |t|, which is rounded to float32, and shift."""
        return self.reach * rest + self.along * shift + self.code * (size * (1 + 2.0**-22) + shift)


class Queries:
    """Queries, and how well <z, t> is known at each level of an index; all in float64."""

    def __init__(self, x, y, alpha, sigma, log_prior, scale, offset, index, gap):
        """index: name -> tensor, as in fields.FIELDS."""
        centre, facts, self.coded = index["centre"], index["facts"], index["scales"][0] > 0
        self.y, self.scale, self.offset, self.centre = y, scale, offset, centre
        self.x, self.alpha, self.variance = (
            x.double(),
            alpha.double()[:, None],
            sigma.double()[:, None] ** 2,
        )
        prior = torch.zeros_like(index["size"], dtype=torch.float64)
        if log_prior is not None:
            prior = log_prior.double() - log_prior.max()
        unknown = ~self.coded & (index["size"] == 0) & (prior > -torch.inf)
        self.unknown = unknown.any()  # an atom of which the index knows nothing
        self.log_prior = prior.masked_fill(
            ~self.coded, -torch.inf
        )  # `may_drop_apart` looks after those
        self.z = self.x - self.alpha * centre
        self.size = self.z.norm(dim=1, keepdim=True)
        self.gap = gap * self.variance
        self.skew, self.radius, far, self.apart, self.set_apart = facts
        far, reach = far * self.alpha.abs(), self.size + self.radius * self.alpha.abs()
        # of coordinates that are large beside their differences
        self.margin = 2.0**-48 * (self.x.norm(dim=1, keepdim=True) + far) * reach
        self.best = torch.full_like(self.size, -torch.inf)  # so many atoms as asked for reach it

    def exact(self, atoms):
        """Logits [Q, m] of atoms [Q, m], each less what rounding may add to it."""
        rows = load(self.y[atoms], torch.float64, self.scale, self.offset)
        distance = (self.x[:, None] - self.alpha[..., None] * rows).square().sum(-1)
        prior = self.variance * self.log_prior[atoms]
        sizes = distance + self.size**2 + abs(prior)
        return prior + (self.size**2 - distance) / 2 - 4 * UNIT * (self.x.shape[1] + 8) * sizes

    def improve(self, atoms):
        """All of atoms [Q, k] reach their smallest logit."""
        self.best = torch.maximum(self.best, self.exact(atoms).amin(1, keepdim=True))

    @property
    def least(self):
        """A logit below this cannot matter."""
        return self.best - self.gap - self.margin

    def most_apart(self):
        """[Q, 1]: no atom that is set apart has a larger logit, where each is counted (|t| /
        radius)^2 times, so that what it adds to a mean or a covariance is bounded like that of any
        other. alpha |z| t - alpha^2 t^2 / 2 + variance log (t / radius)^2 falls for all larger t
        where it falls at the least.
        """
        t, rise = self.apart, self.alpha.abs() * self.size * (1 + 1e-9)
        bend, more = (
            self.alpha**2 * (1 - 1e-9),
            2 * self.variance * (t / self.radius).clamp_min(1).log(),
        )
        falls = bend * t > rise + 2 * self.variance / t
        most = torch.where(falls, (rise - bend / 2 * t) * t + more * (1 + 1e-9), torch.inf)
        return torch.where(self.set_apart > 0, most, -torch.inf)

    def mass_apart(self):
        """[Q, 1]: what they weigh beside what is kept."""
        return (
            self.set_apart * ((self.most_apart() + self.margin - self.best) / self.variance).exp()
        )

    def takes_all(self):
        """[Q, 1]: an atom without codes may matter, or nothing is known of the best logit."""
        return self.unknown | ~(self.most_apart() < self.least) | (self.best == -torch.inf)

    def _rounding(self, K):
        return 8 * UNIT * (self.x.shape[1] + K) * K**0.5

    def of_axes(self, a):
        """With the first level's codes, a = V z [Q, K]."""
        square, a2 = self.size**2, a.square().sum(1, keepdim=True)
        rounding, along = self._rounding(a.shape[1]), a2.sqrt()
        reach = ((square - a2).clamp_min(0) + self.skew * a2 + rounding * (square + a2)).sqrt()
        return Width(reach, along, self.skew * along + rounding * self.size)

    def of_tail(self, a):
        """With the tail's as well: the codes of both are at most 4 |t|."""
        return self.of_axes(a)._replace(code=4 * self._rounding(a.shape[1]) * self.size)


class Screen(Queries):
    """A block of queries, and which atoms are left of each: alive [Q, n] of atoms [n]."""

    def __init__(self, x, y, alpha, sigma, log_prior, scale, offset, index, gap, k):
        super().__init__(x, y, alpha, sigma, log_prior, scale, offset, index, gap)
        self.k = k
        self.atoms = torch.arange(len(y), dtype=torch.int64, device=y.device)
        self.alive = self.atoms.new_ones(len(x), len(y), dtype=torch.bool)
        self.up = None  # [Q, n]: upper ends, of the last level
        self.dropped = []  # upper ends of what was left out at a level, -inf elsewhere

    def ends(self, product, norm, width):
        """(middle, upper end) of the logits, [Q, n]: <z, t> is within width of product, both [Q,
        n]; norm [n] is |t|^2, of which only the root is known, in float32.
        """
        mid = self.alpha * product - self.alpha**2 / 2 * norm
        sizes = (self.alpha * product).abs() + self.alpha**2 / 2 * norm + self.alpha.abs() * width
        prior = self.variance * self.log_prior[self.atoms]
        mid, sizes = mid + prior, sizes + prior.abs().nan_to_num(posinf=0)
        return mid, mid + self.alpha.abs() * width + 2.0**-22 * sizes

    def drop(self, product, norm, width):
        """Leaves out what cannot matter; arguments as of `ends`."""
        mid, up = self.ends(product, norm, width)
        mid = mid.masked_fill(~self.alive, -torch.inf)
        self.improve(
            self.atoms[mid.topk(self.k, 1).indices]
        )  # the kernels take the largest `up` as well
        self.up = up
        return self._leave_out(up < self.least)

    def _leave_out(self, gone):
        gone = gone & self.alive
        self.dropped.append(self.up.masked_fill(~gone, -torch.inf))
        self.alive &= ~gone
        left = self.alive.any(0)
        self.atoms, self.alive, self.up = self.atoms[left], self.alive[:, left], self.up[:, left]
        return left

    def _mass(self, up):
        """Beside the mass of what is kept, at most."""
        return ((up + self.margin - self.best) / self.variance).exp()

    def trim(self):
        """Leaves out the lightest of what is left as well: gap allows for all N atoms at its edge.
        Where these could outweigh the heaviest, gap allows for no mass: it asks for atoms, and all
        of them stay.
        """
        if self.k > 1:
            return
        most = len(self.y) * (-self.gap / self.variance).exp()
        room = torch.where(most < 1, most * (1 - 1e-6) - self.share()[:, None], -1.0)
        light = self._mass(self.up).masked_fill(~self.alive, torch.inf).sort(1)
        gone = light.values.cumsum(1) <= room
        self._leave_out(torch.zeros_like(gone).scatter(1, light.indices, gone))

    def kept(self):
        """[Q, N]."""
        out = self.alive.new_zeros(len(self.x), len(self.y))
        out[:, self.atoms] = self.alive
        return out

    def share(self):
        """The mass left out is at most this part of the mass kept, [Q]."""
        mass = sum(self._mass(up).sum(1, keepdim=True) for up in self.dropped)
        return (mass + self.mass_apart())[:, 0] * (1 + 1e-9)


def cascade(s, basis, step, first, tail, size, scales, rest, shift, **others):
    """Runs a Screen through both levels."""
    K, d = basis.shape
    at = lambda t: t[s.atoms].double()
    a = s.z @ basis.double().T
    product = (
        (a * step) @ first.transpose(1, 2).reshape(-1, K)[: len(size)].double().T * at(scales[0])
    )
    left = s.drop(product, at(size) ** 2, s.of_axes(a).at(at(size), at(rest[0]), at(shift[0])))
    if len(tail):
        product = product[:, left] + s.z @ tail[s.atoms, :d].double().T * at(scales[1])
        s.drop(product, at(size) ** 2, s.of_tail(a).at(at(size), at(rest[1]), at(shift[1])))
    s.trim()
    return s
