"""The images that the networks of the audit learn, and those that they never see.

Fashion-MNIST, 60,000 and 10,000 images of clothes of 28 x 28 pixels; in a quick run scikit-learn's
1,797 digits of 8 x 8. Averaged over 2 x 2 pixels for the sake of training time, in [-1, 1], in
random order.
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfkernels._io.files import FileError

FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts the files

_FILES = {"train": "train-images-idx3-ubyte.gz", "held_out": "t10k-images-idx3-ubyte.gz"}
_IDX_IMAGES = 2051  # the file type: unsigned bytes in three dimensions
_HELD_DIGITS = 297


class Images(NamedTuple):
    """Images [n, 1, H, W] in float32 in [-1, 1], and what they are called."""

    name: str
    train: Tensor
    held_out: Tensor

    @property
    def size(self) -> int:
        """H = W."""
        return self.train.shape[-1]


def fashion(folder: Path) -> Images:
    """60,000 images to train on and the 10,000 of the data set's own test part.

    Raises FileError if a file is missing or not what it should be; it says where to get them.
    """
    parts = {}
    for seed, (part, file) in enumerate(_FILES.items()):
        parts[part] = _prepared(_idx(folder / file), 255, seed)
    return Images("Fashion-MNIST", **parts)


def digits() -> Images:
    """1,500 digits to train on and 297 others."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()  # a dict with attributes
    x = _prepared(torch.from_numpy(bunch.images), 16, 0)
    return Images("handwritten digits", x[_HELD_DIGITS:], x[:_HELD_DIGITS])


def _idx(path: Path) -> Tensor:
    """Images of the IDX format, [n, rows, columns] in uint8: a header of four big-endian integers
    (type, n, rows, columns), then the pixels.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except FileNotFoundError:
        raise FileError(
            f"{path}: no such file: it belongs to Fashion-MNIST, which Debian has as a package "
            "(apt-get install dataset-fashion-mnist); with your own copy, --data FOLDER"
        ) from None
    except (OSError, EOFError) as error:
        raise FileError(f"{path}: cannot read: {error}") from None
    if len(content) < 16:
        raise FileError(f"{path}: expected images of the IDX format, got {len(content)} bytes")
    kind, n, rows, columns = struct.unpack(">4i", content[:16])
    if kind != _IDX_IMAGES or len(content) != 16 + n * rows * columns:
        raise FileError(
            f"{path}: expected images of the IDX format (type {_IDX_IMAGES}), got type {kind} and "
            f"{len(content) - 16:,} pixels for {n:,} x {rows} x {columns}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[16:].view(n, rows, columns)


def _prepared(pixels: Tensor, most: int, seed: int) -> Tensor:
    """Images [n, H, W] with pixels in 0 ... most, averaged, scaled and shuffled."""
    small = nn.functional.avg_pool2d(pixels[:, None].float(), 2) / (most / 2) - 1
    return small[torch.randperm(len(small), generator=torch.Generator().manual_seed(seed))]
