"""What a check found, and how it says so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .queries import Queries

__all__ = ["CheckReport", "CheckedLevel", "Explanation", "explains", "judged", "overrules"]


class CheckedLevel(NamedTuple):
    """A network beside the exact posterior mean at one noise level."""

    t: float
    alpha: float
    sigma: float
    ess: float  # the median effective number of atoms
    error: float  # root mean square of the difference, in posterior standard deviations
    allowed: float  # the error up to which the network fits
    of_data_mean: float  # the error of the data's mean as a prediction


class Explanation(NamedTuple):
    """A change that was tried, and the error with it at each level that it was tried at."""

    cause: str  # one of the causes in the table of `check`
    change: str  # as in: with ... the error falls
    errors: tuple[float, ...]
    ratio: float  # the largest error in units of what is allowed
    changes: int = 1  # how many conventions it changes
    fitted: int = 0  # how many numbers it fits

    @property
    def rank(self) -> float:
        """What explanations are sorted by: the ratio, more for what changes or fits more."""
        return self.ratio * (0.75 + (self.changes + self.fitted) / 4)


def judged(
    cause: str,
    change: str,
    queries: list[Queries],
    means: Sequence[Tensor],
    changes: int = 1,
    fitted: int = 0,
) -> Explanation:
    """The errors of means, and the largest in units of what is allowed."""
    errors = [q.error(mean) for q, mean in zip(queries, means, strict=True)]
    ratio = max(error / q.allowed for q, error in zip(queries, errors, strict=True))
    return Explanation(cause, change, tuple(errors), ratio, changes, fitted)


def explains(found: Explanation, start: Explanation) -> bool:
    """Whether a change makes the error of a network that of a sound one, or so much less that the
    rest has another cause. The more it changes, or fits, the more is asked for.
    """
    gain, most = _gain(found, start), found.ratio
    if start.ratio <= 1:
        return gain >= 3
    if found.fitted:
        return most <= 1 and gain >= 4
    if found.changes > 1:
        return (most <= 1 and gain >= 4) or (most <= 1.5 and gain >= 25)
    return (most <= 1 and gain >= 2) or (most <= 2.5 and gain >= 10)


def overrules(found: Explanation, start: Explanation) -> bool:
    """Whether a change explains so much of an error that is allowed that it cannot be chance."""
    return explains(found, start) and _gain(found, start) >= (8 if found.fitted else 4)


def _gain(found: Explanation, start: Explanation) -> float:
    """The factor by which the error falls, in units of what is allowed, and at some level also in
    its own: other data or noise levels may allow more.
    """
    falls = [a / max(b, 1e-30) for a, b in zip(start.errors, found.errors, strict=True)]
    return min(max(falls), start.ratio / max(found.ratio, 1e-30))


@dataclass(frozen=True)
class CheckReport:
    """What `check` found; `print` shows it as a table with the verdict below.

    Attributes:
        ok: whether the network fits the data at all levels.
        cause: what is most likely wrong: a cause of the table in `check`, "unknown" where no
            explanation was found, or None if ok.
        verdict: what was found, in sentences.
        levels: the numbers behind it, noise rising.
        explanations: what was tried, best first; empty where two calls agree and the error is at
            most 0.3 of what is allowed, so that nothing was.
        notes: what the levels cannot tell, and what else was noticed.
        evaluations: calls of the network.
    """

    ok: bool
    cause: str | None
    verdict: str
    levels: tuple[CheckedLevel, ...]
    explanations: tuple[Explanation, ...]
    notes: tuple[str, ...]
    evaluations: int

    def __str__(self) -> str:
        head = "sigma/alpha         t     ESS     error  allowed  error of the data's mean"
        rows = [
            f"{level.sigma / level.alpha:11.4g} {level.t:9.4g} {level.ess:7.0f} {level.error:9.3g} "
            f"{level.allowed:8.2g}  {level.of_data_mean:8.2g}"
            for level in self.levels
        ]
        notes = [f"Note: {note}" for note in self.notes]
        return "\n".join([head, *rows, self.verdict, *notes])
