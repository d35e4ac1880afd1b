"""Rules of vmap: how one call of an op stands for many."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import private
from .autograd import as_tuple, flatten, nest


def folded(op, shared: Collection[str] = (), per_atom: Mapping[str, int] | None = None) -> Callable:
    """The rule of an op whose outputs are all per query: the new dimension becomes part of B.

    Args:
        op: The op's overload.
        shared: Names of the tensors that all queries of a call share. Where one of them has the new
            dimension, the op is called once per element.
        per_atom: Names of the tensors with a row per atom, and how many dimensions they have. One
            more tells clouds apart, of which the new dimension makes so many more.
    """

    names = [a.name for a in op._schema.arguments]
    ranks = per_atom or {}

    def rule(info, in_dims, *args):
        batched = [dim is not None for dim in in_dims]
        args = to_front(args, in_dims)
        calls = Calls(info.batch_size, args, batched, [ranks.get(n) for n in names[: len(args)]])
        alone = [n in shared for n in names[: len(args)]]
        if any(b and s for b, s in zip(batched, alone, strict=True)) or calls.copy_atoms():
            results = tuple(one_by_one(op, args, batched, info.batch_size))
        else:
            flat = [a if s else f for a, f, s in zip(args, calls.folded(), alone, strict=True)]
            results = tuple(map(calls.unfold, as_tuple(op(*flat))))
        if len(results) == 1:
            return results[0], 0
        return results, (0,) * len(results)

    return rule


def to_front(tensors: Sequence, dims: Sequence[int | None]) -> list:
    """The tensors with their new dimension, where they have one, in front."""
    return [t if dim is None else t.movedim(dim, 0) for t, dim in zip(tensors, dims, strict=True)]


def one_by_one(
    call: Callable, tensors: Sequence, batched: Sequence[bool], size: int
) -> list[Tensor]:
    """call(*tensors) for each element of the new dimension, which is in front; stacked."""
    parts = [
        as_tuple(call(*[t[i] if b else t for t, b in zip(tensors, batched, strict=True)]))
        for i in range(size)
    ]
    return [torch.stack(o) for o in zip(*parts, strict=True)]


class Calls:
    """Calls that become one: the new dimension, which is in front, as part of queries and clouds.

    The clouds of one call are the elements of the leading dimension that its tensors per atom have
    beyond their rank; the queries belong to them in turn, as many to each.

    Args:
        size: How many calls there are.
        args: Their arguments; tensors, and what all calls have in common.
        batched: Which have the new dimension.
        ranks: How many dimensions each has, without the new one and that of clouds, where it has a
            row per atom; None where it has a row per query.
    """

    def __init__(self, size: int, args: Sequence, batched: Sequence[bool], ranks: Sequence):
        self.size = size
        self.args = list(zip(args, batched, ranks, strict=True))
        atoms = [(a, b, r) for a, b, r in self.args if isinstance(a, Tensor) and r is not None]
        sizes = [a.shape[b] for a, b, r in atoms if a.dim() > b + r]
        self.clouds = sizes[0] if sizes else 1  # of one call
        self.atoms_differ = any(b for _, b, _ in atoms)

    def copy_atoms(self) -> bool:
        """Whether one call for all would need copies of the atoms."""
        return any(
            isinstance(a, Tensor) and (r or 0) > 1 and self.clouds > 1 and b != (a.dim() > b + r)
            for a, b, r in self.args
            if self.atoms_differ
        )

    def folded(self) -> list:
        """The arguments of the one call."""
        return [
            a
            if not isinstance(a, Tensor)
            else self._query(a, b)
            if r is None
            else self._atom(a, b, r)
            for a, b, r in self.args
        ]

    def _query(self, t: Tensor, batched: bool) -> Tensor:
        if self.atoms_differ or self.clouds <= 1:
            return fold(t, batched, self.size)
        each = (t if batched else t.expand(self.size, *t.shape)).unflatten(
            1, (self.clouds, t.shape[batched] // self.clouds)
        )
        return each.movedim(1, 0).flatten(0, 2)

    def _atom(self, t: Tensor, batched: bool, rank: int) -> Tensor:
        if not self.atoms_differ:
            return t
        if t.dim() > batched + rank:
            return fold(t, batched, self.size)
        if not batched or self.clouds == 1:
            return t
        return t[:, None].expand(self.size, self.clouds, *t.shape[1:]).flatten(0, 1)

    def unfold(self, out: Tensor) -> Tensor:
        """Those of all calls, [size, B, ...], of an output per query of the one call."""
        if self.atoms_differ or self.clouds <= 1:
            return unfold(out, self.size)
        B = out.shape[0] // (self.clouds * self.size)
        each = out.reshape(self.clouds, self.size, B, *out.shape[1:])
        return each.movedim(1, 0).flatten(1, 2)


def fold(tensor: Tensor, batched: bool, size: int) -> Tensor:
    """[size, B, ...] (or [B, ...], repeated) -> [size * B, ...]."""
    return (tensor if batched else tensor.expand(size, *tensor.shape)).flatten(0, 1)


def unfold(tensor: Tensor, size: int) -> Tensor:
    """[size * B, ...] -> [size, B, ...]."""
    if tensor.numel():
        return tensor.unflatten(0, (size, -1))
    return tensor.reshape(size, tensor.shape[0] // size, *tensor.shape[1:])


class _Info(NamedTuple):
    batch_size: int


def legacy(batch: Callable) -> Callable:
    """The rule under the older vmap of torch.autograd.grad(is_grads_batched=True), for an op that
    takes and returns lists, which that vmap's own fallback does not know."""

    def rule(*args):
        level = private.legacy_vmap_level()
        lengths = [len(a) if isinstance(a, (list, tuple)) else None for a in args]
        # [1, ...] where a tensor has no such dimension
        views = [
            private.remove_batch_dim(a, level, 1, 0) if isinstance(a, Tensor) else a
            for a in flatten(args)
        ]
        size = max(v.shape[0] for v in views if isinstance(v, Tensor))
        dims = [0 if isinstance(v, Tensor) and v.shape[0] == size else None for v in views]
        views = [
            v[0] if isinstance(v, Tensor) and dim is None else v
            for v, dim in zip(views, dims, strict=True)
        ]
        outs, _ = batch(_Info(size), nest(dims, lengths), *nest(views, lengths))
        return [private.add_batch_dim(o, 0, level) for o in outs]

    return rule
