"""Passes that are timed: over atoms in memory, and over files in a process of its own."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import dfkernels as df
from dfkernels import Partial, merge

from . import shards

SPREAD = (shards.HIGHEST - 1) / 12**0.5  # the standard deviation of an atom's number


def atoms(N: int, d: int, dtype: torch.dtype) -> Tensor:
    """Uniform on 1 to 255."""
    generator = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(1, shards.HIGHEST, (N, d), generator=generator, dtype=torch.uint8)
    return bytes_.to(dtype)


def level(d: int) -> float:
    """A sigma at which more than half of the atoms carry weight: nothing can be skipped."""
    return 3 * math.sqrt(d) * SPREAD


def queries(rows: Tensor, B: int) -> Tensor:
    """Noisy copies of some rows."""
    generator, d = torch.Generator().manual_seed(1), rows.shape[1]
    x = rows[torch.arange(B) % len(rows)].float()
    return x + level(d) * torch.randn(B, d, generator=generator)


def middle_queries(d: int, B: int) -> Tensor:
    """Queries whose atoms need not be known."""
    return queries(torch.full((1, d), shards.HIGHEST / 2), B)


def fastest(call: Callable[[], object], seconds: float) -> float:
    """The least seconds of a call, of two calls or as many as `seconds` allow."""
    found, begin = [], time.perf_counter()
    while len(found) < 2 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def of_memory(y: Tensor, B: int, seconds: float) -> float:
    """Seconds of a pass over atoms in memory."""
    x, sigma = queries(y[:B], B), level(y.shape[1])
    return fastest(lambda: Partial.of(x, y, 1.0, sigma), seconds)


class FromFiles(NamedTuple):
    """Seconds of reading the files alone and of passes over them, in turn; the most memory that
    the process ever had (VmHWM: anonymous, mapped and libraries); the share of the files that the
    page cache held before the first pass."""

    reading: list[float]
    passes: list[float]
    peak: int
    cached: float


def from_files(folder: Path, B: int, cold: bool, memory: int, threads: int, rounds: int):
    """`FromFiles` of a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_from_files, (folder, B, cold, memory, threads, rounds))


def same_bits(paths: list[Path], B: int) -> bool:
    """Whether a pass over files leaves the bits that one over the same shards in memory leaves."""
    held = [torch.from_numpy(np.load(path)) for path in paths]
    cloud = df.ShardedCloud(paths[0].parent, memory=2 * max(y.nbytes for y in held))
    x, sigma = queries(held[0][:B], B), level(held[0].shape[1])
    found = cloud.partial(x, 1.0, sigma), merge(Partial.of(x, y, 1.0, sigma) for y in held)
    names = ("log_weight", "log_mass", "mean", "variance", "weight_square")
    return all(torch.equal(*(getattr(part, name) for part in found)) for name in names)


def _from_files(
    folder: Path, B: int, cold: bool, memory: int, threads: int, rounds: int
) -> FromFiles:
    torch.set_num_threads(threads)
    cloud = df.ShardedCloud(folder, memory=memory)
    paths = [folder / name for name in cloud.files]
    d = math.prod(cloud.event_shape)
    x = middle_queries(d, B)
    reading, passes, cached = [], [], math.nan
    if not cold:
        shards.sequential(paths)
    for _ in range(rounds):
        if cold:
            shards.drop(paths)
        reading.append(shards.sequential(paths))
        if cold:
            shards.drop(paths)
        if math.isnan(cached):
            cached = shards.in_memory(paths)
            if cold:
                shards.drop(paths)  # what looking has read ahead
        start = time.perf_counter()
        cloud.partial(x, 1.0, level(d))
        passes.append(time.perf_counter() - start)
    return FromFiles(reading, passes, _peak(), cached)


def _peak() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
