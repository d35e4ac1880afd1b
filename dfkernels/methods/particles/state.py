"""Particles: positions, weights and velocities."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._torch import check, diagnosis
from ..._torch.objects import ordinary, plain

__all__ = ["Particles"]


@dataclass(frozen=True, eq=False, init=False)
class Particles:
    """M weighted particles with velocities: all that a flow needs to go on from, and what it
    returns. `torch.save` takes it.

    Args:
        x: Positions ``[M, *E]``, M >= 1, float32 or float64: the dtype of computation. Values are
            detached, and not copied.
        log_w: Log weights [M] in the dtype of x, normalised here; -inf is a weight of zero. None:
            equal ones.
        v: Velocities ``[M, *E]``. None: at rest.

    Raises:
        TypeError: A type or dtype is wrong; the message names the argument.
        ValueError: So for a shape, a device or a value that is not finite.
    """

    x: Tensor
    log_w: Tensor
    v: Tensor

    def __init__(self, x: Tensor, log_w: Tensor | None = None, v: Tensor | None = None) -> None:
        check.query("x", x)
        if x.numel() == 0:
            raise check.mismatch(
                "x", "shape [M, *E] with M >= 1 and no empty dimension", [*x.shape]
            )
        diagnosis.finite("x", x.detach())
        with plain(x.device), torch.no_grad():
            if log_w is None:
                log_w = x.new_zeros(len(x))
            if v is None:
                v = torch.zeros_like(x)
            check.like("v", v, "x", x)
            diagnosis.finite("v", v.detach())
            log_w = _checked_weights(log_w, x)
        self._set(ordinary(x.detach()), log_w, ordinary(v.detach()))

    def _set(self, x: Tensor, log_w: Tensor, v: Tensor) -> None:
        for name, value in (("x", x), ("log_w", log_w), ("v", v)):
            object.__setattr__(self, name, value)

    @classmethod
    def _of(cls, x: Tensor, log_w: Tensor, v: Tensor) -> Particles:
        """What a step has made, without a look at the values."""
        made = cls.__new__(cls)
        made._set(x, log_w, v)
        return made

    def __len__(self) -> int:
        return len(self.x)

    @property
    def weights(self) -> Tensor:
        """exp(log_w) [M]; their sum is 1."""
        return self.log_w.exp()

    @property
    def ess(self) -> float:
        """The effective sample size of the weights, 1/sum w_i^2, from 1 to M."""
        return math.exp(-float((2 * self.log_w.double()).logsumexp(0)))

    @property
    def _rows(self) -> Tensor:
        """x as [M, d]."""
        return self.x.reshape(len(self.x), -1)

    def __repr__(self) -> str:
        event = tuple(self.x.shape[1:])
        return f"Particles(M={len(self)}, event_shape={event}, {self.x.dtype}, ess={self.ess:.1f})"


def _checked_weights(log_w: Tensor, x: Tensor) -> Tensor:
    check.tensor("log_w", log_w)
    check.same("log_w", log_w, "x", x)
    if log_w.shape != x.shape[:1]:
        raise check.mismatch("log_w", f"shape [{len(x)}], one per particle", [*log_w.shape])
    given = log_w.detach()
    bad = torch.isnan(given) | (given == math.inf)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise check.mismatch("log_w", "values < inf and not nan", f"{given[at]} at index [{at}]")
    if not bool((given > -math.inf).any()):
        raise check.mismatch("log_w", "at least one finite value", "all -inf")
    return given.log_softmax(0)
