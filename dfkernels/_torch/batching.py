"""Rules of vmap: how one call of an op stands for many."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import private
from .autograd import as_tuple, flatten, nest


def folded(op, shared: Collection[str]) -> Callable:
    """The rule of an op whose outputs are all per query: the new dimension becomes part of B.

    Args:
        op: The op's overload.
        shared: Names of the tensors that all queries of a call share, such as the atoms. Where one
            of them has the new dimension, the op is called once per element.
    """

    names = [a.name for a in op._schema.arguments]

    def rule(info, in_dims, *args):
        batched = [dim is not None for dim in in_dims]
        args = to_front(args, in_dims)
        if any(b and name in shared for b, name in zip(batched, names, strict=False)):
            results = tuple(one_by_one(op, args, batched, info.batch_size))
        else:
            size = info.batch_size
            flat = [
                fold(a, b, size) if isinstance(a, Tensor) and name not in shared else a
                for a, b, name in zip(args, batched, names, strict=False)
            ]
            results = tuple(unfold(o, size) for o in as_tuple(op(*flat)))
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
