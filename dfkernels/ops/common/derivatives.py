"""Sums over the pairs (query, atom) and every derivative of them, in tiles: bounded memory at any
order.

    S_k(b) = sum_i s_k(query b, atom i), the moments of _kinds.py, weighted by
    e_bi   = exp(log_prior_i - |x_b - alpha_b y_i|^2 / (2 sigma_b^2) - shift_b),   t_bi = y_i -
    centre_b

shift and centre are constants that keep everything well conditioned; what the ops return does not
depend on them. One op serves all orders, because derivatives of such sums are such sums. With z =
(query tensors, atom tensors),

    psi_0(z, h) = sum_k <h_k, S_k(z)>
    psi_{n+1}(.., k) = sum_{j in wanted_n} <k_j, d psi_n / d z_j>

`pair_gradient` returns d psi_n / d z_j, j in wanted_n. Its VJP with cotangents k is itself at order
n+1. It is the gradient of a scalar, its Jacobian symmetric: so its JVP along tangents k of a set T
is itself at order n+1 too, with wanted_n = T and the first wanted set asked for. The spec
"kind:0,1;3" names the sets by position; with no set at all the op returns the sums.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from ..._torch import library
from .moments import KINDS, V, X, Y, load

TILE = 2**18  # elements of a [queries, atoms, d] block: a few of them stay in a core's L2


class _Spec(NamedTuple):
    kind: str
    wanted: tuple[tuple[int, ...], ...]

    def __str__(self):
        return self.kind + ":" + ";".join(",".join(map(str, w)) for w in self.wanted)

    @property
    def base(self):
        return len(KINDS[self.kind].sides)

    @property
    def sides(self):
        kind = KINDS[self.kind]
        sides = kind.sides
        if self.wanted:
            sides += "q" * len(kind.shape_of)
        for wanted in self.wanted[:-1]:
            sides += "".join(sides[j] for j in wanted)
        return sides


@cache
def _parse(text: str) -> _Spec:
    kind, _, wanted = text.partition(":")
    return _Spec(
        kind, tuple(tuple(map(int, w.split(","))) for w in wanted.split(";")) if wanted else ()
    )


def tiles(B: int, N: int, d: int):
    """Blocks of queries, each with its blocks of atoms, as slices."""
    b = max(1, min(B, 16, TILE // d))
    n = max(1, min(N, TILE // (b * d)))
    for i in range(0, B, b):
        yield slice(i, min(i + b, B)), [slice(j, min(j + n, N)) for j in range(0, N, n)]


def _leaf(t):
    """The same numbers without a graph; what was made in inference mode can have none, but a copy
    can."""
    return t.clone() if t.is_inference() else t.detach()


def _evaluate(spec, tile, scale, offset):
    """The outputs' share of one tile. Every tensor of `tile` is already in the compute dtype."""
    kind = KINDS[spec.kind]
    if not spec.wanted:
        z = list(tile)
        z[Y] = load(z[Y], z[Y].dtype, scale, offset)
        return kind.sums(*z)
    with library.tracked():
        used = {j for wanted in spec.wanted for j in wanted}
        tile = [_leaf(t).requires_grad_(j in used) for j, t in enumerate(tile)]
        z = tile[: spec.base]
        z[Y] = load(z[Y], z[Y].dtype, scale, offset)
        sums = kind.sums(*z)
        cotangents = iter(tile[spec.base :])
        psi = sum((next(cotangents) * s).sum() for s in sums)
        for order, wanted in enumerate(spec.wanted):
            leaves = [tile[j] for j in wanted]
            last = order == len(spec.wanted) - 1
            if not psi.requires_grad:  # psi has become constant
                return [torch.zeros_like(t) for t in leaves]
            grads = torch.autograd.grad(psi, leaves, create_graph=not last, materialize_grads=True)
            if last:
                return grads
            psi = sum((next(cotangents) * g).sum() for g in grads)


def _pair_gradient(spec, tensors, scale, offset):
    spec = _parse(spec)
    x, y = tensors[X], tensors[Y]
    sides = spec.sides
    if spec.wanted:
        out_sides = [sides[j] for j in spec.wanted[-1]]
        outs = [tensors[j].new_zeros(tensors[j].shape, dtype=x.dtype) for j in spec.wanted[-1]]
    else:
        outs = [x.new_zeros(s) for s in KINDS[spec.kind].shapes(tensors)]
        out_sides = ["q"] * len(outs)
    width = max(t.shape[1] for t in (x, *tensors[V : spec.base]))  # d, or K where that is larger
    for rows, atom_tiles in tiles(x.shape[0], y.shape[0], width):
        queries = [t[rows] if side == "q" else None for t, side in zip(tensors, sides, strict=True)]
        for atoms in atom_tiles:
            tile = [
                t[atoms].to(x.dtype) if q is None else q
                for t, q in zip(tensors, queries, strict=True)
            ]
            for out, side, part in zip(
                outs, out_sides, _evaluate(spec, tile, scale, offset), strict=True
            ):
                out[rows if side == "q" else atoms] += part
    if spec.wanted:
        outs = [o.to(tensors[j].dtype) for o, j in zip(outs, spec.wanted[-1], strict=True)]
    return outs


def _fake(spec, tensors, scale, offset):
    spec = _parse(spec)
    if spec.wanted:
        return [tensors[j].new_empty(tensors[j].shape) for j in spec.wanted[-1]]
    return [tensors[X].new_empty(s) for s in KINDS[spec.kind].shapes(tensors)]


def _zeros(like, shapes):
    return [like.new_zeros(()).expand(s) for s in shapes]


def _vjp(args, needs, cotangents):
    text, tensors, scale, offset = args
    spec = _parse(text)
    wanted = tuple(j for j, need in enumerate(needs[1:-2]) if need)
    if spec.wanted:
        given = [(j, g) for j, g in zip(spec.wanted[-1], cotangents, strict=True) if g is not None]
        orders = (*spec.wanted[:-1], tuple(j for j, _ in given), wanted)
        extra = [g for _, g in given]
    else:
        orders = (wanted,)
        extra = [
            g if g is not None else _zeros(tensors[X], [s])[0]
            for g, s in zip(cotangents, KINDS[spec.kind].shapes(tensors), strict=True)
        ]
    grads = pair_gradient(str(_Spec(spec.kind, orders)), [*tensors, *extra], scale, offset)
    grads = dict(zip(wanted, grads, strict=True))
    return (None, *[grads.get(j) for j in range(len(tensors))], None, None)


def _jvp(args, tangents):
    text, tensors, scale, offset = args
    spec = _parse(text)
    given = [(j, t) for j, t in enumerate(tangents[1:-2]) if t is not None]
    along, extra = tuple(j for j, _ in given), [t for _, t in given]
    if spec.wanted:
        orders = (*spec.wanted[:-1], along, spec.wanted[-1])
    else:
        shapes = KINDS[spec.kind].shapes(tensors)
        orders = (along, tuple(range(spec.base, spec.base + len(shapes))))
        tensors = [*tensors, *_zeros(tensors[X], shapes)]
    return pair_gradient(str(_Spec(spec.kind, orders)), [*tensors, *extra], scale, offset)


def _batch(info, in_dims, text, tensors, scale, offset):
    spec = _parse(text)
    dims, size = in_dims[1], info.batch_size
    tensors = [
        t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)
    ]
    atomwise = any(
        dim is not None and side == "a" for dim, side in zip(dims, spec.sides, strict=True)
    )
    if atomwise or (spec.wanted and any(spec.sides[j] == "a" for j in spec.wanted[-1])):
        parts = [
            [t if dim is None else t[i] for t, dim in zip(tensors, dims, strict=True)]
            for i in range(size)
        ]
        calls = [pair_gradient(text, part, scale, offset) for part in parts]
        outs = [torch.stack(o) for o in zip(*calls, strict=True)]
    else:
        tensors = [
            library.fold(t, dim is not None, size) if side == "q" else t
            for t, dim, side in zip(tensors, dims, spec.sides, strict=True)
        ]
        outs = pair_gradient(text, tensors, scale, offset)
        outs = [o.reshape(size, o.shape[0] // size, *o.shape[1:]) for o in outs]
    return outs, [0] * len(outs)


pair_gradient = library.define(
    "pair_gradient",
    "(str spec, Tensor[] tensors, float scale, float offset) -> Tensor[]",
    fallback=_pair_gradient,
    fake=_fake,
    batch=_batch,
    vjp=_vjp,
    jvp=_jvp,
)


def pair_sums(kind: str, tensors, scale: float, offset: float):
    """The sums of `kind` over all atoms; differentiable to any order in every tensor."""
    return pair_gradient(kind + ":", list(tensors), scale, offset)
