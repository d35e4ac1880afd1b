"""What the Triton kernels share. Imported only where triton is: by ops/<op>/triton.py."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

# tl.sum over a cluster's CTAs (num_ctas > 1): earlier compilers refuse it
CLUSTERS = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 8)

POINTER = {torch.float32: "*fp32", torch.float64: "*fp64", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
POINTER[torch.uint8] = "*u8"


class Variant(NamedTuple):
    """One kernel as it is compiled: what tests/test_triton_compile.py checks without a GPU."""

    name: str  # unique within its op, e.g. "row fp32 8192"
    kernel: Any  # the @triton.jit function
    signature: dict[str, str]  # type of every argument: "*fp32", "i32", "constexpr"
    constants: dict[str, Any]
    options: dict[str, int]  # num_warps, num_stages, num_ctas
    divisible: tuple[str, ...] = ()  # integer arguments that are multiples of 16, as d often is; pointers are


class Device(NamedTuple):
    """What launch heuristics may know of a GPU."""

    cc: int  # compute capability: 80, 90, 100, 120
    multiprocessors: int
    shared: int  # bytes of shared memory that one program may take


DEVICES = {  # for tests, and for tensors on the CPU under the interpreter: A100, H200, B200, RTX 5090
    80: Device(80, 108, 163 << 10),
    90: Device(90, 132, 227 << 10),
    100: Device(100, 148, 227 << 10),
    120: Device(120, 170, 99 << 10),
}


@lru_cache
def _cuda_device(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    return Device(10 * p.major + p.minor, p.multi_processor_count, p.shared_memory_per_block_optin)


def device_of(tensor: torch.Tensor) -> Device:
    return _cuda_device(tensor.device.index) if tensor.is_cuda else DEVICES[90]


def signature(kernel, dtype: torch.dtype, integers: tuple[str, ...], constants: dict) -> dict[str, str]:
    """A variant's signature where every pointer is to one dtype."""
    kinds = dict.fromkeys(integers, "i32") | dict.fromkeys(constants, "constexpr")
    return {name: kinds.get(name, POINTER[dtype]) for name in kernel.arg_names}


@triton.jit
def row_sums(t):
    """[rows, n] -> [rows]; one row may lie across a cluster, over which Triton reduces vectors only."""
    if t.shape[0] == 1:
        return tl.sum(t)[None]
    else:
        return tl.sum(t, 1)
