"""What every tensor of an index has to be: the one table behind the op's checks in Python and those
of a file. csrc/certified/kept_atoms.cpp makes the same checks for the compiled kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 64  # atoms side by side in the first level: screen_tile in csrc/certified/screen_kernels.h
AXES = 32  # most principal axes: most_axes in csrc/certified/screen_kernels.h


class Field(NamedTuple):
    """One tensor of an index. In `shape` a letter stands for a size, as in `sizes`."""

    dtype: torch.dtype
    shape: tuple[str | int, ...]
    least: float | None = None  # the smallest number it may hold; None: any finite one


FIELDS = {
    "centre": Field(torch.float32, ("d",)),
    "basis": Field(torch.float32, ("K", "d")),
    "step": Field(torch.float32, ("K",), torch.finfo(torch.float32).tiny),
    "first": Field(torch.int16, ("tiles", "K", TILE)),
    "tail": Field(torch.int8, ("tails", "padded")),
    "size": Field(torch.float32, ("N",), 0.0),
    "scales": Field(torch.float32, ("levels", "N"), 0.0),
    "rest": Field(torch.float32, ("levels", "N"), 0.0),
    "shift": Field(torch.float32, ("levels", "N"), 0.0),
    "facts": Field(torch.float64, (5,), 0.0),
}


def sizes(index: dict[str, Tensor], N: int, d: int) -> dict[str, int]:
    """What the letters of the shapes stand for, for N atoms of d numbers."""
    K, tails = (index[name].shape[0] if index[name].ndim == 2 else 0 for name in ("basis", "tail"))
    return {
        "N": N, "d": d, "K": K, "tiles": -(-N // TILE), "levels": 1 + (tails > 0),
        "tails": N if tails else 0, "padded": -(-d // 32) * 32 if tails else 0,
    }  # fmt: skip


def check_layout(index: dict[str, Tensor], N: int, d: int, device: torch.device) -> None:
    """RuntimeError "name: expected what, got what" unless each tensor is one that a kernel can read
    as it is declared: dense, of its dtype and shape, on `device`. Looks at no values.
    """
    for name, t in index.items():
        if t.layout != torch.strided:
            raise RuntimeError(f"{name}: expected a dense tensor, got {t.layout}")
        if t.dtype != FIELDS[name].dtype:
            wanted, got = (
                str(dtype).removeprefix("torch.") for dtype in (FIELDS[name].dtype, t.dtype)
            )
            raise RuntimeError(f"{name}: expected {wanted}, got {got}")
        if t.device != device:
            raise RuntimeError(f"{name}: expected device {device}, got {t.device}")
    found = sizes(index, N, d)
    if not 1 <= found["K"] <= AXES:
        got = list(index["basis"].shape)
        raise RuntimeError(f"basis: expected 1 to {AXES} axes of {d} numbers, got {got}")
    for name, t in index.items():
        shape = [found.get(n, n) for n in FIELDS[name].shape]
        if list(t.shape) != shape:
            raise RuntimeError(f"{name}: expected shape {shape}, got {list(t.shape)}")


def check_values(index: dict[str, Tensor]) -> None:
    """RuntimeError naming the first tensor with a number that no index has: not finite, or below
    the least.

    Any integer will do: bounds count on no less than the whole range of the codes.
    """
    for name, t in index.items():
        least = FIELDS[name].least
        if t.is_floating_point() and t.numel():
            low, high = (float(end) for end in t.aminmax())
            above = low > -torch.inf if least is None else low >= least
            if not (above and high < torch.inf):  # the ends are nan if any number is
                wanted = "finite values" + ("" if least is None else f" >= {least:g}")
                raise RuntimeError(
                    f"{name}: expected {wanted}, got values from {low:g} to {high:g}"
                )
    if float(index["facts"][4]) > index["size"].shape[0]:
        raise RuntimeError(
            f"facts: expected at most {index['size'].shape[0]} atoms set apart, got {index['facts'][4]:g}"
        )
