"""The index of a cloud in a .safetensors file, with what tells the cloud apart from others."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .._io import files, tensor_files
from .build import independent_of_torch_state
from .index import CloudIndex, check_layout, check_values

FORMAT = "dfkernels index 4"


def fingerprint(y: Tensor, scale: float, offset: float) -> str:
    """Text that tells the cloud of atoms scale * y + offset apart from others."""
    return described((len(y), y.shape[1]), y.dtype, scale, offset, files.checksum(y.cpu()))


def described(
    shape: tuple[int, int], dtype: torch.dtype, scale: object, offset: object, crc32: int
) -> str:
    """The fingerprint of a cloud whose stored numbers have this checksum."""
    return f"{list(shape)} {dtype} scale={scale!r} offset={offset!r} crc32={crc32}"


@independent_of_torch_state
def save_index(path: Path, index: CloudIndex, cloud: str) -> None:
    """Writes the index of the cloud with fingerprint `cloud`. Raises FileError."""
    tensor_files.save(path, index._asdict(), {"format": FORMAT, "cloud": cloud})


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
        tensors, metadata = tensor_files.read(path)
    except files.FileError as error:
        raise files.FileError(f"{error}; remove it and index anew") from None
    _expect(path, tensors, metadata, cloud)
    index = CloudIndex(**{name: tensors[name] for name in CloudIndex._fields})
    try:
        check_layout(index, shape_of(cloud), torch.device("cpu"))
        check_values(index)
    except RuntimeError as error:
        raise wrong(path, str(error)) from None
    return index


def read_header(path: Path, cloud: str) -> tuple[dict[str, tensor_files.Place], dict[str, int]]:
    """Where the tensors of an index stand in its file, and their checksums, for the cloud with
    fingerprint `cloud`. Nothing else is read.

    Raises:
        FileError: as `load_index` does.
    """
    try:
        places, metadata = tensor_files.locate(path)
        checksums = dict(json.loads(metadata["crc32"]))
    except OSError as error:
        raise files.FileError(f"{path}: cannot read: {error.strerror or error}") from None
    except Exception as error:  # parsers of damaged files raise whatever comes to their mind
        raise wrong(path, f"truncated or unreadable: {files.first_sentence(error)}") from None
    _expect(path, places, metadata, cloud)
    return places, checksums


def _expect(path: Path, names: Collection[str], metadata: Mapping[str, str], cloud: str) -> None:
    found = metadata.get("format", "another kind of file")
    if found != FORMAT:
        raise wrong(path, f"expected {FORMAT!r}, got {found!r}")
    if set(names) != set(CloudIndex._fields):
        expected = ", ".join(CloudIndex._fields)
        raise wrong(path, f"expected tensors {expected}, got {', '.join(names)}")
    if metadata.get("cloud") != cloud:
        got = metadata.get("cloud")
        raise wrong(path, f"the index of another cloud: expected {cloud}, got {got}")


def wrong(path: Path, what: str) -> files.FileError:
    """What is to be said of a file that is no index of the cloud."""
    return files.FileError(f"{path}: {what}: remove it and index anew")


def shape_of(cloud: str) -> tuple[int, int]:
    """(N, d) from a fingerprint."""
    N, d = cloud[1 : cloud.index("]")].split(",")
    return int(N), int(d)
