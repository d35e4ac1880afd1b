"""What one experiment hands to the report: tables, figures, checked claims; and its progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from dfkernels._page.theme import Theme


@dataclass(frozen=True)
class Table:
    """Cells are text, ready to print; `note` stands below it: definitions, units, budget."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Picture:
    """`draw(theme)` returns a matplotlib figure; called once per theme, under the theme's style."""

    name: str
    caption: str
    draw: Callable[[Theme], Figure]


@dataclass(frozen=True)
class Claim:
    """One number against its target. A `check` must hold in every run, quick ones too: if it does
    not, the command fails. A target is only judged in a full run, and reported as it came out.
    """

    what: str
    reached: str
    target: str
    holds: bool
    check: bool = False


@dataclass(frozen=True)
class Section:
    """One experiment. `text`: paragraphs in plain words, among them every disagreement with the
    paper."""

    name: str
    title: str
    text: list[str]
    tables: list[Table]
    pictures: list[Picture]
    claims: list[Claim]
    # what took how long, e.g. {"training": 412.0}
    seconds: dict[str, float] = field(default_factory=dict)


def progress(stages: list[str], step: Callable[[str], None]) -> Callable[[int, int], None]:
    """A callback(done, total) that calls step(stage) once for each of the stages, evenly spaced."""
    left = list(stages)

    def at(done: int, total: int) -> None:
        while left and (len(stages) - len(left) + 1) * total <= len(stages) * done:
            step(left.pop(0))

    return at
