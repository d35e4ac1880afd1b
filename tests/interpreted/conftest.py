"""What the interpreter does not do as a GPU does it: float arguments, bfloat16, tensor cores. And
shorter ways to what it computes anew for every operation: else half of the tests' time."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import tensor_cores
import triton.language as tl
from triton.runtime import interpreter

from dfkernels.ops.common.triton import device

AS_IT_IS = interpreter._implicit_cvt
CONVERT = interpreter._convert_float
PLAIN_DOT = interpreter.InterpreterBuilder.create_dot


def as_launched(argument):
    """A Python float is a float32 on a GPU; the interpreter would hand it on as it is, a double."""
    if type(argument) is float:
        return tl.tensor(
            interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32
        )
    return AS_IT_IS(argument)


def converted(data, source, target, rounding):
    """A float32 goes to the nearest bfloat16; the interpreter would cut it off."""
    if (source, target) == (tl.float32, tl.bfloat16):
        return tensor_cores.to_bits(data)
    if (source, target) == (tl.bfloat16, tl.float32):
        return tensor_cores.from_bits(data).view(np.uint32)
    return CONVERT(data, source, target, rounding)


def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """By a model of tensor cores; the interpreter would multiply bit patterns of bfloat16, and
    compute TF32 as float32."""
    if a.dtype.scalar == tl.float64:
        return PLAIN_DOT(self, a, b, d, input_precision, max_num_imprecise_acc)
    if a.dtype.scalar == tl.float32:
        name = str(input_precision).rpartition(".")[2].lower()
        out = tensor_cores.dot(a.data, b.data, d.data, name)
    else:
        whole = a.dtype.scalar == tl.bfloat16
        values = [tensor_cores.from_bits(t.data) if whole else t.data for t in (a, b)]
        out = tensor_cores.product(*values, d.data)
    return interpreter.TensorHandle(out.astype(np.float32), d.dtype.scalar)


def device_call(self, *args, **kwargs):
    """A device function, inside a kernel. The interpreter would patch its language anew at every
    call: here only where it is not patched yet."""
    langs = [lang for lang in self.fn.__globals__.values() if lang is tl or lang is tl.core]
    if not langs or any(tl.core.is_builtin(lang.load) for lang in langs):
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


def remembered(init, key):
    """init, which fills an object that nobody changes: with equal keys it has equal fields."""
    known = {}

    def fill(self, *args):
        name = key(*args)
        if name not in known:
            init(self, *args)
            known[name] = vars(self).copy()
        vars(self).update(known[name])

    return fill


def block_key(element_ty, shape):
    return element_ty.name, *(getattr(size, "value", size) for size in shape)


fill_block_type = remembered(tl.block_type.__init__, block_key)
TENSOR = tl.tensor.__init__
fill_tensor = remembered(lambda self, type: TENSOR(self, None, type), lambda type: type.name)


def tensor(self, handle, type):
    fill_tensor(self, type)
    self.handle, self.type = handle, type


NP_DTYPE = interpreter._get_np_dtype
NP_DTYPES = {}


def np_dtype(type):
    if type.name not in NP_DTYPES:
        NP_DTYPES[type.name] = NP_DTYPE(type)
    return NP_DTYPES[type.name]


@pytest.fixture(autouse=True, scope="session")
def as_on_a_gpu():
    builder = interpreter.InterpreterBuilder
    with (
        mock.patch.object(interpreter, "_implicit_cvt", as_launched),
        mock.patch.object(interpreter, "_convert_float", converted),
        mock.patch.object(builder, "create_dot", dot),
        mock.patch.object(interpreter.InterpretedFunction, "__call__", device_call),
        mock.patch.object(interpreter, "_get_np_dtype", np_dtype),
        mock.patch.object(tl.block_type, "__init__", fill_block_type),
        mock.patch.object(tl.tensor, "__init__", tensor),
        mock.patch.dict(device.DEVICES, {90: device.DEVICES[90]._replace(multiprocessors=4)}),
    ):
        yield
