"""The index of a shard, which stays in its file: opened by its header, then read level by level.

An index that `index_file.save_index` wrote holds some 90 bytes an atom for the first level, and a
byte a coordinate for the second. A search of many shards reads the first level of all of them, and
of the second one what it needs.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._constants import CODE_TILE
from .._io import rows
from .._io.rows import Located
from . import index_file
from .index import FIELDS, CloudIndex, check_layout

__all__ = ["AtomCodes", "StoredIndex"]

_FIRST_LEVEL = tuple(name for name in CloudIndex._fields if name != "fine_codes")
_PER_LEVEL = ("code_scale", "remainder_norm", "axis_error")
_CHECKED = 1 << 22  # bytes that are checked together


class AtomCodes(NamedTuple):
    """What a level of an index says of some atoms, [n] each; see index.py."""

    codes: Tensor  # [n, K] or [n, padded d]
    atom_norm: Tensor
    code_scale: Tensor
    remainder_norm: Tensor
    axis_error: Tensor


class StoredIndex:
    """An index in a file.

    Args:
        path: The file, which is not trusted.
        cloud: The fingerprint of the shard's atoms.

    Opening reads the header; `check` the rest of the first level, whose checksums are compared.

    Raises:
        FileError: No such file, a damaged one, or the index of other atoms; the message says what
            to do.
    """

    def __init__(self, path: Path, cloud: str) -> None:
        self.path = path
        places, self._crc32 = index_file.read_header(path, cloud)
        self._places = {
            name: Located(path, name, at.begin, torch.Size(at.shape), at.dtype(path, name))
            for name, at in places.items()
        }
        self.N, self.d = index_file.shape_of(cloud)
        empty = {
            name: torch.empty(at.shape, dtype=at.dtype, device="meta")
            for name, at in self._places.items()
        }
        try:
            check_layout(CloudIndex(**empty), (self.N, self.d), torch.device("meta"))
        except RuntimeError as error:
            raise index_file.wrong(path, str(error)) from None

    @property
    def has_fine_level(self) -> bool:
        return self._places["fine_codes"].shape[0] > 0

    def check(self) -> None:
        """Reads the first level and compares its checksums.

        Raises:
            FileError: The file is damaged or cannot be read.
        """
        for name in _FIRST_LEVEL:
            at, crc = self._in_bytes(name), 0
            buffer = np.empty(min(_CHECKED, at.shape[0]), np.uint8)
            for first in range(0, at.shape[0], _CHECKED):
                last = min(first + _CHECKED, at.shape[0])
                rows.read(at, first, last, buffer)
                crc = zlib.crc32(buffer.data[: last - first], crc)
            if crc != self._crc32.get(name):
                raise index_file.wrong(
                    self.path,
                    f"damaged: the checksum of {name} is {crc}, not {self._crc32.get(name)}",
                )

    def without_atoms(self) -> CloudIndex:
        """The index but for what it says of the single atoms.

        Raises:
            FileError: The file cannot be read.
        """
        whole = {name: self._numbers(name, 0, None) for name in ("centre", "basis", "axis_scale")}
        limits = self._numbers("limits", 0, None)
        none = {
            name: torch.empty((1, 0) if name in _PER_LEVEL else 0, dtype=at.dtype, device="cpu")
            for name, at in FIELDS.items()
        }
        shaped = {name: t.view(self._places[name].shape) for name, t in whole.items()}
        return CloudIndex(**none | shaped | {"limits": limits})

    def coarse(self, first: int, last: int) -> AtomCodes:
        """The first level of the atoms from `first`, a multiple of CODE_TILE, to last - 1."""
        K = self._places["basis"].shape[0]
        tiles = slice(first // CODE_TILE, -(-last // CODE_TILE))
        held = self._numbers(
            "coarse_codes", tiles.start * K * CODE_TILE, tiles.stop * K * CODE_TILE
        )
        codes = held.view(-1, K, CODE_TILE).transpose(1, 2).reshape(-1, K)[: last - first]
        return AtomCodes(codes, *self._of_atoms(0, slice(first, last)))

    def fine(self, atoms: Tensor) -> AtomCodes:
        """The second level of some atoms, int64 [m], rising."""
        codes = rows.gather(self._places["fine_codes"], atoms)
        span = slice(int(atoms[0]), int(atoms[-1]) + 1)
        return AtomCodes(codes, *(t[atoms - span.start] for t in self._of_atoms(1, span)))

    def _of_atoms(self, level: int, span: slice) -> tuple[Tensor, ...]:
        norm = self._numbers("atom_norm", span.start, span.stop)
        start = level * self.N
        ends = start + span.start, start + span.stop
        return norm, *(self._numbers(name, *ends) for name in _PER_LEVEL)

    def _numbers(self, name: str, first: int, last: int | None) -> Tensor:
        """Numbers first to last - 1 of a tensor, flat; all of them for None."""
        at = self._places[name]
        flat = at._replace(shape=torch.Size([math.prod(at.shape)]))
        last = flat.shape[0] if last is None else last
        into = np.empty((last - first) * at.dtype.itemsize, np.uint8)
        return rows.read(flat, first, last, into)

    def _in_bytes(self, name: str) -> Located:
        at = self._places[name]
        size = math.prod(at.shape) * at.dtype.itemsize
        return at._replace(shape=torch.Size([size]), dtype=torch.uint8)
