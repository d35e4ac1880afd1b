"""DF-TM: the Fisher trace from a network that was trained to match it.

paper (eq. 17): tr F ~ d/sigma^2 - (alpha^2/sigma^4)(d m - |mean|^2),  m ~ E|x_0|^2/d,
                mean = (x - sigma eps)/alpha
residual:       tr F ~ (d/sigma^2)(1 - m),  m ~ E|eps_true - eps|^2/d
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..._torch import check, diagnosis, library
from ..._torch.types import Level
from .reference import matched_trace as reference

__all__ = ["matched_trace", "reference"]


def _fake(m, eps, x, alpha, sigma, form):
    return m.new_empty(m.shape)


op = library.define(
    "matched_trace",
    "(Tensor m, Tensor eps, Tensor? x, Tensor alpha, Tensor sigma, str form) -> Tensor",
    fallback=reference,
    fake=_fake,
    cuda=library.in_triton(__name__),
    differentiable=reference,
)


def matched_trace(
    m: Tensor,
    eps: Tensor,
    alpha: Level,
    sigma: Level,
    *,
    x: Tensor | None = None,
    form: Literal["residual", "paper"] = "residual",
) -> Tensor:
    """Computes tr F by trace matching, DF-TM, from the output of a trace network.

    Args:
        m: The trace network's output, [B] in eps's dtype.
        eps: The noise prediction, ``[B, *E]``, float32 or float64. The residual form reads only its
            shape.
        alpha: Signal level of each sample, a number or [B].
        sigma: Noise level of each sample, a number or [B], positive.
        x: The noisy samples, ``[B, *E]``; needed by form="paper", refused by the other.
        form: "residual", for m ~ E|eps_true - eps|^2/d, whose error is of second order in that of
            eps (prefer it); "paper" is eq. 17, for m ~ E|x_0|^2/d.

    Returns:
        [B], differentiable to any order in every tensor.

    Raises:
        TypeError, ValueError: As `posterior` does.
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
    given = {"eps": eps} if x is None else {"eps": eps, "x": x}
    return diagnosis.call(op, (m, flat, flat_x, alpha, sigma, form), **given)
