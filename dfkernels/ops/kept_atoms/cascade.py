"""kept_atoms by the cascade of bounds in PyTorch, in double: the path of devices without a kernel.

docs/certified.md derives the bounds. Everything is in units of sigma^2 and less -|z|^2 / 2, z = x - alpha centre,
which is the same for all atoms of a query.
"""

from __future__ import annotations

import torch

from .._kinds import load

UNIT = 2.0**-53


class Screen:
    """A block of queries, and which atoms are left of each: alive [Q, n] of atoms [n]."""

    def __init__(self, x, y, alpha, sigma, log_prior, scale, offset, centre, facts, gap, k):
        self.y, self.scale, self.offset, self.k = y, scale, offset, k
        self.x, self.alpha, self.variance = x.double(), alpha.double()[:, None], sigma.double()[:, None] ** 2
        self.log_prior = None if log_prior is None else (log_prior - log_prior.max()).double()
        self.z = self.x - self.alpha * centre
        self.size = self.z.norm(dim=1, keepdim=True)
        self.gap = gap * self.variance
        # of coordinates that are large beside their differences
        radius, far = facts[1] * self.alpha.abs(), facts[2] * self.alpha.abs()
        self.margin = 2.0**-48 * (self.x.norm(dim=1, keepdim=True) + far) * (self.size + radius)
        self.atoms = torch.arange(len(y), device=y.device)
        self.alive = self.atoms.new_ones(len(x), len(y), dtype=torch.bool)
        self.best = torch.full_like(self.size, -torch.inf)
        self.dropped = []  # (largest logit, number)

    def exact(self, atoms):
        """Logits [Q, m] of atoms [Q, m], each less what rounding may add to it."""
        rows = load(self.y[atoms], torch.float64, self.scale, self.offset)
        distance = (self.x[:, None] - self.alpha[..., None] * rows).square().sum(-1)
        prior = 0 if self.log_prior is None else self.variance * self.log_prior[atoms]
        sizes = distance + self.size**2 + abs(prior)
        return prior + (self.size**2 - distance) / 2 - 4 * UNIT * (self.x.shape[1] + 8) * sizes

    def drop(self, product, norm, width):
        """Leaves out what cannot matter: <z, t> is within width of product, both [Q, n]; norm [n] is |t|^2."""
        mid = self.alpha * product - self.alpha**2 / 2 * norm
        sizes = (self.alpha * product).abs() + self.alpha**2 / 2 * norm + self.alpha.abs() * width
        if self.log_prior is not None:
            prior = self.variance * self.log_prior[self.atoms]
            mid, sizes = mid + prior, sizes + prior.abs().nan_to_num(posinf=0)
        up = mid + self.alpha.abs() * width + 2.0**-22 * sizes  # |t| is rounded to float32
        mid = mid.masked_fill(~self.alive, -torch.inf)
        promising = self.atoms[mid.topk(self.k, 1).indices]  # the kernel takes the largest `up` as well
        self.best = torch.maximum(self.best, self.exact(promising).amin(1, keepdim=True))
        gone = self.alive & (up < self.best - self.gap - self.margin)
        self.dropped.append(
            (up.masked_fill(~gone, -torch.inf).amax(1, keepdim=True), gone.sum(1, keepdim=True))
        )
        self.alive &= ~gone
        left = self.alive.any(0)
        self.atoms, self.alive = self.atoms[left], self.alive[:, left]
        return left

    def kept(self):
        """[Q, N]."""
        out = self.alive.new_zeros(len(self.x), len(self.y))
        out[:, self.atoms] = self.alive
        return out

    def share(self):
        """The mass left out is at most this part of the mass kept, [Q]."""
        return sum(
            (n * ((m + self.margin - self.best) / self.variance).exp())[:, 0] for m, n in self.dropped
        ) * (1 + 1e-9)


def cascade(s, basis, step, first, tail, size, scales, rest, shift, facts):
    """Runs a Screen through both levels."""
    (K, d), skew, square = basis.shape, float(facts[0]), s.size**2
    rounding = 8 * UNIT * (d + K) * K**0.5
    at = lambda t: t[s.atoms].double()
    a = s.z @ basis.double().T
    product = (a * step) @ first.transpose(1, 2).reshape(-1, K)[: len(size)].double().T * at(scales[0])
    a2 = a.square().sum(1, keepdim=True)
    reach = ((square - a2).clamp_min(0) + skew * a2 + rounding * (square + a2)).sqrt()
    code = at(size) * (1 + 2.0**-22) + at(shift)  # at least |q step scale|
    width = reach * at(rest[0]) + a2.sqrt() * at(shift) + (skew * a2.sqrt() + rounding * s.size) * code
    left = s.drop(product, at(size) ** 2, width)
    if len(tail):
        product = product[:, left] + s.z @ tail[s.atoms, :d].double().T * at(scales[1])
        code = 4 * at(size)  # of both levels
        s.drop(product, at(size) ** 2, s.size * (at(rest[1]) + rounding * code))
    return s
