"""A progress bar on standard error that suits terminals and log files."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """Show how much of ``total`` units is done: a bar on a terminal, one line per stage elsewhere.

    ``with Progress("demo", total) as bar: bar.step("stage")``: call `step` when a unit is done.
    """

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total, self.done, self.stage = title, max(total, 1), 0, ""
        self.start = time.monotonic()
        self._bar = tqdm(
            desc=title,
            total=self.total,
            disable=None,  # where standard error is no terminal
            leave=False,
            file=sys.stderr,
            miniters=1,
            mininterval=0,
            bar_format="{desc} {bar:28} {percentage:3.0f} %  {elapsed}{postfix}",
        )

    def __enter__(self) -> Progress:
        return self

    def step(self, stage: str = "", units: int = 1) -> None:
        """Count ``units`` more as done, the last of them part of ``stage``."""
        units = min(units, self.total - self.done)
        self.done += units
        new, self.stage = stage != self.stage, stage
        if self._bar.disable and new:
            took = f"{time.monotonic() - self.start:.0f} s"
            print(f"{self.title}: {stage} ({took})", file=sys.stderr, flush=True)
        self._bar.set_postfix_str(stage, refresh=False)
        self._bar.update(units)

    def clear(self) -> None:
        """Take the bar off the terminal, to print there; the next step draws it again."""
        self._bar.clear()

    def __exit__(self, *exc: object) -> None:
        self._bar.close()
