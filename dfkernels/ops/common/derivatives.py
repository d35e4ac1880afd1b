"""Sums over all pairs (query, atom) and every derivative of them: bounded memory.

    S_k(b) = sum_i s_k(query b, atom i), the sums of a moment kind (moments.py)

`shift` and `reference` among their inputs keep everything well conditioned; what the ops return
does not depend on them, so they count as constants. One op serves all orders, because derivatives
of such sums are such sums. With z = the tensors of `Inputs`, then the kind's own,

    psi_0(z, h) = sum_k <h_k, S_k(z)>
    psi_{n+1}(.., k) = sum_{j in wanted_n} <k_j, d psi_n / d z_j>

`pair_gradient` returns d psi_n / d z_j for j in wanted_n. Its VJP with cotangents k is itself at
order n+1. It is the gradient of a scalar, its Jacobian symmetric: so its JVP along tangents k of a
set T is itself at order n+1 too, with wanted_n = T and the first wanted set asked for. Sets are
positions in z, to which cotangents are appended, None for zero; with no set the op returns the
sums. README.md derives all this.

First derivatives of the sums, in either mode, run fused kernels where there are some
(pair_kernels.py); everything else is summed tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch import autograd, batching, library
from . import first_derivatives
from .moments import KINDS, PER_ATOM, Inputs, MomentKind

Tensors = Sequence[Any]  # tensors; None is a uniform prior, or a cotangent that is zero
TILE = 2**18  # elements of a [queries, atoms, d] block: a few of them stay in a core's L2


class Stored(NamedTuple):
    """How the atoms are stored: their values are scale * y + offset, and each query counts those of
    its list, or all."""

    scale: float = 1.0
    offset: float = 0.0
    atoms: Tensor | None = None
    counts: Tensor | None = None


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

    def call(self, tensors: Tensors, stored: Stored) -> list[Tensor]:
        """The op with these arguments."""
        flat, lengths = [j for w in self.wanted for j in w], [len(w) for w in self.wanted]
        return pair_gradient(self.kind.name, flat, lengths, list(tensors), *stored)

    def ranks(self, tensors: Tensors) -> list[int | None]:
        """How many dimensions each tensor that is per atom has without one of clouds; None for
        those that are per query."""
        found = [PER_ATOM.get(name) for name in self.kind.inputs]
        if self.wanted:
            found += [None] * len(self.kind.shapes_for(tensors))
        for wanted in self.wanted[:-1]:
            found += [found[j] for j in wanted]
        return found

    def completed(self, tensors: Tensors) -> list[Any]:
        """The tensors, with zeros for cotangents of sums by which something is differentiated."""
        out, first = list(tensors), len(self.kind.inputs)
        used = {j for wanted in self.wanted for j in wanted}
        if self.wanted:
            for j, shape in enumerate(self.kind.shapes_for(tensors), first):
                if out[j] is None and j in used:
                    out[j] = tensors[0].new_zeros(()).expand(shape)
        return out

    def outputs(self, tensors: Tensors, empty: bool = False) -> list[Tensor]:
        """The results, filled with zeros in the compute dtype, or empty in their own."""
        x = tensors[0]
        if not self.wanted:
            shapes = self.kind.shapes_for(tensors)
            return [x.new_empty(s) if empty else x.new_zeros(s) for s in shapes]
        like = [self.completed(tensors)[j] for j in self.wanted[-1]]
        if empty:
            return [t.new_empty(t.shape) for t in like]
        return [t.new_zeros(t.shape, dtype=x.dtype) for t in like]


def tiles(B: int, N: int, d: int) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of queries, each with its blocks of atoms."""
    b = max(1, min(B, 16, TILE // d))
    n = max(1, min(N, TILE // (b * d)))
    for i in range(0, B, b):
        yield slice(i, min(i + b, B)), [slice(j, min(j + n, N)) for j in range(0, N, n)]


def _tiles_of_lists(atoms: Tensor, counts: Tensor, d: int):
    """Queries, one by one, each with the blocks of its list."""
    for b, rows in enumerate(atoms.split(counts.tolist())):
        yield slice(b, b + 1), rows.split(max(1, TILE // d))


def _leaf(t: Tensor) -> Tensor:
    """The numbers without a graph. An inference tensor cannot require grad, so it is copied."""
    return t.clone() if t.is_inference() else t.detach()


def _on_tile(c: Contraction, tile: list[Any], scale: float, offset: float) -> Sequence[Tensor]:
    """The results' share of one tile. Its tensors are in the compute dtype already."""
    inputs = len(c.kind.inputs)
    if not c.wanted:
        return c.kind.on_tile(tile[:inputs], scale, offset)
    with library.tracked():
        used = {j for wanted in c.wanted for j in wanted}
        tile = [
            None if t is None else _leaf(t).requires_grad_(j in used) for j, t in enumerate(tile)
        ]
        functions: Sequence[Tensor] = c.kind.on_tile(tile[:inputs], scale, offset)
        cotangents = iter(tile[inputs:])
        for order, wanted in enumerate(c.wanted):
            pairs = [(next(cotangents), f) for f in functions]
            terms = [(k * f).sum() for k, f in pairs if k is not None]
            psi = sum(terms, start=functions[0].new_zeros(()))
            leaves = [tile[j] for j in wanted]
            if not psi.requires_grad:  # psi has become constant
                return [torch.zeros_like(t) for t in leaves]
            more = order < len(c.wanted) - 1
            functions = torch.autograd.grad(psi, leaves, create_graph=more, materialize_grads=True)
        return functions


def _tile_by_tile(c: Contraction, tensors: Tensors, a: Stored) -> list[Tensor]:
    x, y = tensors[:2]
    N, log_pi = y.shape[0], Inputs._fields.index("log_pi")
    per_atom = [rank is not None for rank in c.ranks(tensors)]
    out_per_atom = [per_atom[j] for j in c.wanted[-1]] if c.wanted else None
    outs = c.outputs(tensors)
    tensors = c.completed(tensors)
    own = tensors[len(Inputs._fields) : len(c.kind.inputs)]
    width = max(t.shape[1] for t in (x, *own) if t.dim() > 1)  # d, or K where that is larger
    cut = tiles(x.shape[0], N, width)
    if a.atoms is not None and a.counts is not None:
        cut = _tiles_of_lists(a.atoms, a.counts, width)
    for queries, atom_tiles in cut:
        rows = [
            None if t is None or is_per_atom else t[queries]
            for t, is_per_atom in zip(tensors, per_atom, strict=True)
        ]
        for atoms in atom_tiles:
            tile: list[Any] = [
                t[atoms].to(x.dtype) if t is not None and is_per_atom else row
                for t, row, is_per_atom in zip(tensors, rows, per_atom, strict=True)
            ]
            if tile[log_pi] is None:
                tile[log_pi] = x.new_full(tile[1].shape[:1], -math.log(N))
            for i, part in enumerate(_on_tile(c, tile, a.scale, a.offset)):
                outs[i][atoms if out_per_atom and out_per_atom[i] else queries] += part
    return outs


def _one_cloud(c: Contraction, tensors: Tensors, stored: Stored) -> list[Tensor]:
    outs = first_derivatives.run(c.kind, c.wanted, tensors, stored)
    if outs is None:
        if c.wanted and tensors[0].shape[0] > 0:
            why = first_derivatives.why_not(c.kind, c.wanted, tensors[0].device)
            autograd.slow_derivative(c.kind.op or c.kind.name, why)
        outs = _tile_by_tile(c, tensors, stored)
    return outs


def _cloud_by_cloud(c: Contraction, tensors: Tensors, stored: Stored) -> list[Tensor]:
    """Clouds have their queries to themselves; what they share collects the share of each."""
    ranks = c.ranks(tensors)
    own = [
        t is not None and rank is not None and t.dim() > rank
        for t, rank in zip(tensors, ranks, strict=True)
    ]
    G = next((len(t) for t, o in zip(tensors, own, strict=True) if o), None)
    if G is None:
        return _one_cloud(c, tensors, stored)
    outs, last = c.outputs(tensors), c.wanted[-1] if c.wanted else ()
    B = tensors[0].shape[0] // max(G, 1)
    for g in range(G):
        rows = slice(g * B, (g + 1) * B)
        part = [
            t if t is None else t[g] if o else t[rows] if rank is None else t
            for t, o, rank in zip(tensors, own, ranks, strict=True)
        ]
        for i, found in enumerate(_one_cloud(c, part, stored)):
            if not last or ranks[last[i]] is None:
                outs[i][rows] = found
            elif own[last[i]]:
                outs[i][g] = found
            else:
                outs[i] += found
    return outs


def _pair_gradient(kind, wanted, lengths, tensors, *atoms):
    c = Contraction.of(kind, wanted, lengths)
    outs = _cloud_by_cloud(c, tensors, Stored(*atoms))
    if c.wanted:
        like = c.completed(tensors)
        outs = [o.to(like[j].dtype) for o, j in zip(outs, c.wanted[-1], strict=True)]
    return outs


def _fake(kind, wanted, lengths, tensors, *atoms):
    return Contraction.of(kind, wanted, lengths).outputs(tensors, empty=True)


def _vjp(args, needs, outputs, cotangents):
    kind, wanted, lengths, tensors, *atoms = args
    c = Contraction.of(kind, wanted, lengths)
    asked = tuple(j for j, need in enumerate(needs[3]) if need)
    if c.wanted:
        given = [(j, g) for j, g in zip(c.wanted[-1], cotangents, strict=True) if g is not None]
        sets = (*c.wanted[:-1], tuple(j for j, _ in given), asked)
        extra = [g for _, g in given]
    else:
        sets, extra = (asked,), cotangents
    out = Contraction(c.kind, sets).call([*tensors, *extra], Stored(*atoms))
    grads = dict(zip(asked, out, strict=True))
    return None, None, None, [grads.get(j) for j in range(len(tensors))], *[None] * len(atoms)


def _jvp(args, outputs, tangents):
    kind, wanted, lengths, tensors, *atoms = args
    c = Contraction.of(kind, wanted, lengths)
    given = [(j, t) for j, t in enumerate(tangents[3]) if t is not None]
    moved, extra = tuple(j for j, _ in given), [t for _, t in given]
    if c.wanted:
        sets = (*c.wanted[:-1], moved, c.wanted[-1])
    else:
        sums, n = len(c.kind.shapes_for(tensors)), len(c.kind.inputs)
        sets = (moved, tuple(range(n, n + sums)))
        tensors = [*tensors, *[None] * sums]
    return Contraction(c.kind, sets).call([*tensors, *extra], Stored(*atoms))


def folded(tensors: Sequence, batched: Sequence[bool], shared: Sequence[bool], size: int) -> list:
    """One call's tensors for `size` calls that share some; the last two are lists of atoms."""
    *others, atoms, counts = tensors
    flat = [
        t if t is None or s else batching.fold(t, b, size)
        for t, b, s in zip(others, batched[:-2], shared[:-2], strict=True)
    ]
    return flat + [None if t is None else t.repeat(size) for t in (atoms, counts)]


def _batch(info, in_dims, kind, wanted, lengths, tensors, *atoms):
    a, size = Stored(*atoms), info.batch_size
    dims = [*in_dims[3], *in_dims[6:]]
    moved = batching.to_front([*tensors, a.atoms, a.counts], dims)
    batched = [dim is not None for dim in dims]
    c = Contraction.of(kind, wanted, lengths)
    single = [t[0] if b else t for t, b in zip(moved, batched, strict=True)]
    ranks = c.ranks(single[:-2])
    last = [j if ranks[j] is not None else None for j in c.wanted[-1]] if c.wanted else []
    per_atom = [j for j in last if j is not None]  # places of outputs that are

    def call(*tensors):
        return c.call(tensors[:-2], a._replace(atoms=tensors[-2], counts=tensors[-1]))

    if a.atoms is not None:
        shared = [*(rank is not None for rank in ranks), True, True]
        if per_atom or any(b and s for b, s in zip(batched, shared, strict=True)):
            outs = batching.one_by_one(call, moved, batched, size)
        else:
            flat = folded(moved, batched, shared, size)
            outs = [batching.unfold(o, size) for o in call(*flat)]
        return outs, [0] * len(outs)
    for j in per_atom:  # each element has a gradient of its own, in what all share as well
        if not batched[j]:
            moved[j], batched[j] = moved[j].expand(size, *moved[j].shape), True
    calls = batching.Calls(size, moved[:-2], batched[:-2], ranks)
    of_one_cloud = {j for j in per_atom if single[j].dim() == ranks[j]}
    if (calls.clouds > 1 and of_one_cloud) or calls.copy_atoms():
        outs = batching.one_by_one(call, moved, batched, size)
    else:
        outs = call(*calls.folded(), None, None)
        for i, j in enumerate(last or [None] * len(outs)):
            if j is None:
                outs[i] = calls.unfold(outs[i])
            elif j not in of_one_cloud:
                outs[i] = batching.unfold(outs[i], size)
    return outs, [0] * len(outs)


pair_gradient = library.define(
    "pair_gradient",
    "(str kind, int[] wanted, int[] lengths, Tensor?[] tensors, float scale, float offset, "
    "Tensor? atoms, Tensor? counts) -> Tensor[]",
    fallback=_pair_gradient,
    fake=_fake,
    batch=_batch,
    vjp=_vjp,
    jvp=_jvp,
)


def pair_sums(kind: MomentKind, tensors: Tensors, stored: Stored) -> list[Tensor]:
    """The sums of a kind over all atoms, differentiable to any order in every tensor.

    Args:
        kind: A registered kind.
        tensors: Its inputs: those of `moments.Inputs`, then its own.
        stored: How the atoms are stored.
    """
    return Contraction(kind).call(tensors, stored)
