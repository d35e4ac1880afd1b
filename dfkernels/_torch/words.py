"""Shapes, dtypes and types as an error or a summary says them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dtype", "kind", "shape"]


def shape(sizes: Sequence[object]) -> str:
    """A shape in words, [B, 3]."""
    return str(list(sizes)).replace("'", "")


def dtype(of: Tensor | torch.dtype) -> str:
    """The name of a dtype, that of a tensor or one by itself: float32."""
    given = of.dtype if isinstance(of, Tensor) else of
    return str(given).removeprefix("torch.")


def kind(a: object) -> str:
    """The type of what came, with the shape of an array, for an error."""
    sizes = None if isinstance(a, Tensor) and a.is_nested else getattr(a, "shape", None)
    return type(a).__name__ + (
        f" of shape {shape(sizes)}" if isinstance(sizes, tuple) and sizes else ""
    )
