"""`python -m experiments audit`: a network that generalises and one that memorises, checked and
audited."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from dfkernels._io.files import folder, write
from dfkernels._page.machine import machine
from dfkernels.cloud import PointCloud
from dfkernels.methods.audit import audit
from dfkernels.methods.audit_page import write_page
from dfkernels.methods.convention import check

from .. import extra
from ..progress import Progress

if TYPE_CHECKING:
    from .data import Images
    from .networks import Trained
    from .report import Audited, Run


def run(out: Path, images: Path | None = None, *, quick: bool = False) -> int:
    """Train two networks, audit both and write to `out` audits.md with its figures, and a page for
    each network, few.html and many.html; 0 if every claim holds, else 1. A run that was killed goes
    on from the checkpoints of trainings and audits in `out`, kept for quick and full runs apart.

    Args:
        images: the folder of Fashion-MNIST's files; None: where Debian's package has them.
        quick: scikit-learn's digits, and hardly any training.

    Raises ModuleNotFoundError if the extra is not installed, FileError if the images cannot be read
    or `out` cannot be written.
    """
    extra.require()
    from . import data, networks, report  # these need the extra

    found = data.digits() if quick else data.fashion(images or data.FOLDER)
    size = networks.QUICK if quick else networks.FULL
    folder(out / report.FIGURES)
    kept = folder(out / ("networks-quick" if quick else "networks"))
    whole = report.Run(found, size, quick)
    print(machine(), flush=True)
    with Progress("audit", 2 * networks.TRAINING + 4) as bar:
        few = networks.trained("few", size.few, found, size, kept, bar.step)
        many = networks.trained("many", None, found, size, kept, bar.step)
        for network in (many, few):
            whole.audited.append(_audited(network, found, kept, quick))
            page = out / f"{network.name}.html"
            write_page(whole.audited[-1].report, page, PointCloud(network.train))
            bar.step(f"auditing the network of {len(network.train):,} images")
        whole.scaled = check(many.denoiser, PointCloud((found.train + 1) / 2))
        bar.step("checking with images of another scale")
        _draw(whole, out)
        bar.step("figures")
    text = report.document(whole)
    write(out / "audits.md", lambda file: file.write(text.encode()))
    print(f"\n{text}")
    for claim in whole.failed:
        print(f"DOES NOT HOLD: {claim.what}")
    print(
        f"{time.monotonic() - whole.start:.0f} s; written to {out}: audits.md, few.html, many.html"
    )
    return 1 if whole.failed else 0


def _audited(network: Trained, images: Images, kept: Path, quick: bool) -> Audited:
    """The audit of one network; its checkpoint stays in `kept`."""
    from .report import Audited

    found = audit(
        network.denoiser,
        PointCloud(network.train),
        PointCloud(images.held_out),
        levels=3 if quick else 8,
        queries=16 if quick else 256,
        points=8 if quick else 64,
        samples=16 if quick else 256,
        checkpoint=kept / f"audit-{network.name}.json",
    )
    return Audited(network.train, network.parameters, found)


def _draw(whole: Run, out: Path) -> None:
    """The figures of the page, for a light one."""
    from dfkernels._page.theme import LIGHT, png

    from . import figures, report

    for name, draw in figures.of(whole.audited, LIGHT).items():
        picture = png(draw, LIGHT, 72 if whole.quick else 110)
        write(out / report.FIGURES / f"{name}.png", lambda file, png=picture: file.write(png))
