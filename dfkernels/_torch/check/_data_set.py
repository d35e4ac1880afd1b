"""Checks of what the ops over a data set take: atoms, their weights, widths and values, the vectors
of the queries, and lists of atoms.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import dtypes, words
from ..types import Level
from ._errors import mismatch, other_event, wrong_type
from ._levels import alpha, sigma
from ._numbers import choice, constant, in_range
from ._tensors import query, same, tensor


def points(
    x: Tensor,
    y: Tensor,
    alpha_level: Level,
    sigma_level: Level,
    log_prior: Tensor | None,
    scale: float,
    offset: float,
    batched: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, float, float]:
    """The arguments that every op over a data set shares, checked, flat and expanded. Batched, x
    [G, B, *E] becomes [G * B, d], y [G, N, *E] becomes [G, N, d]."""
    choice("batched", batched, (False, True))
    flat = query("x", _queries_of_clouds(x) if batched else x)
    y = _atoms(x, y, batched)
    if log_prior is not None:
        log_prior = _log_prior(x, y, log_prior, batched)
    if not (type(scale) is type(offset) is float and scale == 1.0 and offset == 0.0):
        scale, offset = constant("scale", scale), constant("offset", offset)
    levels = alpha(alpha_level, x, batched), sigma(sigma_level, x, batched)
    return flat, y, *levels, log_prior, scale, offset


def _queries_of_clouds(x: Tensor) -> Tensor:
    """Queries [G, B, *E] as [G * B, *E]."""
    tensor("x", x)
    if x.dim() < 2:
        raise mismatch("x", "shape [G, B, ...] with batched=True", words.shape(x.shape))
    return x.flatten(0, 1)


def _atoms(x: Tensor, y: Tensor, batched: bool) -> Tensor:
    """Atoms [N, *E] beside queries x [B, *E], as flat [N, d]. Batched, beside x [G, B, *E], those
    of each cloud as well, [G, N, *E] as [G, N, d]."""
    tensor("y", y)
    narrow("y", y, x)
    event = x.shape[1 + batched :]
    many = batched and y.dim() == x.dim()
    if (
        y.dim() != 1 + many + len(event)
        or y.shape[1 + many :] != event
        or (many and y.shape[0] != x.shape[0])
    ):
        if not batched and x.shape == y.shape[1:]:
            of_y = f"to go with y of shape {words.shape(y.shape)}"
            raise other_event("x", x.shape, y.shape[1:], of_y)
        expected = words.shape(["N", *event])
        if batched:
            expected = f"{words.shape([x.shape[0], 'N', *event])} or {expected}"
        raise mismatch(
            "y",
            f"shape {expected} to go with x of shape {words.shape(x.shape)}",
            words.shape(y.shape),
        )
    if y.shape[many] == 0:
        raise mismatch("y", "at least one atom", f"shape {words.shape(y.shape)}")
    d = math.prod(event)
    if d == 0:
        raise mismatch("x", "at least one number per query", f"shape {words.shape(x.shape)}")
    if y.device != x.device:
        raise mismatch("y", f"device {x.device} like x", y.device)
    return y if y.dim() == 2 + many else y.reshape(*y.shape[: 1 + many], d)


def narrow(name: str, a: Tensor, x: Tensor) -> None:
    """Refuses a dtype in which atoms cannot be stored beside queries x."""
    if a.dtype not in dtypes.STORED:
        raise wrong_type(name, dtypes.STORED_IN_WORDS, words.other_dtype(a, ".float()"))
    if a.dtype == torch.float64 != x.dtype:
        raise TypeError(
            f"{name}: expected float32 or narrower to go with float32 x, got float64: convert x "
            f"or {name}"
        )


def values(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Values ``[N, *P]`` beside queries x and atoms y [N, d], as flat [N, p]."""
    tensor("values", a)
    narrow("values", a, x)
    if a.dim() == 0 or a.shape[0] != y.shape[0]:
        expected = f"shape {words.shape([y.shape[0], '...'])}, a row for each atom"
        raise mismatch("values", expected, words.shape(a.shape))
    if a.device != x.device:
        raise mismatch("values", f"device {x.device} like x", a.device)
    return a if a.dim() == 2 else a.reshape(a.shape[0], math.prod(a.shape[1:]))


def variance(value: Any, x: Tensor, y: Tensor) -> Tensor:
    """Variances beside queries x [B, *E] and components y [N, *E], in x's dtype, as [rows, columns]
    with 1 or N rows and 1 or d columns: a number of any library, a tensor [], [1], [N], [1, *E] or
    [N, *E].

    Values are looked at by the ops alone, but for a number.
    """
    event, N = y.shape[1:], y.shape[0]
    if not isinstance(value, Tensor):
        if torch.compiler.is_compiling():
            return torch.mul(x.new_ones(1, 1), constant("variance", value))
        number = in_range("variance", value, x.dtype, False)
        if number < 0:
            raise mismatch("variance", "a finite value >= 0", number)
        return x.new_full((1, 1), number)
    tensor("variance", value)
    if not value.dtype.is_floating_point:
        raise wrong_type("variance", "a floating dtype", words.dtype(value))
    if value.dim() == 0 and value.device.type == "cpu":
        value = value.to(x.device)
    if value.device != x.device:
        raise mismatch("variance", f"device {x.device} like x", value.device)
    value = value.to(x.dtype)
    if value.shape in ((), (1,), (N,)):
        return value.reshape(-1, 1)
    if value.shape in ((1, *event), (N, *event)):
        return value.reshape(value.shape[0], math.prod(event))
    expected = ", ".join(words.shape(s) for s in ([1], [N], [1, *event]))
    raise mismatch(
        "variance",
        f"a number, shape {expected} or {words.shape([N, *event])} to go with y of shape "
        f"{words.shape(y.shape)}",
        words.shape(value.shape),
    )


def _log_prior(x: Tensor, y: Tensor, log_prior: Tensor, batched: bool) -> Tensor:
    """Log weights [N] in x's dtype, for flat atoms y. Batched, those of each cloud as well,
    [G, N]."""
    tensor("log_prior", log_prior)
    N = y.shape[-2]
    if log_prior.shape != (N,) and not (batched and log_prior.shape == (x.shape[0], N)):
        expected = f"shape [{N}], one entry per atom"
        if batched:
            expected = f"shape [{N}] or [{x.shape[0]}, {N}] to go with the atoms and the clouds"
        raise mismatch("log_prior", expected, words.shape(log_prior.shape))
    if not log_prior.dtype.is_floating_point:
        raise wrong_type("log_prior", "a floating dtype", words.dtype(log_prior))
    if log_prior.device != x.device:
        raise mismatch("log_prior", f"device {x.device} like x", log_prior.device)
    return log_prior if log_prior.dtype == x.dtype else _narrowed(log_prior, x.dtype)


def _narrowed(log_prior: Tensor, dtype: torch.dtype) -> Tensor:
    """log_prior in another dtype, its largest entry taken off before: a constant means nothing, but
    in float32 a large one would cost the digits of what differs.
    """
    if log_prior.dtype.itemsize > dtype.itemsize:
        largest = log_prior.detach().amax(-1, keepdim=True)
        log_prior = log_prior - torch.where(torch.isfinite(largest), largest, 0.0)
    return log_prior.to(dtype)


def vectors(
    name: str, v: Tensor, other_name: str, other: Tensor, d: int, batched: bool = False
) -> Tensor:
    """Vectors [B, *E] or [B, K, *E] beside a tensor `other` [B, *E], as [B, K, d]. Batched, [G, B]
    takes the place of B, and G * B in the result."""
    tensor(name, v)
    same(name, v, other_name, other)
    lead, event = other.shape[: 1 + batched], other.shape[1 + batched :]
    many = v.dim() == other.dim() + 1
    if not (
        v.shape == other.shape
        or (many and v.shape[: len(lead)] == lead and v.shape[len(lead) + 1 :] == event)
    ):
        wide = words.shape([*lead, "K", *event])
        raise mismatch(name, f"shape {words.shape(other.shape)} or {wide}", words.shape(v.shape))
    if many and v.dim() == 3 and not batched:
        return v
    return v.reshape(math.prod(lead), v.shape[len(lead)] if many else 1, d)


def lists(atoms: Tensor | None, counts: Tensor | None, x: Tensor) -> None:
    """Refuses lists of atoms for queries x [B, d] that are not both int64, [M] and [B]."""
    for name, t, other in (("atoms", atoms, "counts"), ("counts", counts, "atoms")):
        if t is None:
            raise mismatch(name, f"a tensor to go with {other}", "None")
    for name, t, shape in (("atoms", atoms, ["M"]), ("counts", counts, [x.shape[0]])):
        tensor(name, t)
        assert t is not None
        if t.dtype != torch.int64:
            raise wrong_type(name, "int64", words.dtype(t))
        if t.dim() != 1 or shape[0] not in ("M", t.shape[0]):
            raise mismatch(name, f"shape {words.shape(shape)}", words.shape(t.shape))
        if t.device != x.device:
            raise mismatch(name, f"device {x.device} like x", t.device)
