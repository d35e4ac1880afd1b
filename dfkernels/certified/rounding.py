"""The rounding terms of the certificate: all of them stand here, each under its own name.

The table in docs/certified.md says what each term covers and which function adds it.
csrc/certified/rounding.h has the same terms under the same names for the compiled search, and
tests/test_certified_rounding.py holds each of them against exact rational arithmetic.

In this package a logit is taken times sigma^2 and without -|z|^2 / 2, where z = x - alpha centre
and t_i = y_i - centre. Terms that multiply a logit's parts are therefore relative errors.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

UNIT = 2.0**-53  # unit roundoff of float64
FEW_ROUNDINGS = 1 + 1e-9  # covers a few operations in float64 on terms of one sign
STORED_NORM = 2.0**-22  # relative error of |t|, and of |t|^2, when |t| is stored in float32
FLOAT_BOUND = 2.0**-19  # 32 roundings to float32: stored values, and a bound's own operations
COORDINATES = 2.0**-48  # of x, alpha y and alpha centre, which may be large beside differences


def double_sums(d: int, K: int) -> float:
    """Error of V z or V t in float64, relative to |z| or |t|: K sums of d products each."""
    return 8 * UNIT * (d + K) * K**0.5


def float_sums(K: int, query_on_axes: Tensor, z_norm: Tensor) -> Tensor:
    """Error of float32 products with the codes, relative to the codes' norm.

    The first term covers the coarse level's sums of K products, the second the few additions that
    follow at the fine level.
    """
    return 2.0**-24 * (K + 4) * query_on_axes + 2.0**-21 * z_norm


def exact_logit(d: int) -> float:
    """Error of a logit by differences in float64, relative to the sum of its terms' sizes."""
    return 4 * UNIT * (d + 8)


def round_up(t: Tensor) -> Tensor:
    """A float32 tensor that is nowhere below t."""
    return torch.nextafter(t.float(), torch.full_like(t, math.inf, dtype=torch.float32))


def round_down(t: Tensor) -> Tensor:
    """A float32 tensor that is nowhere above t."""
    return torch.nextafter(t.float(), torch.full_like(t, -math.inf, dtype=torch.float32))
