# Triton's language has no types, and pyrefly takes its integers for constants:
# pyrefly: ignore-errors
"""First derivatives of a kind's sums on CUDA: launchers of the kernels in ../pair_kernels.py.

That file has the formulas. What is [B, d] at most is computed by PyTorch, in double: the constants
of every query before the kernels, the gradients from the sums over the atoms after them. Nothing
here was measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import launch
from .device import device_of
from .logits import by_differences
from .pair_problem import (
    NO_TANGENTS,
    Forms,
    Pairs,
    Tangents,
    atoms_tile,
    listed,
    make_pairs,
    pair_tile,
    sum_tile,
)
from .pair_sums import pair_atoms_kernel, pair_sums_kernel
from .pair_weights import pair_weights_kernel
from .problem import Problem


class PairWeights(NamedTuple):
    """What `pair_weights_kernel` has written."""

    coefficients: Tensor | None  # [B, N]: c
    weights: Tensor | None  # [B, N]: e
    totals: Tensor  # [3, B], double: sums of c, of c |t|^2 + 2 e <t, dy>, and of e c
    first: Tensor | None  # [B, d], double, if the tile is whole
    second: Tensor | None


def pair_weights(
    q: Pairs,
    forms: Forms,
    products: Tensor | None = None,
    tangents: Tangents = NO_TANGENTS,
    *,
    keep: bool,
    keep_weights: bool = False,
    squares: bool = False,
) -> PairWeights:
    """The weights of all pairs and, where the tile is whole, their sums over the atoms.

    Args:
        q: the queries.
        forms: f of every query.
        products: [B, N], added to f.
        tangents: of the atoms.
        keep, keep_weights: whether c and e will be used, whatever the tile.
        squares: whether sum c t * t will be.
    """
    (B, d), N = q.p.x.shape, q.p.y.shape[0]
    device, new = device_of(q.p.x), q.reference.new_empty
    tangent = tangents.dy is not None
    tile = pair_tile(B, d, q.reference.element_size(), tangent or squares, device)
    blocks = triton.cdiv(B, tile.QUERIES)
    span, splits = launch.spans(N, blocks, tile.ATOMS, device)
    keep = keep or not tile.whole
    keep_weights = keep_weights or (tangent and not tile.whole)
    totals = new(3, splits, B)
    first = new(splits, B, d) if tile.whole else None
    second = new(splits, B, d) if tile.whole and squares else None
    coefficients = new(B, N) if keep else None
    weights = new(B, N) if keep_weights else None
    quadratic = 0 if forms.quadratic is None else forms.quadratic.dim()
    pair_weights_kernel[(blocks * splits,)](
        **q.p.atom_arguments,
        dy=tangents.dy,
        dy_stride=tangents.dy.stride(0) if tangent else 0,
        dlog_pi=tangents.dlog_pi,
        reference=q.reference,
        pull=q.pull(),
        curvature=q.curvature(),
        level=q.level,
        constant=forms.constant,
        linear=forms.linear,
        quadratic=forms.quadratic,
        square=torch.zeros_like(forms.constant) if forms.square is None else forms.square,
        products=products,
        coefficients=coefficients,
        weights=weights,
        totals=totals,
        first=first,
        second=second,
        B=B,
        splits=splits,
        span=span,
        LINEAR=forms.linear is not None,
        QUADRATIC=quadratic,
        TANGENT=tangent,
        WHOLE=tile.whole,
        SQUARES=second is not None,
        D=tile.D,
        ATOMS=tile.ATOMS,
        QUERIES=tile.QUERIES,
        COORD_AXIS=tile.COORD_AXIS,
        num_warps=tile.warps,
    )
    merged = [None if t is None else t.sum(-3, dtype=torch.float64) for t in (first, second)]
    return PairWeights(coefficients, weights, totals.sum(1, dtype=torch.float64), *merged)


def sums_over_atoms(
    p: Problem,
    reference: Tensor | None,
    coefficients: Tensor,
    weights: Tensor | None = None,
    dy: Tensor | None = None,
    *,
    squares: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(sum c t + e dy, sum c t * t + 2 e t * dy), [targets, d] in double; c, e [targets, N].

    Without a reference t is what the rows of y hold, whatever that is where c is 0.
    """
    (targets, N), d = coefficients.shape, p.y.shape[1]
    device, new = device_of(coefficients), coefficients.new_empty
    sizes = sum_tile(targets, d, coefficients.element_size(), squares or dy is not None)
    programs = triton.cdiv(d, sizes["D"]) * triton.cdiv(targets, sizes["TARGETS"])
    span, splits = launch.spans(N, programs, sizes["ATOMS"], device)
    first = new(splits, targets, d)
    second = new(splits, targets, d) if squares else None
    pair_sums_kernel[(programs * splits,)](
        **p.atom_arguments,
        dy=dy,
        dy_stride=0 if dy is None else dy.stride(0),
        reference=reference,
        coefficients=coefficients,
        weights=weights,
        first=first,
        second=second,
        targets=targets,
        vectors_per_query=targets // len(p.x),
        splits=splits,
        span=span,
        DIFFERENCES=reference is not None,
        TANGENT=dy is not None,
        SQUARES=squares,
        **sizes,
        num_warps=4,
    )
    merged = [None if t is None else t.sum(0, dtype=torch.float64) for t in (first, second)]
    return merged[0], merged[1]


def projections(q: Pairs, vectors: Tensor) -> Tensor:
    """<t, v> for the vectors [B, K, d]: [B, K, N]."""
    B, K, _ = vectors.shape
    p = q.p._replace(v=vectors.contiguous())
    return by_differences(p, q.reference.repeat_interleave(K, 0)).view(B, K, -1)


def query_groups(B: int, N: int, d: int, K: int) -> Iterator[slice]:
    """The queries in groups for which the scratch memory suffices, at least one in each."""
    step = launch.whole_tiles(launch.SCRATCH // (N * (3 + 4 * K) + 64 * d))
    for b in range(0, B, step):
        yield slice(b, min(b + step, B))


def _rows(b: slice, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t[b].contiguous() for t in tensors]


def _forms(q: Pairs, kind: str, h_weight, h_first, h_second, h_square) -> Forms:
    """f of the cotangents; the second moment of a matvec goes through projections."""
    zero = q.p.x.new_zeros(q.p.x.shape[0])
    return Forms(
        zero if h_weight is None else h_weight,
        h_first,
        None if kind == "matvec" else h_second,
        None if h_square is None else 2 * h_square,
    )


def _projection_pairs(q: Pairs, kind: str, h_second):
    """(<t, h_k>, <t, v_k>), [B, K, N] each; None where there is no such product."""
    if kind != "matvec" or h_second is None or h_second.shape[1] == 0:
        return None
    both = projections(q, torch.cat([h_second, q.p.v], 1))
    return both[:, : h_second.shape[1]], both[:, h_second.shape[1] :]


def vjp_queries(
    x, y, v, alpha, sigma, log_pi, scale, offset, shift, reference, kind,
    h_weight, h_first, h_second, h_weight_square, atoms, counts,
):  # fmt: skip
    """`pair_vjp_queries` for tensors on one GPU."""
    (B, d), K = x.shape, 0 if v is None else v.shape[1]
    if atoms is not None and B > 0:
        outs = []
        for a in listed(y, log_pi, atoms, counts, x.dtype):
            head = (*a.row(x), a.y, *a.row(v, alpha, sigma), a.log_pi, scale, offset)
            given = a.row(h_weight, h_first, h_second, h_weight_square)
            outs.append(vjp_queries(*head, *a.row(shift, reference), kind, *given, None, None))
        return tuple(map(torch.cat, zip(*outs, strict=True)))
    if B == 0:
        return x.new_zeros(0, d), x.new_zeros(0), x.new_zeros(0), x.new_zeros(0, K, d)
    whole = make_pairs(x, y, v, alpha, sigma, log_pi, scale, offset, shift, reference)
    outs = []
    with torch.cuda.device_of(x):
        for b in query_groups(B, y.shape[0], d, K):
            given = _rows(b, h_weight, h_first, h_second, h_weight_square)
            outs.append(_vjp_queries(whole.some(b), kind, *given))
    return tuple(torch.cat(o) for o in zip(*outs, strict=True))


def _vjp_queries(q: Pairs, kind: str, h_weight, h_first, h_second, h_square):
    B, d = q.p.x.shape
    pair = _projection_pairs(q, kind, h_second)
    products = None if pair is None else (pair[0] * pair[1]).sum(1)
    forms = _forms(q, kind, h_weight, h_first, h_second, h_square)
    w = pair_weights(q, forms, products, keep=False, keep_weights=pair is not None)
    m1 = sums_over_atoms(q.p, q.reference, w.coefficients)[0] if w.first is None else w.first
    a, m2 = q.a, w.totals[1][:, None]
    along = (q.r * m1).sum(1, keepdim=True)
    grad_x = a * m1 / q.sigma
    grad_alpha = (along - a * ((q.reference.double() * m1).sum(1, keepdim=True) + m2)) / q.sigma
    grad_sigma = a * (a * m2 - 2 * along) / q.sigma
    grad_v = q.p.x.new_zeros(B, 0 if q.p.v is None else q.p.v.shape[1], d)
    if pair is not None:
        e = torch.where(w.weights[:, None] == 0, 0, w.weights[:, None] * pair[0])
        grad_v = sums_over_atoms(q.p, q.reference, e.flatten(0, 1))[0].view(grad_v.shape)
    T = q.p.x.dtype
    return grad_x.to(T), grad_alpha[:, 0].to(T), grad_sigma[:, 0].to(T), grad_v.to(T)


def vjp_atoms(
    x, y, v, alpha, sigma, log_pi, scale, offset, shift, reference, kind,
    h_weight, h_first, h_second, h_weight_square, atoms, counts, want_y,
):  # fmt: skip
    """`pair_vjp_atoms` for tensors on one GPU."""
    (B, d), N, K = x.shape, y.shape[0], 0 if v is None else v.shape[1]
    grad_y = x.new_zeros(N if want_y else 0, d)
    grad_log_pi = x.new_zeros(N, dtype=torch.float64)
    if atoms is not None:
        for a in listed(y, log_pi, atoms, counts, x.dtype):
            head = (*a.row(x), a.y, *a.row(v, alpha, sigma), a.log_pi, scale, offset)
            given = a.row(h_weight, h_first, h_second, h_weight_square)
            some = a.row(shift, reference)
            part = vjp_atoms(*head, *some, kind, *given, None, None, want_y)
            grad_log_pi[a.rows] += part[1]
            if want_y:
                grad_y[a.rows] += part[0]
        return grad_y, grad_log_pi.to(x.dtype)
    whole = make_pairs(x, y, v, alpha, sigma, log_pi, scale, offset, shift, reference)
    with torch.cuda.device_of(x):
        for b in query_groups(B, N, d, K):
            given = _rows(b, h_weight, h_first, h_second, h_weight_square)
            out = grad_y if want_y else None
            grad_log_pi += _vjp_atoms(whole.some(b), kind, *given, out)
    return grad_y, grad_log_pi.to(x.dtype)


def _vjp_atoms(q: Pairs, kind: str, h_weight, h_first, h_second, h_square, grad_y) -> Tensor:
    """The gradient in log_pi; that in y is added to grad_y."""
    pair = _projection_pairs(q, kind, h_second)
    products = None if pair is None else (pair[0] * pair[1]).sum(1)
    forms = _forms(q, kind, h_weight, h_first, h_second, h_square)
    w = pair_weights(q, forms, products, keep=True, keep_weights=grad_y is not None)
    if grad_y is not None:
        _add_to_atoms(q, w.coefficients, w.weights, q.pull(), forms, grad_y, differences=True)
        if pair is not None:  # e (<t, v_k> h_k + <t, h_k> v_k)
            e = w.weights[:, None]
            along_h, along_v = (torch.where(e == 0, 0, e * t).flatten(0, 1) for t in pair)
            h, v = h_second.flatten(0, 1), q.p.v.flatten(0, 1)
            rows = Forms(forms.constant, v, None, None)
            _add_to_atoms(q, along_v, along_h, h, rows, grad_y, differences=False)
    return w.coefficients.sum(0, dtype=torch.float64)


def _add_to_atoms(q: Pairs, coefficients, weights, pull, forms: Forms, out, differences: bool):
    sizes = atoms_tile(out.shape[1], out.element_size())
    grid = triton.cdiv(out.shape[1], sizes["D"]) * triton.cdiv(out.shape[0], sizes["ATOMS"])
    pair_atoms_kernel[(grid,)](
        **q.p.atom_arguments,
        reference=q.reference if differences else None,
        curvature=q.curvature() if differences else None,
        pull=pull,
        linear=forms.linear,
        quadratic=forms.quadratic,
        coefficients=coefficients,
        weights=weights,
        out=out,
        rows=coefficients.shape[0],
        LINEAR=forms.linear is not None,
        QUADRATIC=0 if forms.quadratic is None else forms.quadratic.dim(),
        DIFFERENCES=differences,
        **sizes,
        num_warps=4,
    )


def jvp(
    x, y, v, alpha, sigma, log_pi, scale, offset, shift, reference, kind,
    dx, dy, dv, dalpha, dsigma, dlog_pi, atoms, counts,
):  # fmt: skip
    """`pair_jvp` for tensors on one GPU."""
    B, d = x.shape
    if atoms is not None and B > 0:
        outs = []
        for a in listed(y, log_pi, atoms, counts, x.dtype):
            head = (*a.row(x), a.y, *a.row(v, alpha, sigma), a.log_pi, scale, offset)
            dy_, dlog_pi_ = (None if t is None else t[a.rows] for t in (dy, dlog_pi))
            given = (*a.row(dx), dy_, *a.row(dv, dalpha, dsigma), dlog_pi_)
            outs.append(jvp(*head, *a.row(shift, reference), kind, *given, None, None))
        return tuple(map(torch.cat, zip(*outs, strict=True)))
    second = {"posterior": (B,), "matvec": None if v is None else v.shape, "diagonal": (B, d)}
    if B == 0:
        squares = x.new_zeros(0)
        return x.new_zeros(0), x.new_zeros(0, d), x.new_zeros(second[kind]), squares
    whole = make_pairs(x, y, v, alpha, sigma, log_pi, scale, offset, shift, reference)
    if dy is not None and dy.stride(1) != 1:
        dy = dy.contiguous()
    tangents = Tangents(dy, None if dlog_pi is None else dlog_pi.contiguous())
    outs = []
    with torch.cuda.device_of(x):
        for b in query_groups(B, y.shape[0], d, 0 if v is None else v.shape[1]):
            given = _rows(b, dx, dv, dalpha, dsigma)
            outs.append(_jvp(whole.some(b), kind, *given, tangents))
    return tuple(torch.cat(o) for o in zip(*outs, strict=True))


def _tangent_forms(q: Pairs, dx, dalpha, dsigma) -> Forms:
    """tau of the tangents of x, alpha and sigma: <p, t> + q |t|^2."""
    B, T, zero = len(q.r), q.p.x.dtype, q.p.x.new_zeros(len(q.r))
    if dx is None and dalpha is None and dsigma is None:
        return Forms(zero, None, None, None)
    dx, dalpha, dsigma = (
        q.a.new_zeros(B, 1) if t is None else t.double().view(B, -1) for t in (dx, dalpha, dsigma)
    )
    linear = q.a * dx + dalpha * (q.r - q.a * q.reference.double()) - 2 * q.a * dsigma * q.r
    quadratic = q.a * (q.a * dsigma - dalpha)
    return Forms(zero, (linear / q.sigma).to(T), (quadratic / q.sigma)[:, 0].to(T), None)


def _jvp(q: Pairs, kind: str, dx, dv, dalpha, dsigma, tangents: Tangents):
    forms, dy = _tangent_forms(q, dx, dalpha, dsigma), tangents.dy
    T, matvec = q.p.x.dtype, kind == "matvec"
    squares = kind == "diagonal"
    w = pair_weights(q, forms, None, tangents, keep=matvec, keep_weights=matvec, squares=squares)
    first, second = w.first, w.second
    if first is None:
        first, second = sums_over_atoms(
            q.p, q.reference, w.coefficients, w.weights, dy, squares=squares
        )
    weight_square = q.p.x.new_zeros(0)
    if kind == "posterior":
        second, weight_square = w.totals[1], 2 * w.totals[2]
    if matvec:
        second = _jvp_matvec(q, w, dv, dy)
    return w.totals[0].to(T), first.to(T), second.to(T), weight_square.to(T)


def _jvp_matvec(q: Pairs, w: PairWeights, dv, dy) -> Tensor:
    """sum e (tau <t, v> t + <t, dv> t + <dy, v> t + <t, v> dy), [B, K, d]."""
    if q.p.v.shape[1] == 0:
        return torch.zeros_like(q.p.v)
    e, c = w.weights[:, None], w.coefficients[:, None]
    along = projections(q, q.p.v)
    coefficients = c * along
    if dv is not None:
        coefficients += e * projections(q, dv)
    if dy is not None:
        at_zero = q._replace(p=q.p._replace(y=dy, scale=1.0, offset=0.0))
        at_zero = at_zero._replace(reference=torch.zeros_like(q.reference))
        coefficients += e * projections(at_zero, q.p.v)
    clean = lambda t: torch.where(e == 0, 0, t).flatten(0, 1)
    weights = None if dy is None else clean(e * along)
    return sums_over_atoms(q.p, q.reference, clean(coefficients), weights, dy)[0].view(q.p.v.shape)
