"""Anderson's acceleration of a fixed-point iteration."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

__all__ = ["Anderson"]


class Anderson:
    """Proposes the next iterate of g <- G(g), from the last ones and their images.

    It is the affine combination of the last images whose residual, G(g) - g to first order, is the
    least in the norm of the weights: near the solution GMRES, which needs no estimate of how fast
    the plain iteration converges, as over-relaxation does.
    """

    _MEMORY = 10  # differences; more save few passes, and each is a vector to keep
    _RIDGE = 1e-6  # of the normal equations, since images are rounded

    def __init__(self, weights: Tensor) -> None:
        self._root = weights.sqrt()
        self._images: deque[Tensor] = deque(maxlen=self._MEMORY + 1)
        self._residuals: deque[Tensor] = deque(maxlen=self._MEMORY + 1)

    def forget(self) -> None:
        """Drops what came before, so that the next step is the plain one."""
        self._images.clear()
        self._residuals.clear()

    def next(self, g: Tensor, image: Tensor) -> Tensor:
        """The iterate after g, whose image G(g) is known."""
        residual = self._root * (image - g)
        steps = [r - residual for r in self._residuals]
        moves = [i - image for i in self._images]
        self._images.append(image)
        self._residuals.append(residual)
        kept = [k for k, step in enumerate(steps) if bool(step.any())]
        if not kept:
            return image
        step, move = (torch.stack([t[k] for k in kept], 1) for t in (steps, moves))
        size = step.norm(dim=0)
        step, move = step / size, move / size
        normal = step.T @ step + self._RIDGE * torch.eye(len(kept), dtype=g.dtype, device=g.device)
        return image - move @ torch.linalg.solve(normal, step.T @ residual)
