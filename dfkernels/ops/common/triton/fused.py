# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""One pass over the atoms for many float32 queries in few dimensions.

A query takes products of t = y - centre if no term of a logit is large: with R = max |t|,

    (|alpha| |x'| R + alpha^2 R^2/2)/sigma^2 <= d + SPARE,

or if it is near the cloud, for its noise (problem.py), where that holds, but for a factor, of the
atoms that count. Rounding then changes a logit by at most (d + 2) 2^-24 times the left side; that
of differences, by as many roundings of |x - alpha y|^2/(2 sigma^2), which is about d/2 for the
atoms that count. The other queries, those at low noise, get bounds of their logits by one product,
and then the sweep (sweep.py) on the strips of atoms in which some atom may matter. Nothing waits
for the device: the queries are put in order, those that take products last, and each kernel skips
what is not its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import launch
from .device import Device, device_of
from .fused_kernels import bound_tiles_kernel, fused_moments_kernel, small_moments_kernel
from .fused_prepare import (
    place_queries_kernel,
    prepare_atoms_kernel,
    prepare_vectors_kernel,
    takes_products_kernel,
)
from .problem import NEAR, Problem, centres
from .sweep import sweep_kernel

SMALL_D = 8  # without tensor cores, whose products have sixteen coordinates at least
LEAST_QUERIES = 32  # fewer leave most of a tensor core's tile empty
SPARE = 8
MOST_TILES = 256  # tiles of a split: chains of float32 additions stay short
BOUND_ATOMS = 64
PREPARED = 2**32  # bytes of scratch memory for the atoms of a pass


class Pass(NamedTuple):
    """How a pass is cut: the tile of the kernel for products, and that of the sweep."""

    kind: str  # "log_prob", "posterior", "matvec" or "diagonal"
    sizes: dict[str, int]  # D, ATOMS, TARGETS, STAGES, num_warps
    small: bool
    sweep: launch.Tile
    strip: int  # atoms whose bounds are looked at together

    @property
    def D(self) -> int:
        """Coordinates of a row of bfloat16 numbers."""
        return max(16, self.sizes["D"])

    @property
    def atom_parts(self) -> int:
        """Of the parts of an atom's numbers: one for bounds alone; three; three of squares too."""
        return 1 if self.small else 6 if self.kind == "diagonal" else 3

    @property
    def atom_bytes(self) -> int:
        """Of scratch memory for an atom: parts, |t|^2 and log2 pi, and t itself where small."""
        return 2 * self.atom_parts * self.D + 8 + 4 * self.sizes["D"] * self.small


def most_d(kind: str, device: Device) -> int:
    """The coordinates up to which the sums of a tile and those so far fit registers together."""
    return 128 if device.cc // 10 == 9 and kind in ("log_prob", "posterior") else 64


def _tile(D: int, kind: str, device: Device) -> dict[str, int]:
    """The tile of `fused_moments_kernel`: the parts of queries and vectors stay, those of atoms are
    loaded a tile ahead. Tensor cores that read their operands from registers leave room for half as
    many numbers, and for half of these where two vectors are summed. So does the tensor memory of
    Blackwell, where Triton 3.7 makes a trap of a kernel that needs more of it than there is; of 32
    targets it makes the older instructions, which do without."""
    if device.cc // 10 == 9:
        sizes = {"ATOMS": 64, "TARGETS": 128, "num_warps": 8}
    else:
        two = D > 16 and kind in ("matvec", "diagonal")
        sizes = {"ATOMS": 32, "TARGETS": 32 if two else 64, "num_warps": 4}
    return {"D": D, "STAGES": 2, **sizes}


def plan(B: int, K: int, N: int, d: int, itemsize: int, kind: str, device: Device) -> Pass | None:
    """The pass for such a call, or None where others are better."""
    if itemsize != 4 or d > most_d(kind, device) or B < LEAST_QUERIES:
        return None
    targets = B * K
    if d <= SMALL_D:
        D = max(2, triton.next_power_of_2(d))
        atoms, wide = max(4, 16 // D), 2 if D <= 4 else 1  # targets of a thread
        sizes = {"D": D, "ATOMS": atoms, "TARGETS": 128 * wide, "STAGES": 1, "num_warps": 4}
    else:
        sizes = _tile(max(16, triton.next_power_of_2(d)), kind, device)
    tile = launch.tile_by_differences(targets, d, itemsize, device)
    tile = tile._replace(ATOMS=min(tile.ATOMS, BOUND_ATOMS))
    strip = 16 if tile.COORD_AXIS == 0 else BOUND_ATOMS
    found = Pass(kind, sizes, d <= SMALL_D, tile._replace(strip=strip // tile.ATOMS), strip)
    return None if N * found.atom_bytes > PREPARED else found


def product_splits(N: int, targets: int, sizes: dict[str, int], device: Device) -> tuple[int, int]:
    """(atoms of a split, splits) of the kernel for products."""
    blocks, tiles = triton.cdiv(targets, sizes["TARGETS"]), triton.cdiv(N, sizes["ATOMS"])
    fill = triton.cdiv(2 * device.multiprocessors, blocks)
    splits = max(triton.cdiv(tiles, MOST_TILES), min(fill, triton.cdiv(tiles, 4)))
    return launch.even_splits(N, splits, sizes["ATOMS"])


def sweep_splits(N: int, targets: int, plan: Pass, device: Device) -> tuple[int, int]:
    """(atoms of a split, splits) of the sweep."""
    blocks = triton.cdiv(targets, plan.sweep.TARGETS)
    splits = launch.splits_for(N, blocks, plan.sweep, device)
    return launch.even_splits(N, splits, plan.strip)


def scratch(N: int, d: int, K: int, targets: int, plan: Pass, device: Device) -> int:
    """Numbers of scratch memory for each query."""
    splits = product_splits(N, targets, plan.sizes, device)[1]
    splits += sweep_splits(N, targets, plan, device)[1]
    return K * (3 * splits * d + 4 * splits + 2 * plan.D) + triton.cdiv(N, plan.strip) + 4 * plan.D


def plan_for(
    x: Tensor, y: Tensor, v: Tensor | None, kind: str, atoms: Tensor | None = None
) -> Pass | None:
    """The pass for an op's flat arguments, or None where others are better: with lists of atoms
    always."""
    if atoms is not None:
        return None
    (B, d), K = x.shape, 1 if v is None else v.shape[1]
    return plan(B, K, y.shape[0], d, x.element_size(), kind, device_of(x))


def in_one_pass(
    run: Callable, plan: Pass, x, y, v, alpha, sigma, log_prior, scale: float, offset: float
):
    """run(the call, prepared) for as many queries at a time as the scratch memory allows, in the
    order of the queries.

    Args:
        run: gives a tensor, or a tuple of them, of which every row belongs to a query.
        plan: that of the call.
        x, y, v, alpha, sigma, log_prior, scale, offset: those of an op.
    """

    def some(p: Problem):
        one = prepared(p, plan)
        outs = run(one)
        if isinstance(outs, Tensor):
            return outs[one.back]
        return tuple(t[one.back] for t in outs)

    K = 1 if v is None else v.shape[1]
    room = scratch(*y.shape, K, len(x) * K, plan, device_of(x))
    given = (x, y, v, alpha, sigma, log_prior, scale, offset)
    return launch.in_query_groups(some, *given, scratch=room, anchor=False)


class Prepared(NamedTuple):
    """A call whose queries are in order, and what the kernels read of it. What is [B] is in that
    order, but for `back`."""

    plan: Pass
    problem: Problem
    back: Tensor  # [B]: where each query of the call is in the problem
    common: Tensor  # [B], double: what the logits leave out
    by_products: Tensor  # [B]: 1 for the queries that take products
    centre: Tensor  # [d]
    half: Tensor  # [B]
    q_norm: Tensor  # [B]
    q: Tensor  # [3 or 1, B, D] bfloat16
    q_whole: Tensor | None  # [B, D] where small
    y: Tensor  # [atom_parts, rows, D] bfloat16
    y_whole: Tensor | None
    weights: Tensor  # [rows, 2]
    biased: bool


def _parts(rows: int, like: Tensor, plan: Pass) -> tuple[Tensor, Tensor | None, dict[str, int]]:
    """Where the parts of queries or vectors go, they themselves where small, and the sizes of the
    kernel that writes both."""
    parts, W, D = 1 if plan.small else 3, plan.sizes["D"], plan.D
    out = torch.empty(parts, rows, D, dtype=torch.bfloat16, device=like.device)
    whole = like.new_empty(rows, W) if plan.small else None
    sizes = {"PARTS": parts, "W": W, "D": D, "ROWS": max(1, 2048 // D), "num_warps": 4}
    return out, whole, sizes


def _vectors(v: Tensor, plan: Pass) -> tuple[Tensor, Tensor | None]:
    """Parts of v [targets, d], and v itself where small."""
    rows, d = v.shape
    parts, whole, sizes = _parts(rows, v, plan)
    prepare_vectors_kernel[(triton.cdiv(rows, sizes["ROWS"]),)](
        x=v, parts=parts, whole=whole, rows=rows, d=d, **sizes
    )
    return parts, whole


def _atoms(p: Problem, centre: Tensor, plan: Pass) -> tuple[Tensor, Tensor | None, Tensor]:
    """Parts of t, t itself where small, and the weights of the atoms."""
    N = p.y.shape[0]
    least = max(plan.sizes["ATOMS"], BOUND_ATOMS)
    rows, parts, W = triton.cdiv(N, least) * least, plan.atom_parts, plan.sizes["D"]
    out = torch.empty(parts, rows, plan.D, dtype=torch.bfloat16, device=p.x.device)
    whole = p.x.new_empty(rows, W) if plan.small else None
    weights = p.x.new_empty(rows, 2)
    ROWS = max(1, 2048 // plan.D)
    prepare_atoms_kernel[(triton.cdiv(rows, ROWS),)](
        **p.atom_arguments, centre=centre, parts=out, whole=whole, weights=weights, rows=rows,
        PARTS=parts, W=W, D=plan.D, ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    return out, whole, weights


def prepared(p: Problem, plan: Pass) -> Prepared:
    """The call with its queries in order and everything split into parts."""
    (B, d), new = p.x.shape, p.x.new_empty
    _, centre = centres(p)
    y, y_whole, weights = _atoms(p, centre, plan)
    q, q_whole, sizes = _parts(B, p.x, plan)
    grid = (triton.cdiv(B, sizes["ROWS"]),)
    queries = {"x": p.x, "alpha": p.alpha, "sigma": p.sigma, "centre": centre, "B": B, "d": d}
    takes, by_products = (new(B, dtype=torch.int32) for _ in range(2))
    takes_products_kernel[grid](
        **queries, largest=weights[:, 0].amax(), takes=takes, SPARE=SPARE, NEAR=NEAR,
        **{k: sizes[k] for k in ("D", "ROWS", "num_warps")},
    )  # fmt: skip
    back, order = (new(B, dtype=torch.int64) for _ in range(2))
    x, common = torch.empty_like(p.x), new(B, dtype=torch.float64)
    alpha, sigma, half, q_norm = (new(B) for _ in range(4))
    place_queries_kernel[grid](
        **queries, takes=takes, taken=takes.cumsum(0), back=back, order=order, x_out=x,
        alpha_out=alpha, sigma_out=sigma, by_products=by_products, common=common, half=half,
        q_norm=q_norm, parts=q, whole=q_whole, **sizes,
    )  # fmt: skip
    v = None if p.v is None else p.v[order]
    return Prepared(
        plan,
        p._replace(x=x, v=v, alpha=alpha, sigma=sigma),
        back,
        common,
        by_products,
        centre,
        half,
        q_norm,
        q,
        q_whole,
        y,
        y_whole,
        weights,
        p.log_pi is not None or len(weights) != p.y.shape[0],
    )


def _bounds(a: Prepared, device: Device) -> tuple[Tensor, Tensor]:
    """(upper bounds of strips [B, strips], lower bounds of the largest logits [B], inf for the
    queries that take products)."""
    plan = a.plan
    B, rows = a.problem.x.shape[0], len(a.weights)
    upper = a.weights.new_empty(B, rows // plan.strip)
    queries, ATOMS = 64, BOUND_ATOMS
    span, splits = product_splits(rows, B, {"TARGETS": queries, "ATOMS": ATOMS}, device)
    lower = a.weights.new_empty(splits, B)
    bound_tiles_kernel[(triton.cdiv(B, queries) * splits,)](
        q=a.q, y=a.y, weights=a.weights, half=a.half, q_norm=a.q_norm, by_products=a.by_products,
        upper=upper, lower=lower, B=B, rows=rows, d=a.problem.x.shape[1], splits=splits, span=span,
        BIASED=a.biased, STRIP=plan.strip, D=plan.D, ATOMS=ATOMS, QUERIES=queries, STAGES=2,
        num_warps=4,
    )  # fmt: skip
    return upper, lower.amax(0)


def _sweep(
    a: Prepared, moments: launch.SplitMoments, span: int, splits: int, device: Device
) -> None:
    """The moments of the queries that need differences."""
    p, tile = a.problem, a.plan.sweep
    targets, matvec = p.targets, p.v is not None
    upper, floor = _bounds(a, device)
    sweep_kernel[(triton.cdiv(targets, tile.TARGETS) * splits,)](
        **p.atom_arguments,
        **p.list_arguments,
        anchor=p.x,
        rest=torch.zeros_like(p.x),
        v=p.v,
        alpha=p.alpha,
        sigma=p.sigma,
        logits=None,
        bounds=upper,
        floor=floor,
        projections=None,
        reference=None,
        scalars=moments.scalars,
        vectors=moments.vectors,
        targets=targets,
        vectors_per_query=targets // p.x.shape[0],
        splits=moments.splits,
        span=span,
        row_strips=upper.shape[1],
        gap=p.gap,
        MATVEC=matvec,
        GIVEN=False,
        **tile.arguments,
    )


def accumulate(a: Prepared) -> launch.SplitMoments:
    """The moments of all splits, those of the sweep first: of "log_prob" only the sums of weights,
    of "posterior" the second moment's sum over the coordinates alone is right."""
    p, plan, device = a.problem, a.plan, device_of(a.problem.x)
    (B, d), N, targets = p.x.shape, p.y.shape[0], p.targets
    swept_span, swept = sweep_splits(N, targets, plan, device)
    span, splits = product_splits(N, targets, plan.sizes, device)
    count = swept + splits
    scalars, vectors = p.x.new_empty(4, count, targets), p.x.new_empty(3, count, targets, d)
    moments = launch.SplitMoments(scalars, vectors, count, N if p.log_pi is None else 1, a.common)
    _sweep(a, moments, swept_span, swept, device)
    v = v_whole = None
    if p.v is not None:
        v, v_whole = _vectors(p.v.flatten(0, 1), plan)
    kernel, q, y, weights = fused_moments_kernel, a.q, a.y, a.weights
    if plan.small:
        kernel, q, v = small_moments_kernel, a.q_whole, v_whole
        y, weights = a.y_whole.view(torch.int64), a.weights.view(torch.int64)
    blocks = triton.cdiv(targets, plan.sizes["TARGETS"])
    kernel[(blocks * splits,)](
        q=q, v=v, y=y, weights=weights, half=a.half, by_products=a.by_products, centre=a.centre,
        scalars=scalars, vectors=None if plan.kind == "log_prob" else vectors, B=B,
        rows=len(a.weights), d=d, targets=targets, vectors_per_query=targets // B, splits=count,
        begin_split=swept, span=span, KIND=plan.kind, BIASED=a.biased, **plan.sizes,
    )  # fmt: skip
    return moments
