"""Lists of atoms: two optional arguments of the ops over a data set.

``atoms`` (int64 [M]) holds row numbers of ``y``, those of one query after those of another, each
query's ascending; ``counts`` (int64 [B]) says how many belong to each query, at least one. A query
then counts the atoms of its list and no other, while ``log_prior`` is still normalised over all
atoms. The compiled kernels take the lists themselves, and so do Triton's, but for those of first
derivatives. Everywhere else a call with lists is one call without them per query, which is what
`define` adds to an op.

And clouds: ``y`` and ``log_prior`` may each have a leading dimension, [G, N, d] and [G, N]. The
queries then belong to the clouds in turn, B/G to each. The compiled kernels take clouds, as long as
there are no lists; elsewhere `define` makes one call per cloud.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..._torch import batching, check, library
from ..._torch.errors import UnusableValue
from . import moments

# dimensions of the arguments with a row per atom: those of the sums, and the prior as ops take it
PER_ATOM = moments.PER_ATOM | {"log_prior": 1}


def define(
    name: str,
    schema: str,
    *,
    fallback: Callable,
    fake: Callable,
    differentiable: Callable,
    cuda: Callable,
    lists_on_cuda: bool = False,
    density: bool = False,
):
    """Declares an op over a data set whose last two arguments are ``atoms`` and ``counts``.

    Args:
        name: Name of the op.
        schema: Its schema, which ends in ``Tensor? atoms=None, Tensor? counts=None``.
        fallback, fake, cuda: As in `library.define`, for calls without lists; they never see the
            two arguments, but for `cuda` where it takes them.
        lists_on_cuda: Whether `cuda` takes checked lists as its last two arguments.
        differentiable: As in `library.define`, for both: its last two arguments are None or left
            out where there are no lists.
        density: Whether the first result is a log-density.

    Returns:
        The overload of the op.
    """

    count = schema.partition(")")[0].count(",") - 1  # arguments before the lists

    def choice(plain: Callable, with_lists: Callable) -> Callable:
        """`plain` for calls without lists: the dispatcher leaves out arguments that have their
        default."""

        def implementation(*args):
            atoms, counts = (*args[count:], None, None)[:2]
            if atoms is None and counts is None:
                return plain(*args[:count])
            if atoms is None or counts is None:
                raise UnusableValue("atoms, counts: expected both or neither, got None for one")
            _refuse_lists_of_clouds(op, args)
            return with_lists(args[:count], atoms, counts)

        return implementation

    def by_clouds(plain: Callable) -> Callable:
        """`plain` for calls with clouds as well."""

        def implementation(*args):
            parts = list(each_cloud(op, args))
            if len(parts) == 1:
                return plain(*parts[0])
            return joined([plain(*part) for part in parts]) if parts else fake(*args)

        return implementation

    def by_rows(args, atoms, counts):
        cloud = _cloud(op, args)
        lists = split(atoms, counts, len(cloud["y"]))
        clouds = ({name: a[rows] for name, a in cloud.items()} for rows in lists)
        if not len(counts):
            return fake(*args)
        return _query_by_query(op, args, cloud["log_prior"], clouds, density)

    def together_on_cuda(args, atoms, counts):
        split(atoms, counts, len(args[1]))
        return cuda(*args, atoms, counts)

    def batched(info, in_dims, *args):
        rule = one_by_one if any(a is not None for a in args[count:]) else together
        return rule(info, in_dims[: len(args)], *args)

    op = library.define(
        name,
        schema,
        fallback=choice(by_clouds(fallback), by_rows),
        fake=choice(fake, lambda args, *_: fake(*args)),
        cuda=choice(by_clouds(cuda), together_on_cuda if lists_on_cuda else by_rows),
        differentiable=differentiable,
        batch=batched,
    )
    together = batching.folded(op, per_atom=PER_ATOM)
    one_by_one = batching.folded(op, [a.name for a in op._schema.arguments])
    return op


def _names(op) -> list[str]:
    return [a.name for a in op._schema.arguments]


def _cloud(op, args) -> dict[str, Tensor]:
    """The arguments with a row per atom, by name; log_prior is zeros for None."""
    cloud = {n: a for n, a in zip(_names(op), args, strict=False) if n in PER_ATOM}
    if cloud["log_prior"] is None:
        cloud["log_prior"] = args[0].new_zeros(len(cloud["y"]))
    return cloud


def _query_by_query(
    op, args, log_prior: Tensor, clouds: Iterable[dict[str, Tensor]], density: bool
):
    """The op without lists for each query and its cloud."""
    outs = []
    for b, cloud in enumerate(clouds):
        one = [
            cloud.get(name, a[b : b + 1] if isinstance(a, Tensor) else a)
            for name, a in zip(_names(op), args, strict=False)
        ]
        out = op(*one)
        if density:  # log_prior is normalised over all atoms, not over those of the list
            share = cloud["log_prior"].logsumexp(0) - log_prior.logsumexp(0)
            out = out + share if isinstance(out, Tensor) else (out[0] + share, *out[1:])
        outs.append(out)
    return joined(outs)


def joined(outs: list):
    """The results of one call for the queries of several, in their order."""
    if isinstance(outs[0], Tensor):
        return torch.cat(outs)
    return tuple(map(torch.cat, zip(*outs, strict=True)))


def _own(op, args) -> list[bool]:
    """Which arguments have a leading dimension of clouds."""
    ranks = [PER_ATOM.get(a.name) for a in op._schema.arguments[: len(args)]]
    return [
        isinstance(a, Tensor) and rank is not None and a.dim() > rank
        for a, rank in zip(args, ranks, strict=True)
    ]


def _refuse_lists_of_clouds(op, args) -> None:
    given = [a.name for a, t in zip(op._schema.arguments, args, strict=False) if t is not None]
    if "atoms" in given and any(_own(op, args)):
        raise UnusableValue(
            "atoms: expected None where y or log_prior has an axis of clouds, got a tensor"
        )


def each_cloud(op, args) -> Iterator[Sequence]:
    """The arguments of a call for each cloud; those of the call itself where it has one."""
    own = _own(op, args)
    names = [a.name for a in op._schema.arguments[: len(args)]]
    sizes = {name: len(a) for name, a, o in zip(names, args, own, strict=True) if o}
    if not sizes:
        yield args
        return
    _refuse_lists_of_clouds(op, args)
    x, G = args[0], max(sizes.values())
    if min(sizes.values()) < G:
        found = ", ".join(map(str, sizes.values()))
        raise UnusableValue(f"{', '.join(sizes)}: expected equally many clouds, got {found}")
    if x.shape[0] % G if G else x.shape[0]:
        raise UnusableValue(
            f"x: expected equally many queries for each of {G} clouds, got {x.shape[0]}"
        )
    B = x.shape[0] // max(G, 1)
    for g in range(G):
        rows = slice(g * B, (g + 1) * B)
        yield [
            a[g] if o else a[rows] if isinstance(a, Tensor) and name not in PER_ATOM else a
            for a, o, name in zip(args, own, names, strict=True)
        ]


def split(atoms, counts, N):
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
    atoms: Tensor | None,
    counts: Tensor | None,
    kept: tuple[Tensor, Tensor] | None,
    x: Tensor,
    batched: bool = False,
) -> tuple[Tensor, ...]:
    """The checked lists as an op's last arguments: (atoms, counts), or () where there are none.

    Args:
        atoms, counts: As the caller of a public function gave them.
        kept: The two as one tuple, under the keyword that they had before; deprecated.
        x: The queries.
        batched: Whether the call has many clouds, which have no lists.

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
    if batched:
        name = "counts" if atoms is None else "atoms"
        raise check.mismatch(name, "None with batched=True", "a tensor")
    check.lists(atoms, counts, x)
    assert atoms is not None
    assert counts is not None
    return atoms, counts
