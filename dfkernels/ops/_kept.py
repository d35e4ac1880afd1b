"""The data-set ops over lists: every query counts the atoms that it is given, as by `kept_atoms`, and no other.

dfkernels::kept_<op> takes what <op> takes and atoms, counts: int64 [M] and [B], the atoms of one query after
another, ascending. log_prior stays that of all atoms.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from .. import _check, _op

_KEPT = {}  # op -> its kept_ op


def define(op, schema: str, fake: Callable, fast: Callable | None = None, density: bool = False):
    """Declares kept_<op>; density: the first result is a log-density."""
    arguments, _, results = schema.partition(")")
    names = [a.name for a in op._schema.arguments]
    y, log_prior = names.index("y"), names.index("log_prior")

    def by_masks(*args):
        """Query by query: what a mask hides the kernels do not read. For derivatives, and in PyTorch alone."""
        *args, atoms, counts = args
        prior = args[0].new_zeros(args[y].shape[0]) if args[log_prior] is None else args[log_prior]
        outs = []
        for b, mask in enumerate(_masks(atoms, counts, len(prior))):
            one = [
                a if i in (y, log_prior) or not _is_tensor(a) else a[b : b + 1] for i, a in enumerate(args)
            ]
            one[log_prior] = torch.where(mask, prior, -math.inf)
            out = op(*one)
            if density:  # of all atoms, not of those that are left
                out = (out[0] + one[log_prior].logsumexp(0) - prior.logsumexp(0), *out[1:])
            outs.append(out)
        if not outs:
            return fake(*args)
        return torch.cat(outs) if _is_tensor(outs[0]) else tuple(map(torch.cat, zip(*outs, strict=True)))

    def in_pytorch(*args):
        _expect_lists(*args[-2:], args[y].shape[0])
        return by_masks(*args)

    name = "kept_" + op._schema.name.removeprefix(_op.NAMESPACE + "::")
    _KEPT[op] = _op.define(
        name,
        f"{arguments}, Tensor atoms, Tensor counts){results}",
        fallback=in_pytorch,
        fake=lambda *args: fake(*args[:-2]),
        twin=by_masks,
        fast=fast,
        batch=_op.folded(name, "a" * (len(names) + 2)),  # one call per element: lists do not fold
    )
    return _KEPT[op]


def _is_tensor(a):
    return isinstance(a, torch.Tensor)


def _masks(atoms, counts, N):
    """[B, N]: which atoms a query counts."""
    B, M = counts.shape[0], atoms.shape[0]
    query = torch.arange(B, device=atoms.device).repeat_interleave(counts, output_size=M)
    return atoms.new_zeros(B, N, dtype=torch.bool).index_put((query, atoms), atoms.new_ones(M).bool())


def _expect_lists(atoms, counts, N):
    sizes = counts.tolist()
    if min(sizes, default=1) < 1 or sum(sizes) != len(atoms):
        raise RuntimeError(f"counts: expected at least one atom per query, {len(atoms)} in all, got {sizes}")
    for rows in atoms.split(sizes):
        if rows[0] < 0 or rows[-1] >= N or bool((rows.diff() <= 0).any()):
            raise RuntimeError(f"atoms: expected numbers of {N} rows, each query's ascending, got {rows}")


def call(op, args, kept: tuple[torch.Tensor, torch.Tensor] | None, **given):
    """`_check.call` of op or, for kept = (atoms, counts), of its kept_ op."""
    if kept is None:
        return _check.call(op, args, **given)
    _check.lists("kept", kept, args[0])
    return _check.call(_KEPT[op], (*args, *kept), **given)
