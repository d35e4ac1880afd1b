"""Sums over the particles with the weights of a kernel, in one pass of `ops.average`."""

from __future__ import annotations

import math

from torch import Tensor

from ... import ops

__all__ = ["kernel_sums"]


def kernel_sums(x: Tensor, values: Tensor, log_w: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """(sum_j w_j k_ij [M, 1], sum_j w_j k_ij values_j [M, p]), k_ij = exp(-|x_i - x_j|^2/h)."""
    sigma = math.sqrt(h / 2)
    found = ops.average(x, x, values, 1.0, sigma, log_w)
    log_norm = x.shape[1] * math.log(sigma * math.sqrt(2 * math.pi))  # of a Gaussian's density
    total = (found.log_prob.double() + log_norm).exp().to(x.dtype)[:, None]
    return total, total * found.average
