"""What the interpreter does not do as a GPU does it."""

from __future__ import annotations

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

AS_IT_IS = interpreter._implicit_cvt


def as_launched(argument):
    """A Python float is a float32 on a GPU; the interpreter would hand it on as it is, a double."""
    if type(argument) is float:
        return tl.tensor(
            interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32
        )
    return AS_IT_IS(argument)


@pytest.fixture(autouse=True, scope="session")
def floats_are_launched_as_float32():
    interpreter._implicit_cvt = as_launched
    yield
    interpreter._implicit_cvt = AS_IT_IS
