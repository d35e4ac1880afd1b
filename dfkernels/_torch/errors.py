"""The library's own errors, and how what a compiled kernel says becomes one of them."""

from __future__ import annotations

import re

import torch

# A kernel's only calls of the dispatcher make its outputs, and copies of arguments that are not
# contiguous; the stable ABI passes on that one failed, without the reason
_ALLOCATION = re.compile(r'^torch_call_dispatcher\(\s*"aten::(contiguous|clone|new_empty)"')
_PLACE = re.compile(r"^[^,:]*, .+?:\d+, ")  # function, file:line that C++ puts before its message


class UnusableValue(ValueError, RuntimeError):
    """A value that a kernel cannot use. A RuntimeError too: that is what ops of torch raise."""


class Unsupported(ValueError, NotImplementedError):
    """A correct argument in a situation that has no implementation: under vmap, say, or with a
    gradient."""


def from_kernel(op, error: RuntimeError) -> RuntimeError | None:
    """The library's error for what one of its kernels said; None for an error of anybody else.

    The compiled kernels can only say RuntimeError. They begin with the arguments at fault, "x, y:
    expected ...", and with "dfkernels: out of memory". Whatever else goes wrong below an op is not
    about a value.
    """
    if isinstance(error, UnusableValue):
        return error
    if type(error) is not RuntimeError:
        return None
    words = _PLACE.sub("", str(error))
    if words.startswith("dfkernels: out of memory"):
        return torch.OutOfMemoryError(words)
    if allocation := _ALLOCATION.match(words):
        what = "an output" if allocation[1] == "new_empty" else "a contiguous copy of an argument"
        return torch.OutOfMemoryError(f"dfkernels: out of memory ({what})")
    names, expected, _ = words.partition(": expected ")
    own = {"v", "result", *(a.name for a in op._schema.arguments)}
    return UnusableValue(words) if expected and own.issuperset(names.split(", ")) else None
