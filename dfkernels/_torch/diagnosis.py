"""Names the argument whose values a kernel could not use.

To look at every value before a call would cost a pass over y. So the kernels find NaN, inf and
sigma <= 0 in what they compute, and only where a CPU kernel has raised an error does `call` look
for the culprit, under vmap, grad and jvp in the tensors behind what these hand on. On CUDA values
are never looked at, nor from a compiled graph or in a backward pass: there the kernels' own words,
which name the argument as well, are the error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import check, private
from .errors import UnusableValue, from_kernel

_BLOCK = 1 << 22  # elements of a tensor that are looked at together


def call(op: Callable[..., Any], args: Sequence[Any], **given: Tensor | None) -> Any:
    """op(*args). A value that the kernel could not use becomes a ValueError that names the argument
    or, where each is finite and together they overflow, says in the kernel's words what did.

    Args:
        op: an operator of torch.ops.dfkernels.
        args: its arguments.
        given: those that were reshaped, as the caller gave them: the index in the message is
            theirs.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        known = from_kernel(error)
        if known is None:
            raise
        if isinstance(known, UnusableValue):
            names = [a.name for a in op._schema.arguments]  # pyrefly: ignore[missing-attribute]
            flat = dict(zip(names, args, strict=False))
            y = flat.get("y")
            diagnose({**flat, **given}, error, clouds=isinstance(y, Tensor) and y.dim() == 3)
        raise known from error


def diagnose(args: Mapping[str, object], cause: Exception | None, clouds: bool = False) -> None:
    """Raises ValueError for the first of the named arguments whose values explain `cause`, an error
    of a kernel: NaN, inf, a sigma that is not positive. Returns if there is none.

    Args:
        args: The arguments by name.
        cause: The kernel's error.
        clouds: Whether y has an axis of clouds.
    """
    plain = {
        name: private.fully_unwrapped(a.detach())
        for name, a in args.items()
        if isinstance(a, Tensor)
    }
    if any(a.device.type != "cpu" for a in plain.values()):
        return
    for name, a in plain.items():
        if not a.dtype.is_floating_point:
            continue
        if name == "log_prior":
            _first(name, a, torch.isnan(a) | (a == math.inf), "values < inf and not nan", cause)
            if bool((a == -math.inf).all(-1).any()):
                raise check.mismatch(name, "at least one finite value", "all -inf") from cause
        elif name == "variance":
            masked = _masked_rows(a, plain.get("log_prior"))
            bad = ~((a >= 0) & torch.isfinite(a)) & ~masked
            _first(name, a, bad, "finite values >= 0", cause)
        elif name == "sigma":
            _first(name, a, ~((a > 0) & torch.isfinite(a)), "finite values > 0", cause)
        else:
            finite(name, a, cause, _unread(a, plain, clouds) if name in ("y", "values") else None)


def _masked_rows(variance: Tensor, prior: Tensor | None) -> Tensor:
    """bool, to go with the variances [N, ...]: those of masked components, which may be anything;
    told by shapes, as in `_unread`."""
    if prior is None or prior.dim() != 1 or prior.shape != variance.shape[:1]:
        return variance.new_zeros((), dtype=torch.bool)
    return (prior == -math.inf).reshape(-1, *[1] * (variance.dim() - 1))


def _unread(y: Tensor, args: Mapping[str, Tensor], clouds: bool) -> Tensor | None:
    """bool [N], or [G, N] where y has clouds: the atoms that no query counts, which may hold
    anything; None if there are none."""
    prior, atoms = args.get("log_prior"), args.get("atoms")
    unread = None
    # Told by shapes, since under vmap the tensors behind have axes that the call does not see. As
    # many clouds as atoms would look like a prior for each cloud.
    if clouds and prior is not None and prior.dim() == 1 and prior.shape == y.shape[1:2]:
        unread = (prior == -math.inf).expand(y.shape[:2])
    elif prior is not None and prior.shape == y.shape[: prior.dim()]:
        unread = prior == -math.inf
    elif prior is not None and prior.dim() == 2 and prior.shape[1:] == y.shape[:1]:
        unread = (prior == -math.inf).all(0)
    elif prior is not None and prior.dim() == 1 and prior.shape == y.shape[1:2]:
        unread = (prior == -math.inf).expand(y.shape[:2])
    if atoms is not None:
        listed = atoms.clamp(0, y.shape[0] - 1)
        unlisted = atoms.new_ones(y.shape[0], dtype=torch.bool).index_fill(0, listed, False)
        unread = unlisted if unread is None else unread | unlisted
    return unread


def finite(
    name: str, a: Tensor, cause: Exception | None = None, unread: Tensor | None = None
) -> None:
    """Raises ValueError for the first NaN or inf of a tensor [n, ...], where it is not `unread`,
    which has the first one or two of its dimensions.
    """
    step = max(1, _BLOCK // max(1, a[:1].numel()))
    for start in range(0, a.shape[0], step):
        block = a[start : start + step]
        bad = ~torch.isfinite(block)
        if unread is not None:
            rows = unread[start : start + step]
            bad &= ~rows.reshape(*rows.shape, *[1] * (a.dim() - rows.dim()))
        _first(name, block, bad, "finite values", cause, start)


def _first(
    name: str,
    a: Tensor,
    bad: Tensor,
    expected: str,
    cause: Exception | None,
    start: int = 0,
) -> None:
    """Raises ValueError for the first entry that is bad; `start`: the number of a's first row."""
    if bool(bad.any()):
        index = torch.nonzero(bad)[0].tolist()
        value = a[tuple(index)].item()
        if index:  # none of a number
            value = f"{value} at index {[index[0] + start, *index[1:]]}"
        raise check.mismatch(name, expected, value) from cause
