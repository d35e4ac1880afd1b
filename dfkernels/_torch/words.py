"""Shapes, dtypes and types as an error or a summary says them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["dtype", "kind", "other_dtype", "per_query_shape", "shape"]


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


def other_dtype(of: Tensor, way_out: str) -> str:
    """The dtype that came, and the method that makes the right one of it. Complex numbers have no
    such method.
    """
    return dtype(of) + ("" if of.dtype.is_complex else f": {way_out} converts it")


def per_query_shape(given: Sequence[int], count: int) -> str:
    """The shape that came in place of one number for each of `count` queries, and what to do where
    there are as many, such as in [B, 1, 1, 1].
    """
    as_many = math.prod(given) == count
    return f"shape {shape(given)}" + (f": .flatten() makes it [{count}]" if as_many else "")
