"""Figures for a light and a dark page. Colours: Okabe and Ito's, safe for colour-blind readers."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib import rc_context
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of one variant of the page."""

    name: str
    paper: str
    ink: str
    faint: str
    grid: str
    series: tuple[str, str, str]
    extra: tuple[str, str, str]


LIGHT = Theme(
    "light", "#ffffff", "#1f2328", "#646b75", "#e6e8eb",
    ("#0072b2", "#d55e00", "#009e73"), ("#cc79a7", "#b8860b", "#5f6670"),
)  # fmt: skip
DARK = Theme(
    "dark", "#16191d", "#e6e8ea", "#98a1ac", "#2b3037",
    ("#56b4e9", "#f0883e", "#2fc79a"), ("#e29bc4", "#e3b341", "#aab2bc"),
)  # fmt: skip


def png(draw: Callable[[], Figure], theme: Theme, dpi: int) -> bytes:
    """The figure that `draw` returns, drawn under the theme's style, as a PNG.

    `draw` makes a `Figure` and leaves pyplot alone, whose figures and backend are the user's.
    """
    style = {
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.labelcolor": theme.ink,
        "axes.edgecolor": theme.faint,
        "axes.facecolor": theme.paper,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.faint,
        "ytick.color": theme.faint,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "text.color": theme.ink,
        "figure.facecolor": theme.paper,
        "lines.linewidth": 1.8,
        "legend.frameon": False,
        "legend.labelcolor": theme.ink,
    }
    with rc_context(style):
        figure = draw()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
