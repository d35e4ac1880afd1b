"""Arrays from files, without pickle and without reading more than is used; results to files, whole or not at
all.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

_SUFFIXES = (".npy", ".safetensors", ".pt", ".pth")
_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip


_UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError,
)  # fmt: skip


class FileError(ValueError):
    """A file that cannot be read or written, or holds the wrong thing; the message starts with its name."""


def load(name: str) -> Tensor | np.ndarray:
    """One array, memory-mapped, from FILE.npy, FILE.safetensors or FILE.pt; FILE:KEY where it holds several.

    Nothing in a file is executed. Raises FileError for a missing, truncated, unreadable or ambiguous file.
    """
    path, key = _split(name)
    if path.suffix not in _SUFFIXES:
        raise FileError(f"{path}: expected one of {', '.join(_SUFFIXES)}, got {path.suffix or 'no suffix'}")
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        if path.suffix == ".npy":
            return np.lib.format.open_memmap(path, mode="r")  # refuses pickled objects
        arrays = _atoms(path) if path.suffix == ".safetensors" else _torch_file(path)
    except FileError:
        raise
    except _UNREADABLE as error:
        raise FileError(f"{path}: truncated or unreadable: {_first_sentence(error)}") from None
    if isinstance(arrays, Tensor):
        arrays = {"": arrays}
    if not isinstance(arrays, dict) or not all(isinstance(a, Tensor) for a in arrays.values()):
        raise FileError(f"{path}: expected a tensor or a dict of tensors")
    if key is None and len(arrays) == 1:
        return next(iter(arrays.values()))
    if key not in arrays:
        names = ", ".join(map(str, list(arrays)[:12]))
        raise FileError(f"{path}: holds {len(arrays)} tensors ({names}): name one as {path.name}:KEY")
    return arrays[key]


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write `path` by `fill(file)` on a temporary file beside it, then rename: a failure leaves the old one.

    Raises FileError (full disk, no permission, no such folder).
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # a temporary file is private; the result is an ordinary file
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError):
            raise FileError(f"{path}: cannot write: {error.strerror or error}") from None
        raise


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A .safetensors file, whole or not at all; every tensor at a multiple of 64 bytes, with its checksum."""
    names = {dtype: name for name, dtype in _SAFETENSORS.items()}
    arrays = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    header, end = {"__metadata__": metadata | {"crc32": json.dumps(_checksums(arrays))}}, 0
    for name, t in arrays.items():
        begin, end = end, end + t.numel() * t.element_size()
        header[name] = {"dtype": names[t.dtype], "shape": list(t.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)

    def fill(file: BinaryIO) -> None:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in arrays.values():
            file.write(_bytes(t))

    write(path, fill)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_tensors` wrote, memory-mapped, checksums compared. Raises FileError."""
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        arrays, metadata = _safetensors(path)
        checksums = json.loads(metadata["crc32"])
    except _UNREADABLE as error:
        raise FileError(f"{path}: truncated or unreadable: {_first_sentence(error)}") from None
    for name, found in _checksums(arrays).items():
        if found != checksums.get(name):
            raise FileError(f"{path}: damaged: the checksum of {name} is {found}, not {checksums.get(name)}")
    return arrays, metadata


def checksum(t: Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes."""
    return zlib.crc32(_bytes(t))


def _bytes(t: Tensor) -> memoryview:
    return memoryview(t.flatten().view(torch.uint8).numpy())


def _checksums(arrays: dict[str, Tensor]) -> dict[str, int]:
    return {name: checksum(t) for name, t in arrays.items()}


def folder(path: Path) -> Path:
    """`path`, made if missing and seen to be writable. Raises FileError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise FileError(f"{path}: cannot write there: {error.strerror or error}") from None


def _split(name: str) -> tuple[Path, str | None]:
    path = Path(name)
    if path.exists() or ":" not in name:
        return path, None
    head, key = name.rsplit(":", 1)
    return (Path(head), key) if Path(head).suffix in _SUFFIXES else (path, None)


def _first_sentence(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]


def _torch_file(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _atoms(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file that can be atoms; others are not offered."""
    arrays = _safetensors(path)[0]
    return {k: t for k, t in arrays.items() if t.is_floating_point() or t.dtype == torch.uint8}


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata). Header length (uint64, little endian), JSON {name: {dtype, shape, data_offsets}},
    tensor bytes.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"the header needs {length} bytes, the file has {size}")
        header = json.loads(file.read(length))
    arrays, metadata = {}, header.pop("__metadata__", {})
    for name, entry in header.items():
        if entry["dtype"] not in _SAFETENSORS:
            continue
        dtype, shape, (begin, end) = _SAFETENSORS[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if begin < 0 or end - begin != math.prod(shape) * dtype.itemsize or 8 + length + end > size:
            raise ValueError(
                f"tensor {name} {shape} needs bytes {begin} to {end}, the file ends at {size - 8 - length}"
            )
        if end == begin:
            arrays[name] = torch.empty(shape, dtype=dtype)
            continue
        raw = np.memmap(path, np.uint8, "c", offset=8 + length + begin, shape=(end - begin,))
        if raw.ctypes.data % dtype.itemsize:
            raw = np.array(raw)  # the format does not promise alignment
        arrays[name] = torch.from_numpy(raw).view(dtype).view(shape)
    return arrays, metadata
