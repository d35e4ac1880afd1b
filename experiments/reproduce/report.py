"""What a reproduction writes: tables on the terminal, Markdown for the repository, one HTML
page."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from dfkernels._page.html import render
from dfkernels._page.machine import machine

from ..text import markdown_table, processor, text_table
from .section import Claim, Section, Table

FIGURES = "reproduction"  # the figures' folder, beside reproduction.md

_TITLE = "The experiments of the paper and its siblings, reproduced"
_LEAD = (
    "Efficiently Access Diffusion Fisher: Within the Outer Product Span Space (ICML 2025), and"
    " methods that are made of the same weighted sums: its general prior, Sinkhorn flows,"
    " particles, Reflow, Langevin steps. What agrees, what does not, and why."
)
_HEAD = ["claim", "reached", "target", "verdict"]
_QUICK = (
    "A quick run: small samples and short training show that everything works. Its numbers are not"
    " the results, and no target is judged."
)
_MARKUP = re.compile(r"([\\*~|$]|<(?=[a-zA-Z/!?])|\b_|_\b)")
_NUMBER = re.compile(r"[<>≤≥≈~+−-]?\s*\d.{,9}$|[–-]?$")  # or an empty cell


@dataclass
class Result:
    """One experiment: its section and PNGs [(light, dark)] as far as it came, and the error that
    ended it."""

    name: str
    section: Section | None = None
    pictures: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    error: str = ""
    seconds: float = 0.0


@dataclass
class Run:
    """Everything that one command did: `results` in order, `names` of what was asked for."""

    names: list[str]
    quick: bool
    results: list[Result] = field(default_factory=list)
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%d"))
    start: float = field(default_factory=time.monotonic)

    @property
    def command(self) -> str:
        what = self.names[0] if len(self.names) == 1 else "all"
        return f"python -m experiments reproduce {what}{' --quick' * self.quick}"

    @property
    def dpi(self) -> int:
        """Of the figures."""
        return 72 if self.quick else 170

    @property
    def unfinished(self) -> list[str]:
        return [name for name in self.names if name not in {r.name for r in self.results}]

    @property
    def failed(self) -> bool:
        """A check does not hold, or an experiment raised."""
        return any(r.error for r in self.results) or not all(
            c.holds for _, c in self.claims(check=True)
        )

    def claims(self, check: bool) -> list[tuple[str, Claim]]:
        """(experiment, claim) of all checks, or of all targets."""
        sections = [r.section for r in self.results if r.section]
        return [(s.name, c) for s in sections for c in s.claims if c.check == check]

    def verdict(self, claim: Claim) -> str:
        if claim.check:
            return "holds" if claim.holds else "FAILS"
        return "not judged" if self.quick else "reached" if claim.holds else "not reached"

    def claim_row(self, claim: Claim) -> list[str]:
        return [claim.what, claim.reached, claim.target, self.verdict(claim)]


# ---- terminal


def describe(run: Run, section: Section) -> str:
    """A section's tables and claims."""
    parts = [f"{section.title}\n{'═' * len(section.title)}"]
    tables = [*section.tables, Table("Claims", _HEAD, [run.claim_row(c) for c in section.claims])]
    for table in tables:
        if table.rows:
            parts.append(f"{table.title}\n{text_table(table.head, table.rows, _words(table.rows))}")
            parts += [table.note] if table.note else []
    return "\n\n".join(parts)


def verdict(run: Run) -> str:
    """What does not hold, one line each, and the count of what does."""
    return "\n".join([*problems(run), _count(run)])


def problems(run: Run) -> list[str]:
    """Everything that the reader has to know first, plainly."""
    checks, targets = run.claims(check=True), run.claims(check=False)
    lines = [f"FAILED: {r.name}: {r.error}" for r in run.results if r.error]
    lines += [f"CHECK FAILED: {_short(name, c)}" for name, c in checks if not c.holds]
    if not run.quick:
        lines += [f"target not reached: {_short(name, c)}" for name, c in targets if not c.holds]
    return lines + [f"not finished: {', '.join(run.unfinished)}"] * bool(run.unfinished)


def _short(name: str, claim: Claim) -> str:
    return f"{name}: {claim.what}: reached {claim.reached}, target {claim.target}"


def _count(run: Run) -> str:
    checks, targets = run.claims(check=True), run.claims(check=False)
    parts = [f"{sum(c.holds for _, c in checks)} of {len(checks)} checks hold"]
    if targets and run.quick:
        parts.append("targets are not judged in a quick run")
    elif targets:
        parts.append(f"{sum(c.holds for _, c in targets)} of {len(targets)} targets reached")
    return "; ".join(parts)


# ---- Markdown


def section_file(run: Run, result: Result) -> str:
    """One section, alone."""
    if result.section is None:
        raise ValueError(f"{result.name}: ended before there was a section")
    rows = [run.claim_row(c) for c in result.section.claims]
    claims = ["### Claims", _markdown_table(_HEAD, rows)] if rows else []
    return "\n\n".join([*_section(result, result.section), *claims, _about(run)]) + "\n"


def document(run: Run) -> str:
    """The whole reproduction."""
    targets = [[name, *run.claim_row(c)] for name, c in run.claims(check=False)]
    checks = [[name, *run.claim_row(c)] for name, c in run.claims(check=True)]
    head = ["experiment", *_HEAD]
    parts = [f"# {_TITLE}", _LEAD, "<!-- summary -->", _about(run)]
    parts += [f"**{_QUICK}**"] if run.quick else []
    parts += [_count(run) + "."]
    parts += [_markdown_table(head, targets)] if targets else []
    parts += ["<!-- /summary -->"]
    parts += ["\n".join(f"- {_markdown(line)}" for line in problems(run))]
    for result in run.results:
        parts += _section(result, result.section) if result.section else []
    parts += ["## Checks", _markdown_table(head, checks)] if checks else []
    parts += ["## Time", _markdown_table(*_times(run))]
    return "\n\n".join(filter(None, parts)) + "\n"


def _section(result: Result, section: Section) -> list[str]:
    parts = [f"## {_markdown(section.title)}", *map(_markdown, section.text)]
    for table in section.tables:
        parts += [f"### {_markdown(table.title)}", _markdown_table(table.head, table.rows)]
        parts += [_markdown(table.note)] if table.note else []
    for picture in section.pictures:
        if picture.name in result.pictures:
            parts.append(f"![{_markdown(section.title)}]({figure_path(result.name, picture.name)})")
            parts.append(_markdown(picture.caption))
    return parts


def figure_path(name: str, picture: str) -> str:
    """Relative to reproduction.md."""
    return f"{FIGURES}/{name}-{picture}.png"


def _about(run: Run) -> str:
    what = f"Made by `{run.command}` on {run.date} in {_duration(time.monotonic() - run.start)}"
    return f"{what}: {_markdown(f'{processor()}, {machine()}')}."


def _markdown(text: str) -> str:
    """Plain text in which `backticks` mark code."""
    pieces = text.split("`")
    pieces[::2] = [_MARKUP.sub(r"\\\1", piece) for piece in pieces[::2]]
    return "`".join(pieces)


def _markdown_table(head: list[str], rows: list[list[str]]) -> str:
    titles, *lines = (
        [re.sub(r"(?<!\\)\|", r"\|", _markdown(cell)) for cell in row] for row in (head, *rows)
    )
    return markdown_table(titles, lines, _words(rows))


# ---- HTML


def page(run: Run) -> str:
    """The same, self-contained, light and dark."""
    checks, targets = run.claims(check=True), run.claims(check=False)
    facts = [
        (f"{sum(c.holds for _, c in checks)} / {len(checks)}", "checks hold"),
        (
            "–" if run.quick else f"{sum(c.holds for _, c in targets)} / {len(targets)}",
            "targets reached" + ": not judged in a quick run" * run.quick,
        ),
        (_duration(time.monotonic() - run.start), "for everything on this page"),
    ]
    return render(
        Path(__file__).with_name("page.html"),
        run=run,
        title=_TITLE,
        lead=_LEAD,
        quick=_QUICK if run.quick else "",
        facts=facts,
        problems=problems(run),
        head=["experiment", *_HEAD],
        targets=[[name, *run.claim_row(c)] for name, c in targets],
        checks=[[name, *run.claim_row(c)] for name, c in checks],
        times=_times(run),
        words=_words,
        machine=f"{processor()}, {machine()}",
    )


# ---- common


def _times(run: Run) -> tuple[list[str], list[list[str]]]:
    rows = []
    for result in run.results:
        parts = result.section.seconds if result.section else {}
        of_which = ", ".join(f"{what} {_duration(s)}" for what, s in parts.items())
        rows.append([result.name, _duration(result.seconds), of_which])
    return ["experiment", "wall time", "of which"], rows


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _words(rows: list[list[str]]) -> set[int]:
    """Columns to be read, not compared: the first, and those in which few cells are numbers."""
    numeric = [
        sum(bool(_NUMBER.match(cell)) for cell in column) for column in zip(*rows, strict=True)
    ]
    return {j for j, count in enumerate(numeric) if j == 0 or 2 * count < len(rows)}
