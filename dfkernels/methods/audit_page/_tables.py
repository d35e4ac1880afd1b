"""The tables of the page, as (heading, head, rows, note)."""

from __future__ import annotations

from collections.abc import Callable

from ..audit.parts import Estimate, LevelAudit
from ..audit.report import AuditReport

Table = tuple[str, list[str], list[list[str]], str]

_COLUMNS: dict[str, Callable[[LevelAudit], object]] = {
    "σ/α": lambda u: u.noise,
    "ESS": lambda u: u.errors.ess,
    "network, held-out": lambda u: u.held_out and u.held_out.network,
    "network, training": lambda u: u.train and u.train.network,
    "exact, held-out": lambda u: u.held_out and u.held_out.exact,
    "exact, training": lambda u: u.train and u.train.exact,
    "least possible": lambda u: u.best,
    "asymmetry": lambda u: u.jacobian.asymmetry,
    "eigenvalue": lambda u: u.jacobian.eigenvalue,
    "trace error": lambda u: u.jacobian.trace_error,
    "calibration": lambda u: u.calibration.ratio,
}


def tables(report: AuditReport) -> list[Table]:
    """Those of what was measured."""
    return [*_levels(report), *_points(report), *_check(report)]


def settings(report: AuditReport) -> list[list[str]]:
    """What was audited, and how."""
    given = report.settings
    low, high = given.noise
    rows = {
        "denoiser": given.denoiser,
        "shape of a datum": str(list(given.event_shape)),
        "training data": "none" if given.train is None else f"{given.train:,}",
        "held-out data": "none" if given.held_out is None else f"{given.held_out:,}",
        "noise levels σ/α": f"{low:.4g} to {high:.4g}",
        "queries": f"{given.queries} per level and kind of data",
        "width of a bin": "continuous data" if given.width is None else f"{given.width:.4g}",
        "calls of the network": f"{report.evaluations:,}",
    }
    return [list(row) for row in rows.items()]


def _levels(report: AuditReport) -> list[Table]:
    cells = [[_cell(pick(u)) for pick in _COLUMNS.values()] for u in report.levels]
    shown = [j for j in range(len(_COLUMNS)) if any(row[j] for row in cells)]
    if not shown:
        return []
    head = [list(_COLUMNS)[j] for j in shown]
    note = (
        "Errors are mean square errors of x₀ per number, in squared units of the data, ± one"
        " standard error. Asymmetry: `|J − Jᵀ|/|J|`; eigenvalue: the largest one found of `σJ`;"
        " trace error: of `σ² tr F/d`; calibration: implied variance over mean square error."
    )
    return [("By noise level", head, [[row[j] for j in shown] for row in cells], note)]


def _points(report: AuditReport) -> list[Table]:
    rows: list[list[str]] = []
    if (found := report.likelihood) is not None:
        unit = "nats per number"
        for name, value in (
            (f"log-likelihood of held-out data, {unit}", found.held_out),
            (f"log-likelihood of training data, {unit}", found.train),
            (f"training − held-out, {unit}", found.gap),
            ("held-out data, bits per dimension", found.held_out_bits),
            ("training data, bits per dimension", found.train_bits),
            (f"estimated error of the integration, {unit}", found.integration),
        ):
            rows += [[name, _cell(value)]] if value is not None else []
    if (drawn := report.samples) is not None:
        for name, value in (
            (f"samples, of {drawn.count}, that are copies (ratio below 1/3)", drawn.ratio),
            ("the same by chance", drawn.chance_ratio),
            ("samples nearer to an atom than nearly all held-out points", drawn.closer),
            ("the same by chance", drawn.expected),
            ("samples nearest to a training atom, not a held-out point", drawn.train_side),
            ("median distance to the nearest atom, samples", drawn.distance),
            ("median distance to the nearest atom, held-out data", drawn.held_out_distance),
        ):
            rows += [[name, _cell(value)]] if value is not None else []
    note = "± one standard error. Distances are root mean squares per number."
    return [("Likelihood and samples", ["", "found"], rows, note)] if rows else []


def _check(report: AuditReport) -> list[Table]:
    if report.check is None:
        return []
    head = ["σ/α", "t", "ESS", "error", "allowed", "error of the data's mean"]
    rows = [
        [_cell(u.sigma / u.alpha), *map(_cell, (u.t, u.ess, u.error, u.allowed, u.of_data_mean))]
        for u in report.check.levels
    ]
    note = f"In posterior standard deviations. {report.check.verdict}"
    return [("The check of its conventions", head, rows, note)]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, Estimate) else f"{value:.4g}"
