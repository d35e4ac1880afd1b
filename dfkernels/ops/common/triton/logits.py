"""Launches what keeps logits: all by differences, or by the filter and then anew where they may
matter."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton

from ..moments import load
from .device import Device, device_of
from .differences import rows_sum
from .filter import filter_logits
from .problem import Problem, gap_of
from .products import near_tilts

NEAR = 2  # a query is near the data if |x'|^2 + alpha^2 max |y'|^2 <= NEAR d sigma^2


def rows_sizes(lanes: int) -> dict[str, int]:
    """LANES that share a tile of y."""
    few = {"D": 512, "LANES": 1} if lanes == 1 else {"D": 128, "LANES": 4}
    return {**few, "ATOMS": 16, "STRIP": 16}


def filter_sizes(B: int, precise: bool, device: Device) -> dict[str, int]:
    """QUERIES of a tile: as many as leave the loop without spills and fit shared memory."""
    largest = 64 if precise or device.cc >= 100 else 128
    queries = max(16, min(largest, triton.next_power_of_2(B)))
    return {"D": 32 if precise else 64, "ATOMS": 128, "QUERIES": queries, "STAGES": 3}


def rows(p: Problem, about=None, bounds=None, floor=None) -> torch.Tensor:
    """Every logit, [B, N], or every <y - about, v>, [lanes, N]; with bounds those that may matter,
    the logits in their place.
    """
    N, d = p.y.shape
    lanes = p.x.shape[0] if about is None else p.lanes
    out = p.x.new_empty(lanes, N) if bounds is None or about is not None else bounds
    sizes = rows_sizes(lanes)
    grid = (triton.cdiv(N, sizes["ATOMS"] * sizes["STRIP"]) * triton.cdiv(lanes, sizes["LANES"]),)
    or_x = lambda t: p.x if t is None else t
    rows_sum[grid](
        *(
            or_x(about),
            p.y,
            or_x(p.v),
            p.alpha,
            p.sigma,
            or_x(p.log_pi),
            or_x(bounds),
            or_x(floor),
            out,
        ),
        *(N, d, p.y.stride(0), lanes, lanes // p.x.shape[0], gap_of(p), p.scale, p.offset),
        **p.flags,
        **sizes,
        PROJECT=about is not None,
        FILTERED=bounds is not None,
        num_warps=4,
    )
    return out


class Logits(NamedTuple):
    """What the sweep and `near_sums` take."""

    given: torch.Tensor  # [B, N], base 2, right where they matter
    top: torch.Tensor  # [B]: the largest
    near: torch.Tensor | None = None  # [B]: queries near the data
    centre: torch.Tensor | None = None  # [d]
    sizes: torch.Tensor | None = None  # [N]: |y - centre|^2


def centre_of(p: Problem) -> torch.Tensor:
    """[d]: the mean of some atoms that have weight; any point would do, a near one costs fewest
    digits."""
    some = slice(None, None, max(1, p.y.shape[0] // 64))
    atoms = load(p.y[some], p.x.dtype, p.scale, p.offset)
    if p.log_pi is None:
        return atoms.mean(0)
    real = (p.log_pi[some] > -math.inf)[:, None]
    return torch.where(real, atoms, 0).sum(0) / real.sum().clamp_min(1)


def filtered(p: Problem) -> Logits:
    """By a matrix product what each logit is at most; then those that may matter, better."""
    (B, d), N = p.x.shape, p.y.shape[0]
    centre = centre_of(p)
    x = p.x - p.alpha[:, None] * centre
    square = x.square().sum(1)
    tiles = triton.cdiv(N, 128)
    upper, lower, norms = x.new_empty(B, N), x.new_empty(B, tiles), x.new_empty(N)

    def launch(x, near, precise):
        sizes = filter_sizes(B, precise, device_of(x))
        filter_logits[(tiles * triton.cdiv(B, sizes["QUERIES"]),)](
            *(
                x,
                p.y,
                centre,
                square,
                near,
                p.alpha,
                p.sigma,
                p.x if p.log_pi is None else p.log_pi,
            ),
            *(upper, lower, norms, N, d, p.y.stride(0), B, 1.0, p.scale, p.offset),
            **p.flags,
            **sizes,
            PRECISE=precise,
            num_warps=8,
        )

    launch(x.to(x.dtype if x.device.type == "cpu" else torch.bfloat16), p.x, False)
    close = square + p.alpha.square() * norms.amax() <= NEAR * d * p.sigma.square()
    near = close.to(x.dtype)
    launch(x, near, True)
    floor = torch.where(close, math.inf, lower.amax(1))
    given = rows(p, bounds=upper, floor=floor)
    return Logits(given, given.amax(1), near, centre, norms)


def logits(p: Problem) -> Logits:
    if p.x.dtype == torch.float32 and p.x.shape[0] > 1:
        return filtered(p)
    given = rows(p)
    return Logits(given, given.amax(1))


def tilts(p: Problem, found: Logits, about: torch.Tensor) -> torch.Tensor:
    """<y - about, v>, [lanes, N], where it matters."""
    if found.near is None:
        return rows(p, about, found.given, found.top)
    (N, d), lanes = p.y.shape, p.lanes
    out = rows(p, about, found.given, torch.where(found.near > 0, math.inf, found.top))
    sizes = filter_sizes(lanes, True, device_of(p.x))
    shift = ((about - found.centre) * p.v.flatten(0, 1)).sum(1)
    log_pi = p.x if p.log_pi is None else p.log_pi
    near_tilts[(triton.cdiv(N, sizes["ATOMS"]) * triton.cdiv(lanes, sizes["QUERIES"]),)](
        *(p.v, p.y, found.centre, shift, found.near, log_pi, out),
        *(N, d, p.y.stride(0), lanes, lanes // p.x.shape[0], 1.0, p.scale, p.offset),
        **p.flags,
        **sizes,
        num_warps=8,
    )
    return out
