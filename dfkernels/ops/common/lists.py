"""Lists of atoms: two optional arguments of the ops over a data set.

``atoms`` (int64 [M]) holds row numbers of ``y``, those of one query after those of another, each
query's ascending; ``counts`` (int64 [B]) says how many belong to each query, at least one. A query
then counts the atoms of its list and no other, while ``log_prior`` is still normalised over all
atoms. The compiled kernels take the lists themselves. Everywhere else a call with lists is one call
without them per query, which is what `define` adds to an op.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..._torch import check, library
from ..._torch.errors import UnusableValue


def define(
    name: str,
    schema: str,
    *,
    fallback: Callable,
    fake: Callable,
    twin: Callable,
    cuda: Callable,
    batch: Callable,
    fast: Callable | None = None,
    density: bool = False,
):
    """Declares an op over a data set whose last two arguments are ``atoms`` and ``counts``.

    Args:
        name: Name of the op.
        schema: Its schema, which ends in ``Tensor? atoms=None, Tensor? counts=None``.
        fallback, fake, twin, cuda, batch: As in `library.define`, for calls without lists; they
            never see the two arguments.
        fast: As in `library.define`; it hands lists on with the other arguments.
        density: Whether the first result is a log-density.

    Returns:
        The overload of the op.
    """

    def result(args, prior, clouds):
        out = _query_by_query(op, args, prior, clouds, density)
        return fake(*args) if out is None else out

    def cloud(args):
        y, log_prior = (args[names.index(n)] for n in ("y", "log_prior"))
        return y, y.new_zeros(len(y), dtype=args[0].dtype) if log_prior is None else log_prior

    def by_rows(args, atoms, counts):
        y, prior = cloud(args)
        rows = _split(atoms, counts, len(y))
        return result(args, prior, ((y[r], prior[r]) for r in rows))

    def by_masks(args, atoms, counts):
        """Can be traced, and keeps no copies of ``y`` for the derivatives."""
        y, prior = cloud(args)
        masks = _masks(atoms, counts, len(y))
        masked = (torch.where(mask, prior, -math.inf) for mask in masks)
        return result(args, prior, ((y, p) for p in masked))

    def choice(plain, with_lists):
        """`plain` for calls without lists: the dispatcher leaves out arguments that have their
        default."""

        def implementation(*args):
            atoms, counts = (*args[len(names) :], None, None)[:2]
            if atoms is None and counts is None:
                return plain(*args[: len(names)])
            if atoms is None or counts is None:
                raise UnusableValue("atoms, counts: expected both or neither, got None for one")
            return with_lists(args[: len(names)], atoms, counts)

        return implementation

    def batched(info, in_dims, *args):
        lists = args[len(names) :]
        rule = one_by_one if any(a is not None for a in lists) else batch
        return rule(info, in_dims[: len(args)], *args)

    op = library.define(
        name,
        schema,
        fallback=choice(fallback, by_rows),
        fake=choice(fake, lambda args, *_: fake(*args)),
        cuda=choice(cuda, by_rows),
        twin=choice(twin, by_masks),
        fast=fast,
        batch=batched,
    )
    names = [a.name for a in op._schema.arguments][:-2]
    one_by_one = library.folded(name, "a" * (len(names) + 2))
    return op


def _query_by_query(op, args, log_prior, clouds: Iterable[tuple[Tensor, Tensor]], density: bool):
    """The op without lists for each query and its cloud (y, log_prior); None for no queries."""
    names, outs = [a.name for a in op._schema.arguments], []
    for b, (y, prior) in enumerate(clouds):
        one = [a[b : b + 1] if isinstance(a, Tensor) else a for a in args]
        one[names.index("y")], one[names.index("log_prior")] = y, prior
        out = op(*one)
        if density:  # log_prior is normalised over all atoms, not over those of the list
            out = (out[0] + prior.logsumexp(0) - log_prior.logsumexp(0), *out[1:])
        outs.append(out)
    if not outs or isinstance(outs[0], Tensor):
        return torch.cat(outs) if outs else None
    return tuple(map(torch.cat, zip(*outs, strict=True)))


def _masks(atoms, counts, N):
    """[B, N]: which atoms a query counts."""
    B, M = counts.shape[0], atoms.shape[0]
    query = torch.arange(B, dtype=torch.int64, device=atoms.device).repeat_interleave(
        counts, output_size=M
    )
    return atoms.new_zeros(B, N, dtype=torch.bool).index_put(
        (query, atoms), atoms.new_ones(M).bool()
    )


def _split(atoms, counts, N):
    """The list of each query, checked."""
    sizes = counts.tolist()
    if min(sizes, default=1) < 1 or sum(sizes) != len(atoms):
        raise UnusableValue(
            f"counts: expected at least one atom per query, {len(atoms)} in all, got {sizes}"
        )
    rises = atoms.diff() > 0
    rises[counts.cumsum(0)[:-1] - 1] = True  # from one query to the next
    if not bool(rises.all() & (atoms >= 0).all() & (atoms < N).all()):
        raise UnusableValue(
            f"atoms: expected numbers of {N} rows, each query's ascending, got {atoms}"
        )
    return atoms.split(sizes) if sizes else ()


def arguments(
    atoms: Tensor | None, counts: Tensor | None, kept: tuple[Tensor, Tensor] | None, x: Tensor
) -> tuple[Tensor, ...]:
    """The checked lists as an op's last arguments: (atoms, counts), or () where there are none.

    Args:
        atoms, counts: As the caller of a public function gave them.
        kept: The two as one tuple, under the keyword that they had before; deprecated.
        x: The queries.

    Raises:
        ValueError: One is given without the other, or a shape or device is wrong.
        TypeError: A type or dtype is wrong.
    """
    if kept is not None:
        warnings.warn(
            "kept=(atoms, counts) is deprecated: write atoms=atoms, counts=counts",
            DeprecationWarning,
            stacklevel=3,
        )
        if atoms is not None or counts is not None:
            raise check.mismatch("kept", "None beside atoms and counts", "both")
        if not (isinstance(kept, tuple) and len(kept) == 2):
            kind = type(kept).__name__
            raise TypeError(f"kept: expected a tuple (atoms, counts) of tensors, got {kind}")
        atoms, counts = kept
    if atoms is None and counts is None:
        return ()
    check.lists(atoms, counts, x)
    return atoms, counts
