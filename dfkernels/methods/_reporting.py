"""What a long computation tells its caller while it runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

__all__ = ["Callback", "reporting"]

Callback = Callable[[int, int], None]


@contextlib.contextmanager
def reporting(
    name: str, callback: Callback | None, progress: bool, total: int
) -> Iterator[Callback]:
    """A function (done, total) that calls `callback` and, with progress=True, moves a tqdm bar on
    stderr.
    """
    if not progress:
        yield callback or (lambda done, total: None)
        return
    from tqdm import tqdm  # only here: it need not be loaded with the package

    with tqdm(desc=name, total=total, file=sys.stderr) as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if callback is not None:
                callback(done, total)

        yield report
