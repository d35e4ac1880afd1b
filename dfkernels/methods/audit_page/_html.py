"""The text of the page: which figures there are, and how to read each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from ..._page.html import render
from ..._page.machine import machine
from ..._page.theme import DARK, LIGHT, Theme, png
from ..audit.report import AuditReport
from ..audit.task import Points
from . import _levels, _samples, _tables

_DPI = 150
_MARKS = {"good": "✓ good", "bad": "✗ bad", "unknown": "? unknown"}


class _Picture(NamedTuple):
    heading: str
    caption: str  # how to read it
    draw: Callable[[Theme], Figure]


def html(report: AuditReport, train: Points | None) -> str:
    """The whole page."""
    figures = []
    for picture in (*_of_levels(report), *_of_points(report, train)):
        light, dark = (png(partial(picture.draw, theme), theme, _DPI) for theme in (LIGHT, DARK))
        figures.append((picture.heading, picture.caption, light, dark))
    return render(
        Path(__file__).with_name("page.html"),
        title="Audit of a diffusion model",
        lead=report.settings.denoiser,
        findings=report.findings,
        marks=_MARKS,
        tables=_tables.tables(report),
        figures=figures,
        dpi=_DPI,
        settings=_tables.settings(report),
        machine=machine(),
    )


def _of_levels(report: AuditReport) -> list[_Picture]:
    levels = report.levels
    if not levels:
        return []
    return [
        _Picture(
            "Error",
            "At high noise, where many atoms share the weight (the ESS below), the exact mean of"
            " the training data is the best there is, and a sound network is close to it. At low"
            " noise it is one atom, with next to no error on training data and a large one on"
            " held-out data; there a network that generalises has the same error on both. Bands are"
            " two standard errors.",
            partial(_levels.errors, levels),
        ),
        *_gap(report),
        _Picture(
            "Is it a score?",
            "The score of any law has a symmetric Jacobian J, and `σJ` has no eigenvalue above 1."
            " What lies above the line is impossible for a score; the percentage is the share of"
            " queries at which it is above by more than the verdict allows.",
            partial(_levels.jacobian, levels),
        ),
        _Picture(
            "Fisher trace",
            "`σ² tr F/d` is 1 minus the share of the noise that x leaves open. The training data's"
            " is back at 1 at low noise, where one atom has all the weight; that of a network that"
            " generalises stays below, so that the two have to agree at high noise only.",
            partial(_levels.trace, levels),
        ),
        _Picture(
            "Calibration",
            "The variance of x₀ that the network's Jacobian implies, over its actual mean square"
            " error: above 1 it is less certain than it could be, below 1 too certain.",
            partial(_levels.calibration, levels),
        ),
    ]


def _gap(report: AuditReport) -> list[_Picture]:
    if all(level.gap is None for level in report.levels):
        return []
    return [
        _Picture(
            "Generalisation",
            "Left: how much larger the error is on held-out than on training data. Right: the same"
            " as a share of the exact mean's, 0 for a network that generalises and 1 for one that"
            " has stored the data; there is no point where the exact mean has no gap either.",
            partial(_levels.gap, report.levels),
        )
    ]


def _of_points(report: AuditReport, train: Points | None) -> list[_Picture]:
    found = []
    if report.likelihood is not None:
        found.append(
            _Picture(
                "Likelihood",
                "The further the training data are ahead of the held-out data, the more the network"
                " remembers them. Bars are two standard errors over the points.",
                partial(_samples.likelihood, report.likelihood),
            )
        )
    if report.samples is None:
        return found
    found.append(
        _Picture(
            "Samples and training data",
            "Samples of a network that memorises lie nearer to training atoms than held-out data"
            " do: the steps of the samples are then to the left.",
            partial(_samples.distances, report.samples),
        )
    )
    if train is not None and len(train.event_shape) == 3 and train.event_shape[0] in (1, 3):
        rows = report.samples.rows.to(train.device)
        atoms = train.rows(rows).cpu()
        found.append(
            _Picture(
                "The samples nearest to the training data",
                "Below each sample its nearest training atom, and the distance over that of the"
                " second nearest: below 1/3 it counts as a copy.",
                partial(_samples.pictures, report.samples, atoms),
            )
        )
    return found
