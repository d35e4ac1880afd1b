"""The index of a cloud in a .safetensors file, with what tells the cloud apart from others."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .._io import files
from .build import independent_of_torch_state
from .index import CloudIndex, check_layout, check_values

FORMAT = "dfkernels index 4"


def fingerprint(y: Tensor, scale: float, offset: float) -> str:
    """Text that tells the cloud of atoms scale * y + offset apart from others."""
    checksum = files.checksum(y.cpu())
    return f"{list(y.shape)} {y.dtype} scale={scale!r} offset={offset!r} crc32={checksum}"


@independent_of_torch_state
def save_index(path: Path, index: CloudIndex, cloud: str) -> None:
    """Writes the index of the cloud with fingerprint `cloud`. Raises FileError."""
    files.save_tensors(path, index._asdict(), {"format": FORMAT, "cloud": cloud})


@independent_of_torch_state
def load_index(path: Path, cloud: str) -> CloudIndex:
    """Reads an index, memory-mapped, for the cloud with fingerprint `cloud`.

    Every tensor's name, checksum, dtype, shape and range is checked, since kernels read what they
    say.

    Raises:
        FileError: the file is damaged, of another format version or of another cloud. The message
            says what to do.
    """
    try:
        tensors, metadata = files.read_tensors(path)
    except files.FileError as error:
        raise files.FileError(f"{error}; remove it and index anew") from None
    found = metadata.get("format", "another kind of file")
    if found != FORMAT:
        raise _wrong(path, f"expected {FORMAT!r}, got {found!r}")
    if set(tensors) != set(CloudIndex._fields):
        names = ", ".join(CloudIndex._fields)
        raise _wrong(path, f"expected tensors {names}, got {', '.join(tensors)}")
    if metadata.get("cloud") != cloud:
        got = metadata.get("cloud")
        raise _wrong(path, f"the index of another cloud: expected {cloud}, got {got}")
    index = CloudIndex(**{name: tensors[name] for name in CloudIndex._fields})
    try:
        check_layout(index, _shape(cloud), torch.device("cpu"))
        check_values(index)
    except RuntimeError as error:
        raise _wrong(path, str(error)) from None
    return index


def _wrong(path: Path, what: str) -> files.FileError:
    return files.FileError(f"{path}: {what}: remove it and index anew")


def _shape(cloud: str) -> tuple[int, int]:
    """(N, d) from a fingerprint."""
    N, d = cloud[1 : cloud.index("]")].split(",")
    return int(N), int(d)
