"""How an error says what was expected and what came."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mismatch(name: str, expected: str, got: object) -> ValueError:
    """The error for an argument of the right type whose shape, device or value is wrong."""
    return ValueError(f"{name}: expected {expected}, got {got}")


def wrong_type(name: str, expected: str, got: object) -> TypeError:
    """The error for an argument of the wrong type or dtype."""
    return TypeError(f"{name}: expected {expected}, got {got}")


def shape(sizes: Sequence[object]) -> str:
    """A shape in words, [B, 3]."""
    return str(list(sizes)).replace("'", "")


def dtype(of: Tensor | torch.dtype) -> str:
    """A dtype in words, that of a tensor or one by itself."""
    given = of.dtype if isinstance(of, Tensor) else of
    return str(given).removeprefix("torch.")


def kind(a: object) -> str:
    """The type of what came, with the shape of an array, for an error."""
    sizes = None if isinstance(a, Tensor) and a.is_nested else getattr(a, "shape", None)
    return type(a).__name__ + (
        f" of shape {shape(sizes)}" if isinstance(sizes, tuple) and sizes else ""
    )
