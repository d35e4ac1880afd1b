"""The straight flow of NSGF++, from a time of each point's own."""

from __future__ import annotations

from torch import Tensor

from ..._torch import check
from ...schedule import RectifiedFlow
from .._reporting import Callback, reporting
from ..denoiser import Denoiser, expect_denoiser

__all__ = ["straight_flow"]


def straight_flow(
    denoiser: Denoiser,
    x: Tensor,
    t: float | Tensor,
    *,
    steps: int,
    callback: Callback | None = None,
    progress: bool = False,
    **conditions: object,
) -> Tensor:
    """Moves points along the straight flow from their own times t to 1, in equal Euler steps: the
    second phase of NSGF++ (Algorithm 4).

    A step from t to t' is x <- x + (t' - t) (mean - x)/(1 - t), with mean = x + (1 - t) u(x, t) the
    denoiser's. The last one therefore ends at a mean, which is a point of the data where the flow
    has decided for one.

    Args:
        denoiser: `Denoiser(u, RectifiedFlow(), "flow")` of a network that `reflow.loss` trained,
            or `Denoiser.exact(cloud, RectifiedFlow())`.
        x: Points ``[B, *E]``, float32 or float64, such as the end of `sample`.
        t: The time of each, a number or [B], in [0, 1): what a `TimePredictor` or `time_posterior`
            says, or 0 for points of the source.
        steps: How many, each of (1 - t)/steps.
        callback: Called as callback(done, steps) after each step.
        progress: Whether to show a bar on stderr.
        conditions: Keyword arguments of the network, such as class labels.

    Differentiable through the denoiser; sample under torch.no_grad() otherwise.

    Returns:
        The points at t = 1, ``[B, *E]``.

    Raises:
        TypeError, ValueError: An argument is wrong, or the network returns another shape, NaN or
            inf; the message names it.
    """
    check.query("x", x)
    steps = check.integer("steps", steps, 1)
    expect_denoiser(denoiser)
    if not isinstance(denoiser.schedule, RectifiedFlow):
        raise check.mismatch("denoiser", "the schedule RectifiedFlow()", repr(denoiser.schedule))
    t = check.per_query("t", t, x).double()
    if not check.values_hidden(t) and not bool(((t >= 0) & (t < 1)).all()):
        at = t[~((t >= 0) & (t < 1))][0].item()
        raise check.mismatch("t", "times in [0, 1)", f"{at:g}")
    denoiser.warn_in_training("straight_flow")
    denoiser = denoiser.bind(**conditions)
    with reporting("straight_flow", callback, progress, steps) as report:
        for k in range(steps):
            mean = denoiser(x, t + (1 - t) * (k / steps))
            x = x + (mean - x) / (steps - k)  # (t' - t)/(1 - t) of the k-th step
            report(k + 1, steps)
    return x
