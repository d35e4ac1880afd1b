"""The verdict of an audit: what the numbers say beyond their errors, in sentences.

Each finding is "bad", "good", or "unknown" where these data cannot tell. The thresholds have names
in `thresholds`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from ..convention import CheckReport
from . import estimates
from .parts import Errors, Estimate, LevelAudit, LikelihoodAudit, SampleAudit
from .report import Finding
from .thresholds import (
    ASYMMETRIC,
    CLEAR,
    COARSE,
    DIFFERENT,
    ENOUGH_ATOMS,
    FEW_POINTS,
    IMPOSSIBLE,
    LIKELIER,
    MEMORISED,
    MISCALIBRATED,
    OVERFITTED,
    OWN,
    SAME,
    TRACE,
    UNDERTRAINED,
    derivative_error,
)

__all__ = ["doubted", "of_check", "of_data", "of_levels", "of_likelihood", "of_samples"]

Levels = tuple[LevelAudit, ...]
_COMPARISONS = ("memorisation", "likelihood", "copies", "samples")  # findings that need one law


def of_check(check: CheckReport | None, obstacle: str) -> Finding:
    """Whether the conventions are right; a named mistake ends the audit."""
    if check is None:
        text = f"The network's conventions cannot be checked: {obstacle}"
        return Finding("convention", "unknown", text)
    if check.ok:
        return Finding("convention", "good", check.verdict)
    end = "" if check.cause == "unknown" else " All else has no meaning, and was not measured."
    return Finding("convention", "bad", check.verdict + end)


def of_levels(levels: Levels, rounding: float) -> Iterator[Finding]:
    """Whether the network fits, memorises, is a gradient, and knows its errors."""
    yield _fit(levels)
    if any(level.gap is not None for level in levels):
        yield _memorisation(levels)
    yield _gradient(levels, max(ASYMMETRIC, derivative_error(rounding)))
    yield _eigenvalues(levels, max(IMPOSSIBLE, derivative_error(rounding)))
    yield _calibration(levels)


def _fit(levels: Levels) -> Finding:
    other = "the best multiple of x"
    if levels[0].errors.exact is not None:
        other = f"the exact posterior mean of the training data, or {other}"
    excess = {level.noise: _undertrained(level) for level in levels}
    found = [noise for noise, part in excess.items() if part > UNDERTRAINED]
    if found:
        text = (
            f"The network does not fit at sigma/alpha = {_listed(found)}: its mean square error is "
            f"up to {1 + max(excess.values()):.2g} times that of another prediction, {other}. It "
            "is undertrained there, or has learnt too few data by heart."
        )
        return Finding("fit", "bad", text)
    text = (
        f"At no level is the network's mean square error clearly, and by more than "
        f"{UNDERTRAINED:.0%}, above that of another prediction, {other}."
    )
    return Finding("fit", "good", text)


def _undertrained(level: LevelAudit) -> float:
    """By which part the network's error is clearly above that of another prediction, or 0. On
    training data the exact mean is one only where many atoms share the weight: elsewhere it
    memorises.
    """
    errors, found = level.errors, [0.0]
    least = (level.train or errors).network  # what memorises fits the training data all the same
    above = Estimate(least.value - level.baseline, least.error)
    if _clear(above):
        found.append(above.value / level.baseline)
    fair = level.held_out is not None or (errors.ess or 0) >= ENOUGH_ATOMS
    if errors.exact and errors.excess and fair and _clear(errors.excess):
        found.append(errors.excess.value / errors.exact.value)
    return max(found)


def _memorisation(levels: Levels) -> Finding:
    found, below, part, seen = [], [0.0], [0.0], []
    for level in levels:
        gap, memorised, held_out = level.gap, level.memorised, level.held_out
        if not (gap and memorised and level.exact_gap and held_out):
            continue
        own = _part(gap.value, held_out)
        least = min(_part(MEMORISED * level.exact_gap.value, held_out), OWN)
        seen.append(max(_part(CLEAR * gap.error, held_out), least))
        if _clear(gap) and (memorised.value > MEMORISED or own > OWN):
            found.append(level.noise)
            below.append(min(1.0, own))
            part.append(memorised.value)
    if found:
        much = max(part) > OVERFITTED[0] or max(below) > OVERFITTED[1]
        does = "memorises" if much else "begins to memorise"
        text = (
            f"The network {does} at sigma/alpha = {_listed(found)}: its error on training data is "
            f"up to {_percent(max(below))} below that on held-out data, and the difference up to "
            f"{_percent(max(part))} of the exact posterior mean's, which knows nothing else."
        )
        return Finding("memorisation", "bad", text)
    if not seen:
        text = (
            "Of memorisation the errors say nothing: at no level has even the exact posterior mean "
            "a clear difference between training and held-out data."
        )
        return Finding("memorisation", "unknown", text)
    text = (
        "No sign of memorisation in the errors: at no level are those on training data clearly "
        f"below those on held-out data, by more than {OWN:.0%} or {MEMORISED:.0%} of the exact "
        f"posterior mean's difference. One of {_percent(min(seen))} of the network's error would "
        f"show at the most sensitive level, of {_percent(max(seen))} at every one where the exact "
        "mean has any."
    )
    return Finding("memorisation", "good", text)


def _part(difference: float, errors: Errors) -> float:
    """A difference as a part of the network's error."""
    return difference / errors.network.value if errors.network.value else 0.0


def _gradient(levels: Levels, allowed: float) -> Finding:
    found = {
        level.noise: level.jacobian.asymmetry.value
        for level in levels
        if level.jacobian.asymmetry.value - CLEAR * level.jacobian.asymmetry.error > allowed
    }
    if found:
        text = (
            f"The network is not a gradient at sigma/alpha = {_listed(found)}: |J - J^T|/|J| of "
            f"its Jacobian is up to {max(found.values()):.2g}, where a score has 0."
        )
        return Finding("gradient", "bad", text)
    most = max(level.jacobian.asymmetry.value for level in levels)
    text = (
        "The network's Jacobian is symmetric enough for a score: |J - J^T|/|J| is at most "
        f"{most:.2g}, not clearly more than the {allowed:.2g} that is allowed."
    )
    return Finding("gradient", "good", text)


def _eigenvalues(levels: Levels, allowed: float) -> Finding:
    found = [level.noise for level in levels if level.jacobian.impossible > 0]
    most = max(level.jacobian.eigenvalue for level in levels)
    if found:
        text = (
            f"Impossible curvature at sigma/alpha = {_listed(found)}: sigma J has eigenvalues up "
            f"to {most:.3g}. A score has none above 1, since they imply a negative variance of "
            f"x_0; {1 + allowed:.2g} is allowed."
        )
        return Finding("eigenvalues", "bad", text)
    text = (
        f"The largest eigenvalue of sigma J that was found is {most:.3g}. A score has none above "
        f"1; {1 + allowed:.2g} is allowed."
    )
    return Finding("eigenvalues", "good", text)


def _calibration(levels: Levels) -> Finding:
    off = {level.noise: ratio for level in levels if (ratio := _miscalibrated(level)) is not None}
    data = "held-out" if levels[0].held_out else "training"
    if not off:
        text = (
            "The posterior variance by the network's Jacobian is its mean square error on "
            f"{data} data, within {MISCALIBRATED:.0%} or within the errors."
        )
        if not levels[0].held_out:
            text += " That of a network that memorises is so as well."
        return Finding("calibration", "good", text)
    texts = []
    if low := [noise for noise, ratio in off.items() if ratio < 1]:
        least = max(0.0, min(off.values()))
        texts.append(f"too small at sigma/alpha = {_listed(low)} (down to {least:.2g} of it)")
    if high := [noise for noise, ratio in off.items() if ratio > 1]:
        most = max(off.values())
        texts.append(f"too large at sigma/alpha = {_listed(high)} (up to {most:.2g} times it)")
    text = (
        f"The posterior variance by the network's Jacobian is not its mean square error on {data} "
        f"data: it is {', and '.join(texts)}."
    )
    return Finding("calibration", "bad", text)


def _miscalibrated(level: LevelAudit) -> float | None:
    """The ratio of predicted and actual variance where it is clearly not 1, else None. A small
    error of the trace is allowed too, since at high noise (sigma/alpha)^2 multiplies it.
    """
    ratio, actual = level.calibration.ratio, level.calibration.actual.value
    if ratio is None:
        return None
    allowed = max(MISCALIBRATED, CLEAR * ratio.error, TRACE * level.noise**2 / actual)
    return ratio.value if abs(ratio.value - 1) > allowed else None


def of_likelihood(found: LikelihoodAudit) -> Iterator[Finding]:
    """Whether training data are more likely than held-out data."""
    if found.gap is None:
        return
    gap = f"{found.gap} nats per number"
    if found.integration > found.gap.error:
        gap += f" (the integration is known to {found.integration:.1g} only)"
    sure = Estimate(found.gap.value - found.integration, found.gap.error)
    if _clear(sure) and sure.value > LIKELIER:
        text = f"Training data are more likely than held-out data, by {gap}."
        yield Finding("likelihood", "bad", text)
        return
    text = (
        f"Training data are not clearly, and by more than {LIKELIER:.2g} nats per number, more "
        f"likely than held-out data: the difference is {gap}."
    )
    yield Finding("likelihood", "good", text)


def of_samples(found: SampleAudit) -> Iterator[Finding]:
    """Whether samples are as far from the training data as other data are, or copies of them, and
    whether these others are training data themselves. Near are also samples without detail: as a
    sign of copies that counts beside another one only.
    """
    yield from _overlap(found)
    yield from _farness(found)
    n = found.count
    ratio = _beyond(found.ratio, found.chance_ratio)
    # a point that is of both kinds counts as one of the training data
    side = _beyond(found.train_side, Estimate((1 + _shared(found)) / 2, 0.0))
    closer = _beyond(found.closer, Estimate(found.expected or 0.0, 0.0))
    texts = [
        ratio and f"{ratio} have a nearest training atom three times nearer than all others",
        side
        and f"{side} are nearer to the training than to the held-out data, of as many of either",
        closer
        and f"{closer} are nearer to a training atom than {1 - (found.expected or 0):.0%} of "
        "held-out data",
    ]
    if ratio or side:
        said = "; ".join(text for text in texts if text)
        text = f"Among {n} samples there are copies of training data: {said}."
        yield Finding("copies", "bad", text)
        return
    text = (
        f"No clear sign of copies among {n} samples: they are no nearer to the training data than "
        "by chance."
    )
    if closer:
        text = (
            f"Of {n} samples, {texts[2]}, but no sign says that they are copies: they may lack "
            "detail."
        )
    yield Finding("copies", "unknown" if closer else "good", text)


def _farness(found: SampleAudit) -> Iterator[Finding]:
    """Whether more than half of the samples are beyond the median distance of held-out points that
    are no training data, which is itself known as well as their number allows.
    """
    held_out = found.held_out_distances
    if held_out is None or _shared(found) == 1:
        return
    fresh = held_out[round(_shared(found) * len(held_out)) :]  # they rise
    share = estimates.share(found.distances > fresh.median())
    if farther := _beyond(share, Estimate(0.5, 0.5 / math.sqrt(len(fresh)))):
        text = (
            f"Of {found.count} samples, {farther} are farther from the training data than half of "
            "the held-out data are: samples are blurred, or not like data."
        )
        yield Finding("samples", "bad", text)


def _overlap(found: SampleAudit) -> Iterator[Finding]:
    """Whether held-out points are training data."""
    distances, shared = found.held_out_distances, _shared(found)
    if distances is None or not shared:
        return
    text = (
        f"{round(shared * len(distances))} of {len(distances)} held-out points are also training "
        "data: of memorisation, likelihood and copies they tell nothing."
    )
    yield Finding("limits", "bad" if shared > 0.5 else "unknown", text)


def _shared(found: SampleAudit) -> float:
    """The share of held-out points that are training data."""
    distances = found.held_out_distances
    if distances is None:
        return 0.0
    size = found.samples.double().square().mean().sqrt()
    return (distances <= SAME * size).double().mean().item()


def _beyond(share: Estimate | None, chance: Estimate) -> str:
    """A share that is clearly beyond chance, in words; else nothing."""
    if share is None:
        return ""
    error = math.hypot(share.error, chance.error)
    if not _clear(Estimate(share.value - chance.value, error)):
        return ""
    return f"{share.value:.0%} (by chance {_percent(chance.value)})"


def of_data(
    train: int | None, held_out: int | None, rounding: float, levels: Levels
) -> Iterator[Finding]:
    """What these data, and the network's precision, cannot tell."""
    texts = []
    if train is None:
        texts.append(
            "Without its training data nothing can be said of memorisation, of the exact posterior "
            "mean, or of copies among the samples."
        )
    if held_out is None:
        texts.append(
            "Without held-out data nothing can be said of memorisation: all errors are those on "
            "training data."
        )
    for kind, count in (("training", train), ("held-out", held_out)):
        if count is not None and count < FEW_POINTS:
            texts.append(
                f"{count} {kind} points are few: their standard errors are rough, and only large "
                "differences are beyond them."
            )
    if rounding > COARSE:
        texts.append(
            f"The network computes in half precision (rounding {rounding:.1g}): its Jacobian is "
            "known roughly only."
        )
    if _two_laws(levels):
        texts.append(
            "A multiple of x, which cannot memorise, has other errors on held-out than on training "
            "data: the two do not follow the same law, and comparisons of them are doubtful."
        )
    yield from (Finding("limits", "unknown", text) for text in texts)


def doubted(findings: Iterable[Finding], levels: Levels) -> Iterator[Finding]:
    """The findings: "unknown" in place of "bad" where they compare data of two laws."""
    two = _two_laws(levels)
    for found in findings:
        if two and found.status == "bad" and found.name in _COMPARISONS:
            text = f"{found.text} The two kinds of data follow different laws: that may be why."
            yield Finding(found.name, "unknown", text)
        else:
            yield found


def _two_laws(levels: Levels) -> bool:
    """Whether the best multiple of x has clearly other errors on held-out than on training data, at
    the highest level, where these are the data's variances.
    """
    if not levels or (gap := levels[-1].linear_gap) is None:
        return False
    size = abs(gap.value)
    return _clear(Estimate(size, gap.error)) and size > DIFFERENT * levels[-1].baseline


def _clear(estimate: Estimate) -> bool:
    """Whether a number is above 0 by more than chance."""
    return estimate.value > CLEAR * estimate.error


def _percent(part: float) -> str:
    return f"{part:.0%}" if part > 0.095 else f"{100 * part:.1g}%"


def _listed(noise: Iterable[float]) -> str:
    return ", ".join(f"{level:.3g}" for level in noise)
