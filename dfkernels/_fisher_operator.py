"""The Fisher information F = -Hessian of log q_t at the queries, as a batch of linear operators."""

from __future__ import annotations

import torch
from torch import Tensor

from ._torch import check
from ._torch.objects import Object, Watched, plain
from .linalg.cg import power_of_two
from .linalg.operator import LinearOperator

__all__ = ["FisherOperator"]


class FisherOperator(Object, LinearOperator):
    """A Fisher information F [d, d] for each query x at noise level sigma: the base of all its
    forms, `DiffusionFisher` and those of `methods.endpoint`.

    A subclass defines `apply`, and `parameters` and `rebuild` for derivatives of `solve`, as for
    any `LinearOperator`. Vectors have the shape of the queries, and 1/sigma^2 is taken for the size
    of F.

    Args:
        x: [B, *E], float32 or float64; the computation follows its dtype.
        alpha, sigma: float, 0-d or [B]; sigma > 0.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """

    x, alpha, sigma = Watched[Tensor](), Watched[Tensor](), Watched[Tensor]()
    _symbol, _element = "F", "query"

    def __init__(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> None:
        check.query("x", x)
        self.x = x
        # with its graph also under no_grad: results may be differentiated later
        with plain(x.device), torch.set_grad_enabled(True):
            self.alpha, self.sigma = check.alpha(alpha, x), check.sigma(sigma, x)

    @property
    def _x(self) -> Tensor:
        """x for its shape, dtype and device, which a change in place leaves."""
        return FisherOperator.x.peek(self)

    @property
    def shape(self) -> torch.Size:  # pyrefly: ignore[bad-override]  # follows from x
        """(B, d, d)."""
        return torch.Size((self._x.shape[0], self.d, self.d))

    @property
    def d(self) -> int:
        """prod(E)."""
        return self._x.shape[1:].numel()

    @property
    def event_shape(self) -> torch.Size:
        """E."""
        return self._x.shape[1:]

    @property
    def dtype(self) -> torch.dtype:  # pyrefly: ignore[bad-override]  # follows from x
        return self._x.dtype

    @property
    def device(self) -> torch.device:  # pyrefly: ignore[bad-override]  # follows from x
        return self._x.device

    @property
    def T(self) -> FisherOperator:
        """The transpose: F itself."""
        return self

    @property
    def _like(self) -> tuple[str, Tensor]:
        return "x", self.x

    @property
    def _width(self) -> Tensor:
        """The deviation w [B] with which F <= I/w^2."""
        return self.sigma.detach()

    @property
    def _unit(self) -> Tensor:
        return power_of_two(self._width)[:, None]

    @property
    def _size_in_units(self) -> Tensor:
        return (self._unit / self._width[:, None]).square()
