"""Figures for tests that look at the text around them: drawn in a third of the time."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

SAVE = Figure.savefig


def draw_coarsely(patch: pytest.MonkeyPatch) -> None:
    """From now on figures are drawn once, since nothing is laid out, and have few pixels."""
    patch.setattr(Figure, "set_layout_engine", lambda figure, layout=None, **options: None)
    patch.setattr(
        Figure, "savefig", lambda figure, file, **how: SAVE(figure, file, **how | {"dpi": 30})
    )
