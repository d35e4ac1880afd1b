"""Checks of noise levels: one number for each query."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import words
from ..types import Level
from ._errors import mismatch, wrong_type
from ._numbers import in_range, of_numpy
from ._tensors import tensor


def alpha(value: Level, x: Tensor, batched: bool = False) -> Tensor:
    """alpha for queries x [B, *E], as [B] in x's dtype: see `per_query`."""
    return per_query("alpha", value, x, batched=batched)


def sigma(value: Level, x: Tensor, batched: bool = False) -> Tensor:
    """sigma > 0 for queries x [B, *E], as [B] in x's dtype: see `per_query`.

    A number that is not positive is refused here, except inside a compiled graph. There, and inside
    a tensor, the kernels refuse it.
    """
    return per_query("sigma", value, x, positive=True, batched=batched)


def per_query(
    name: str, value: Any, x: Tensor, positive: bool = False, batched: bool = False
) -> Tensor:
    """One number for each query x [B, *E], as [B] in x's dtype: a number of any library, a tensor
    or NumPy array, 0-d or [B]. Batched, for x [G, B, *E]: as [G * B], from 0-d, [G, B] or [G, 1].

    Raises TypeError or ValueError naming the argument; for a number also where it is not finite, or
    not positive, in x's dtype.
    """
    if batched:
        value, x = _per_cloud(name, value, x), x.flatten(0, 1)
    if isinstance(value, Tensor):
        return _per_query_tensor(name, value, x)
    if torch.compiler.is_compiling() and not isinstance(value, (bool, str)):
        if isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
            # a product, since the number may be symbolic, of which torch's own hints know nothing
            return torch.mul(x.new_ones(x.shape[0]), value)  # pyrefly: ignore[bad-argument-type]
        traced = torch.as_tensor(value, dtype=x.dtype, device=x.device)  # of NumPy
        return _per_query_tensor(name, traced, x)
    if type(value).__module__.partition(".")[0] == "numpy" and getattr(value, "ndim", 0):
        return _per_query_tensor(name, of_numpy(name, value).to(x.device), x)
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise wrong_type(name, "a number or a tensor", words.kind(value))
    return x.new_full((x.shape[0],), in_range(name, value, x.dtype, positive))


def _per_cloud(name: str, value: Any, x: Tensor) -> Any:
    """A tensor or array of numbers for queries x [G, B, *E] as a tensor [G * B]; a number as it
    is."""
    if not getattr(value, "ndim", 0):
        return value
    if not isinstance(value, Tensor):
        if torch.compiler.is_compiling():
            value = torch.as_tensor(value, dtype=x.dtype, device=x.device)
        else:
            value = of_numpy(name, value).to(x.device)
    tensor(name, value)
    G, B = x.shape[:2]
    if value.shape not in ((G, B), (G, 1)):
        expected = f"a number, shape [], {words.shape([G, B])} or {words.shape([G, 1])}"
        raise mismatch(
            name,
            f"{expected} to go with x of shape {words.shape(x.shape)}",
            words.shape(value.shape),
        )
    return value.expand(G, B).reshape(G * B)


def _per_query_tensor(name: str, a: Tensor, x: Tensor) -> Tensor:
    if (
        type(a) is Tensor
        and a.dtype == x.dtype
        and a.layout == torch.strided
        and not a.is_nested
        and a.shape == x.shape[:1]
        and a.device == x.device
    ):
        return a
    tensor(name, a)
    if a.dtype.is_complex or a.dtype == torch.bool:
        raise wrong_type(name, "a real number or tensor", words.dtype(a))
    if a.dim() and a.shape != x.shape[:1]:
        got = words.per_query_shape(a.shape, x.shape[0])
        raise mismatch(name, f"a number, shape [] or [{x.shape[0]}]", got)
    if a.device != x.device and (a.dim() or a.is_meta):
        raise mismatch(name, f"device {x.device} like x", a.device)
    return a.to(device=x.device, dtype=x.dtype).expand(x.shape[0])


def given_levels(alpha_level: object, sigma_level: object, batched: bool) -> dict[str, Tensor]:
    """For `diagnosis.call`: the levels of a batched call, whose indices are the caller's."""
    given = {"alpha": alpha_level, "sigma": sigma_level}
    return {k: a for k, a in given.items() if batched and isinstance(a, Tensor) and a.dim() > 0}
