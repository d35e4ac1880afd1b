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
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

_SUFFIXES = (".npy", ".safetensors", ".pt", ".pth")
_SAFETENSORS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "U8": torch.uint8,
}  # fmt: skip


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
        arrays = _safetensors(path) if path.suffix == ".safetensors" else _torch_file(path)
    except FileError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
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


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Header length (uint64, little endian), JSON {name: {dtype, shape, data_offsets}}, tensor bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"the header needs {length} bytes, the file has {size}")
        header = json.loads(file.read(length))
    arrays = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS:
            continue  # other dtypes are no atoms; such a tensor is not offered
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
    return arrays
