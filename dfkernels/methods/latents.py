"""The latents of an autoencoder as encoders leave them in files: read by rows, in the units of the
diffusion.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._io import arrays, tensor_files
from .._io.files import FileError
from .._torch import check, dtypes, words
from .._torch.objects import plain
from ._shards import of_folder, stamp, written

__all__ = ["Latents"]

_STATISTICS = "latents_stats.pt"
_BLOCK = 1 << 22  # numbers that are converted together
PerChannel = float | Sequence[float] | np.ndarray | Tensor


class Latents:
    """Latents z [N, C, *] in files, read by rows as x_0 = (z - shift) scale, for training and for a
    PointCloud.

    >>> latents = Latents("imagenet256/train")  # latents_rank00_shard000.safetensors, ...
    >>> rows = torch.randint(len(latents), (16,), generator=generator)
    >>> x_0, label = latents[rows], latents.labels[rows]  # [16, C, *] in float32, [16]
    >>> cloud = PointCloud(latents[:50_000])

    Args:
        path: a folder with .safetensors files, or else with .npy files, in the order of the numbers
            in their names; or one such file. Each holds rows [n, C, *], all of one shape and dtype:
            float64/32/16, bfloat16 or uint8.
        keys: of the arrays in a .safetensors file. With several, all rows of the first key come
            before those of the next: ("latents", "latents_flip") reads the N images of LightningDiT
            and then, as rows N to 2N - 1, the same images mirrored.
        shift, scale: a number, or C numbers, in the units of z: shift_factor and scaling_factor of
            a VAE, or the mean and 1/std of a data set. Where neither is given they come from
            `latents_stats.pt` beside the latents, a dict with the C numbers `mean` and `std`; where
            one is, the other is 0 or 1.

    `len(latents)` is N; `event_shape` and `dtype` are those of a stored row; `shift` and `scale`
    are [C] in float64. `labels` is [N], or None where no file has an array `labels`; those of a
    folder of .npy files are the caller's. `latents[rows]`, for an integer, a slice or integers [n],
    is a float32 tensor on the CPU. Only the rows asked for are read, and copied: 4 bytes a number,
    0.8 GB for 50,000 rows [4, 32, 32]. Files are memory-mapped when they are read, and a copy in
    another process (a DataLoader's) maps them itself.

    The first look is at the header and the end of every file. Values are checked as they are read.

    Raises:
        ValueError: A shard is missing in the numbering or truncated, lacks a key or labels, has
            another shape or dtype than the first, or ends in zeros, as one does whose writer died;
            the folder is empty; a row that is read holds NaN or inf; a file has changed since. It
            is a `FileError`, whose message names the file.
        ValueError: shift or scale are not 1 or C finite numbers, scale > 0; or neither is given and
            there is no `latents_stats.pt`.
        IndexError: A row out of range.

    A RuntimeWarning says where one rank has fewer shards than another: the last ones may be
    missing, which the numbering does not tell.
    """

    event_shape: torch.Size
    dtype: torch.dtype
    shift: Tensor
    scale: Tensor
    labels: Tensor | None

    def __init__(
        self,
        path: str | Path,
        *,
        keys: str | Sequence[str] = ("latents",),
        shift: PerChannel | None = None,
        scale: PerChannel | None = None,
    ) -> None:
        path, keys = Path(path), (keys,) if isinstance(keys, str) else tuple(keys)
        with plain(torch.device("cpu")):
            found = of_folder(path)
            self._parts = _parts(found, keys)
            self.event_shape, self.dtype = self._parts[0].event_shape, self._parts[0].dtype
            self.labels = _labels(found, self._parts)
            if shift is None and scale is None:
                shift, scale = _statistics(path, self.event_shape[0])
            self.shift = _per_channel("shift", 0.0 if shift is None else shift, self.event_shape[0])
            self.scale = _per_channel("scale", 1.0 if scale is None else scale, self.event_shape[0])
            if not bool((self.scale > 0).all()):
                raise check.mismatch("scale", "numbers > 0", self.scale.tolist())
            counts = [part.rows for part in self._parts]
            self._ends = torch.tensor(counts, dtype=torch.int64, device="cpu").cumsum(0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        event = tuple(self.event_shape)
        names = {part.file for part in self._parts}
        return f"Latents(N={len(self)}, event_shape={event}, {self.dtype}, files={len(names)})"

    def __getitem__(self, rows: int | slice | Tensor) -> Tensor:
        index = torch.arange(len(self), dtype=torch.int64, device="cpu")
        index = index[rows.cpu() if isinstance(rows, Tensor) else rows]
        wanted, order = index.reshape(-1).sort()
        out = torch.empty((len(wanted), *self.event_shape), dtype=torch.float32, device="cpu")
        places = torch.searchsorted(self._ends, wanted, right=True)
        which, counts = places.unique_consecutive(return_counts=True)
        block, begin = max(1, _BLOCK // self.event_shape.numel()), 0
        for i, count in zip(which.tolist(), counts.tolist(), strict=True):
            part, start = self._parts[i], int(self._ends[i]) - self._parts[i].rows
            end, array = begin + count, part.array()
            for at in range(begin, end, block):
                some = slice(at, min(at + block, end))
                out[order[some]] = self._read(part, array, wanted[some] - start)
            begin = end
        return out.reshape(*index.shape, *self.event_shape)

    def _read(self, part: _Part, array: Tensor, rows: Tensor) -> Tensor:
        """Rows of one array in the units of the diffusion, in float32. Raises FileError."""
        z = array[rows]
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        by_channel = (-1, *[1] * (z.ndim - 2))
        x = (z - self.shift.to(z.dtype).view(by_channel)) * self.scale.to(z.dtype).view(by_channel)
        x = x.float()
        bad = ~x.flatten(1).isfinite().all(1)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            value = z[first][~x[first].isfinite()][0].item()
            raise FileError(
                f"{part.name}: expected finite numbers in float32, got {value} in row "
                f"{int(rows[first])}"
            )
        return x


class _Part(NamedTuple):
    """An array of rows in a file: what is known of it while it is not mapped."""

    file: str
    name: str  # FILE or FILE:KEY
    stamp: tuple[int, int]
    rows: int
    event_shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, file: Path, key: str | None) -> _Part:
        name = str(file) if key is None else f"{file}:{key}"
        seen = stamp(file)
        array = _mapped(name, seen)
        if array.dtype not in dtypes.STORED:
            names = ", ".join(dtypes.STORED_BY_NAME)
            raise FileError(f"{name}: expected dtype {names}, got {array.dtype}")
        if array.ndim < 2 or not array.numel():
            raise FileError(
                f"{name}: expected rows [n, C, *] with n >= 1, got shape {list(array.shape)}"
            )
        count = written(array)
        if count < len(array):
            raise FileError(
                f"{name}: rows {count} to {len(array) - 1}, the last, hold nothing but zeros, "
                "as where a writer died: encode them anew, or cut them off"
            )
        return cls(str(file), name, seen, len(array), array.shape[1:], array.dtype)

    @property
    def kind(self) -> str:
        return f"rows {list(self.event_shape)} in {words.dtype(self.dtype)}"

    def array(self) -> Tensor:
        """The array, memory-mapped. Raises FileError."""
        if stamp(Path(self.file)) != self.stamp:
            raise FileError(f"{self.file}: has changed since it was first read: open it anew")
        return _mapped(self.name, self.stamp)


@functools.lru_cache(maxsize=128)
def _mapped(name: str, stamp: tuple[int, int]) -> Tensor:
    """The array FILE or FILE:KEY, memory-mapped. The last ones stay mapped, since a batch asks for
    rows of many; a file that has changed, by its `stamp`, is another one.
    """
    return arrays.load(name)


def _parts(found: list[Path], keys: tuple[str, ...]) -> list[_Part]:
    """The arrays of all files, key by key, of one shape and dtype. Raises FileError."""
    if not keys:
        raise check.mismatch("keys", "at least one", "none")
    of_file = lambda file: keys if file.suffix.lower() == ".safetensors" else (None,)
    parts = [[_Part.of(file, key) for key in of_file(file)] for file in found]
    first = parts[0][0]
    for of_one in parts:
        for part in of_one:
            if part.kind != first.kind:
                raise FileError(
                    f"{part.name}: expected {first.kind} as in {first.name}, got {part.kind}"
                )
            if part.rows != of_one[0].rows:
                raise FileError(
                    f"{part.name}: expected {of_one[0].rows} rows, as many as "
                    f"{of_one[0].name} has, got {part.rows}"
                )
    return [part for column in zip(*parts, strict=True) for part in column]


def _labels(found: list[Path], parts: list[_Part]) -> Tensor | None:
    """The labels of all rows, [N]; None where no file has any. Raises FileError."""
    with_labels, without = [], []
    for file in found:
        shard = file.suffix.lower() == ".safetensors"
        has = shard and "labels" in tensor_files.opened(file, mode="r")[0]
        (with_labels if has else without).append(file)
    if not with_labels:
        return None
    if without:
        raise FileError(f"{without[0]}: expected labels, as {with_labels[0]} has them, got none")
    labels = []
    for file, part in zip(found, parts, strict=False):  # the parts of the first key
        held = arrays.load(f"{file}:labels")
        if held.shape != (part.rows,):
            raise FileError(
                f"{file}:labels: expected shape [{part.rows}], one for each row, got "
                f"{list(held.shape)}"
            )
        labels.append(held)
    return torch.cat(labels * (len(parts) // len(found)))


def _statistics(path: Path, channels: int) -> tuple[Tensor, Tensor]:
    """Shift and scale that give the latents mean 0 and standard deviation 1, by the file beside
    them.
    """
    folder = path if path.is_dir() else path.parent
    file = folder / _STATISTICS
    if not file.exists():
        raise check.mismatch(
            "shift, scale",
            f"numbers, since there is no {file}; shift=0 takes what is stored as it is",
            "None",
        )
    mean, std = (
        _per_channel(name, arrays.load(name), channels) for name in (f"{file}:mean", f"{file}:std")
    )
    if not bool((std > 0).all()):
        raise check.mismatch(f"{file}:std", "numbers > 0", std.tolist())
    return mean, 1 / std


def _per_channel(name: str, value: PerChannel, channels: int) -> Tensor:
    """A number for each channel, [C] in float64: of one number, or of C in any shape."""
    try:
        given = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected numbers, got {type(value).__name__}") from None
    if given.ndim and given.numel() != channels:
        expected = f"a number, or {channels} of them, one for each channel"
        raise check.mismatch(name, expected, f"shape {list(given.shape)}")
    given = given.reshape(-1).expand(channels).clone()
    if not all(map(math.isfinite, given.tolist())):
        raise check.mismatch(name, "finite numbers", given.tolist())
    return given
