"""Checks of tensors, whatever they are for."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dtypes, private, words
from ._errors import mismatch, other_event, wrong_type


def tensor(name: str, t: object) -> None:
    """Refuses what is no plain dense tensor; the error says how to make one of what came."""
    if not isinstance(t, Tensor):
        if type(t).__module__.partition(".")[0] == "numpy":
            unmasked(name, t)
            raise wrong_type(name, "a tensor", f"{words.kind(t)}: torch.as_tensor makes one of it")
        raise wrong_type(name, "a tensor", type(t).__name__)
    if t.is_nested:
        raise wrong_type(
            name, "a dense tensor", "a nested one: torch.cat of its unbind(), or to_padded_tensor"
        )
    if t.layout != torch.strided:
        raise wrong_type(name, "a dense tensor", f"{t.layout}: to_dense() makes one of it")
    if t.is_quantized:
        raise wrong_type(name, "a dense tensor", f"{words.dtype(t)}: dequantize() makes one of it")
    if type(t) is not Tensor:
        if isinstance(t, torch.masked.MaskedTensor):
            raise wrong_type(
                name, "a dense tensor", "MaskedTensor: to_tensor(value) makes one of it"
            )
        if private.is_dtensor(t):
            raise wrong_type(
                name, "a dense tensor", "DTensor: to_local() or full_tensor() makes one of it"
            )


def stored(name: str, t: Tensor) -> None:
    """Refuses what cannot be kept: no plain dense tensor, or one without values (meta, fake)."""
    tensor(name, t)
    if not torch.compiler.is_compiling() and private.is_fake(t):
        raise mismatch(name, "a tensor with values", f"{type(t).__name__} without, on {t.device}")


def values_hidden(*tensors: object) -> bool:
    """Whether the values of these tensors must not be looked at: on an accelerator one would wait
    for them; while a graph is traced, under vmap at any nesting, and of meta and fake tensors there
    are none.
    """
    if torch.compiler.is_compiling():
        return True
    given = [t for t in tensors if isinstance(t, Tensor)]
    if any(t.device.type != "cpu" or private.is_vmapped(t) for t in given):
        return True
    return private.is_fake(*given)


def unmasked(name: str, a: object) -> None:
    """Refuses NumPy's masked arrays, since whoever reads their data drops the mask."""
    masked = sys.modules.get("numpy.ma")
    if masked is not None and isinstance(a, masked.MaskedArray):
        way_out = "fill or leave out what is masked: .filled, .compressed"
        raise wrong_type(name, "no masked array", f"{words.kind(a)}: {way_out}")


def query(name: str, x: Tensor) -> Tensor:
    """Queries [B, *E] in a compute dtype, as flat [B, d]."""
    tensor(name, x)
    if x.dtype not in dtypes.COMPUTED:
        raise wrong_type(name, "float32 or float64", words.other_dtype(x, ".float()"))
    if x.dim() == 2:
        return x
    if x.dim() == 0:
        raise mismatch(name, "shape [B, ...]", "[]")
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def events(name: str, x: Tensor, event: Sequence[int], to_match: str) -> None:
    """Refuses queries [B, *E] of another event shape than that of a law of data."""
    query(name, x)
    if x.shape[1:] != event:
        raise other_event(name, x.shape, event, to_match)


def like(name: str, t: Tensor, other_name: str, other: Tensor) -> Tensor:
    """A tensor of the shape, dtype and device of another, as flat [B, d]."""
    tensor(name, t)
    if t.shape != other.shape:
        raise mismatch(
            name, f"shape {words.shape(other.shape)} like {other_name}", words.shape(t.shape)
        )
    same(name, t, other_name, other)
    return t if t.dim() == 2 else t.reshape(t.shape[0], math.prod(t.shape[1:]))


def same(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Refuses another dtype or device than that of `other`."""
    if t.dtype != other.dtype:
        got = words.other_dtype(t, f".to({other.dtype})")
        raise wrong_type(name, f"{words.dtype(other)} like {other_name}", got)
    if t.device != other.device:
        raise mismatch(name, f"device {other.device} like {other_name}", t.device)
