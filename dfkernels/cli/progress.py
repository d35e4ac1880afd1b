"""The bar of a long command."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(name: str, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that moves a bar on standard error, if that is a terminal; the bar
    is gone at the end.
    """
    from tqdm import tqdm  # only here: it need not be loaded with the package

    with tqdm(desc=name, unit=f" {unit}", disable=None, leave=False) as bar:

        def step(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield step
