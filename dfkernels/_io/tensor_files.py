"""Files of tensors: .safetensors, written whole with checksums, read without trusting them."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .files import FileError, checksum, first_sentence, write

__all__ = ["Place", "locate", "opened", "read", "save"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a .safetensors file, whole or not at all, with the checksum of every tensor in its
    metadata.

    Raises:
        FileError: as `write` does.
    """
    from safetensors import torch as safetensors

    arrays = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    checksums = {name: checksum(t) for name, t in arrays.items()}
    metadata = metadata | {"crc32": json.dumps(checksums)}

    def fill(file: BinaryIO) -> None:
        if hasattr(file, "name"):  # in place of the file, without a copy of all tensors in memory
            safetensors.save_file(arrays, file.name, metadata)
        else:
            file.write(safetensors.save(arrays, metadata))

    write(path, fill)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a file that `save` wrote, with their checksums verified.

    The tensors are memory-mapped; writing to one of them leaves the file as it is.

    Raises:
        FileError: no such file, truncated, damaged, or without checksums.
    """
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        held, metadata = opened(path, mode="c")
        arrays = {name: mapped() for name, mapped in held.items()}
        checksums = dict(json.loads(metadata["crc32"]))
    except FileError:
        raise
    except Exception as error:  # parsers of damaged files raise whatever comes to their mind
        raise FileError(f"{path}: truncated or unreadable: {first_sentence(error)}") from None
    for name, t in arrays.items():
        if (found := checksum(t)) != checksums.get(name):
            raise FileError(
                f"{path}: damaged: the checksum of {name} is {found}, not {checksums.get(name)}"
            )
    return arrays, metadata


def opened(
    path: Path, *, mode: Literal["c", "r"]
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """The metadata of any .safetensors file, and for each of its tensors a call that maps it.

    Args:
        path: The file, which is not trusted.
        mode: "r" for tensors that must not be written to and may be larger than the memory; "c" for
            tensors whose changes stay in memory.

    Raises:
        Exception: whatever safetensors raises of a header that is wrong. A call raises FileError
            where torch does not have the tensor's dtype.
    """
    places, metadata = locate(path)
    return {name: partial(_mapped, path, name, *at, mode) for name, at in places.items()}, metadata


class Place(NamedTuple):
    """Where a tensor stands in a .safetensors file."""

    begin: int  # its first byte
    dtype_name: str
    shape: list[int]

    def dtype(self, path: Path, name: str) -> torch.dtype:
        """Raises FileError where torch does not have it."""
        dtype = _DTYPES.get(self.dtype_name)
        if dtype is None:
            raise FileError(
                f"{path}: tensor {name} has dtype {self.dtype_name}, expected one of "
                f"{', '.join(_DTYPES)}"
            )
        return dtype


def locate(path: Path) -> tuple[dict[str, Place], dict[str, str]]:
    """Where the tensors of any .safetensors file stand, and its metadata.

    Raises:
        Exception: whatever safetensors raises of a header that is wrong.
    """
    from safetensors import safe_open

    # Checks the header: each tensor has its own bytes, as many as its dtype and shape need, and
    # together they fill the file. It is not asked for tensors, which it would copy.
    with safe_open(path, framework="numpy"), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    place = lambda given: Place(
        8 + length + given["data_offsets"][0], given["dtype"], given["shape"]
    )
    return {name: place(given) for name, given in header.items()}, metadata


def _mapped(
    path: Path, name: str, begin: int, dtype_name: str, shape: list[int], mode: Literal["c", "r"]
) -> Tensor:
    dtype = Place(begin, dtype_name, shape).dtype(path, name)
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype, device="cpu")
    raw = np.memmap(path, np.uint8, mode, offset=begin, shape=(size,))
    if raw.ctypes.data % dtype.itemsize:
        raw = np.array(raw)  # the format does not promise alignment
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(raw).view(dtype).view(shape)
