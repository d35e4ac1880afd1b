"""Tables for the terminal and in Markdown, and the name of the processor."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable
from pathlib import Path


def text_table(head: list[str], rows: list[list[str]], words: Collection[int] = ()) -> str:
    """Columns aligned to the right, those in `words` to the left; two spaces between."""
    widths = [max(len(row[j]) for row in (head, *rows)) for j in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if j in words else cell.rjust(width)
            for j, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
    return "\n".join([lines[0], "─" * (sum(widths) + 2 * len(widths) - 2), *lines[1:]])


def markdown_table(head: list[str], rows: Iterable[list[str]], words: Collection[int] = ()) -> str:
    """A Markdown table whose columns are aligned to the right, those in `words` to the left."""
    rule = [":--" if j in words else "--:" for j in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine()
    )
