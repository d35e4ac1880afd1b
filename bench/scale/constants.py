"""What the model has to know of a machine, measured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from ..floor import measure
from . import model, passes, ranks, shards

inf = float("inf")


class Constants(NamedTuple):
    """Rates of all cores together, but for `copy_gbs`, that of one; in 1e9 a second.

    Attributes:
        read_gbs, gemm_gflops: Of memory and of multiply-adds, as bench/floor.py measures them.
        copy_gbs, disk_gbs: At which one thread reads files from end to end, in the page cache and
            on the disk.
        link_gbs, latency_us: Of messages over gloo between two processes.
    """

    read_gbs: float
    gemm_gflops: float
    copy_gbs: float
    disk_gbs: float
    link_gbs: float
    latency_us: float

    def machine(self, store: str, cores: int, threads: int, count: int = 1) -> model.Machine:
        """What each of `count` ranks has of `cores` cores."""
        rate = {"memory": inf, "page cache": count * self.copy_gbs, "disk": self.disk_gbs}[store]
        return model.Machine(
            memory=self.read_gbs * 1e9 * min(1, count * threads / cores) / count,
            peak=self.gemm_gflops * 1e9 * min(1, count * threads / cores) / count,
            store=rate * 1e9 / count,
            copy=inf if store == "memory" else self.copy_gbs * 1e9,
            cores=cores // count,
            threads=threads,
            link=self.link_gbs * 1e9,
            latency=self.latency_us * 1e-6,
        )


def measured(threads: int, paths: list[Path]) -> Constants:
    """Of this machine, and of the disk that has these files."""
    rates, size = measure(threads), sum(os.stat(path).st_size for path in paths)
    shards.drop(paths)
    disk = size / shards.sequential(paths)
    copy = size / min(shards.sequential(paths) for _ in range(2))
    link, latency = ranks.gloo()
    return Constants(
        rates["read_gbs"], rates["gemm_gflops"], copy / 1e9, disk / 1e9, link / 1e9, latency * 1e6
    )


class Kernel:
    """Seconds that the kernel takes for a number of an atom, in a cloud of so many numbers."""

    def __init__(self, numbers: int, seconds: float) -> None:
        self.numbers, self.seconds = numbers, seconds
        self.found: dict[tuple, float] = {}

    def __call__(self, d: int, dtype: torch.dtype, B: int, threads: int) -> float:
        key = d, dtype, B, threads
        if key not in self.found:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            y = passes.atoms(max(8, self.numbers // d), d, dtype)
            self.found[key] = passes.of_memory(y, B, self.seconds) / y.numel()
            torch.set_num_threads(before)
        return self.found[key]
