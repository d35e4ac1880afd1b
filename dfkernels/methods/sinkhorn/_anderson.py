"""Anderson's acceleration of fixed-point iterations."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Anderson"]


class _Past(NamedTuple):
    image: Tensor  # [G, m]
    residual: Tensor  # [G, m]
    known: Tensor  # [G]: whether it counts

    def of(self, problems: Tensor) -> _Past:
        return _Past(*(t[problems] for t in self))


class Anderson:
    """Proposes the next iterates of g <- G(g), from the last ones and their images, [G, m].

    Each is the affine combination of the last images whose residual, G(g) - g to first order, is
    the least in the norm of the weights: near the solution GMRES, which needs no estimate of how
    fast the plain iteration converges, as over-relaxation does.
    """

    _MEMORY = 10  # differences; more save few passes, and each is a vector to keep
    _RIDGE = 1e-6  # of the normal equations, since images are rounded

    def __init__(self, weights: Tensor) -> None:
        self._root = weights.sqrt()
        self._past: deque[_Past] = deque(maxlen=self._MEMORY + 1)

    def forget(self, where: Tensor) -> None:
        """Drops what came before, so that the next step is the plain one, of some problems [G]."""
        self._past = deque(
            (p._replace(known=p.known & ~where) for p in self._past), self._past.maxlen
        )

    def keep(self, problems: Tensor) -> None:
        """Goes on with these problems only."""
        self._root = self._root[problems]
        self._past = deque((p.of(problems) for p in self._past), self._past.maxlen)

    def next(self, g: Tensor, image: Tensor) -> Tensor:
        """The iterates after g, whose images G(g) are known."""
        residual = self._root * (image - g)
        past = list(self._past)
        self._past.append(_Past(image, residual, torch.ones_like(g[:, 0], dtype=torch.bool)))
        if not past:
            return image
        step = torch.stack([p.residual - residual for p in past], 1)
        move = torch.stack([p.image - image for p in past], 1)
        size = step.norm(dim=2)
        known = torch.stack([p.known for p in past], 1) & (size > 0)
        scale = torch.where(known, 1 / size, 0)[..., None]
        step, move = step * scale, move * scale
        normal = step @ step.mT + self._RIDGE * torch.eye(len(past), dtype=g.dtype, device=g.device)
        part = torch.linalg.solve(normal, step @ residual[..., None])
        return image - (part.mT @ move)[:, 0]
