"""What a check found, in sentences."""

from __future__ import annotations

from ..denoiser import Denoiser
from .queries import Queries
from .report import Explanation, explains

__all__ = ["notes_of", "verdict_of"]

_MOST = 3  # a change by which the error falls by this factor explains most of it
CAUSES = {
    "sign": "the output has the wrong sign",
    "flow sign": "the velocity points the other way, as where a flow is eps - x_0",
    "prediction type": "the network predicts something else than prediction_type says",
    "output scale": "the output misses a factor",
    "clock": "the network expects another time than the schedule's t",
    "input scale": "the network expects a state that is scaled in another way",
    "data scale": "the network was trained on data of another scale or with another offset, or a "
    "scale or shift factor was forgotten",
    "noise level": "the network assumes other noise levels than the schedule has: another table of "
    "betas, shifted sigmas, or a zero terminal SNR on one side only",
    "guidance": "the network is guided, and what it then returns is no posterior mean: check and "
    "compute likelihoods without",
    "train mode": "the network is in train mode: call .eval()",
}


def verdict_of(
    cause: str | None, start: Explanation, found: list[Explanation], spread: float
) -> str:
    """The verdict: whether the network fits, what is most likely wrong, and the evidence."""
    error = f"{max(start.errors):.3g}"
    if cause is None:
        text = (
            f"The network fits the data: its posterior mean is within {error} posterior standard "
            "deviations of the exact one at these noise levels."
        )
        if found and explains(found[0], start):
            text += (
                f" But with {found[0].change} the error would fall to {max(found[0].errors):.2g}: "
                f"perhaps {CAUSES[found[0].cause]}."
            )
        return text
    lead = f"The network does not fit the data: its posterior mean is off by up to {error} "
    lead += "posterior standard deviations."
    if cause == "random":
        return (
            f"Two calls of the network with the same input differ by {spread:.2g} posterior "
            "standard deviations: is it in train mode, or does it draw random numbers? " + lead
        )
    if cause == "unknown":
        return f"{lead} {_unexplained(start, found)}"
    best = found[0]
    text = f"Most likely {CAUSES[cause]}. With {best.change} the error falls from {error} to "
    if cause == "train mode" and start.ratio <= 1:
        return f"Two calls with the same input differ by {spread:.2g} posterior standard " + (
            f"deviations: {CAUSES[cause]}."
        )
    others = [e for e in found[1:] if explains(e, start) and e.ratio <= 1.5 * best.ratio]
    also = (
        f" About as well: with {others[0].change}, {max(others[0].errors):.2g}." if others else ""
    )
    return f"{lead} {text}{max(best.errors):.2g}.{also}"


def _unexplained(start: Explanation, found: list[Explanation]) -> str:
    """What is said where no change explains the error: how far the best one goes."""
    tried = f"None of {len(found)} changes of sign, prediction type, scale, clock and data explains"
    asked = (
        "Was the network trained on these data, and long enough, and is it called with the right "
        "conditions, without guidance?"
    )
    if not found:
        return f"{tried} it. {asked}"
    best = found[0]
    error = f"{max(best.errors):.3g}"
    if best.ratio > start.ratio / _MOST:
        better = best.ratio < start.ratio and max(best.errors) < max(start.errors)
        least = f"; with {best.change} it is {error}" if better else " or makes it smaller"
        return f"{tried} it{least}. {asked}"
    return (
        f"{tried} all of it, but one explains most: with {best.change} the error falls from "
        f"{max(start.errors):.3g} to {error}, still {best.ratio:.2g} times what a sound network "
        f"has. Perhaps {CAUSES[best.cause]}, and something else is wrong besides. {asked}"
    )


def notes_of(denoiser: Denoiser, queries: list[Queries], fits: bool) -> tuple[str, ...]:
    """What these levels cannot tell, and what else was noticed."""
    notes = []
    low = queries[0]
    if low.ess < 10:
        notes.append(
            f"At sigma/alpha = {low.sigma / low.alpha:.3g} the ESS is {low.ess:.2g}: there a "
            "network that generalises differs from the exact mean, which memorises."
        )
    ends = [t for t in denoiser.schedule.t_range if t < float("inf")]
    silent = [t for t in ends if denoiser.schedule.alpha(t) == 0]
    if silent and denoiser.prediction_type == "epsilon":
        notes.append(
            f"alpha = 0 at t = {silent[0]:g}: there the noise says nothing of x_0, so that an "
            "'epsilon' network has no x_0 to give; begin at less noise."
        )
    if fits:
        notes.append(
            "These levels say nothing of less noise, nor of errors below what is allowed, such as "
            "a shift of the data by a small part of their standard deviation."
        )
    return tuple(notes)
