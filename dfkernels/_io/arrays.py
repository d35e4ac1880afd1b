"""Arrays that people have in files, as tensors: .npy, .npz, .safetensors, .pt and .pth, named FILE
or FILE:KEY.

A file is not trusted: nothing in it is executed, and whatever is wrong with it becomes a FileError
with its name.
"""

from __future__ import annotations

import os
import pickle
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import files, tensor_files
from .files import FileError

SUFFIXES = (".npy", ".npz", ".safetensors", ".pt", ".pth")

# What a file holds: for each name a call that reads that array. None is the name of an array that
# has none.
_Held = dict[str | None, Callable[[], Tensor | np.ndarray]]


def load(name: str) -> Tensor:
    """Load an array from a file: a dense tensor of real numbers on the CPU that requires no grad.

    .npy, .safetensors and .pt files are memory-mapped, so do not write to the result; an array of
    an .npz file is read whole.

    Args:
        name: FILE, or FILE:KEY where the file holds several arrays. In a checkpoint of nested dicts
            a.b is the entry b of the dict a; entries that are no tensors are passed over.

    Raises:
        FileError: No such file, no permission, truncated or damaged, no such key, several arrays
            and no key, or an array that is not real and dense.
    """
    path, key = split(name)
    _check_kind(path)
    try:
        held = _READERS[path.suffix.lower()](path)
        read = _pick(path, key, held)
        found = read()
    except FileError:
        raise
    except MemoryError:
        raise FileError(f"{path}: does not fit into memory") from None
    except pickle.UnpicklingError:
        raise FileError(
            f"{path}: holds more than tensors, numbers and texts, or is damaged: save the tensor"
            " alone"
        ) from None
    except Exception as error:  # parsers of damaged files raise whatever comes to their mind
        raise FileError(f"{path}: truncated or unreadable: {files.first_sentence(error)}") from None
    return _from_numpy(name, found) if isinstance(found, np.ndarray) else _dense(name, found)


def split(name: str) -> tuple[Path, str | None]:
    """Split FILE or FILE:KEY into (file, key or None). Both may hold colons: the longest name that
    exists is the file."""
    if os.path.exists(name) or ":" not in name:
        return Path(name), None
    ends = [at for at, letter in enumerate(name) if letter == ":"][::-1]
    heads = [at for at in ends if Path(name[:at]).suffix.lower() in SUFFIXES]
    for at in [at for at in heads if os.path.exists(name[:at])] or heads[:1]:
        return Path(name[:at]), name[at + 1 :]
    return Path(name), None


def _check_kind(path: Path) -> None:
    """Raise FileError unless ``path`` is a regular file with one of the suffixes that can be
    read."""
    if path.suffix.lower() not in SUFFIXES:
        raise FileError(
            f"{path}: expected one of {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}"
        )
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            with open(path, "rb"):
                return
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except OSError as error:
        raise FileError(f"{path}: cannot read: {error.strerror or error}") from None
    raise FileError(
        f"{path}: expected a regular file, got a {files.kind(mode)}"
        + ("" if stat.S_ISDIR(mode) else ": save what comes out of it as a file")
    )


def _pick(path: Path, key: str | None, held: _Held) -> Callable[[], Tensor | np.ndarray]:
    """Return what reads the array ``key`` of a file; without a key, the only array."""
    if key in held:
        return held[key]
    if key is None and len(held) == 1:
        return next(iter(held.values()))
    if None in held:
        raise FileError(f"{path}: holds one array, which has no name: leave out :{key}")
    if not held:
        raise FileError(f"{path}: holds no arrays")
    names = ", ".join(map(str, list(held)[:12])) + (", ..." if len(held) > 12 else "")
    what = f"holds {len(held)} array{'s' if len(held) > 1 else ''} ({names})"
    if key is None:
        raise FileError(f"{path}: {what}: name one as {path.name}:KEY")
    raise FileError(f"{path}: {what}, none of them named {key}")


# ---- the formats


def _npy(path: Path) -> _Held:
    return {None: lambda: np.lib.format.open_memmap(path, mode="r")}  # refuses pickled objects


def _npz(path: Path) -> _Held:
    def read(name: str) -> np.ndarray:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]

    with zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
    return {name: lambda name=name: read(name) for name in names}


def _safetensors(path: Path) -> _Held:
    held, _ = tensor_files.opened(path, mode="r")
    return {**held}


def _torch_file(path: Path) -> _Held:
    """Return what a file of torch.save holds: a tensor, or the tensors of a dict, nested or not."""
    try:
        str(path).encode()
        # what torch.save writes; the format before that cannot be mapped
        can_map = zipfile.is_zipfile(path)
    except UnicodeEncodeError:  # torch maps files whose names are UTF-8; any other is read
        can_map = False
    with warnings.catch_warnings(), open(path, "rb") as file:
        # what torch thinks of the format is nothing that the user can change
        warnings.simplefilter("ignore")
        found = torch.load(
            path if can_map else file, map_location="cpu", weights_only=True, mmap=can_map
        )
    if isinstance(found, Tensor):
        return {None: lambda: found}
    if not isinstance(found, dict):
        raise FileError(
            f"{path}: expected a tensor or a dict of tensors, got {type(found).__name__}"
        )
    held: _Held = {}
    for name, t in _tensors_of(found, ""):
        if name in held:
            raise FileError(f"{path}: holds two tensors named {name}: save the one you mean alone")
        held[name] = lambda t=t: t
    return held


def _tensors_of(found: dict, prefix: str) -> list[tuple[str, Tensor]]:
    """List (name, tensor) for all tensors of a dict of dicts, names joined by dots."""
    pairs = []
    for key, value in found.items():
        if isinstance(value, Tensor):
            pairs.append((f"{prefix}{key}", value))
        elif isinstance(value, dict):
            pairs += _tensors_of(value, f"{prefix}{key}.")
    return pairs


_READERS = {
    ".npy": _npy,
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _torch_file,
    ".pth": _torch_file,
}


# ---- from what was read to a tensor of real numbers


def _refusal(name: str, got: str, way_out: str) -> FileError:
    return FileError(
        f"{name}: expected a dense array of real numbers, got {got}{way_out and ': '}{way_out}"
    )


_NUMPY_WAYS = {
    "b": 'save it as numbers, a.astype("uint8")',
    "c": "save its real part, a.real",
    "V": "save one of its fields",
    "O": "save it as numbers",
}


def _from_numpy(name: str, a: np.ndarray) -> Tensor:
    if a.dtype.kind not in "fiu":
        raise _refusal(name, f"dtype {a.dtype}", _NUMPY_WAYS.get(a.dtype.kind, ""))
    if a.dtype.itemsize > 8:  # long double
        a = a.astype(np.float64)
    if not a.dtype.isnative:
        a = a.astype(a.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        # nobody writes to it
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(a)


def _dense(name: str, t: Tensor) -> Tensor:
    t = t.detach()
    if t.is_nested:
        raise _refusal(name, "a nested tensor", "save it padded, t.to_padded_tensor(value)")
    if t.layout != torch.strided:
        raise _refusal(name, f"layout {t.layout}", "save t.to_dense()")
    if t.is_meta:
        raise _refusal(
            name, "a meta tensor, which has no values", "save it from the device that has them"
        )
    if t.is_quantized:
        raise _refusal(name, f"dtype {t.dtype}", "save t.dequantize()")
    if t.is_complex():
        raise _refusal(name, f"dtype {t.dtype}", "save its real part, t.real")
    if t.dtype == torch.bool:
        raise _refusal(name, f"dtype {t.dtype}", "save it as numbers, t.to(torch.uint8)")
    return t
