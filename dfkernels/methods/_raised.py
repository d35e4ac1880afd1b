"""What a network raises when it is called, said together with what it was given and what that most
likely asks for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .._torch import words

__all__ = ["KINDS", "with_given"]

KINDS = (RuntimeError, IndexError, TypeError)  # themselves: no kind of theirs, such as of memory
_REMEDIES = (
    (
        "indices.* scalar types|used as indices must be",
        "a network that knows its timesteps by a table needs integers: a schedule with "
        "discrete=True, or a clock such as lambda t: (999 * t).round().long()",
    ),
    (
        "index out of range|index .*out of bounds",
        "a table of the network has no such entry: is t the time that it was trained with? If not, "
        "clock= says what it is given",
    ),
    (
        "required .*argument|unexpected keyword argument|positional arguments? but",
        "conditions are keyword arguments, of the call or of denoiser.bind(...)",
    ),
    (
        "same number of dimensions|[Ss]izes? of tensor|expanded size",
        "t has one number per sample: beside x [B, d] it is t[:, None]",
    ),
    (
        "cannot be multiplied|to have .* channels|invalid for input of size",
        "does the network take samples of this shape?",
    ),
)
_DTYPES = "same dtype|expected scalar type|should be the same"
_HALF = "a network in half precision is given t in float32: beside x it is t.to(x.dtype)"
_HIDDEN = "a function hides the dtype and the device of its model: df.methods.Called shows them"


def with_given(
    error: Exception, name: str, x: Tensor, t: Tensor, conditions: Mapping[str, object]
) -> Exception | None:
    """The error to raise from what the network `name` raised: of the same type, with what it was
    given.

    None where the network's own has to stay: that of any other type than RuntimeError, IndexError
    and TypeError themselves, which is what wrong shapes, dtypes and arguments raise, and that of a
    data set in the place of a network, or of a network within the network.
    """
    said = str(error)
    if type(error) not in KINDS or said.startswith(f"{name}: ") or _is_own(error):
        return None
    given = ", ".join([f"x {_described(x)}", f"t {_described(t)}", *conditions])
    remedies = *_REMEDIES, (_DTYPES, _HALF if x.dtype.itemsize < t.dtype.itemsize else _HIDDEN)
    hints = [remedy for words, remedy in remedies if re.search(words, said)]
    hint = f" ({hints[0]})" if hints else ""
    kind = type(error)
    return kind(
        f"{name}: expected a prediction for {given}; it raised {kind.__name__}: {said}{hint}"
    )


def _is_own(error: Exception) -> bool:
    """Whether an object or an operator of this library raised it: its message is complete."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = "" if frame is None else f"{frame.tb_frame.f_globals.get('__name__', '')}."
    package = __name__.partition(".")[0]
    # methods and adapters call networks: what is raised there may be a wrong argument of one
    callers = (f"{package}.methods.", f"{package}.adapt.")
    return where.startswith(f"{package}.") and not where.startswith(callers)


def _described(t: Tensor) -> str:
    return f"{list(t.shape)} {words.dtype(t)} on {t.device}"
