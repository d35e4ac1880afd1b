"""How far a long command is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

SECONDS = 60.0  # between two lines, where there is no terminal


@contextlib.contextmanager
def progress(name: str, unit: str, shown: bool = True) -> Iterator[Callable[[float, float], None]]:
    """A function (done, total) that says on standard error how far a command is and how long it
    will take; its first call says how much was done before.

    On a terminal that is a bar, which is gone at the end; elsewhere, as in a log, a line a minute.
    Where it is not to be shown it says nothing.
    """
    if not shown:
        yield lambda done, total: None
        return
    from tqdm import tqdm  # only here: it need not be loaded with the package

    begun: tuple[float, float] | None = None  # when, with how much done
    said = 0.0
    with tqdm(desc=name, unit=f" {unit}", unit_scale=True, disable=None, leave=False) as bar:

        def step(done: float, total: float) -> None:
            nonlocal begun, said
            now = time.monotonic()
            bar.total = total
            if begun is None:
                begun, said = (now, done), now
                bar.initial = bar.n = bar.last_print_n = done
                bar.start_t = bar.last_print_t = time.time()
                return
            bar.update(done - bar.n)
            if bar.disable and now - said >= SECONDS and done > begun[1]:
                said = now
                left = tqdm.format_interval((now - begun[0]) * (total - done) / (done - begun[1]))
                share = f"{100 * done / total:.1f} % of {total:,} {unit}"
                print(f"{name}: {share}, {left} left", file=sys.stderr)

        yield step
