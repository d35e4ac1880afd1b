"""The page of an audit: its verdict, tables and figures in one HTML file, to read and to send."""

from __future__ import annotations

from pathlib import Path

from ..._io import files
from ..._page import extra
from ..._torch import check
from ...cloud import PointCloud
from ..audit.report import AuditReport
from ..sharded import ShardedCloud

__all__ = ["write_page"]


def write_page(
    report: AuditReport, path: str | Path, train: PointCloud | ShardedCloud | None = None
) -> None:
    """Write an audit as one HTML file that refers to nothing outside, light or dark as the reader's
    system asks.

    >>> report = audit(denoiser, train, held_out)
    >>> write_page(report, "audit.html", train)

    Args:
        report: what `audit` found.
        path: the file, which is written whole or not at all.
        train: the training data that were given to `audit`, as atoms [N, C, H, W] with C = 1 or 3:
            then the samples nearest to an atom are shown above it. None, or data of another shape:
            they are not shown.

    Needs the extra `report`: `pip install "dfkernels[report]"`.

    Raises:
        ModuleNotFoundError: The extra is not installed.
        TypeError, ValueError: report is no `AuditReport`, or train is not what it was made of; or
            the file cannot be written (a `FileError` that names it).
    """
    check.instance("report", report, AuditReport, "an AuditReport")
    if train is not None:
        check.instance(
            "train", train, (PointCloud, ShardedCloud), "a PointCloud, a ShardedCloud or None"
        )
    audited = report.settings
    if train is not None and (len(train), *train.event_shape) != (
        audited.train,
        *audited.event_shape,
    ):
        raise ValueError(
            f"train: expected the {audited.train} atoms of shape {list(audited.event_shape)} of the"
            f" audit, got {len(train)} of {list(train.event_shape)}"
        )
    extra.require("report", extra.REPORT)
    from ._html import html  # needs the extra

    text = html(report, train)
    files.write(Path(path), lambda file: file.write(text.encode()))
