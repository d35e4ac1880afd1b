"""The library's own errors, and how what a compiled kernel says becomes one of them."""

from __future__ import annotations

import torch

from . import native


class UnusableValue(ValueError, RuntimeError):
    """A value that a kernel cannot use. A RuntimeError too: that is what ops of torch raise."""


class Unsupported(ValueError, NotImplementedError):
    """A correct argument in a situation that has no implementation: under vmap, say, or with a
    gradient."""


def from_kernel(error: RuntimeError) -> RuntimeError | None:
    """The library's error for one that a kernel raised; None for an error of anybody else.

    A compiled kernel can only raise RuntimeError, but it records what it refuses (see
    ``csrc/host/refuse.h``). An error that does not carry the message on record is not its own.
    """
    if isinstance(error, UnusableValue):
        return error
    refusal = native.take_refusal()
    if type(error) is not RuntimeError or refusal is None or refusal.message not in str(error):
        return None
    kind = UnusableValue if refusal.kind == "value" else torch.OutOfMemoryError
    return kind(refusal.message)
