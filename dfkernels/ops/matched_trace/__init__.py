"""DF-TM: the Fisher trace from a network that was trained to match it.

paper (eq. 17): tr F ~ d/sigma^2 - (alpha^2/sigma^4)(d m - |mean|^2),  m ~ E|x_0|^2/d,
                mean = (x - sigma eps)/alpha
residual:       tr F ~ (d/sigma^2)(1 - m),  m ~ E|eps_true - eps|^2/d
"""

from __future__ import annotations

from torch import Tensor

from ..._torch import check, library
from .reference import matched_trace as reference

__all__ = ["matched_trace", "reference"]


def _fake(m, eps, x, alpha, sigma, form):
    return m.new_empty(m.shape)


def _cuda(*args):
    from .triton import launch

    return launch(*args)


op = library.define(
    "matched_trace",
    "(Tensor m, Tensor eps, Tensor? x, Tensor alpha, Tensor sigma, str form) -> Tensor",
    fallback=reference,
    fake=_fake,
    cuda=_cuda,
    twin=reference,
    batch=library.folded("matched_trace", "qqqqq-"),
)


def matched_trace(
    m: Tensor, eps: Tensor, alpha, sigma, *, x: Tensor | None = None, form: str = "residual"
) -> Tensor:
    """tr F by trace matching, DF-TM.

    Args:
        m: [B], the trace network's output, dtype of eps.
        eps: [B, *E], the noise prediction, float32 or float64. The residual form reads only its
        shape. alpha, sigma: float, 0-d or [B]; sigma > 0.
        x: [B, *E], the noisy samples; needed by form="paper", refused by the other.
        form: "residual": m ~ |eps_true - eps|^2/d, error of second order in that of eps (prefer
            it); "paper": eq. 17, m ~ |x_0|^2/d.

    Returns [B]; differentiable to any order in every tensor.

    Raises ValueError or TypeError naming the argument; see `posterior` for values.
    """
    flat = check.query("eps", eps)
    check.tensor("m", m)
    if m.shape != eps.shape[:1]:
        raise check.mismatch("m", f"shape [{eps.shape[0]}], one entry per sample", list(m.shape))
    check.same("m", m, "eps", eps)
    check.choice("form", form, ("residual", "paper"))
    if (x is None) == (form == "paper"):
        raise check.mismatch(
            "x",
            f"{'a tensor' if x is None else 'None'} with form={form!r}",
            "None" if x is None else "a tensor",
        )
    flat_x = None if x is None else check.like("x", x, "eps", eps)
    alpha, sigma = check.alpha(alpha, flat), check.sigma(sigma, flat)
    return check.call(op, (m, flat, flat_x, alpha, sigma, form), eps=eps, x=x)
