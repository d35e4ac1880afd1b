# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""Computes the logits of all pairs (query, atom): by differences, or by the filter first.

The filter bounds every logit by a matrix product; then the atoms that may matter are computed again
by differences, or, for the queries whose expanded logits are accurate enough, all of them by a
more precise product.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..moments import load
from .device import Device, device_of
from .differences import differences_kernel
from .filter import filter_kernel
from .problem import Problem
from .products import product_projections_kernel

# A query takes products if |x'|^2 + alpha^2 max |y'|^2 <= PRODUCTS_LIMIT d sigma^2
PRODUCTS_LIMIT = 2
SAMPLED = 64  # atoms whose mean is the centre


def difference_sizes(targets: int) -> dict[str, int]:
    """The tile of `differences_kernel`: TARGETS share a tile of y."""
    shared = {"D": 512, "TARGETS": 1} if targets == 1 else {"D": 128, "TARGETS": 4}
    return {**shared, "ATOMS": 16, "STRIP": 16}


def filter_sizes(B: int, precise: bool, device: Device) -> dict[str, int]:
    """The tile of the filter: as many QUERIES as do not spill in the loop and fit shared memory."""
    largest = 64 if precise or device.cc >= 100 else 128
    queries = max(16, min(largest, triton.next_power_of_2(B)))
    return {"D": 32 if precise else 64, "ATOMS": 128, "QUERIES": queries, "STAGES": 3}


def by_differences(
    p: Problem,
    reference: Tensor | None = None,
    bounds: Tensor | None = None,
    floor: Tensor | None = None,
) -> Tensor:
    """Every logit, [B, N], or, given a reference, every <y - reference, v>, [targets, N].

    With bounds, only those that may matter; logits then take the place of their bounds.
    """
    N = p.y.shape[0]
    targets = p.x.shape[0] if reference is None else p.targets
    out = p.x.new_empty(targets, N) if bounds is None or reference is not None else bounds
    sizes = difference_sizes(targets)
    tiles = triton.cdiv(N, sizes["ATOMS"] * sizes["STRIP"])
    differences_kernel[(tiles * triton.cdiv(targets, sizes["TARGETS"]),)](
        **p.atom_arguments,
        x=p.x if reference is None else reference,
        v=p.v,
        alpha=p.alpha,
        sigma=p.sigma,
        bounds=bounds,
        floor=floor,
        out=out,
        targets=targets,
        vectors_per_query=targets // p.x.shape[0],
        gap=p.gap,
        PROJECT=reference is not None,
        FILTERED=bounds is not None,
        **sizes,
        num_warps=4,
    )
    return out


class Logits(NamedTuple):
    """Logits of all pairs, and what the kernels that use matrix products need beside them."""

    value: Tensor  # [B, N], base 2, exact where they matter
    max_logit: Tensor  # [B]
    by_products: Tensor | None = None  # [B]: 1 for the queries that take products, else 0
    centre: Tensor | None = None  # [d]
    y_square: Tensor | None = None  # [N]: |y - centre|^2


def centre_of(p: Problem) -> Tensor:
    """The mean of some atoms that are not masked, [d]; any point would do, a close one costs the
    fewest digits."""
    some = slice(None, None, max(1, p.y.shape[0] // SAMPLED))
    atoms = load(p.y[some], p.x.dtype, p.scale, p.offset)
    if p.log_pi is None:
        return atoms.mean(0)
    valid = (p.log_pi[some] > -math.inf)[:, None]
    return torch.where(valid, atoms, 0).sum(0) / valid.sum().clamp_min(1)


def filtered(p: Problem) -> Logits:
    """Logits by the filter: an upper bound of each, then those that may matter, computed again."""
    (B, d), N = p.x.shape, p.y.shape[0]
    centre = centre_of(p)
    x = p.x - p.alpha[:, None] * centre
    x_square = x.square().sum(1)
    tiles = triton.cdiv(N, 128)
    upper, lower, y_square = x.new_empty(B, N), x.new_empty(B, tiles), x.new_empty(N)

    def launch(x: Tensor, by_products: Tensor | None) -> None:
        sizes = filter_sizes(B, by_products is not None, device_of(x))
        filter_kernel[(tiles * triton.cdiv(B, sizes["QUERIES"]),)](
            **p.atom_arguments,
            x=x,
            centre=centre,
            x_square=x_square,
            by_products=by_products,
            alpha=p.alpha,
            sigma=p.sigma,
            upper=upper,
            lower=lower,
            y_square=y_square,
            B=B,
            one=1.0,
            PRECISE=by_products is not None,
            **sizes,
            num_warps=8,
        )

    launch(x.to(x.dtype if x.device.type == "cpu" else torch.bfloat16), None)
    size = x_square + p.alpha.square() * y_square.amax()
    accurate = size <= PRODUCTS_LIMIT * d * p.sigma.square()
    by_products = accurate.to(x.dtype)
    launch(x, by_products)
    floor = torch.where(accurate, math.inf, lower.amax(1))
    value = by_differences(p, bounds=upper, floor=floor)
    return Logits(value, value.amax(1), by_products, centre, y_square)


def compute_logits(p: Problem) -> Logits:
    """The logits of a call, by whichever way is faster."""
    if p.x.dtype == torch.float32 and p.x.shape[0] > 1:
        return filtered(p)
    value = by_differences(p)
    return Logits(value, value.amax(1))


def compute_projections(p: Problem, logits: Logits, reference: Tensor) -> Tensor:
    """<y - reference, v>, [targets, N], where the logit matters."""
    if logits.by_products is None:
        return by_differences(p, reference, logits.value, logits.max_logit)
    floor = torch.where(logits.by_products > 0, math.inf, logits.max_logit)
    out = by_differences(p, reference, logits.value, floor)
    N, targets = p.y.shape[0], p.targets
    sizes = filter_sizes(targets, True, device_of(p.x))
    grid = (triton.cdiv(N, sizes["ATOMS"]) * triton.cdiv(targets, sizes["QUERIES"]),)
    product_projections_kernel[grid](
        **p.atom_arguments,
        v=p.v,
        centre=logits.centre,
        shift=((reference - logits.centre) * p.v.flatten(0, 1)).sum(1),
        by_products=logits.by_products,
        out=out,
        targets=targets,
        vectors_per_query=targets // p.x.shape[0],
        one=1.0,
        **sizes,
        num_warps=8,
    )
    return out
