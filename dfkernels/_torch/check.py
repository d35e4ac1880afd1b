"""Checks of arguments, and their errors in one style: "name: expected what, got what".

Who checks what:

* A public op or object checks type, dtype, shape, device and plain numbers of its arguments before
  it does anything, by the functions below (`query`, `alpha`, `sigma`, `points`, `vectors`, ...). An
  object passes what it has checked to an op, which checks again: of tensors in order this takes
  about a microsecond each, and an op can be called by anybody.
* Values inside tensors (NaN, inf, sigma <= 0) are found by the kernels in what they compute, and
  named by diagnosis.py.
* A wrong sigma is refused by `sigma` if it is a number, else by the kernels and diagnosis.py.
  Inside a compiled graph, where a number may be symbolic, the kernels refuse it.
"""

from __future__ import annotations

import math
import operator
import struct
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import private
from .types import Level

_COMPUTE = (torch.float32, torch.float64)
_NARROW = (torch.float16, torch.bfloat16, torch.uint8)


def mismatch(name: str, expected: str, got: object) -> ValueError:
    """The error for an argument of the right type whose shape, device or value is wrong."""
    return ValueError(f"{name}: expected {expected}, got {got}")


def _type(name: str, expected: str, got: object) -> TypeError:
    return TypeError(f"{name}: expected {expected}, got {got}")


def _shape(shape: Sequence[object]) -> str:
    return str(list(shape)).replace("'", "")


def _dtype(t: Tensor) -> str:
    return _name(t.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor(name: str, t: object) -> None:
    """Refuses what is no plain dense tensor; the error says how to make one of what came."""
    if not isinstance(t, Tensor):
        if type(t).__module__.partition(".")[0] == "numpy":
            unmasked(name, t)
            raise _type(name, "a tensor", f"{_kind(t)}: torch.as_tensor makes one of it")
        raise _type(name, "a tensor", type(t).__name__)
    if t.is_nested:
        raise _type(
            name, "a dense tensor", "a nested one: torch.cat of its unbind(), or to_padded_tensor"
        )
    if t.layout != torch.strided:
        raise _type(name, "a dense tensor", f"{t.layout}: to_dense() makes one of it")
    if t.is_quantized:
        raise _type(name, "a dense tensor", f"{_dtype(t)}: dequantize() makes one of it")
    if type(t) is not Tensor:
        if isinstance(t, torch.masked.MaskedTensor):
            raise _type(name, "a dense tensor", "MaskedTensor: to_tensor(value) makes one of it")
        if private.is_dtensor(t):
            raise _type(
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
        raise _type(name, "no masked array", f"{_kind(a)}: {way_out}")


def query(name: str, x: Tensor) -> Tensor:
    """Queries [B, *E] in a compute dtype, as flat [B, d]."""
    tensor(name, x)
    if x.dtype not in _COMPUTE:
        raise _type(name, "float32 or float64", _dtype(x))
    if x.dim() == 2:
        return x
    if x.dim() == 0:
        raise mismatch(name, "shape [B, ...]", "[]")
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def like(name: str, t: Tensor, other_name: str, other: Tensor) -> Tensor:
    """A tensor of the shape, dtype and device of another, as flat [B, d]."""
    tensor(name, t)
    if t.shape != other.shape:
        raise mismatch(name, f"shape {_shape(other.shape)} like {other_name}", _shape(t.shape))
    same(name, t, other_name, other)
    return t if t.dim() == 2 else t.reshape(t.shape[0], math.prod(t.shape[1:]))


def same(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Refuses another dtype or device than that of `other`."""
    if t.dtype != other.dtype:
        raise _type(name, f"{_dtype(other)} like {other_name}", _dtype(t))
    if t.device != other.device:
        raise mismatch(name, f"device {other.device} like {other_name}", t.device)


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
        raise _type(name, "a number or a tensor", _kind(value))
    return x.new_full((x.shape[0],), _in_range(name, value, x.dtype, positive))


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
        expected = f"a number, shape [], {_shape([G, B])} or {_shape([G, 1])}"
        raise mismatch(
            name, f"{expected} to go with x of shape {_shape(x.shape)}", _shape(value.shape)
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
        raise _type(name, "a real number or tensor", _dtype(a))
    if a.dim() and a.shape != x.shape[:1]:
        raise mismatch(name, f"a number, shape [] or [{x.shape[0]}]", f"shape {_shape(a.shape)}")
    if a.device != x.device and (a.dim() or a.is_meta):
        raise mismatch(name, f"device {x.device} like x", a.device)
    return a.to(device=x.device, dtype=x.dtype).expand(x.shape[0])


def of_numpy(name: str, a: Any) -> Tensor:
    """A NumPy array of real numbers as a float64 tensor, without loss."""
    unmasked(name, a)
    if a.dtype.kind not in "fiu":
        raise _type(name, "a real number or tensor", _kind(a) + f" and dtype {a.dtype}")
    wide = a.astype("f8", order="C")
    same = (a <= 2**53) & (a >= -(2**53)) if a.dtype.kind in "iu" else (wide == a) | (a != a)
    if not bool(same.all()):
        raise mismatch(
            name, "numbers that float64 holds", f"an array of {a.dtype} that it does not"
        )
    return torch.from_numpy(wide)


def _in_range(name: str, number: Any, dtype: torch.dtype, positive: bool) -> float:
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
        raise mismatch(name, f"{expected} in {_name(dtype)}", value)
    return value


def constant(name: str, a: Any) -> float:
    """A finite number of any library, as a Python float: int, float, a NumPy scalar, a 0-d array or
    tensor, whatever has `__float__`. bool, complex and arrays of one entry are no numbers.

    Raises TypeError or ValueError naming the argument.
    """
    if torch.compiler.is_compiling() and isinstance(a, (int, float)) and not isinstance(a, bool):
        return 1.0 * a  # may be symbolic: nothing to look at
    if isinstance(a, (bool, complex, str)) or getattr(a, "ndim", 0) or not hasattr(a, "__float__"):
        raise _type(name, "a number", _kind(a))
    unmasked(name, a)
    dtype = getattr(a, "dtype", None)
    # of NumPy: float would read them, or raise
    text_or_time = getattr(dtype, "kind", "") in ("S", "U", "M", "m")
    if text_or_time or str(dtype).removeprefix("torch.").startswith(("bool", "complex")):
        raise _type(name, "a real number", f"{_kind(a)} of {dtype}")
    if isinstance(a, Tensor) and private.is_differentiated(a):
        hint = "detach() drops the derivative"
        raise _type(
            name, "a number", f"a tensor whose derivative is asked for, and there is none: {hint}"
        )
    try:
        value = float(a)
    except OverflowError:  # an integer of hundreds of digits
        value = math.inf
    except (TypeError, ValueError):
        raise _type(name, "a number", f"{_kind(a)} that is none") from None
    except RuntimeError:
        hidden = f"{_kind(a)} whose value cannot be read here: under vmap, or it has none"
        raise _type(name, "a number", hidden) from None
    if not math.isfinite(value):
        raise mismatch(name, "a finite value", value)
    return value


def positive(name: str, a: Any) -> float:
    """As `constant`, for a number that has to be positive."""
    value = constant(name, a)
    if value <= 0:
        raise mismatch(name, "a finite value > 0", value)
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
        raise _type(name, "an integer", _kind(a)) from None
    if (least is not None and value < least) or (most is not None and value > most):
        ends = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise mismatch(name, f"an integer {ends}", value)
    return value


def _kind(a: object) -> str:
    """The type of what came, with the shape of an array, for an error."""
    shape = None if isinstance(a, Tensor) and a.is_nested else getattr(a, "shape", None)
    return type(a).__name__ + (
        f" of shape {_shape(shape)}" if isinstance(shape, tuple) and shape else ""
    )


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
        raise mismatch("x", "shape [G, B, ...] with batched=True", _shape(x.shape))
    return x.flatten(0, 1)


def given_levels(alpha_level: object, sigma_level: object, batched: bool) -> dict[str, Tensor]:
    """For `diagnosis.call`: the levels of a batched call, whose indices are the caller's."""
    given = {"alpha": alpha_level, "sigma": sigma_level}
    return {k: a for k, a in given.items() if batched and isinstance(a, Tensor) and a.dim() > 0}


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
        expected = _shape(["N", *event])
        if batched:
            expected = f"{_shape([x.shape[0], 'N', *event])} or {expected}"
        raise mismatch(
            "y", f"shape {expected} to go with x of shape {_shape(x.shape)}", _shape(y.shape)
        )
    if y.shape[many] == 0:
        raise mismatch("y", "at least one atom", f"shape {_shape(y.shape)}")
    d = math.prod(event)
    if d == 0:
        raise mismatch("x", "at least one number per query", f"shape {_shape(x.shape)}")
    if y.device != x.device:
        raise mismatch("y", f"device {x.device} like x", y.device)
    return y if y.dim() == 2 + many else y.reshape(*y.shape[: 1 + many], d)


def narrow(name: str, a: Tensor, x: Tensor) -> None:
    """Refuses a dtype in which atoms cannot be stored beside queries x."""
    if a.dtype == x.dtype or a.dtype in _NARROW:
        return
    if a.dtype == torch.float64:
        raise TypeError(
            f"{name}: expected float32 or narrower to go with float32 x, got float64: convert x "
            f"or {name}"
        )
    if not (a.dtype == torch.float32 and x.dtype == torch.float64):
        raise _type(name, "float64, float32, float16, bfloat16 or uint8", _dtype(a))


def values(a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Values ``[N, *P]`` beside queries x and atoms y [N, d], as flat [N, p]."""
    tensor("values", a)
    narrow("values", a, x)
    if a.dim() == 0 or a.shape[0] != y.shape[0]:
        expected = f"shape {_shape([y.shape[0], '...'])}, a row for each atom"
        raise mismatch("values", expected, _shape(a.shape))
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
        number = _in_range("variance", value, x.dtype, False)
        if number < 0:
            raise mismatch("variance", "a finite value >= 0", number)
        return x.new_full((1, 1), number)
    tensor("variance", value)
    if not value.dtype.is_floating_point:
        raise _type("variance", "a floating dtype", _dtype(value))
    if value.dim() == 0 and value.device.type == "cpu":
        value = value.to(x.device)
    if value.device != x.device:
        raise mismatch("variance", f"device {x.device} like x", value.device)
    value = value.to(x.dtype)
    if value.shape in ((), (1,), (N,)):
        return value.reshape(-1, 1)
    if value.shape in ((1, *event), (N, *event)):
        return value.reshape(value.shape[0], math.prod(event))
    expected = ", ".join(_shape(s) for s in ([1], [N], [1, *event]))
    raise mismatch(
        "variance",
        f"a number, shape {expected} or {_shape([N, *event])} to go with y of shape "
        f"{_shape(y.shape)}",
        _shape(value.shape),
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
        raise mismatch("log_prior", expected, _shape(log_prior.shape))
    if not log_prior.dtype.is_floating_point:
        raise _type("log_prior", "a floating dtype", _dtype(log_prior))
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
        wide = _shape([*lead, "K", *event])
        raise mismatch(name, f"shape {_shape(other.shape)} or {wide}", _shape(v.shape))
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
            raise _type(name, "int64", _dtype(t))
        if t.dim() != 1 or shape[0] not in ("M", t.shape[0]):
            raise mismatch(name, f"shape {_shape(shape)}", _shape(t.shape))
        if t.device != x.device:
            raise mismatch(name, f"device {x.device} like x", t.device)


def generator(given: object) -> torch.Generator:
    """The argument `generator` itself, if it is one: without one, torch draws from its global
    state."""
    if not isinstance(given, torch.Generator):
        raise _type("generator", "a torch.Generator", type(given).__name__)
    return given


def choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Refuses a value that is not one of the names allowed."""
    if value not in allowed:
        raise mismatch(name, " or ".join(map(repr, allowed)), repr(value))
