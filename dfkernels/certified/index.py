"""The index of a cloud: codes of the atoms, from which bounds on all logits follow without reading
the atoms themselves.

Let t = y - centre, V = ``basis`` with K <= 32 almost orthonormal rows (principal axes), and
h = V t. The coarse level approximates h, the fine level what the coarse level leaves over:

    h ~ coarse_codes * axis_scale * code_scale[0]                    int16, along the axes
    t - V^T (coarse part) ~ fine_codes * code_scale[1]               int8, along the coordinates

Each atom has a scale of its own at each level. With r the part of t that the codes leave over,
``remainder_norm`` is at least |r| and ``axis_error`` at least |V r|, at each level.

Masked atoms and remote atoms have no codes: their ``code_scale`` is 0. A remote atom is one of the
few that are very far from all others. It has ``atom_norm`` 1 and is known to be at least
``limits[3]`` away from the centre. Of a masked atom, ``atom_norm`` 0, nothing is known.
docs/certified.md derives the bounds that follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._constants import CODE_TILE, MOST_AXES
from .._torch import words


class CloudIndex(NamedTuple):
    """The tensors that the search takes beside the atoms; `FIELDS` has their dtypes and shapes."""

    centre: Tensor
    basis: Tensor
    axis_scale: Tensor
    coarse_codes: Tensor
    fine_codes: Tensor  # [0, 0] where the index has no fine level
    atom_norm: Tensor  # |t|
    code_scale: Tensor
    remainder_norm: Tensor
    axis_error: Tensor
    limits: Tensor  # the numbers of `Limits`

    def __repr__(self) -> str:
        """In one line: a tuple of tensors prints numbers of each."""
        N, d, K = len(self.atom_norm), len(self.centre), len(self.axis_scale)
        size = f"{self.nbytes} bytes, {self.centre.device}"
        return f"CloudIndex({N} atoms, d = {d}, {K} axes, {len(self.code_scale)} levels, {size})"

    @property
    def nbytes(self) -> int:
        """Memory of all tensors, in bytes."""
        return sum(t.numel() * t.element_size() for t in self)

    @property
    def named_limits(self) -> Limits:
        """The bounds on all atoms together."""
        return Limits(*self.limits)


class Limits(NamedTuple):
    """Bounds on all atoms together, 0-d float64 tensors; norms are those of atoms with codes."""

    axis_skew: Tensor  # |V V^T - I|
    radius: Tensor  # largest |t|
    coordinate_norm: Tensor  # largest |y| plus |centre|
    remote_distance: Tensor  # least |t| of the remote atoms
    remote_count: Tensor  # how many remote atoms there are


class Field(NamedTuple):
    """What a tensor of an index has to be. A letter in `shape` stands for a size (see `_sizes`)."""

    dtype: torch.dtype
    shape: tuple[str | int, ...]
    minimum: float | None = None  # the smallest number it may hold; None: any finite number


_LEAST_BYTES = 32  # of an atom: shorter ones are read as fast as an index
FIELDS = {
    "centre": Field(torch.float32, ("d",)),
    "basis": Field(torch.float32, ("K", "d")),
    "axis_scale": Field(torch.float32, ("K",), torch.finfo(torch.float32).tiny),
    "coarse_codes": Field(torch.int16, ("tiles", "K", CODE_TILE)),
    "fine_codes": Field(torch.int8, ("rows", "padded")),
    "atom_norm": Field(torch.float32, ("N",), 0.0),
    "code_scale": Field(torch.float32, ("levels", "N"), 0.0),
    "remainder_norm": Field(torch.float32, ("levels", "N"), 0.0),
    "axis_error": Field(torch.float32, ("levels", "N"), 0.0),
    "limits": Field(torch.float64, (5,), 0.0),
}


def unindexable(d: int, dtype: torch.dtype) -> str | None:
    """Why atoms of d numbers are too short for an index; None where they are not."""
    if d * dtype.itemsize >= _LEAST_BYTES:
        return None
    return (
        f"expected atoms of at least {_LEAST_BYTES} bytes, got {d * dtype.itemsize} (d = {d}, "
        f"{dtype}): these are read as fast as an index"
    )


def has_fine_level(d: int, itemsize: int) -> bool:
    """Whether atoms are so long that int8 codes are short beside the rest of what is stored."""
    return d >= (128 if itemsize > 1 else 512)


def check_layout(index: CloudIndex, shape: Sequence[int], device: torch.device) -> None:
    """Checks that a kernel can read each tensor as `FIELDS` declares it. Looks at no values.

    Args:
        index: the tensors of an index.
        shape: [N, d], of the atoms that it has to describe.
        device: where its tensors have to be.

    Raises:
        RuntimeError: "name: expected what, got what" for a tensor of another layout, dtype, device
            or shape. csrc/certified/ makes the same checks for the compiled kernel.
    """
    for name, t in index._asdict().items():
        if t.layout != torch.strided:
            raise RuntimeError(f"{name}: expected a dense tensor, got {t.layout}")
        if t.dtype != FIELDS[name].dtype:
            expected, got = (words.dtype(a) for a in (FIELDS[name].dtype, t.dtype))
            raise RuntimeError(f"{name}: expected {expected}, got {got}")
        if t.device != device:
            raise RuntimeError(f"{name}: expected device {device}, got {t.device}")
    sizes = _sizes(index, *shape)
    if not 1 <= sizes["K"] <= MOST_AXES:
        got = list(index.basis.shape)
        raise RuntimeError(
            f"basis: expected 1 to {MOST_AXES} axes of {shape[1]} numbers, got {got}"
        )
    for name, t in index._asdict().items():
        expected = [n if isinstance(n, int) else sizes[n] for n in FIELDS[name].shape]
        if list(t.shape) != expected:
            raise RuntimeError(f"{name}: expected shape {expected}, got {list(t.shape)}")


def _sizes(index: CloudIndex, N: int, d: int) -> dict[str, int]:
    """What the letters of the shapes stand for, for N atoms of d numbers."""
    K, rows = (t.shape[0] if t.ndim == 2 else 0 for t in (index.basis, index.fine_codes))
    return {
        "N": N, "d": d, "K": K, "tiles": -(-N // CODE_TILE), "levels": 1 + (rows > 0),
        "rows": N if rows else 0, "padded": -(-d // 32) * 32 if rows else 0,
    }  # fmt: skip


def check_values(index: CloudIndex) -> None:
    """Checks the numbers of an index. Codes may be any integers: bounds allow for all of them.

    Raises:
        RuntimeError: names the first tensor with a number that is not finite or below the minimum.
    """
    floats = {n: t for n, t in index._asdict().items() if t.is_floating_point() and t.numel()}
    # both ends are nan if any number is; a device is waited for once
    ends = torch.stack([end for t in floats.values() for end in t.aminmax()]).view(-1, 2)
    for name, (low, high) in zip(floats, ends.tolist(), strict=True):
        minimum = FIELDS[name].minimum
        enough = low > -torch.inf if minimum is None else low >= minimum
        if not (enough and high < torch.inf):
            expected = "finite values" + ("" if minimum is None else f" >= {minimum:g}")
            raise RuntimeError(f"{name}: expected {expected}, got values from {low:g} to {high:g}")
    N, count = len(index.atom_norm), float(index.named_limits.remote_count)
    if count > N:
        raise RuntimeError(f"limits: expected at most {N} remote atoms, got {count:g}")
