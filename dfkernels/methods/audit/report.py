"""The report of an audit: what was audited, what was measured, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ..convention import CheckReport
from . import serial, table
from .parts import (
    Calibration,
    Errors,
    Estimate,
    JacobianAudit,
    LevelAudit,
    LikelihoodAudit,
    SampleAudit,
)

__all__ = [
    "AuditReport",
    "Calibration",
    "Errors",
    "Estimate",
    "Finding",
    "JacobianAudit",
    "LevelAudit",
    "LikelihoodAudit",
    "SampleAudit",
    "Settings",
]


class Finding(NamedTuple):
    """One sentence or two of the verdict, by a rule of `verdict`."""

    name: str  # convention, fit, memorisation, gradient, eigenvalues, calibration, likelihood, ...
    status: str  # "good", "bad", or "unknown": what these data cannot tell
    text: str


class Settings(NamedTuple):
    """What was audited, and how."""

    denoiser: str  # in one line
    event_shape: tuple[int, ...]
    train: int | None  # how many points were given; None: none
    held_out: int | None
    noise: tuple[float, float]  # the range of levels sigma/alpha
    queries: int  # per level and kind of data
    width: float | None
    rounding: float  # relative, of the network: 1.2e-7 in float32
    seed: int  # what all random numbers follow from


@dataclass(frozen=True, eq=False)
class AuditReport:
    """What `audit` found; `print` shows it as tables with the verdict below.

    Attributes:
        settings: what was audited.
        check: the report of `check`, against the training data, or the held-out where no others
            are given; None where it cannot be made, and a finding says why.
        levels: noise rising; empty where `check` named a mistake, since nothing else has a meaning
            then.
        likelihood, samples: None for the same reason, where 0 points or samples were asked for, and
            samples also without training data.
        findings: the verdict, sentence by sentence.
        evaluations: calls of the network, each on a batch.
    """

    settings: Settings
    check: CheckReport | None
    levels: tuple[LevelAudit, ...]
    likelihood: LikelihoodAudit | None
    samples: SampleAudit | None
    findings: tuple[Finding, ...]
    evaluations: int

    @property
    def ok(self) -> bool:
        """Whether no finding is bad."""
        return all(finding.status != "bad" for finding in self.findings)

    @property
    def verdict(self) -> str:
        """The findings, a line each."""
        return "\n".join(finding.text for finding in self.findings)

    def __repr__(self) -> str:
        """In one line, with what is bad; `print` shows all of it."""
        bad = [finding.name for finding in self.findings if finding.status == "bad"]
        found = f"{len(self.levels)} levels, {len(self.findings)} findings"
        said = f"bad: {', '.join(bad)}" if bad else "none of them bad"
        return f"AuditReport({self.settings.denoiser}, {found}, {said})"

    def __str__(self) -> str:
        if not self.levels:
            return self.verdict
        return f"{table.text(self.levels, self.likelihood, self.samples)}\n\n{self.verdict}"

    def to_json(self) -> str:
        """The report as JSON text, from which `from_json` makes the same report."""
        return serial.dumps(self)

    @classmethod
    def from_json(cls, text: str) -> AuditReport:
        """The report of a text that `to_json` made.

        Raises:
            ValueError: The text is none.
        """
        return serial.loads(cls, text)
