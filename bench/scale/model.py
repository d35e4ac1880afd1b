"""What a pass over a cloud costs: bytes, operations and messages, and the seconds that they take.

A pass takes B queries through N atoms of d numbers of s bytes, which lie in files and are shared
out among R ranks. It reads every atom once, whatever B is:

    bytes        s N d
    operations   (2 + 2) B N d for log q, the mean and tr F; 4 K B N d more for F v of K vectors
    messages     two from each rank to each other: 2 * 4,096 + 8 F n bytes, where F is the most
                 files that a rank has and n = 1 + B ((1 + K) d + 3) the numbers of a `Partial`

Reading goes on while the cores compute. It is not free to them, though: out of the page cache the
data is copied, by a core. So a pass takes

    max(bytes/store, compute, (bytes/copy + threads compute)/cores) + messages

seconds, where `compute` is the larger of bytes/memory and operations/peak, the floor, or what the
kernel was found to take for an atom's number in a small cloud, the prediction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NOTE = 4096  # bytes in which a rank says what it was asked for, and how it went

__all__ = ["Machine", "Pass", "compute_bound_from", "floor", "predicted"]


@dataclass(frozen=True)
class Pass:
    """A pass over a cloud; K is the number of vectors that F is multiplied with."""

    N: int
    d: int
    itemsize: int
    B: int
    K: int = 0
    ranks: int = 1
    files: int = 1

    @property
    def numbers(self) -> int:
        return self.N * self.d

    @property
    def bytes(self) -> int:
        """That all ranks together read."""
        return self.itemsize * self.numbers

    @property
    def flops(self) -> int:
        """Of all ranks together."""
        return 4 * (1 + self.K) * self.B * self.numbers

    @property
    def partial_bytes(self) -> int:
        """The moments of one file, in float64."""
        return 8 * (1 + self.B * ((1 + self.K) * self.d + 3))

    @property
    def messages(self) -> int:
        """That a rank receives: two from each other."""
        return 2 * (self.ranks - 1)

    @property
    def message_bytes(self) -> int:
        """That a rank receives."""
        files = math.ceil(self.files / self.ranks)
        return (self.ranks - 1) * (2 * NOTE + files * self.partial_bytes)


@dataclass(frozen=True)
class Machine:
    """What a rank has. Rates are in bytes or operations a second, and count what is shared with
    other ranks by the share.

    Attributes:
        memory: Reading of memory.
        peak: Multiply-adds, which are two operations each.
        store: Reading of files; inf where the atoms stay in memory.
        copy: Reading of the page cache by one core; inf where no core takes part.
        cores, threads: That it has, and that compute.
        link, latency: Of a message: bytes a second and seconds.
    """

    memory: float
    peak: float
    store: float = math.inf
    copy: float = math.inf
    cores: int = 1
    threads: int = 1
    link: float = math.inf
    latency: float = 0.0


def floor(work: Pass, machine: Machine) -> float:
    """The least seconds that the machine's rates allow."""
    share = 1 / work.ranks
    computing = max(work.bytes / machine.memory, work.flops / machine.peak) * share
    return _with_files(work, machine, computing)


def predicted(work: Pass, machine: Machine, seconds_a_number: float) -> float:
    """Seconds, where the kernel takes so long for each of an atom's numbers, for all B queries."""
    return _with_files(work, machine, seconds_a_number * work.numbers / work.ranks)


def compute_bound_from(itemsize: int, rate: float, peak: float) -> float:
    """The number of queries from which operations take longer than reading at `rate`."""
    return itemsize * peak / (4 * rate)


def _with_files(work: Pass, machine: Machine, computing: float) -> float:
    read = work.bytes / work.ranks
    shared = (read / machine.copy + machine.threads * computing) / machine.cores
    messages = machine.latency * work.messages + work.message_bytes / machine.link
    bound = max(read / machine.store, computing)
    return (max(bound, shared) if math.isfinite(machine.copy) else bound) + messages
