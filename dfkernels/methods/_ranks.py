"""Ranks that share the files of a data set out: who reads what, what they have to agree on, how
they exchange what they found, and how the failure of one becomes an error of all.

A call makes two all_gathers. In the first, before any work, each rank says what it was asked for,
in 4,096 bytes. In the second, after it, each sends what its files left, and whether that went well:

    4,096 + 8 F n bytes    F: the most files that one rank reads; n: the numbers that a file leaves

For a Partial of B queries of d numbers n = 1 + B (d + 3), and B K d more with K vectors v, B d more
with the diagonal. Atoms and queries never move, and N is not in it. The Partials of all files are
then merged by every rank in the order of the files, as one process does it: the bits are the same
whatever the number of ranks.
"""

from __future__ import annotations

import contextlib
import json
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, distributed

from .. import __version__
from .._io import files
from .._torch import native, words
from ..partial import Partial

__all__ = ["RankError", "Ranks", "owners"]

_NOTE = 4096  # bytes in which a rank says something
_MOST = 500  # letters of an error that travel
T = TypeVar("T", Partial, tuple[Tensor, ...])


class RankError(RuntimeError):
    """A call in which several ranks take part has failed, on every rank with this error: they were
    asked for different things, one of them has raised an error, or has died."""


def owners(rows: Sequence[int], ranks: int) -> list[int]:
    """Which rank reads each file: the largest file goes first, each to the rank that has the fewest
    rows by then, and of several to the first; of files of the same size the first goes first.
    """
    loads, found = [0] * ranks, [0] * len(rows)
    for i in sorted(range(len(rows)), key=lambda i: -rows[i]):
        found[i] = loads.index(min(loads))
        loads[found[i]] += rows[i]
    return found


class Ranks:
    """The ranks of a process group that share files out, or this process alone.

    Args:
        group: Of `torch.distributed`; None for this process alone, for which the methods below do
            nothing but hand through.

    `rank` is this process's number among `size`.

    Raises:
        TypeError: group is no process group.
        ValueError: It is none any more, or one without this process, or there is none yet.
    """

    def __init__(self, group: distributed.ProcessGroup | None) -> None:
        self.group, self.rank, self.size = group, 0, 1
        if group is None:
            return
        _expect_group(group)
        self.rank, self.size = distributed.get_rank(group), distributed.get_world_size(group)
        config = distributed.get_backend_config(group)
        self._backends = dict(pair.split(":") for pair in config.split(","))
        at = "cpu" if "cpu" in self._backends else torch.accelerator.current_accelerator()
        self._notes_at = torch.device(at or "cpu")

    def __deepcopy__(self, memo: object) -> Ranks:
        return self  # a group is what it is, and has no copies

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """For what comes before `agree`: an error in the block is told to the other ranks, which
        are there, and raised by all. What was told already is not told again.
        """
        try:
            yield
        except RankError:
            raise
        except Exception as error:
            if self.group is not None:
                self._notes(_of_error(error), error, "the beginning of a call")
            raise

    def agree(self, call: str, given: Mapping[str, object]) -> None:
        """Comes back if all ranks make the same call.

        Args:
            call: Its name.
            given: What it depends on, tensors, numbers, texts, by name.

        Raises:
            RankError: They do not, or one has told an error, has died, or gives no answer.
        """
        if self.group is not None:
            said = {"call": call, "versions": _versions(), **given}
            self._notes({str(name): _described(value) for name, value in said.items()}, None, call)

    def first(self, number: int) -> int:
        """The number that the first rank has given."""
        own = (torch.tensor([number], dtype=torch.float64, device="cpu"),)
        everyone = range(self.size)
        (found,) = next(self.exchanged(everyone, everyone, [own], own))
        return int(found)

    def share(self, numbers: Sequence[int], owner: Sequence[int]) -> list[int]:
        """Those of the files that this rank reads."""
        return [i for i in numbers if owner[i] == self.rank]

    def exchanged(
        self, numbers: Sequence[int], owner: Sequence[int], own: Iterable[T], nothing: T
    ) -> Iterator[T]:
        """What the files of these numbers have left, in their order, read by this rank or another.

        Args:
            numbers: Of the files.
            owner: Of each file of the cloud.
            own: What those of `share(numbers, owner)` leave, made one by one: Partials, or tuples
                of tensors in float64.
            nothing: The same of no atoms.

        Raises:
            RankError: A rank has raised, has died or gives no answer.
            Exception: That of `own`, where all ranks have raised the same.
        """
        if self.group is None:
            yield from own
            return
        held = _tensors(nothing)
        shapes, device = [t.shape for t in held], held[0].device
        shares = [[i for i in numbers if owner[i] == rank] for rank in range(self.size)]
        most, n = max(map(len, shares)), sum(t.numel() for t in held)
        sent = torch.zeros(most, n, dtype=torch.float64, device=device)
        failed, note = None, {}
        try:
            for k, made in enumerate(own):
                sent[k] = torch.cat([t.flatten() for t in _tensors(made)])
        except Exception as error:
            failed, note = error, _of_error(error)
        place = device if self._backends.get(device.type, "gloo") != "gloo" else self._notes_at
        whole = torch.cat([_packed(note).to(place), sent.view(torch.uint8).flatten().to(place)])
        received = self._gathered(whole, "the exchange of results")
        self._compare([_unpacked(row[:_NOTE]) for row in received], failed)
        rows = [iter(r[_NOTE:].view(torch.float64).view(most, n).to(device)) for r in received]
        for i in numbers:
            yield _like(nothing, next(rows[owner[i]]), shapes)

    def _notes(self, note: Mapping[str, str], failed: Exception | None, call: str) -> None:
        """Sends a note to all ranks, and raises as `_compare` does."""
        sent = _packed(note).to(self._notes_at)
        self._compare([_unpacked(row) for row in self._gathered(sent, call)], failed)

    def _gathered(self, sent: Tensor, call: str) -> Tensor:
        """What each rank has sent, [ranks, bytes]."""
        received, start = sent.new_empty(self.size, len(sent)), time.monotonic()
        try:
            distributed.all_gather(list(received), sent, group=self.group)
        except RuntimeError as error:
            who, why = f"rank {self.rank} of {self.size}", files.first_sentence(error)
            if "timed out" not in str(error).lower() and "timeout" not in str(error).lower():
                raise RankError(
                    f"{who}: lost another rank in {call}: it has ended or was killed: {why}"
                ) from error
            raise RankError(
                f"{who}: no answer of the other ranks to {call} in "
                f"{time.monotonic() - start:.1f} s, the timeout of the process group "
                "(init_process_group(timeout=...)): one has died, hangs, or needs so much longer "
                f"for its files: {why}"
            ) from error
        return received

    def _compare(self, notes: list[dict[str, str]], failed: Exception | None) -> None:
        """Raises if the ranks have said different things, or one of them an error."""
        errors = [note.get("error") for note in notes]
        if failed is not None and len(set(errors)) == 1:
            raise failed
        if any(errors):
            raise RankError(self._by_rank(errors)) from failed
        said = lambda name: [note.get(name, "nothing") for note in notes]
        if len(set(said("call"))) > 1:
            calls = self._by_rank(said("call"))
            raise RankError(f"expected all ranks to do the same, got {calls}")
        differing = [
            f"{name}: {self._by_rank(said(name))}"
            for name in dict.fromkeys(name for note in notes for name in note)
            if len(set(said(name))) > 1
        ]
        if differing:
            listed = "; ".join(differing)
            raise RankError(f"expected the same on all ranks, got {listed}")

    def _by_rank(self, texts: Sequence[str | None]) -> str:
        """The texts, each after the ranks that said it."""
        said: dict[str, list[str]] = defaultdict(list)
        for rank, text in enumerate(texts):
            if text is not None:
                said[text].append(str(rank))
        ranks = lambda who: f"rank{'s' if len(who) > 1 else ''} {', '.join(who)} of {self.size}"
        return ", ".join(f"{ranks(who)}: {text}" for text, who in said.items())


def _expect_group(group: object) -> None:
    if not distributed.is_available():
        raise ValueError("group: expected None, since this torch has no torch.distributed")
    if group == distributed.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "group: expected a process group with this process in it, got one of other ranks: only "
            "its ranks can open a cloud with it"
        )
    if not isinstance(group, distributed.ProcessGroup):
        hint = ": its get_group() is one" if hasattr(group, "get_group") else ""
        raise TypeError(
            f"group: expected a torch.distributed.ProcessGroup, got {type(group).__name__}{hint}"
        )
    try:
        distributed.get_backend(group)
    except ValueError:
        raise ValueError(
            "group: expected a process group that is initialised, got one that was destroyed, or "
            "none: call torch.distributed.init_process_group first"
        ) from None


def _versions() -> str:
    isa, _ = native.isa()
    cpu = torch.backends.cpu.get_cpu_capability()
    return f"dfkernels {__version__} ({isa or 'not compiled'}), torch {torch.__version__} ({cpu})"


def _described(value: object) -> str:
    """A short text that tells a value apart from others."""
    if isinstance(value, Tensor):
        crc = files.checksum(value.detach().cpu().contiguous())
        kind = f"{words.dtype(value)} {list(value.shape)}"
        return f"{kind} on {value.device.type} (checksum {crc})"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else f"{text[:60]}... (checksum {zlib.crc32(text.encode())})"


def _of_error(error: Exception) -> dict[str, str]:
    text = f"{type(error).__name__}: {error}"
    return {"error": text if len(text) <= _MOST else f"{text[:_MOST]}..."}


def _packed(note: Mapping[str, str]) -> Tensor:
    """A note in _NOTE bytes."""
    text = json.dumps(note, ensure_ascii=False).encode(errors="replace")
    return torch.frombuffer(bytearray(text.ljust(_NOTE)), dtype=torch.uint8)


def _unpacked(row: Tensor) -> dict[str, str]:
    return json.loads(row.cpu().numpy().tobytes())


def _tensors(made: Partial | tuple[Tensor, ...]) -> Sequence[Tensor]:
    """What of it is sent."""
    return list(made._moments().values()) if isinstance(made, Partial) else made


def _like(made: T, flat: Tensor, shapes: Sequence[torch.Size]) -> T:
    """The same of numbers in a row."""
    pieces = flat.split([shape.numel() for shape in shapes])
    tensors = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    if isinstance(made, Partial):
        return replace(made, **dict(zip(made._moments(), tensors, strict=True)))
    return tuple(tensors)  # pyrefly: ignore[bad-return]  # T is this tuple
