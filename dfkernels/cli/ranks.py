"""A command that `torchrun` has started in several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed

__all__ = ["torchrun_group"]


@contextmanager
def torchrun_group() -> Iterator[distributed.ProcessGroup | None]:
    """The process group of the processes that torchrun has started together, by gloo; None for a
    process alone."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    distributed.init_process_group("gloo")
    try:
        yield distributed.group.WORLD
    finally:
        distributed.destroy_process_group()
