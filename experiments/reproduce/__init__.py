"""`python -m experiments reproduce`: the experiments of the paper and of its sibling methods, each
with its tables, figures and checked claims."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from dfkernels._io.files import folder, write
from dfkernels._page.machine import machine

from .. import extra
from ..progress import Progress

if TYPE_CHECKING:
    from .report import Result, Run


def run(names: list[str], out: Path, *, quick: bool = False) -> int:
    """Run the experiments `names` (of experiments.NAMES); 0 if every check holds, 1 if not or if an
    experiment raised.

    Writes to `out`, each file whole and as soon as it is there: NAME.md and
    reproduction/NAME-FIGURE.png of each experiment when it ends, and then, over all that have
    ended, reproduction.md and index.html. Trained networks are kept under `out`, for quick and full
    runs apart. An experiment that raises is reported, and the next one runs.

    Raises ModuleNotFoundError if the extra is not installed, dfkernels FileError if `out` cannot be
    written.
    """
    extra.require()
    from . import report  # needs the extra

    modules = {name: import_module(f"{__name__}.{name}") for name in names}
    folder(out / report.FIGURES)
    networks = folder(out / ("networks-quick" if quick else "networks"))
    whole = report.Run(list(names), quick)
    print(machine(), flush=True)
    stages = sum(len(module.STAGES) + 1 for module in modules.values())
    with Progress("reproduce", stages) as bar, _threads(1 if quick else torch.get_num_threads()):
        for name, module in modules.items():
            result = _experiment(whole, name, module, networks, bar)
            _save(whole, result, out)
    print(f"\n{report.verdict(whole)}")
    files = ["index.html", "reproduction.md", *(f"{r.name}.md" for r in whole.results if r.section)]
    print(f"{time.monotonic() - whole.start:.0f} s; written to {out}: {', '.join(files)}")
    return 1 if whole.failed else 0


@contextmanager
def _threads(n: int) -> Iterator[None]:
    """A quick run's batches are too small to share: threads that wait for each other would only
    cost."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _experiment(whole: Run, name: str, module: ModuleType, networks: Path, bar: Progress) -> Result:
    """Run one, print its tables and draw its figures; whatever it raises is part of the result."""
    from dfkernels._page.theme import DARK, LIGHT, png

    from . import report

    result = report.Result(name)
    whole.results.append(result)
    start, last = time.monotonic(), bar.done + len(module.STAGES)
    with _kept(result, bar):
        result.section = module.run(
            whole.quick, networks, lambda stage: bar.step(f"{name}: {stage}")
        )
    if result.section:
        bar.clear()
        print(f"\n{report.describe(whole, result.section)}", flush=True)
        with _kept(result, bar):
            for picture in result.section.pictures:
                light, dark = (
                    png(lambda theme=theme, draw=picture.draw: draw(theme), theme, whole.dpi)
                    for theme in (LIGHT, DARK)
                )
                result.pictures[picture.name] = light, dark
    bar.step(f"{name}: figures", max(last - bar.done, 0) + 1)
    result.seconds = time.monotonic() - start
    return result


@contextmanager
def _kept(result: Result, bar: Progress) -> Iterator[None]:
    """An error in the block is the experiment's: shown, kept in its result, and the run goes on."""
    try:
        yield
    except Exception as error:
        result.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
        bar.clear()
        traceback.print_exc()


def _save(whole: Run, result: Result, out: Path) -> None:
    """The result's own files, then the pages over all results so far."""
    from . import report

    for picture, (light, _) in result.pictures.items():
        write(
            out / report.figure_path(result.name, picture),
            lambda file, light=light: file.write(light),
        )
    texts = {"reproduction.md": report.document(whole), "index.html": report.page(whole)}
    if result.section:
        texts = {f"{result.name}.md": report.section_file(whole, result), **texts}
    for name, text in texts.items():
        write(out / name, lambda file, text=text: file.write(text.encode()))
