"""The verdict of an audit: what the numbers say beyond their errors, in sentences.

Each finding is "bad", "good", or "unknown" where these data cannot tell. The thresholds have names
in `thresholds`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from ..convention import CheckReport
from .parts import Estimate, LevelAudit, LikelihoodAudit, SampleAudit
from .report import Finding
from .thresholds import (
    ASYMMETRIC,
    CLEAR,
    COARSE,
    ENOUGH_ATOMS,
    FEW_POINTS,
    IMPOSSIBLE,
    MEMORISED,
    MISCALIBRATED,
    UNDERTRAINED,
    derivative_error,
)

__all__ = ["of_check", "of_data", "of_levels", "of_likelihood", "of_samples"]


def of_check(check: CheckReport | None, obstacle: str) -> Finding:
    """Whether the conventions are right; a named mistake ends the audit."""
    if check is None:
        return Finding(
            "convention", "unknown", f"The network's conventions cannot be checked: {obstacle}"
        )
    if check.ok:
        return Finding("convention", "good", check.verdict)
    end = "" if check.cause == "unknown" else " All else has no meaning, and was not measured."
    return Finding("convention", "bad", check.verdict + end)


def of_data(
    train: int | None, held_out: int | None, rounding: float, levels: tuple[LevelAudit, ...]
) -> Iterator[Finding]:
    """What these data, and the network's precision, cannot tell."""
    if train is None:
        yield _unknown(
            "Without its training data nothing can be said of memorisation, of the exact posterior "
            "mean, or of copies among the samples."
        )
    if held_out is None:
        yield _unknown(
            "Without held-out data nothing can be said of memorisation or of chance among the "
            "distances of samples, and all errors are those on training data."
        )
    elif held_out < FEW_POINTS:
        yield _unknown(
            f"{held_out} held-out points are few: only large differences are beyond their errors, "
            "and a share of 1 % cannot be seen."
        )
    if rounding > COARSE:
        yield _unknown(
            f"The network computes in half precision (rounding {rounding:.1g}): its Jacobian is "
            "known roughly only, and an asymmetry or an eigenvalue may be rounding."
        )
    odd = [level for level in levels if level.gap and _clear(_negative(level.gap))]
    if odd:
        yield _unknown(
            f"At sigma/alpha = {_at(odd)} the error on held-out data is below that on training "
            "data: the two do not follow the same law, and comparisons of them are doubtful."
        )


def of_levels(levels: tuple[LevelAudit, ...], rounding: float) -> Iterator[Finding]:
    """Whether the network fits, memorises, is a gradient, and knows its errors."""
    yield _fit(levels)
    if any(level.gap is not None for level in levels):
        yield _memorisation(levels)
    yield _gradient(levels, max(ASYMMETRIC, derivative_error(rounding)))
    yield _eigenvalues(levels, max(IMPOSSIBLE, derivative_error(rounding)))
    yield _calibration(levels)


def _fit(levels: tuple[LevelAudit, ...]) -> Finding:
    excess = {level.noise: part for level in levels if (part := _undertrained(level))}
    if excess:
        most = max(excess.values())
        return Finding(
            "fit",
            "bad",
            f"The network is undertrained at sigma/alpha = {_listed(excess)}: its mean square error "
            f"there is up to {1 + most:.2g} times that of a simpler prediction, the exact posterior "
            "mean of the training data or a multiple of x.",
        )
    return Finding(
        "fit",
        "good",
        "At no level is the network's error clearly above that of a simpler prediction, the exact "
        "posterior mean of the training data or a multiple of x.",
    )


def _undertrained(level: LevelAudit) -> float:
    """By which part the network's error is clearly above that of a simpler prediction, or 0. On
    training data the exact mean is one only where many atoms share the weight: elsewhere it
    memorises.
    """
    errors, found = level.errors, [0.0]
    above = Estimate(errors.network.value - level.baseline, errors.network.error)
    if _clear(above):
        found.append(above.value / level.baseline)
    fair = level.held_out is not None or (errors.ess or 0) >= ENOUGH_ATOMS
    if errors.exact and errors.excess and fair and _clear(errors.excess):
        found.append(errors.excess.value / max(errors.exact.value, 1e-300))
    return max(found) if max(found) > UNDERTRAINED else 0.0


def _memorisation(levels: tuple[LevelAudit, ...]) -> Finding:
    clear = [
        level
        for level in levels
        if level.gap and _clear(level.gap) and level.memorised and level.train
    ]
    found = [level for level in clear if level.memorised.value > MEMORISED]
    if found:
        part = max(level.memorised.value for level in found)
        below = max(
            level.gap.value / (level.gap.value + level.train.network.value) for level in found
        )
        return Finding(
            "memorisation",
            "bad",
            f"The network memorises at sigma/alpha = {_at(found)}: its error on training data is up "
            f"to {below:.0%} below that on held-out data, {part:.0%} of the difference that the "
            "exact posterior mean has, which knows nothing but the training data.",
        )
    seen = [
        (abs(level.gap.value) + CLEAR * level.gap.error) / level.held_out.network.value
        for level in levels
        if level.gap and level.held_out
    ]
    return Finding(
        "memorisation",
        "good",
        "No sign of memorisation in the errors: on training data they are nowhere clearly below "
        f"those on held-out data (a difference of {max(seen):.0%} would show at every level).",
    )


def _gradient(levels: tuple[LevelAudit, ...], allowed: float) -> Finding:
    def beyond(level: LevelAudit) -> bool:
        found = level.jacobian.asymmetry
        return found.value - CLEAR * found.error > allowed

    found = [level for level in levels if beyond(level)]
    most = max(level.jacobian.asymmetry.value for level in found or levels)
    if found:
        return Finding(
            "gradient",
            "bad",
            f"The network is not a gradient at sigma/alpha = {_at(found)}: the antisymmetric part "
            f"of its Jacobian makes |J - J^T|/|J| up to {most:.2g}, where a score has 0.",
        )
    return Finding(
        "gradient",
        "good",
        "The network's Jacobian is symmetric enough for a gradient: |J - J^T|/|J| is at most "
        f"{most:.2g}, and {allowed:.2g} is allowed.",
    )


def _eigenvalues(levels: tuple[LevelAudit, ...], allowed: float) -> Finding:
    found = [level for level in levels if level.jacobian.impossible > 0]
    most = max(level.jacobian.eigenvalue for level in found or levels)
    if found:
        return Finding(
            "eigenvalues",
            "bad",
            f"Impossible curvature at sigma/alpha = {_at(found)}: sigma J has eigenvalues up to "
            f"{most:.3g}, and a score none above 1: the variance of x_0 that they imply is "
            "negative.",
        )
    return Finding(
        "eigenvalues",
        "good",
        f"No impossible curvature: the largest eigenvalue of sigma J that was found is {most:.3g}, "
        f"and a score has none above 1 ({allowed:.2g} above is allowed).",
    )


def _calibration(levels: tuple[LevelAudit, ...]) -> Finding:
    ratios = {level.noise: level.calibration.ratio for level in levels if level.calibration.ratio}
    off = {
        noise: ratio.value
        for noise, ratio in ratios.items()
        if abs(ratio.value - 1) > max(MISCALIBRATED, CLEAR * ratio.error)
    }
    data = "held-out" if levels[0].held_out else "training"
    if not off:
        return Finding(
            "calibration",
            "good",
            "The posterior variance by the network's Jacobian is its mean square error on "
            f"{data} data, within {MISCALIBRATED:.0%} or within the errors.",
        )
    texts = []
    if low := [noise for noise, ratio in off.items() if ratio < 1]:
        least = max(0.0, min(off.values()))
        texts.append(f"too small at sigma/alpha = {_listed(low)} (down to {least:.2g} of it)")
    if high := [noise for noise, ratio in off.items() if ratio > 1]:
        most = max(off.values())
        texts.append(f"too large at sigma/alpha = {_listed(high)} (up to {most:.2g} times as large)")
    return Finding(
        "calibration",
        "bad",
        "The posterior variance by the network's Jacobian is not its mean square error on "
        f"{data} data: {', and '.join(texts)}.",
    )


def of_likelihood(found: LikelihoodAudit) -> Iterator[Finding]:
    """Whether training data are more likely than held-out data."""
    if found.gap is None:
        return
    noise = math.hypot(found.gap.error, found.integration)
    gap = Estimate(found.gap.value, noise)
    if _clear(gap):
        yield Finding(
            "likelihood",
            "bad",
            f"Training data are more likely than held-out data, by {gap} nats per number: the "
            "network knows them.",
        )
    else:
        yield Finding(
            "likelihood",
            "good",
            "Training data are not clearly more likely than held-out data: the difference is "
            f"{gap} nats per number.",
        )


def of_samples(found: SampleAudit) -> Iterator[Finding]:
    """Whether samples are copies of training data."""
    texts = [
        text
        for share, expected, text in (
            (
                found.ratio,
                found.chance_ratio,
                "lie at less than a third of the second nearest training atom's distance from the "
                "nearest",
            ),
            (found.closer, found.expected, "are nearer to a training atom than held-out data are"),
            (found.train_side, 0.5, "are nearer to the training than to the held-out data"),
        )
        if share is not None and _clear(_above(share, expected))
        for text in [f"{share.value:.0%} {text} (by chance {_value(expected):.1%})"]
    ]
    if texts:
        yield Finding(
            "copies",
            "bad",
            f"Of {found.count} samples there are copies of training data: {'; '.join(texts)}.",
        )
        return
    yield Finding(
        "copies",
        "good",
        f"No clear sign of copies among {found.count} samples: their distances to the training data "
        "are those of chance.",
    )


def _unknown(text: str) -> Finding:
    return Finding("limits", "unknown", text)


def _clear(estimate: Estimate) -> bool:
    return estimate.value > CLEAR * estimate.error


def _negative(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.value, estimate.error)


def _value(number: float | Estimate | None) -> float:
    return number.value if isinstance(number, Estimate) else float(number or 0)


def _above(share: Estimate, expected: float | Estimate | None) -> Estimate:
    error = expected.error if isinstance(expected, Estimate) else 0.0
    return Estimate(share.value - _value(expected), math.hypot(share.error, error))


def _at(levels: Sequence[LevelAudit]) -> str:
    return _listed([level.noise for level in levels])


def _listed(noise: Iterable[float]) -> str:
    return ", ".join(f"{level:.3g}" for level in noise)
