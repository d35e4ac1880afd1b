"""Results that another process writes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

__all__ = ["Elsewhere"]


class Elsewhere:
    """The results of `Unfinished` on a rank that does not write them.

    Args:
        rows: How many are done.
        count: All of them.
    """

    folder, kept = None, False

    def __init__(self, rows: int, count: int) -> None:
        self.rows, self.count = rows, count

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        """The next rows are done."""
        self.rows += len(next(iter(rows.values())))

    def finish(self) -> dict[str, np.ndarray]:
        """Nothing."""
        return {}
