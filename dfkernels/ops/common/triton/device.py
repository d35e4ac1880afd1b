"""What the Triton kernels share. Imported only where triton is: by ops/<op>/triton.py."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# tl.sum over a cluster's CTAs (num_ctas > 1): earlier compilers refuse it
CLUSTERS = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 8)


class Device(NamedTuple):
    """What launch heuristics may know of a GPU."""

    cc: int  # compute capability: 80, 90, 100, 120
    multiprocessors: int
    shared: int  # bytes of shared memory that one program may take


DEVICES = {  # for tests, where tensors are on no GPU: A100, H200, B200, RTX 5090
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


def expect(like: torch.Tensor, **given: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    """RuntimeError for a tensor, given with its shape, that a kernel would read past its end."""
    for name, (t, shape) in given.items():
        if t.shape != shape or t.dtype != like.dtype or t.device != like.device:
            wanted = f"{list(shape)}, {like.dtype}, {like.device}"
            raise RuntimeError(
                f"{name}: expected {wanted}, got {list(t.shape)}, {t.dtype}, {t.device}"
            )


@triton.jit
def row_sums(t):
    """[rows, n] -> [rows]; one row may lie across a cluster, over which Triton reduces vectors
    only."""
    if t.shape[0] == 1:
        return tl.sum(t)[None]
    return tl.sum(t, 1)
