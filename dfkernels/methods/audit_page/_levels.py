"""The figures over the noise level."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ..._page.theme import Theme
from ..audit.parts import LevelAudit
from ._curves import HELD_OUT, TRAIN, Curve, Levels, Pick, curve, draw, noise_axis, reference

_BEYOND = 10  # what is not the network's is shown as far as this factor beyond the network's
_LEAST = 1e-3  # no smaller part of the best multiple's error is shown: the network knows the datum


def errors(levels: Levels, theme: Theme) -> Figure:
    """Mean square errors of the network and of the exact mean; the ESS below."""
    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.6, 1))
    network, exact, least = theme.series
    near, far = [], [curve(levels, lambda level: level.best, _baseline)]
    draw(top, far[0], least, "least possible, training law", linestyle=(0, (1, 1)))
    for what, kind, look in _kinds():
        far.append(curve(levels, _error(kind, "exact"), _baseline))
        draw(top, far[-1], exact, f"exact mean, {what}", **look)
        near.append(curve(levels, _error(kind, "network"), _baseline))
        draw(top, near[-1], network, f"network, {what}", **look)
        pairs = [(u.noise, e.ess) for u in levels if (e := getattr(u, kind)) and e.ess is not None]
        if pairs:
            bottom.plot(*zip(*pairs, strict=True), color=exact, label=what, **look)
    reference(top, 1, "best\nmultiple\nof x", theme.faint)
    top.set_yscale("log")
    top.set_ylim(*_limits(near, far))
    _plain_numbers(top)
    top.set_ylabel("mean square error of x₀,\nover that of the best multiple of x")
    top.legend(fontsize=8, ncols=2)
    if bottom.lines:
        bottom.set_yscale("log")
        bottom.set_ylabel("effective number\nof atoms (ESS)")
        _plain_numbers(bottom)
        bottom.legend(fontsize=8)
    else:
        bottom.remove()
    noise_axis(bottom if bottom.lines else top)
    return figure


def gap(levels: Levels, theme: Theme) -> Figure:
    """How much larger the errors are on held-out data, and as a share of the exact mean's."""
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    network, exact, _ = theme.series
    shown = curve(levels, lambda level: level.gap, _baseline)
    exactly = curve(levels, lambda level: level.exact_gap, _baseline)
    draw(left, exactly, exact, "exact mean", **HELD_OUT)
    draw(left, shown, network, "network", **HELD_OUT)
    reference(left, 0, "none", theme.faint)
    most = max(1e-3, np.nanmax(np.abs(shown.value) + 2 * shown.error, initial=0))
    least = min(0, np.nanmin(shown.value - 2 * shown.error, initial=0))
    left.set_ylim(
        least - 0.2 * most, min(4 * most, 1.2 * max(most, np.nanmax(exactly.value, initial=0)))
    )
    left.set_ylabel("error on held-out − on training data,\nover that of the best multiple of x")
    left.legend(fontsize=8, loc="upper right")
    draw(right, curve(levels, lambda u: u.memorised), network, "network", **HELD_OUT)
    reference(right, 0, "generalises", theme.faint)
    reference(right, 1, "as the\nexact mean", theme.faint)
    right.set_ylim(-0.25, 1.25)
    right.set_ylabel("share of the exact mean's gap")
    for axis in (left, right):
        noise_axis(axis)
    return figure


def jacobian(levels: Levels, theme: Theme) -> Figure:
    """Asymmetry, and the largest eigenvalue of sigma J."""
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    network = theme.series[0]
    draw(left, curve(levels, lambda u: u.jacobian.asymmetry), network, "network", **HELD_OUT)
    left.set_ylim(0, None)
    left.set_ylabel("|J − Jᵀ| / |J|")
    left.set_title("Asymmetry")
    noise = [u.noise for u in levels]
    right.plot(noise, [u.jacobian.eigenvalue for u in levels], color=network, **HELD_OUT)
    reference(right, 1, "a score:\nat most 1", theme.faint)
    for level in levels:
        if level.jacobian.impossible:
            place = (level.noise, level.jacobian.eigenvalue)
            text = f"{100 * level.jacobian.impossible:.0f} %"
            look = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            right.annotate(text, place, **look, fontsize=7.5, color=theme.series[1])
    right.margins(y=0.2)
    right.set_ylabel("largest eigenvalue of σJ")
    right.set_title("Largest eigenvalue")
    for axis in (left, right):
        noise_axis(axis)
    return figure


def trace(levels: Levels, theme: Theme) -> Figure:
    """The Fisher trace of the network beside the exact one, and their difference."""
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    network, exact, _ = theme.series
    draw(left, curve(levels, lambda u: u.jacobian.trace), network, "network", **HELD_OUT)
    draw(left, curve(levels, lambda u: u.jacobian.exact_trace), exact, "training data", **TRAIN)
    left.set_ylabel("σ² tr F / d")
    left.legend(fontsize=8)
    difference = curve(levels, lambda u: u.jacobian.trace_error)
    draw(right, difference, network, "network", **HELD_OUT)
    reference(right, 0, "as exact", theme.faint)
    right.margins(y=0.2)
    right.set_ylabel("difference, network − training data")
    for axis in (left, right):
        noise_axis(axis)
    return figure


def calibration(levels: Levels, theme: Theme) -> Figure:
    """The variance that the Jacobian implies, over the mean square error."""
    figure = Figure(figsize=(8.6, 3.0), layout="constrained")
    axis = figure.subplots()
    draw(axis, curve(levels, lambda u: u.calibration.ratio), theme.series[0], "", **HELD_OUT)
    reference(axis, 1, "calibrated", theme.faint)
    axis.margins(y=0.2)
    axis.set_ylabel("implied variance /\nmean square error")
    noise_axis(axis)
    return figure


def _kinds() -> tuple[tuple[str, str, dict[str, Any]], ...]:
    return ("held-out data", "held_out", HELD_OUT), ("training data", "train", TRAIN)


def _baseline(level: LevelAudit) -> float:
    return level.baseline


def _error(kind: str, field: str) -> Pick:
    """The errors `field` on data of the kind, where there are any."""
    return lambda level: getattr(getattr(level, kind), field, None)


def _limits(near: list[Curve], far: list[Curve]) -> tuple[float, float]:
    """Of a logarithmic axis: all of the curves that matter, and of the others what is near."""
    values = [v for found in near for v in found.value if v > 0] + [1.0]
    others = [v for found in far for v in found.value if v > 0]
    low, high = min(values), max(values)
    low = max(min([low, *others]), low / _BEYOND, _LEAST)
    high = min(max([high, *others]), high * _BEYOND)
    return low / 1.6, high * 1.6


def _plain_numbers(axis: Axes) -> None:
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
