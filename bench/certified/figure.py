"""The figure of bench.certified: time and atoms read against the noise level, for a light and a
dark page."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from dfkernels._page.theme import DARK, LIGHT, Theme

WIDTHS = (2.0, 1.0)  # of the smaller cloud and the larger
SHOWN = 1e-3  # a smaller share of the weight that the k nearest atoms miss is not written down


def draw(rows: list[dict], folder: Path) -> None:
    """certified-light.png and certified-dark.png."""
    from dfkernels._page.theme import png

    for theme in (LIGHT, DARK):
        picture = png(lambda theme=theme: figure(rows, theme), theme, 150)
        (folder / f"certified-{theme.name}.png").write_bytes(picture)


def figure(rows: list[dict], theme: Theme) -> Figure:
    found = Figure(figsize=(9.4, 4.0), layout="constrained")
    left, right = found.subplots(1, 2)
    rows = [r for r in rows if r["kind"] == "level" and r["data"] == "patches"]
    clouds = sorted({int(r["N"]) for r in rows})
    for N, width in zip(clouds, WIDTHS, strict=False):
        cloud = [r for r in rows if int(r["N"]) == N]
        times(left, cloud, theme, width)
        atoms(right, cloud, theme, width, last=clouds[-1] == N)
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="noise level σ")
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_minor_formatter(NullFormatter())
    left.set_ylabel("ms for 8 queries")
    left.set_title("Time")
    right.set_ylabel("atoms")
    right.set_title("Atoms read in full")
    colours = {"dense": theme.series[0], "certified, ε = 10⁻⁶": theme.series[1]}
    if any(r["k"] for r in rows):
        colours[f"faiss, top {int(rows[0]['k']):,}"] = theme.series[2]
    lines = [Line2D([], [], color=c, linewidth=WIDTHS[0]) for c in colours.values()]
    names = list(colours)
    for N, width in zip(clouds, WIDTHS, strict=False):
        lines.append(Line2D([], [], color=theme.faint, linewidth=width))
        names.append(f"N = {N:,}")
    found.legend(lines, names, loc="outside lower center", ncols=len(names), fontsize=8)
    return found


def column(rows: list[dict], name: str) -> list[float]:
    return [float(r[name]) for r in rows]


def times(axis: Axes, rows: list[dict], theme: Theme, width: float) -> None:
    sigma = column(rows, "sigma")
    for name, colour in zip(("dense", "certified", "faiss"), theme.series, strict=True):
        if name != "faiss" or rows[0]["k"]:
            axis.plot(
                sigma,
                column(rows, f"{name}_ms"),
                "o-",
                color=colour,
                linewidth=width,
                markersize=2 * width,
            )


def atoms(axis: Axes, rows: list[dict], theme: Theme, width: float, last: bool) -> None:
    """last: of the clouds, the one of which is written what the peer misses."""
    dense, certified, nearest = theme.series
    sigma, N = column(rows, "sigma"), float(rows[0]["N"])
    axis.plot(sigma, [N] * len(rows), color=dense, linewidth=width)
    axis.plot(
        sigma,
        column(rows, "atoms_read"),
        "o-",
        color=certified,
        linewidth=width,
        markersize=2 * width,
    )
    if not rows[0]["k"]:
        return
    k = float(rows[0]["k"])
    axis.plot(sigma, [k] * len(rows), color=nearest, linewidth=WIDTHS[0])
    missed = [(sigma, float(r["faiss_missing_mass"])) for sigma, r in zip(sigma, rows, strict=True)]
    missed = [(sigma, share) for sigma, share in missed if share > SHOWN]
    if last and missed:
        # the grid does not run through
        box = {
            "facecolor": theme.paper,
            "edgecolor": "none",
            "pad": 1,
        }
        place = {
            "xycoords": ("data", "axes fraction"),
            "color": nearest,
            "fontsize": 8,
            "bbox": box,
        }
        for sigma, share in missed:
            text = f"{100 * share:.{0 if share >= 0.1 else 1}f} %"
            axis.annotate(text, (sigma, 0.05), ha="center", **place)
        says = f"weight that the top {k:,.0f}\nof {N:,.0f} atoms miss:"
        axis.annotate(says, (missed[-1][0], 0.12), ha="right", **place)
