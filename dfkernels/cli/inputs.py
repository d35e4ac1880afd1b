"""Atoms and queries that people have in files: read, converted without loss, with errors that name
the file."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, distributed

from .._io import arrays
from .._io.files import FileError
from .._torch import words
from ..cloud import PointCloud
from ..methods.sharded import ShardedCloud

_BLOCK = 1 << 22  # numbers converted together
EXACT = {  # integers up to here are numbers of that dtype
    torch.float32: 1 << 24,
    torch.float64: 1 << 53,
}


def cloud(
    data: str,
    log_prior: str | None,
    scale: float,
    offset: float,
    dtype: torch.dtype | None = None,
) -> PointCloud:
    """The cloud of the atoms in a file.

    They stay in their file (memory-mapped) and their dtype where that is float32, float16, bfloat16
    or uint8, or float64 and ``dtype`` too; others are converted to ``dtype``, integers only where
    nothing is lost.

    Args:
        data: FILE or FILE:KEY of atoms [N, *E], as `arrays.load` reads them.
        log_prior: The same for log weights [N]; None for equal ones.
        scale, offset: Atoms are ``scale * data + offset``.
        dtype: float32 or float64; None for the atoms' own, or float32 where that is an integer.

    Raises:
        FileError: Anything wrong with a file or its contents.
    """
    atoms = arrays.load(data)
    prior = None if log_prior is None else arrays.load(log_prior)
    if atoms.ndim < 1 or atoms.numel() == 0:
        raise FileError(
            f"{data}: expected shape [N, *E] with N >= 1 and no empty dimension, got"
            f" {list(atoms.shape)}"
        )
    if log_prior is not None and prior is not None:
        if prior.shape != atoms.shape[:1]:
            raise FileError(
                f"{log_prior}: expected shape [{len(atoms)}], one log weight per atom of {data},"
                f" got {list(prior.shape)}"
            )
        prior = converted(log_prior, prior, torch.float64)
    if dtype is None:
        dtype = torch.float64 if atoms.dtype == torch.float64 else torch.float32
    if atoms.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.uint8, dtype):
        atoms = converted(data, atoms, dtype, masked=None if prior is None else prior == -math.inf)
    with blaming({"y": data, "log_prior": log_prior}):
        return PointCloud(atoms, prior, scale=scale, offset=offset)


def manifest_folder(data: str) -> Path | None:
    """The folder of shards that `data` names, itself or by its manifest; None for a single file.

    Raises:
        FileError: There is neither.
    """
    path = Path(data)
    if not path.suffix and ":" not in data and not path.exists():
        raise FileError(f"{data}: no such file or folder")
    if path.is_dir():
        return path
    return path.parent if path.name == "manifest.json" else None


def sharded(
    folder: Path,
    memory: int | None,
    dtype: torch.dtype,
    group: distributed.ProcessGroup | None = None,
) -> ShardedCloud:
    """The cloud of a folder of shards with a manifest.

    Args:
        memory: Bytes of atoms in memory at once; None for the default.
        dtype: float32 or float64, of the computation.
        group: Of the processes that share the files out.

    Raises:
        FileError: A file or the manifest is wrong, or holds numbers that ``dtype`` does not have.
    """
    try:
        if memory is None:
            cloud = ShardedCloud(folder, group=group)
        else:
            cloud = ShardedCloud(folder, memory=memory, group=group)
    except FileError:
        raise
    except ValueError as error:
        raise FileError(f"--{error}") from None  # memory: ...
    if cloud.dtype == torch.float64 != dtype:
        raise FileError(
            f"{folder}: holds float64: expected --dtype float64, got {words.dtype(dtype)}"
        )
    return cloud


def queries(name: str, data: str, event_shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The queries [B, *E] of a file, all of which are looked at: `converted` will take them.

    Args:
        name: FILE or FILE:KEY, as `arrays.load` reads them.
        data: The name of the atoms, for a message.
        event_shape: E.
        dtype: float32 or float64, of the computation.

    Raises:
        FileError: Anything wrong with the file or its contents.
    """
    found = arrays.load(name)
    if found.ndim < 1 or found.shape[1:] != event_shape or not len(found):
        expected = words.shape(["B", *event_shape])
        raise FileError(
            f"{name}: expected shape {expected} with B >= 1 to match {data}, got"
            f" {list(found.shape)}"
        )
    for start, block in _blocks(found):
        check_finite(name, converted(name, block, dtype, start), start)
    return found


def described(t: Tensor | None) -> str:
    """Dtype, shape and checksum of an array, by which a later run knows it again."""
    if t is None:
        return "none"
    crc = 0
    for _, block in _blocks(t):
        crc = zlib.crc32(block.contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return f"{words.dtype(t)} {list(t.shape)}, checksum {crc}"


def _blocks(t: Tensor) -> Iterator[tuple[int, Tensor]]:
    rows = max(1, _BLOCK // max(1, t[:1].numel()))
    for start in range(0, len(t), rows):
        yield start, t[start : start + rows]


def converted(
    name: str, t: Tensor, dtype: torch.dtype, first: int = 0, masked: Tensor | None = None
) -> Tensor:
    """`t` [n, ...], whose row 0 is row `first` of the file, in `dtype`. Numbers with a fraction are
    rounded.

    Raises FileError for integers that `dtype` does not have and for numbers beyond its range, but
    for those in the rows that are `masked` [n], whose values do not matter.
    """
    if t.dtype == dtype:
        return t
    out = torch.empty(t.shape, dtype=dtype, device="cpu")
    for start, block in _blocks(t):
        into = out[start : start + len(block)]
        into.copy_(block)
        if block.is_floating_point():
            lost = into.isinf() & ~block.to(torch.float64).isinf()
        else:
            most = EXACT[dtype]
            values = block.numpy()
            if -most <= int(values.min()) and int(values.max()) <= most:
                continue
            lost = torch.from_numpy((values < -most) | (values > most))
        if masked is not None:
            lost[masked[start : start + len(block)]] = False
        if bool(lost.any()):
            index = lost.nonzero()[0].tolist()
            place = [first + start + index[0], *index[1:]]
            way_out = (
                "; --dtype float64 computes with more digits" if dtype == torch.float32 else ""
            )
            raise FileError(
                f"{name}: expected numbers that {words.dtype(dtype)} can hold, got"
                f" {block[tuple(index)].item()} at index {place}{way_out}"
            )
    return out


def check_finite(name: str, x: Tensor, first: int) -> None:
    """Raises FileError for the first NaN or inf of x [n, ...], whose row 0 is row `first` of the
    file."""
    bad = ~x.isfinite()
    if bool(bad.any()):
        index = bad.nonzero()[0].tolist()
        place = [first + index[0], *index[1:]]
        raise FileError(
            f"{name}, row {place[0]}: expected finite values, got {x[tuple(index)].item()} at index"
            f" {place}"
        )


@contextmanager
def blaming(names: dict[str, str | None], otherwise: str | None = None) -> Iterator[None]:
    """An error that begins with the name of an argument is that of the argument's file; one that
    begins with another name (a number that the caller gave, an environment variable) stays as it
    is; any other is put down to `otherwise`.
    """
    try:
        yield
    except FileError:
        raise
    except (TypeError, ValueError) as error:
        argument, colon, _ = str(error).partition(":")
        named = bool(colon) and argument.isidentifier()
        name = names.get(argument) if named else otherwise
        if name is None:
            raise
        raise FileError(f"{name}: {error}") from None
