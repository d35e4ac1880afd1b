"""The law that particles are to follow, as its log-density, its score, or both."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..._torch import check
from ..._torch.objects import plain

__all__ = ["Function", "Target"]

Function = Callable[[Tensor], Tensor]


class Target:
    """log_target: [M, *E] -> [M], grad_log_target: [M, *E] -> [M, *E]; one of them at least. Row i
    of a result belongs to row i of x alone.

    Raises:
        TypeError: One is not callable, or both are None.
    """

    def __init__(self, log_target: Function | None, grad_log_target: Function | None) -> None:
        for name, given in (("log_target", log_target), ("grad_log_target", grad_log_target)):
            if given is not None:
                check.function(name, given, "a callable")
        if log_target is None and grad_log_target is None:
            raise TypeError("log_target: expected it or grad_log_target, got None for both")
        self.log_target, self.grad_log_target = log_target, grad_log_target

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(score ``[M, *E]``, log-density [M], or None where only the score is known)."""
        if self.grad_log_target is None:
            with plain(x.device), torch.enable_grad():
                value, score = self._differentiated(x.detach().requires_grad_(), False)
            return score, value.detach()
        score = self.grad_log_target(x)
        _finite("grad_log_target", score, x, x.shape)
        if self.log_target is None:
            return score.detach(), None
        value = self.log_target(x)
        _finite("log_target", value, x, x.shape[:1])
        return score.detach(), value.detach()

    def score_and_pullback(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The score s, and u -> J^T u with its Jacobian J at each particle."""
        with plain(x.device), torch.enable_grad():
            at = x.detach().requires_grad_()
            if self.grad_log_target is None:
                score = self._differentiated(at, True)[1]
            else:
                score = self.grad_log_target(at)
                _finite("grad_log_target", score, x, x.shape)
                if not score.requires_grad:
                    raise _without_graph(
                        "grad_log_target", "and the derivative of the score is used"
                    )

        def pullback(u: Tensor) -> Tensor:
            found = None  # where a log-density is linear in x
            if score.requires_grad:
                (found,) = torch.autograd.grad(score, at, u, allow_unused=True)
            return torch.zeros_like(u) if found is None else found

        return score.detach(), pullback

    def _differentiated(self, at: Tensor, again: bool) -> tuple[Tensor, Tensor]:
        assert self.log_target is not None
        value = self.log_target(at)
        _finite("log_target", value, at, at.shape[:1])
        if not value.requires_grad:
            raise _without_graph("log_target", "and grad_log_target is not given")
        (score,) = torch.autograd.grad(value.sum(), at, create_graph=again)
        _finite("log_target", score, at, at.shape, "a gradient that has ")
        return value, score


def _without_graph(name: str, why: str) -> TypeError:
    return TypeError(
        f"{name}: expected a function of x that autograd can differentiate, got a result without a "
        f"graph, {why}"
    )


def _finite(name: str, out: Tensor, x: Tensor, shape: torch.Size, what: str = "") -> None:
    """Refuses what is no finite tensor of this shape, of the dtype and device of x."""
    check.tensor(name, out)
    if out.shape != shape:
        raise check.mismatch(name, f"a result of shape {[*shape]}", [*out.shape])
    check.same(name, out, "x", x)
    bad = ~out.detach().isfinite().reshape(len(out), -1).all(1)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise check.mismatch(
            name,
            "finite values",
            f"{what}NaN or inf for {int(bad.sum())} of {len(bad)} particles, first for particle "
            f"{at}, where |x| is up to {float(x[at].detach().abs().max()):.1e}; of particles that "
            "have run away the step_size was too large",
        )
