"""What a tensor core makes of a product, in NumPy: for Triton's interpreter and for error models.

The operands' products are exact. RUN of them are added up with the accumulator and the sum is cut
off to float32, towards zero: coarser than what Hopper was seen to do, and biased as it is.
"""

from __future__ import annotations

import numpy as np

RUN = 16  # products that one step of the hardware adds up


def from_bits(bits: np.ndarray) -> np.ndarray:
    """bfloat16, stored as uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bits(t: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 in uint16: to nearest, ties to even; a NaN stays one."""
    u = np.ascontiguousarray(t, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    return np.where(np.isnan(t), 0x7FC0, rounded).astype(np.uint16)


def to_tf32(t: np.ndarray) -> np.ndarray:
    """float32 with ten bits after the point: to nearest, ties away from zero."""
    u = np.ascontiguousarray(t, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((u + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(t), rounded, t)


def towards_zero(t: np.ndarray) -> np.ndarray:
    """float64 cut off to float32."""
    near = t.astype(np.float32)
    return np.where(np.abs(near) > np.abs(t), np.nextafter(near, np.float32(0)), near)


def product(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a @ b + c in float32, for operands that the tensor core takes as they are."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    for k in range(0, a.shape[-1], RUN):
        c = towards_zero(a[..., k : k + RUN] @ b[..., k : k + RUN, :] + c)
    return c


def dot(a: np.ndarray, b: np.ndarray, c: np.ndarray, precision: str) -> np.ndarray:
    """tl.dot of float32 operands: precision tf32, tf32x3 or ieee, without tensor cores."""
    if precision == "ieee":
        return np.matmul(a, b, dtype=np.float32) + c
    high_a, high_b = to_tf32(a), to_tf32(b)
    if precision == "tf32":
        return product(high_a, high_b, c)
    low_a, low_b = to_tf32(a - high_a), to_tf32(b - high_b)
    small = product(low_a, high_b, np.zeros_like(c))
    small = product(high_a, low_b, small)
    small = np.where(np.isnan(small), 0, small).astype(np.float32)
    return product(high_a, high_b, small) + c
