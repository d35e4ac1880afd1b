"""A progress bar on stderr: redrawn in place on a terminal, one line per stage elsewhere."""

from __future__ import annotations

import sys
import time


class Progress:
    """`with Progress("demo", total) as bar: bar.step("stage")`: call `step` when a unit of `total`
    is done.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done, self.stage = title, max(total, 1), 0, ""
        self.start, self.tty = time.monotonic(), sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def step(self, stage: str = "", units: int = 1) -> None:
        self.done = min(self.done + units, self.total)
        new, self.stage = stage != self.stage, stage
        if self.tty:
            fill = "━" * round(28 * self.done / self.total)
            percent, seconds = 100 * self.done // self.total, time.monotonic() - self.start
            line = f"{self.title} {fill:<28} {percent:3d} %  {seconds:4.0f} s  {stage}"
            sys.stderr.write(f"\r\x1b[2K{line[:110]}")
        elif new:
            sys.stderr.write(f"{self.title}: {stage} ({time.monotonic() - self.start:.0f} s)\n")
        sys.stderr.flush()

    def at(self, done: int, total: int) -> None:
        """The same for a count that the callee keeps."""
        self.total = total
        self.step("", done - self.done)

    def clear(self) -> None:
        """Take the bar off the terminal, to print there; the next step draws it again."""
        if self.tty:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()

    def __exit__(self, *exc: object) -> None:
        self.clear()
