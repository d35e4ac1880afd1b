"""The manifest of a folder of shards: which files, how many rows of which kind, and checksums."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from ..._io import files, rows
from ..._io.files import FileError
from ..._io.rows import Located
from ..._torch import check, dtypes, words
from .._shards import of_folder, stamp

__all__ = ["NAME", "Manifest", "Numbers", "Shard", "blocks", "load", "make", "numbers"]

Numbers = float | tuple[float, ...]  # for all channels, or one for each

NAME = "manifest.json"
_FORMAT = "dfkernels rows 1"
_BLOCK = 1 << 24  # bytes that are looked at together


@dataclass(frozen=True)
class Shard:
    """A file of rows, as it was when the manifest was written."""

    file: str  # in the manifest's folder
    key: str | None  # of the array in a .safetensors file
    rows: int
    bytes: int  # of the file
    mtime_ns: int  # of the file
    crc32: int  # of the rows


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds; its atoms are scale * row + offset, with numbers for all
    channels (the first axis of a row) or one for each.
    """

    event_shape: tuple[int, ...]
    dtype: str
    scale: Numbers
    offset: Numbers
    shards: tuple[Shard, ...]

    def write(self, path: Path) -> None:
        """Writes it as JSON, whole or not at all. Raises FileError."""
        head = {"format": _FORMAT, **asdict(self)}
        lines = ",\n    ".join(json.dumps(shard) for shard in head.pop("shards"))
        text = json.dumps(head, indent=2).removesuffix("\n}")
        files.write(
            path,
            lambda file: file.write(f'{text},\n  "shards": [\n    {lines}\n  ]\n}}\n'.encode()),
        )

    def located(self, folder: Path, numbers: Iterable[int]) -> dict[int, Located]:
        """The arrays of the files of these numbers, which are still there as the manifest has them,
        contents aside.

        Raises:
            FileError: A file is missing, of another size, shape or dtype, or listed twice.
        """
        found, seen = {}, set()
        expected = f"rows {list(self.event_shape)} in {self.dtype}"
        for i in numbers:
            shard = self.shards[i]
            path = folder / shard.file
            same = (path.resolve(), shard.key)
            if same in seen:
                raise FileError(f"{folder / NAME}: lists {shard.file} twice")
            seen.add(same)
            if not path.exists():
                raise FileError(f"{path}: no such file, but {NAME} lists it")
            size = stamp(path)[1]
            if size != shard.bytes:
                what = "truncated" if size < shard.bytes else "has changed"
                raise FileError(
                    f"{path}: {what}: {size} bytes, and {shard.bytes} when {NAME} was written"
                )
            at = rows.locate(path, shard.key)
            if at.kind != expected:
                raise FileError(f"{at.name}: expected {expected} as in {NAME}, got {at.kind}")
            if at.shape[0] != shard.rows:
                raise FileError(
                    f"{at.name}: expected {shard.rows} rows as in {NAME}, got {at.shape[0]}"
                )
            found[i] = at
        return found


def make(
    folder: Path,
    key: str | None,
    scale: object,
    offset: object,
    callback: Callable[[int, int], None],
) -> Manifest:
    """The manifest of a folder, whose files are all read once. callback(rows, all rows).

    Raises:
        FileError: A file is wrong, unlike the first, holds NaN or inf, or ends in a row of zeros.
        TypeError, ValueError: scale or offset is wrong, or has too few or too many channels.
    """
    if not folder.is_dir():
        raise FileError(f"{folder}: expected a folder of .safetensors or .npy files")
    found = [(path, *stamp(path), rows.locate(path, key)) for path in of_folder(folder)]
    first, total, done = found[0][3], sum(at.shape[0] for *_, at in found), 0
    event = tuple(first.shape[1:])
    scale, offset = numbers("scale", scale, event), numbers("offset", offset, event)
    shards = []
    for path, mtime_ns, size, at in found:
        if at.kind != first.kind:
            raise FileError(f"{at.name}: expected {first.kind} as in {first.name}, got {at.kind}")
        crc = 0
        for start, block, crc_so_far in blocks(at):
            crc = crc_so_far
            _check_values(at, start, block)
            callback(done + start + len(block), total)
        done += at.shape[0]
        if stamp(path) != (mtime_ns, size):
            raise FileError(f"{path}: has changed while it was read")
        shards.append(Shard(path.name, at.key, at.shape[0], size, mtime_ns, crc))
    return Manifest(event, words.dtype(first.dtype), scale, offset, tuple(shards))


def blocks(at: Located) -> Iterator[tuple[int, torch.Tensor, int]]:
    """(number of the first row, rows, CRC-32 of all up to the last of them), block by block."""
    count = max(1, _BLOCK // at.row_bytes)
    buffer = np.empty(min(count, at.shape[0]) * at.row_bytes, np.uint8)
    crc = 0
    for start in range(0, at.shape[0], count):
        block = rows.read(at, start, min(start + count, at.shape[0]), buffer)
        crc = zlib.crc32(buffer.data[: len(block) * at.row_bytes], crc)
        yield start, block, crc


def _check_values(at: Located, start: int, block: torch.Tensor) -> None:
    if block.is_floating_point():
        bad = ~block.reshape(len(block), -1).isfinite().all(1)
        if bool(bad.any()):
            row = start + int(bad.nonzero()[0])
            raise FileError(f"{at.name}: expected finite numbers, got others in row {row}")
    if start + len(block) == at.shape[0] and not bool(block[-1].any()):
        raise FileError(
            f"{at.name}: row {at.shape[0] - 1}, the last, holds nothing but zeros, as where a "
            "writer died: write the file anew, or cut it off"
        )


def load(path: Path) -> Manifest:
    """Reads a manifest. Raises FileError."""
    try:
        state = json.loads(path.read_bytes())
        if state["format"] != _FORMAT:
            raise ValueError(f"format {state['format']!r}, not {_FORMAT!r}")
        shards = tuple(Shard(**shard) for shard in state["shards"])
        for shard in shards:
            _check_shard(shard)
        if not shards:
            raise ValueError("no shards")
        event = tuple(check.integer("event_shape", n, 1) for n in state["event_shape"])
        scale, offset = (numbers(name, state[name], event) for name in ("scale", "offset"))
        check.choice("dtype", state["dtype"], tuple(dtypes.STORED_BY_NAME))
        return Manifest(event, state["dtype"], scale, offset, shards)
    except FileNotFoundError:
        raise FileError(
            f"{path}: no such file: `dfkernels manifest {path.parent}` writes it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = files.first_sentence(error)
        raise FileError(f"{path}: truncated, or no manifest of dfkernels: {why}") from None


def numbers(name: str, value: object, event: tuple[int, ...]) -> Numbers:
    """A scale or an offset of rows with shape `event`: a number, or one for each channel.

    Raises:
        TypeError, ValueError: It is none, or there are too few or too many.
    """
    if not isinstance(value, (Sequence, np.ndarray, torch.Tensor)) or isinstance(value, str):
        return check.constant(name, value)
    if not getattr(value, "ndim", 1):
        return check.constant(name, value)
    each = tuple(check.constant(f"{name}[{i}]", number) for i, number in enumerate(value))
    if not event or len(each) != event[0]:
        channels = f", or {event[0]} of them, one for each channel" if event else ""
        expected = f"a number{channels} of rows {[*event]}"
        raise check.mismatch(name, expected, f"{len(each)} numbers")
    return each if len(each) > 1 else each[0]


def _check_shard(shard: Shard) -> None:
    if not isinstance(shard.file, str) or not isinstance(shard.key, str | None):
        raise TypeError("file and key are no texts")
    check.integer("rows", shard.rows, 1)
    for name in ("bytes", "mtime_ns", "crc32"):
        check.integer(name, getattr(shard, name))
