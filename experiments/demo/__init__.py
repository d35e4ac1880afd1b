"""`python -m experiments demo`: real data, every quantity over the noise levels, checked and
drawn."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path

import numpy as np

from dfkernels._io.files import folder, write
from dfkernels._page.machine import machine

from .. import extra
from ..progress import Progress
from ..text import text_table
from .speed import Speed, speed
from .sweep import LIMIT, Sweep, sweep


def run(out: Path, *, quick: bool = False) -> int:
    """Write results.npz, the figures and index.html to `out`, print tables; 0 if every check holds,
    else 1.

    Raises ModuleNotFoundError if the extra is not installed, FileError if `out` cannot be
    written. What was finished before an error stays: every file is written whole, as soon as it is
    there, results before figures.
    """
    extra.require()
    from dfkernels._page.theme import DARK, LIGHT  # these need the extra

    from . import data, figures, report

    start = time.monotonic()
    folder(out)
    sets = [data.digits(quick), data.patches(quick)]
    batches = [[1, 64], [1, 16]] if quick else [[1, 8, 64, 512, 4096], [1, 4, 16, 64, 256]]
    print(machine())
    with Progress("compute", sum(2 + len(s.sigma) for s in sets) + sum(map(len, batches))) as bar:
        sweeps = [sweep(s, bar.step) for s in sets]
        speeds = [speed(s, b, bar.step) for s, b in zip(sets, batches, strict=True)]
    for each in sweeps:
        print(
            f"\n{report.describe(each)}\n{text_table(report.sweep_head(), report.sweep_rows(each))}"
        )
    rows = [row for each in speeds for row in report.speed_rows(each)]
    print(f"\n{text_table(report.speed_head(), rows)}\n")
    error = report.worst(sweeps)
    good = error <= LIMIT
    verdict = "all checks hold" if good else "A CHECK FAILED"
    print(f"{verdict}: largest error {error:.1e}, limit {LIMIT:.1e}", flush=True)

    arrays = _arrays(sweeps, speeds)
    # pyrefly: ignore[bad-argument-type]  NumPy's stub takes the names for its own keyword
    write(out / "results.npz", lambda file: np.savez_compressed(file, **arrays))
    pictures: dict[str, dict[str, bytes]] = {}
    with Progress("figures", 2 * (len(sets) + 3)) as bar:
        for theme in (LIGHT, DARK):
            pictures[theme.name] = {}
            for name, draw in figures.draw_all(sweeps, speeds, theme, 72 if quick else 170).items():
                png = pictures[theme.name][name] = draw()
                if theme is LIGHT:
                    write(out / f"{name}.png", lambda file, png=png: file.write(png))
                bar.step("draw")
    page = report.page(
        sweeps, speeds, pictures["light"], pictures["dark"], time.monotonic() - start
    )
    write(out / "index.html", lambda file: file.write(page.encode()))
    print(
        f"{time.monotonic() - start:.0f} s; written: {out}/index.html, results.npz, "
        f"{', '.join(f'{n}.png' for n in pictures['light'])}"
    )
    return 0 if good else 1


def _arrays(sweeps: list[Sweep], speeds: list[Speed]) -> dict[str, np.ndarray]:
    """Everything as flat names, digits_sigma, digits_log_prob, ..., patches_speed_ms."""
    arrays: dict[str, np.ndarray] = {}
    for each in sweeps:
        name = each.data.name
        arrays[f"{name}_sigma"] = each.data.sigma.numpy()
        for field in fields(each):
            if field.name != "data":
                arrays[f"{name}_{field.name}"] = getattr(each, field.name).numpy()
    for each in speeds:
        arrays[f"{each.data.name}_speed_queries"] = np.array(each.batch)
        arrays[f"{each.data.name}_speed_ms"] = np.array(each.ms)
    return arrays
