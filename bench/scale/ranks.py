"""Passes that two or more processes share over gloo, and what its messages cost."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from dfkernels import ShardedCloud

from . import passes

MESSAGE = 1 << 26  # bytes by which the rate of messages is measured


class Shared(NamedTuple):
    """Seconds of a pass, the slowest rank's of the fastest of several, and the bytes that crossed
    the loopback interface in one: those of all ranks, with the headers of TCP."""

    seconds: float
    wire_bytes: float


def gloo() -> tuple[float, float]:
    """(bytes a second, seconds) of a message between two processes: its rate and its latency."""
    return _run(_gloo, 2)[0]


def shared(folder: Path, B: int, ranks: int, memory: int, rounds: int) -> Shared:
    """A pass over the files of a folder that so many ranks share, of one thread each."""
    found = _run(_shared, ranks, folder, B, memory, rounds)
    return Shared(min(map(max, zip(*(times for times, _ in found), strict=True))), found[0][1])


def _run(work: Callable, ranks: int, *args) -> list:
    """What `work(rank, *args)` returns in each of so many processes."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(ranks, spawn) as pool:
        store = f"file://{folder}/store"
        given = [pool.submit(_joined, work, store, rank, ranks, *args) for rank in range(ranks)]
        return [future.result() for future in given]


def _joined(work: Callable, store: str, rank: int, ranks: int, *args):
    torch.set_num_threads(1)
    how = {"init_method": store, "timeout": timedelta(minutes=5)}
    dist.init_process_group("gloo", rank=rank, world_size=ranks, **how)
    try:
        return work(rank, *args)
    finally:
        dist.destroy_process_group()


def _gloo(rank: int) -> tuple[float, float]:
    def seconds(size: int, count: int) -> float:
        own = torch.zeros(size, dtype=torch.uint8)
        found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(found, own)
        start = time.perf_counter()
        for _ in range(count):
            dist.all_gather(found, own)
        return (time.perf_counter() - start) / count

    latency = seconds(1, 1000)
    return MESSAGE / (seconds(MESSAGE, 5) - latency), latency


def _shared(rank: int, folder: Path, B: int, memory: int, rounds: int):
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    cloud = ShardedCloud(folder, memory=memory, group=group)
    d = cloud.event_shape.numel()
    x, sigma = passes.middle_queries(d, B), passes.level(d)
    times, before = [], 0
    for i in range(rounds + 1):
        dist.barrier()
        before = _loopback() if i == 1 else before  # the first one warms up
        start = time.perf_counter()
        cloud.partial(x, 1.0, sigma)
        times.append(time.perf_counter() - start)
    dist.barrier()
    return times[1:], (_loopback() - before) / rounds


def _loopback() -> int:
    """Bytes that the loopback interface has received."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (line,) = (line for line in lines if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])
