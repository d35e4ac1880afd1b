# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""What launchers know of a GPU, and what all Triton kernels share.

Modules that import triton are themselves imported only when a CUDA call needs them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# tl.sum over a cluster's CTAs (num_ctas > 1): earlier compilers refuse it
CLUSTERS = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 8)


class Device(NamedTuple):
    """What the choice of a tile may depend on."""

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
    """The GPU of a tensor; for one that is on none, as in tests, an H200."""
    return _cuda_device(tensor.device.index) if tensor.is_cuda else DEVICES[90]


def expect(like: torch.Tensor, **given: tuple[torch.Tensor, tuple[int, ...]]) -> None:
    """Raises RuntimeError for a tensor that a kernel would read past its end.

    Args:
        like: gives the dtype and the device that all tensors must have.
        given: name=(tensor, the shape it must have).
    """
    for name, (t, shape) in given.items():
        if t.shape != shape or t.dtype != like.dtype or t.device != like.device:
            expected = f"{list(shape)}, {like.dtype}, {like.device}"
            raise RuntimeError(
                f"{name}: expected {expected}, got {list(t.shape)}, {t.dtype}, {t.device}"
            )


@triton.jit
def row_sums(t):
    """Sums [rows, n] -> [rows]. One row may lie across a cluster, over which Triton reduces vectors
    only."""
    return tl.sum(t)[None] if t.shape[0] == 1 else tl.sum(t, 1)
