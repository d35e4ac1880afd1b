"""Checks of numbers, of choices by name, and of generators."""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import private, words
from ._errors import mismatch, wrong_type
from ._tensors import unmasked


def constant(name: str, a: Any) -> float:
    """A finite number of any library, as a Python float: int, float, a NumPy scalar, a 0-d array or
    tensor, whatever has `__float__`. bool, complex and arrays of one entry are no numbers.

    Raises TypeError or ValueError naming the argument.
    """
    if torch.compiler.is_compiling() and isinstance(a, (int, float)) and not isinstance(a, bool):
        return 1.0 * a  # may be symbolic: nothing to look at
    if isinstance(a, (bool, complex, str)) or getattr(a, "ndim", 0) or not hasattr(a, "__float__"):
        raise wrong_type(name, "a number", words.kind(a))
    unmasked(name, a)
    dtype = getattr(a, "dtype", None)
    # of NumPy: float would read them, or raise
    text_or_time = getattr(dtype, "kind", "") in ("S", "U", "M", "m")
    if text_or_time or str(dtype).removeprefix("torch.").startswith(("bool", "complex")):
        raise wrong_type(name, "a real number", f"{words.kind(a)} of {dtype}")
    if isinstance(a, Tensor) and private.is_differentiated(a):
        hint = "detach() drops the derivative"
        raise wrong_type(
            name, "a number", f"a tensor whose derivative is asked for, and there is none: {hint}"
        )
    try:
        value = float(a)
    except OverflowError:  # an integer of hundreds of digits
        value = math.inf
    except (TypeError, ValueError):
        raise wrong_type(name, "a number", f"{words.kind(a)} that is none") from None
    except RuntimeError:
        hidden = f"{words.kind(a)} whose value cannot be read here: under vmap, or it has none"
        raise wrong_type(name, "a number", hidden) from None
    if not math.isfinite(value):
        raise mismatch(name, "a finite value", value)
    return value


def positive(name: str, a: Any) -> float:
    """As `constant`, for a number that has to be positive."""
    value = constant(name, a)
    if value <= 0:
        raise mismatch(name, "a finite value > 0", value)
    return value


def nonnegative(name: str, a: Any) -> float:
    """As `constant`, for a number that may be 0 but not less."""
    value = constant(name, a)
    if value < 0:
        raise mismatch(name, "a finite value >= 0", value)
    return value


def integer(name: str, a: Any, least: int | None = None, most: int | None = None) -> int:
    """A whole number of any library (whatever has `__index__`) from least to most, as a Python
    int.
    """
    try:
        if isinstance(a, bool) or str(getattr(a, "dtype", "")).removeprefix("torch.") == "bool":
            raise TypeError
        value = operator.index(a)
    except TypeError:
        raise wrong_type(name, "an integer", words.kind(a)) from None
    if (least is not None and value < least) or (most is not None and value > most):
        ends = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise mismatch(name, f"an integer {ends}", value)
    return value


def in_range(name: str, number: Any, dtype: torch.dtype, positive: bool) -> float:
    """A number that is finite and, where it has to be, positive: in this dtype as well."""
    expected = "a finite value > 0" if positive else "a finite value"
    try:
        value = constant(name, number)
    except ValueError as error:
        raise mismatch(name, expected, str(error).rpartition("got ")[2]) from None
    if positive and value <= 0:
        raise mismatch(name, expected, value)
    try:
        narrow = struct.unpack("f", struct.pack("f", value))[0] if dtype == torch.float32 else value
    except OverflowError:
        narrow = math.inf
    if not math.isfinite(narrow) or (positive and narrow == 0):
        raise mismatch(name, f"{expected} in {words.dtype(dtype)}", value)
    return value


def of_numpy(name: str, a: Any) -> Tensor:
    """A NumPy array of real numbers as a float64 tensor, without loss."""
    unmasked(name, a)
    if a.dtype.kind not in "fiu":
        raise wrong_type(name, "a real number or tensor", words.kind(a) + f" and dtype {a.dtype}")
    wide = a.astype("f8", order="C")
    same = (a <= 2**53) & (a >= -(2**53)) if a.dtype.kind in "iu" else (wide == a) | (a != a)
    if not bool(same.all()):
        raise mismatch(
            name, "numbers that float64 holds", f"an array of {a.dtype} that it does not"
        )
    return torch.from_numpy(wide)


def generator(given: object) -> torch.Generator:
    """The argument `generator` itself, if it is one: without one, torch draws from its global
    state."""
    if not isinstance(given, torch.Generator):
        raise wrong_type("generator", "a torch.Generator", type(given).__name__)
    return given


def cpu_generator(given: object) -> torch.Generator:
    """As `generator`, for one on the CPU, whose draws are the same whatever device they are for."""
    found = generator(given)
    if found.device.type != "cpu":
        raise mismatch("generator", "a generator on the CPU", found.device)
    return found


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuses a value that is not one of the names allowed."""
    if value not in allowed:
        raise mismatch(name, " or ".join(map(repr, allowed)), repr(value))
