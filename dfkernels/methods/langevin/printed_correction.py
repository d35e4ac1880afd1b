"""The correction of the published code of LML."""

from __future__ import annotations

from torch import Tensor

from ..._torch import check

__all__ = ["printed_correction"]


def printed_correction(
    n: Tensor, damping: float, previous: Tensor | None = None, kappa: float = 0.0
) -> Tensor:
    """Applies the correction of the published code of LML to the contribution n that a network
    makes to a step: for comparison, since by default it is the identity but for rounding.

        e = kappa previous + (1 - kappa) n
        m = n - e <n, e>/(damping + |e|^2) = damping (damping I + e e^T)^{-1} n
        n' = m |n|/|m|

    With kappa = 0, its value in all of the paper's scripts, e = n, and m is n times
    damping/(damping + |n|^2), which n' takes out again. In floating point m is the difference of
    nearly equal vectors, and n' is n turned by an angle of about eps (damping + |n|^2)/damping, eps
    the rounding of the dtype, in a direction that only the rounding decides: noise. With kappa > 0
    it extrapolates along n - previous. In no case does e e^T, which is positive and of rank one,
    stand for the Fisher information, which is of full rank and often indefinite.

    Every product and quotient is rounded where the published code rounds it, since rounding is all
    that comes out; the order in which sums are added up is that of torch.

    Args:
        n: ``[B, *E]``, floating: eps, an increment, a velocity.
        damping: lamb, > 0; compared with |n|^2, so that its meaning depends on d and on what n is.
        previous: ``[B, *E]``, the last n; None with kappa = 0.
        kappa: The weight of the last n, from 0 to 1.

    Returns:
        n', ``[B, *E]``; NaN where all digits of m cancel.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    rows = check.query("n", n)
    damping, kappa = check.positive("damping", damping), check.constant("kappa", kappa)
    if not 0 <= kappa <= 1:
        raise check.mismatch("kappa", "a number from 0 to 1", kappa)
    if (previous is None) != (kappa == 0):
        came = "None" if previous is None else "a tensor"
        raise check.mismatch("previous", "the last n with kappa > 0, else None", came)
    e = rows
    if previous is not None:
        e = kappa * check.like("previous", previous, "n", n) + (1 - kappa) * rows
    square = rows.square().sum(1, keepdim=True)
    m = rows - e * (rows * e).sum(1, keepdim=True) / (damping + e.square().sum(1, keepdim=True))
    return (m * square.sqrt() / m.square().sum(1, keepdim=True).sqrt()).view(n.shape)
