"""Sums over all pairs (query, atom) and every derivative of them, tile by tile: bounded memory.

    S_k(b) = sum_i s_k(query b, atom i), the sums of a moment kind (moments.py)

`shift` and `reference` among their inputs keep everything well conditioned; what the ops return
does not depend on them, so they count as constants. One op serves all orders, because derivatives
of such sums are such sums. With z = the tensors of `Inputs`, then the kind's own,

    psi_0(z, h) = sum_k <h_k, S_k(z)>
    psi_{n+1}(.., k) = sum_{j in wanted_n} <k_j, d psi_n / d z_j>

`pair_gradient` returns d psi_n / d z_j for j in wanted_n. Its VJP with cotangents k is itself at
order n+1. It is the gradient of a scalar, its Jacobian symmetric: so its JVP along tangents k of a
set T is itself at order n+1 too, with wanted_n = T and the first wanted set asked for. Sets are
positions in z, to which cotangents are appended; with no set the op returns the sums. README.md
derives all this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import batching, library
from .moments import KINDS, PER_ATOM, Inputs, MomentKind

TILE = 2**18  # elements of a [queries, atoms, d] block: a few of them stay in a core's L2


class Contraction(NamedTuple):
    """What `pair_gradient` computes: a kind's sums, or a gradient of psi_n.

    wanted[n] are the positions, among all tensors, by which psi_n is differentiated.
    """

    kind: MomentKind
    wanted: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, kind: str, wanted: Sequence[int], lengths: Sequence[int]) -> Contraction:
        """From the op's arguments: the sets one after another, and how long each is."""
        items = iter(wanted)
        return cls(KINDS[kind], tuple(tuple(next(items) for _ in range(n)) for n in lengths))

    def call(self, tensors: Sequence[Tensor], scale: float, offset: float) -> list[Tensor]:
        """The op with these arguments."""
        flat, lengths = [j for w in self.wanted for j in w], [len(w) for w in self.wanted]
        return pair_gradient(self.kind.name, flat, lengths, list(tensors), scale, offset)

    def per_atom(self, tensors: Sequence[Tensor]) -> list[bool]:
        """Whether each tensor is per atom, or else per query."""
        found = [name in PER_ATOM for name in self.kind.inputs]
        if self.wanted:
            found += [False] * len(self.kind.shapes_for(tensors))
        for wanted in self.wanted[:-1]:
            found += [found[j] for j in wanted]
        return found

    def outputs(self, tensors: Sequence[Tensor], empty: bool = False) -> list[Tensor]:
        """The results, filled with zeros in the compute dtype, or empty in their own."""
        x = tensors[0]
        if not self.wanted:
            shapes = self.kind.shapes_for(tensors)
            return [x.new_empty(s) if empty else x.new_zeros(s) for s in shapes]
        like = [tensors[j] for j in self.wanted[-1]]
        if empty:
            return [t.new_empty(t.shape) for t in like]
        return [t.new_zeros(t.shape, dtype=x.dtype) for t in like]


def tiles(B: int, N: int, d: int) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of queries, each with its blocks of atoms."""
    b = max(1, min(B, 16, TILE // d))
    n = max(1, min(N, TILE // (b * d)))
    for i in range(0, B, b):
        yield slice(i, min(i + b, B)), [slice(j, min(j + n, N)) for j in range(0, N, n)]


def _leaf(t: Tensor) -> Tensor:
    """The numbers without a graph. An inference tensor cannot require grad, so it is copied."""
    return t.clone() if t.is_inference() else t.detach()


def _on_tile(c: Contraction, tile: list[Tensor], scale: float, offset: float) -> Sequence[Tensor]:
    """The results' share of one tile. Every tensor of `tile` is in the compute dtype already."""
    inputs = len(c.kind.inputs)
    if not c.wanted:
        return c.kind.on_tile(tile[:inputs], scale, offset)
    with library.tracked():
        used = {j for wanted in c.wanted for j in wanted}
        tile = [_leaf(t).requires_grad_(j in used) for j, t in enumerate(tile)]
        functions: Sequence[Tensor] = c.kind.on_tile(tile[:inputs], scale, offset)
        cotangents = iter(tile[inputs:])
        for order, wanted in enumerate(c.wanted):
            terms = [(next(cotangents) * f).sum() for f in functions]
            psi = sum(terms, start=tile[0].new_zeros(()))
            leaves = [tile[j] for j in wanted]
            if not psi.requires_grad:  # psi has become constant
                return [torch.zeros_like(t) for t in leaves]
            more = order < len(c.wanted) - 1
            functions = torch.autograd.grad(psi, leaves, create_graph=more, materialize_grads=True)
        return functions


def _pair_gradient(kind, wanted, lengths, tensors, scale, offset):
    c = Contraction.of(kind, wanted, lengths)
    x, y = tensors[:2]
    per_atom = c.per_atom(tensors)
    out_per_atom = [per_atom[j] for j in c.wanted[-1]] if c.wanted else None
    outs = c.outputs(tensors)
    own = tensors[len(Inputs._fields) : len(c.kind.inputs)]
    width = max(t.shape[1] for t in (x, *own) if t.dim() > 1)  # d, or K where that is larger
    for queries, atom_tiles in tiles(x.shape[0], y.shape[0], width):
        rows = [None if a else t[queries] for t, a in zip(tensors, per_atom, strict=True)]
        for atoms in atom_tiles:
            tile = [
                t[atoms].to(x.dtype) if row is None else row
                for t, row in zip(tensors, rows, strict=True)
            ]
            for i, part in enumerate(_on_tile(c, tile, scale, offset)):
                outs[i][atoms if out_per_atom and out_per_atom[i] else queries] += part
    if c.wanted:
        outs = [o.to(tensors[j].dtype) for o, j in zip(outs, c.wanted[-1], strict=True)]
    return outs


def _fake(kind, wanted, lengths, tensors, scale, offset):
    return Contraction.of(kind, wanted, lengths).outputs(tensors, empty=True)


def _zeros(like: Tensor, shapes) -> list[Tensor]:
    return [like.new_zeros(()).expand(s) for s in shapes]


def _vjp(args, needs, cotangents):
    kind, wanted, lengths, tensors, scale, offset = args
    c = Contraction.of(kind, wanted, lengths)
    asked = tuple(j for j, need in enumerate(needs[3]) if need)
    if c.wanted:
        given = [(j, g) for j, g in zip(c.wanted[-1], cotangents, strict=True) if g is not None]
        sets = (*c.wanted[:-1], tuple(j for j, _ in given), asked)
        extra = [g for _, g in given]
    else:
        sets = (asked,)
        zeros = _zeros(tensors[0], c.kind.shapes_for(tensors))
        extra = [z if g is None else g for g, z in zip(cotangents, zeros, strict=True)]
    out = Contraction(c.kind, sets).call([*tensors, *extra], scale, offset)
    grads = dict(zip(asked, out, strict=True))
    return None, None, None, [grads.get(j) for j in range(len(tensors))], None, None


def _jvp(args, tangents):
    kind, wanted, lengths, tensors, scale, offset = args
    c = Contraction.of(kind, wanted, lengths)
    given = [(j, t) for j, t in enumerate(tangents[3]) if t is not None]
    moved, extra = tuple(j for j, _ in given), [t for _, t in given]
    if c.wanted:
        sets = (*c.wanted[:-1], moved, c.wanted[-1])
    else:
        shapes, n = c.kind.shapes_for(tensors), len(c.kind.inputs)
        sets = (moved, tuple(range(n, n + len(shapes))))
        tensors = [*tensors, *_zeros(tensors[0], shapes)]
    return Contraction(c.kind, sets).call([*tensors, *extra], scale, offset)


def _batch(info, in_dims, kind, wanted, lengths, tensors, scale, offset):
    dims, size = in_dims[3], info.batch_size
    tensors = [
        t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)
    ]
    single = [t if dim is None else t[0] for t, dim in zip(tensors, dims, strict=True)]
    c = Contraction.of(kind, wanted, lengths)
    per_atom = c.per_atom(single)
    batched = [dim is not None for dim in dims]
    one_by_one = any(b and a for b, a in zip(batched, per_atom, strict=True))
    if one_by_one or (c.wanted and any(per_atom[j] for j in c.wanted[-1])):
        calls = []
        for i in range(size):
            part = [t[i] if b else t for t, b in zip(tensors, batched, strict=True)]
            calls.append(c.call(part, scale, offset))
        outs = [torch.stack(o) for o in zip(*calls, strict=True)]
    else:
        tensors = [
            t if a else batching.fold(t, b, size)
            for t, b, a in zip(tensors, batched, per_atom, strict=True)
        ]
        outs = [batching.unfold(o, size) for o in c.call(tensors, scale, offset)]
    return outs, [0] * len(outs)


pair_gradient = library.define(
    "pair_gradient",
    "(str kind, int[] wanted, int[] lengths, Tensor[] tensors, float scale, float offset)"
    " -> Tensor[]",
    fallback=_pair_gradient,
    fake=_fake,
    batch=_batch,
    vjp=_vjp,
    jvp=_jvp,
)


def pair_sums(
    kind: MomentKind, tensors: Sequence[Tensor], scale: float, offset: float
) -> list[Tensor]:
    """The sums of a kind over all atoms, differentiable to any order in every tensor.

    Args:
        kind: A registered kind.
        tensors: Its inputs: those of `moments.Inputs`, then its own.
        scale, offset: The atoms are scale * y + offset.
    """
    return Contraction(kind).call(tensors, scale, offset)
