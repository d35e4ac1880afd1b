"""Argument errors in one style: "name: expected what, got what". Shapes, dtypes and devices before
the call; values after it.

Looking at every value first would cost a pass over y. The CPU kernels raise an error when they meet
a value that they cannot use; `call` then looks for the culprit, under vmap, grad and jvp in the
tensors behind what these hand on. On CUDA values are never looked at, nor from a compiled graph or
in a backward pass: there the kernels' own words, which name the argument as well, are the error.
"""

from __future__ import annotations

import math
import operator
import struct
import sys

import torch
from torch import Tensor

from . import private
from .errors import UnusableValue, from_kernel

_COMPUTE = (torch.float32, torch.float64)
_NARROW = (torch.float16, torch.bfloat16, torch.uint8)
_BLOCK = 1 << 22  # elements of y that diagnose looks at together


def mismatch(name, expected, got):
    return ValueError(f"{name}: expected {expected}, got {got}")


def _type(name, expected, got):
    return TypeError(f"{name}: expected {expected}, got {got}")


def _shape(shape) -> str:
    return str(list(shape)).replace("'", "")


def _dtype(t) -> str:
    return str(t.dtype).removeprefix("torch.")


def tensor(name, t):
    """A plain dense tensor. The error says how to make one of what came instead."""
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


def stored(name, t):
    """A plain dense tensor that has values, to be kept: none of the meta device, no FakeTensor."""
    tensor(name, t)
    if not torch.compiler.is_compiling() and private.is_fake(t):
        raise mismatch(name, "a tensor with values", f"{type(t).__name__} without, on {t.device}")


def values_hidden(*tensors) -> bool:
    """Whether the values of these tensors must not be looked at. On an accelerator one would wait
    for them; while a graph is traced, under vmap at any nesting, and of meta and fake tensors it
    cannot be done.
    """
    if torch.compiler.is_compiling():
        return True
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    if any(t.device.type != "cpu" or private.is_vmapped(t) for t in tensors):
        return True
    return private.is_fake(*tensors)


def unmasked(name, a):
    """Refuses NumPy's masked arrays: whoever reads their data drops the mask."""
    masked = sys.modules.get("numpy.ma")
    if masked is not None and isinstance(a, masked.MaskedArray):
        way_out = "fill or leave out what is masked: .filled, .compressed"
        raise _type(name, "no masked array", f"{_kind(a)}: {way_out}")


def query(name, x):
    """A [B, *E] tensor in a compute dtype. -> flat [B, d]"""
    tensor(name, x)
    if x.dtype not in _COMPUTE:
        raise _type(name, "float32 or float64", _dtype(x))
    if x.dim() == 2:
        return x
    if x.dim() == 0:
        raise mismatch(name, "shape [B, ...]", "[]")
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def like(name, t, other_name, other):
    """A tensor of the shape, dtype and device of another. -> flat [B, d]"""
    tensor(name, t)
    if t.shape != other.shape:
        raise mismatch(name, f"shape {_shape(other.shape)} like {other_name}", _shape(t.shape))
    same(name, t, other_name, other)
    return t if t.dim() == 2 else t.reshape(t.shape[0], math.prod(t.shape[1:]))


def same(name, t, other_name, other):
    if t.dtype != other.dtype:
        raise _type(name, f"{_dtype(other)} like {other_name}", _dtype(t))
    if t.device != other.device:
        raise mismatch(name, f"device {other.device} like {other_name}", t.device)


def level(name, a, x):
    """alpha or sigma, a number of any library, 0-d or [B], a tensor or a NumPy array. -> [B] in x's
    dtype"""
    if isinstance(a, Tensor):
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
            raise mismatch(
                name, f"a number, shape [] or [{x.shape[0]}]", f"shape {_shape(a.shape)}"
            )
        if a.device != x.device and (a.dim() or a.is_meta):
            raise mismatch(name, f"device {x.device} like x", a.device)
        return a.to(device=x.device, dtype=x.dtype).expand(x.shape[0])
    if torch.compiler.is_compiling() and not isinstance(a, (bool, str)):
        if isinstance(a, (int, float, torch.SymFloat, torch.SymInt)):
            return x.new_ones(x.shape[0]) * a  # a may be symbolic
        return level(
            name, torch.as_tensor(a, dtype=x.dtype, device=x.device), x
        )  # of NumPy, which is traced
    if type(a).__module__.partition(".")[0] == "numpy" and getattr(a, "ndim", 0):
        return level(name, of_numpy(name, a).to(x.device), x)
    if isinstance(a, (bool, str)) or not hasattr(a, "__float__"):
        raise _type(name, "a number or a tensor", _kind(a))
    return x.new_full((x.shape[0],), _in_range(name, a, x.dtype))


def of_numpy(name, a) -> Tensor:
    """A NumPy array of real numbers as a float64 tensor, without a loss."""
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


def _in_range(name, a, dtype) -> float:
    """A level's number, finite and, if it is sigma, positive; in this dtype as well."""
    expected = "a finite value > 0" if name == "sigma" else "a finite value"
    try:
        value = constant(name, a)
    except ValueError as error:
        raise mismatch(name, expected, str(error).rpartition("got ")[2]) from None
    if name == "sigma" and value <= 0:
        raise mismatch(name, expected, value)
    try:
        there = struct.unpack("f", struct.pack("f", value))[0] if dtype == torch.float32 else value
    except OverflowError:
        there = math.inf
    if not math.isfinite(there) or (name == "sigma" and there == 0):
        raise mismatch(name, f"{expected} in {str(dtype).removeprefix('torch.')}", value)
    return value


def constant(name, a):
    """A finite number of any library, as a Python float: int, float, a NumPy scalar, a 0-d array or
    tensor, whatever has `__float__`. bool, complex and arrays of one entry are no numbers.
    """
    if torch.compiler.is_compiling() and isinstance(a, (int, float)) and not isinstance(a, bool):
        return 1.0 * a  # may be symbolic: nothing to look at
    if isinstance(a, (bool, complex, str)) or getattr(a, "ndim", 0) or not hasattr(a, "__float__"):
        raise _type(name, "a number", _kind(a))
    unmasked(name, a)
    dtype = getattr(a, "dtype", None)
    text_or_time = getattr(dtype, "kind", "") in tuple(
        "SUMm"
    )  # of NumPy: float would read them, or raise
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


def integer(name, a, least=None, most=None):
    """A whole number of any library (whatever has `__index__`) from least to most, as a Python
    int."""
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


def _kind(a) -> str:
    """What came, in an error's words: the type, with the shape of an array."""
    shape = None if isinstance(a, Tensor) and a.is_nested else getattr(a, "shape", None)
    return type(a).__name__ + (
        f" of shape {_shape(shape)}" if isinstance(shape, tuple) and shape else ""
    )


def points(x, y, alpha, sigma, log_prior, scale, offset):
    """Arguments that every data-set op shares, flat and expanded: (x, y, alpha, sigma, log_prior,
    scale, offset).
    """
    flat = query("x", x)
    tensor("y", y)
    if (
        y.dtype != x.dtype
        and y.dtype not in _NARROW
        and not (y.dtype == torch.float32 and x.dtype == torch.float64)
    ):
        if y.dtype == torch.float64:
            raise TypeError(
                "y: expected float32 or narrower to go with float32 x, got float64: convert x or y"
            )
        raise _type("y", "float64, float32, float16, bfloat16 or uint8", _dtype(y))
    if y.dim() == 0 or y.shape[1:] != x.shape[1:]:
        raise mismatch(
            "y",
            f"shape {_shape(['N', *x.shape[1:]])} to go with x of shape {_shape(x.shape)}",
            _shape(y.shape),
        )
    if y.shape[0] == 0:
        raise mismatch("y", "at least one atom", f"shape {_shape(y.shape)}")
    if flat.shape[1] == 0:
        raise mismatch("x", "at least one number per query", f"shape {_shape(x.shape)}")
    if y.device != x.device:
        raise mismatch("y", f"device {x.device} like x", y.device)
    if y.dim() != 2:
        y = y.reshape(y.shape[0], flat.shape[1])
    if log_prior is not None:
        tensor("log_prior", log_prior)
        if log_prior.shape != y.shape[:1]:
            raise mismatch(
                "log_prior", f"shape [{y.shape[0]}], one entry per atom", _shape(log_prior.shape)
            )
        if not log_prior.dtype.is_floating_point:
            raise _type("log_prior", "a floating dtype", _dtype(log_prior))
        if log_prior.device != x.device:
            raise mismatch("log_prior", f"device {x.device} like x", log_prior.device)
        if log_prior.dtype != x.dtype:
            log_prior = _narrowed(log_prior, x.dtype)
    if not (type(scale) is type(offset) is float and scale == 1.0 and offset == 0.0):
        scale, offset = constant("scale", scale), constant("offset", offset)
    return flat, y, level("alpha", alpha, x), level("sigma", sigma, x), log_prior, scale, offset


def _narrowed(log_prior, dtype):
    """log_prior in another dtype. The largest is taken off before: a constant means nothing, but in
    float32 a large one would cost the digits of what differs.
    """
    if log_prior.dtype.itemsize > dtype.itemsize:
        top = log_prior.detach().amax()
        log_prior = log_prior - torch.where(torch.isfinite(top), top, 0.0)
    return log_prior.to(dtype)


def vectors(name, v, other_name, other, d):
    """[B, *E] or [B, K, *E] beside a [B, *E] tensor. -> [B, K, d]"""
    tensor(name, v)
    same(name, v, other_name, other)
    event = other.shape[1:]
    many = v.dim() == other.dim() + 1
    if not (
        v.shape == other.shape or (many and v.shape[0] == other.shape[0] and v.shape[2:] == event)
    ):
        wide = _shape([other.shape[0], "K", *event])
        raise mismatch(name, f"shape {_shape(other.shape)} or {wide}", _shape(v.shape))
    return v if many and v.dim() == 3 else v.reshape(v.shape[0], v.shape[1] if many else 1, d)


def lists(atoms, counts, x):
    """Lists of atoms: int64 [M] and [B], beside x [B, d]; both or neither."""
    for name, t, other in (("atoms", atoms, "counts"), ("counts", counts, "atoms")):
        if t is None:
            raise mismatch(name, f"a tensor to go with {other}", "None")
    for name, t, shape in (("atoms", atoms, ["M"]), ("counts", counts, [x.shape[0]])):
        tensor(name, t)
        if t.dtype != torch.int64:
            raise _type(name, "int64", _dtype(t))
        if t.dim() != 1 or shape[0] not in ("M", t.shape[0]):
            raise mismatch(name, f"shape {_shape(shape)}", _shape(t.shape))
        if t.device != x.device:
            raise mismatch(name, f"device {x.device} like x", t.device)


def choice(name, value, allowed):
    if value not in allowed:
        raise mismatch(name, " or ".join(map(repr, allowed)), repr(value))


def call(op, args, **given):
    """op(*args); a value that the kernel could not use becomes a ValueError: it names the argument
    or, where each is finite and together they overflow, says in the kernel's words what did.

    `given`: the arguments that were reshaped, as the caller gave them, so that the index in the
    message is theirs.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        known = from_kernel(op, error)
        if known is None:
            raise
        if isinstance(known, UnusableValue):
            names = [a.name for a in op._schema.arguments]
            diagnose({**dict(zip(names, args, strict=False)), **given}, error)
        raise known from error


def diagnose(args, cause):
    """Raises ValueError for the first of the named arguments whose values explain `cause`; returns
    if there is none.
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
                raise mismatch(name, "at least one finite value", "all -inf") from cause
        elif name == "sigma":
            _first(name, a, ~((a > 0) & torch.isfinite(a)), "finite values > 0", cause)
        else:
            finite(name, a, cause, _unread(a, plain) if name == "y" else None)


def _unread(y, args):
    """[N]: the atoms that no query counts, which may hold anything; None if there are none."""
    prior, atoms = args.get("log_prior"), args.get("atoms")
    unread = None
    if prior is not None and prior.shape == y.shape[:1]:
        unread = prior == -math.inf
    if atoms is not None:
        listed = atoms.clamp(0, y.shape[0] - 1)
        unlisted = atoms.new_ones(y.shape[0], dtype=torch.bool).index_fill(0, listed, False)
        unread = unlisted if unread is None else unread | unlisted
    return unread


def finite(name, a, cause=None, unread=None):
    """Raises ValueError for the first NaN or inf in a [n, ...] tensor, rows that are unread, [n],
    left out."""
    step = max(1, _BLOCK // max(1, a[:1].numel()))
    for start in range(0, a.shape[0], step):
        block = a[start : start + step]
        bad = ~torch.isfinite(block)
        if unread is not None:
            bad &= ~unread[start : start + step].reshape(-1, *[1] * (a.dim() - 1))
        _first(name, block, bad, "finite values", cause, start)


def _first(name, a, bad, expected, cause, start=0):
    if bool(bad.any()):
        index = torch.nonzero(bad)[0].tolist()
        raise mismatch(
            name, expected, f"{a[tuple(index)].item()} at index {[index[0] + start, *index[1:]]}"
        ) from cause
