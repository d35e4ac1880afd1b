"""What the experiment writes: one Markdown page over both networks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import NamedTuple

from torch import Tensor

from dfkernels._page.machine import machine
from dfkernels.methods.audit.parts import Errors, Estimate, LevelAudit
from dfkernels.methods.audit.report import AuditReport
from dfkernels.methods.convention import CheckReport

from ..text import markdown_table, processor
from .data import Images
from .networks import NOISE, Size

FIGURES = "audits"  # the figures' folder, beside audits.md


class Claim(NamedTuple):
    """What a run has to show; `always`: a quick one too, whose networks are hardly trained."""

    what: str
    holds: bool
    always: bool = False


class Audited(NamedTuple):
    """A network with its training images, and what was found."""

    train: Tensor
    parameters: int
    report: AuditReport

    @property
    def title(self) -> str:
        return f"{len(self.train):,} images"


@dataclass
class Run:
    """Everything that one command did."""

    images: Images
    size: Size
    quick: bool
    audited: list[Audited] = field(default_factory=list)
    scaled: CheckReport | None = None  # of the first network, with its images in [0, 1]
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%d"))
    start: float = field(default_factory=time.monotonic)

    def claims(self) -> list[Claim]:
        """For a run that is over."""
        assert self.scaled is not None
        many, few = (audited.report for audited in self.audited)
        fits = [report.check is not None and report.check.ok for report in (many, few)]
        claims = [
            Claim("df.check: each network fits its training images", all(fits), True),
            Claim(
                "df.check: images in [0, 1] have another scale",
                self.scaled.cause == "data scale",
                True,
            ),
            Claim("the network of many images does not memorise", _status(many) == "good"),
            Claim("the network of few images memorises", _status(few) == "bad"),
            Claim("its samples are copies", _status(few, "copies") == "bad"),
        ]
        return [claim for claim in claims if claim.always or not self.quick]

    @property
    def failed(self) -> list[Claim]:
        return [claim for claim in self.claims() if not claim.holds]

    @property
    def command(self) -> str:
        return f"python -m experiments audit{' --quick' * self.quick}"


def document(run: Run) -> str:
    """The page."""
    few = run.audited[-1]
    lead = (
        f"Two U-Nets that differ in their training data alone: {run.images.name}, "
        f"{run.images.size} x {run.images.size} pixels in [−1, 1], the one trained on "
        f"{run.audited[0].title}, the other on {few.title}, which it has the time to learn by "
        f"heart. Both have {few.parameters:,} parameters and saw {run.size.steps:,} batches of 64 "
        f"images at noise levels σ/α from {NOISE[0]:g} to {NOISE[1]:g}. "
        f"{len(run.images.held_out):,} images were held out from both."
    )
    made = (
        f"Made by `{run.command}` on {run.date}: {processor()}, {machine()}. Everything on this "
        "page was found by `df.check` and `df.audit`, which know of a network only what it returns;"
        " [Audit](guide/auditing.md) says how to read it."
    )
    parts = ["# Two networks, audited", lead, made]
    if run.quick:
        parts.append("**A quick run: short training shows that everything works, and no more.**")
    parts += ["## What the audit says"]
    for audited in run.audited:
        parts += [f"### Trained on {audited.title}", *_verdict(audited.report)]
    parts += ["## Errors", markdown_table(*_errors(run)), _ERRORS]
    parts += [_figure("errors", "Errors of the two networks over the noise levels")]
    parts += ["## Samples", markdown_table(*_samples(run), {0}), _SAMPLES]
    parts += [_figure("samples", "Samples of the two networks above the nearest training images")]
    parts += ["## Jacobian and calibration", markdown_table(*_jacobian(run)), _JACOBIAN]
    parts += ["## Likelihood", markdown_table(*_likelihood(run), {0}), _LIKELIHOOD]
    parts += ["## Images of the wrong scale", _SCALE, f"```text\n{run.scaled}\n```"]
    return "\n\n".join(parts) + "\n"


_ERRORS = (
    "Mean square errors of x₀ per number, with standard errors; exact: the exact posterior mean of "
    "the training images, which has memorised them. Memorised: the network's difference between "
    "held-out and training images over that of the exact mean; – where the latter has none."
)
_SAMPLES = (
    "Copies: samples at less than a third of the second nearest training image's distance from the "
    "nearest. Closer: samples nearer to a training image than 99 % of the held-out images. "
    "Distances are root mean squares per pixel."
)
_JACOBIAN = (
    "J = dε/dx of the network on noisy held-out images. Asymmetry: ‖J − Jᵀ‖/‖J‖, 0 for the "
    "gradient of any function. Eigenvalue: the largest found of σJ, at most 1 for a score. "
    "Variance: the posterior variance that J implies over the mean square error, 1 where the "
    "network knows its error."
)
_LIKELIHOOD = (
    "Of noisy images at the lowest level, in nats per number, by the probability-flow ODE with "
    "Hutchinson's trace. Integration: the estimated error of the solver."
)
_SCALE = (
    "The first network was trained on pixels in [−1, 1]. Given the same images in [0, 1], as many "
    "loaders return them, `df.check` says:"
)


def _status(report: AuditReport, name: str = "memorisation") -> str:
    return next((f.status for f in report.findings if f.name == name), "missing")


def _verdict(report: AuditReport) -> Iterator[str]:
    yield "\n".join(f"- **{found.status}**: {found.text}" for found in report.findings)


def _figure(name: str, what: str) -> str:
    return f"![{what}]({FIGURES}/{name}.png)"


def _errors(run: Run) -> tuple[list[str], list[list[str]]]:
    head = ["trained on", "σ/α", "ESS", "training", "held out", "exact, held out", "memorised"]
    rows = [
        [
            audited.title,
            f"{level.noise:.3g}",
            "" if level.errors.ess is None else f"{level.errors.ess:.3g}",
            *(_number(error_of(level, *what)) for what in _COLUMNS),
            _number(level.memorised),
        ]
        for audited in run.audited
        for level in audited.report.levels
    ]
    return head, rows


_COLUMNS = (("train", "network"), ("held_out", "network"), ("held_out", "exact"))


def error_of(level: LevelAudit, data: str, of: str) -> Estimate:
    """The mean square error on "train" or "held_out" images of the "network" or "exact" mean."""
    found: Errors = getattr(level, data)
    return getattr(found, of)


def _samples(run: Run) -> tuple[list[str], list[list[str]]]:
    head = ["trained on", "copies", "by chance", "closer", "distance", "of held-out images"]
    rows = [
        [
            audited.title,
            _share(found.ratio),
            _share(found.chance_ratio),
            _share(found.closer),
            f"{found.distance:.3f}",
            "" if found.held_out_distance is None else f"{found.held_out_distance:.3f}",
        ]
        for audited in run.audited
        if (found := audited.report.samples)
    ]
    return head, rows


def _jacobian(run: Run) -> tuple[list[str], list[list[str]]]:
    head = ["trained on", "σ/α", "asymmetry", "eigenvalue", "variance"]
    rows = [
        [
            audited.title,
            f"{level.noise:.3g}",
            _number(level.jacobian.asymmetry),
            f"{level.jacobian.eigenvalue:.3f}",
            _number(level.calibration.ratio),
        ]
        for audited in run.audited
        for level in audited.report.levels
    ]
    return head, rows


def _likelihood(run: Run) -> tuple[list[str], list[list[str]]]:
    head = ["trained on", "training", "held out", "difference", "integration"]
    rows = [
        [
            audited.title,
            _number(found.train),
            _number(found.held_out),
            _number(found.gap),
            f"{found.integration:.1g}",
        ]
        for audited in run.audited
        if (found := audited.report.likelihood)
    ]
    return head, rows


def _number(estimate: Estimate | None) -> str:
    return "–" if estimate is None else str(estimate)


def _share(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.value:.0%} ± {estimate.error:.0%}"
