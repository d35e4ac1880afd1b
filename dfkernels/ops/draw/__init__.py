"""One atom per query, drawn from its posterior, in one pass over the atoms.

The atom is i with probability w_i = softmax_i(log pi_i - |x - alpha y_i|^2/(2 sigma^2)). It comes
from Gumbel-max in two stages, first among blocks of 64 rows of y and then among the atoms of one
block, with noise that is a function of the seed, the query's number and the row alone:
reference.py has the definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..._constants import DRAW_BLOCK as BLOCK
from ..._torch import batching, check, diagnosis, library
from ..._torch.errors import UnusableValue
from ..._torch.types import Level
from ..common import derivatives, lists, moments
from .gumbel import gumbel
from .listed import draw_listed
from .reference import draw as reference

__all__ = ["draw", "reference"]


_launch = library.in_triton(__name__)


def _cloud_by_cloud(one_cloud: Callable) -> Callable:
    def implementation(*args):
        parts = [one_cloud(*part) for part in lists.each_cloud(op, args)]
        return torch.cat(parts) if parts else args[0].new_empty(0, dtype=torch.int64)

    return implementation


def _in_triton(*args):
    """Lists of atoms go to PyTorch: the kernel has none."""
    listed = len(args) > _BEFORE_LISTS and any(a is not None for a in args[_BEFORE_LISTS:])
    return _in_pytorch(*args) if listed else _launch(*args[:_BEFORE_LISTS])


_BEFORE_LISTS = 10  # arguments


def _in_pytorch(
    x, y, alpha, sigma, log_prior, scale, offset, seed, queries, total, atoms=None, counts=None
):
    """A few queries at a time, since each has N/64 block sums."""
    if (atoms is None) != (counts is None):
        raise UnusableValue("atoms, counts: expected both or neither, got None for one")
    if log_prior is None:
        log_prior = x.new_zeros(()).expand(y.shape[0])
    log_prior = torch.log_softmax(log_prior, 0)
    if atoms is not None and counts is not None:
        levels = (alpha, sigma, log_prior, scale, offset)
        return draw_listed(x, y, *levels, seed, queries, atoms, counts)
    out = [x.new_empty(0, dtype=torch.int64)]
    for b in range(0, len(x), 16):
        q = slice(b, b + 16)
        given = (x[q], y, alpha[q], sigma[q], log_prior, scale, offset, seed, queries[q, None])
        out.append(_some(*given))
    return torch.cat(out)


def _some(x, y, alpha, sigma, log_prior, scale, offset, seed, queries):
    """The draws of a few queries; queries: their numbers, [B, 1]."""
    N, d = y.shape
    step = max(BLOCK, derivatives.TILE // (len(x) * d) // BLOCK * BLOCK)
    sums = []
    for start in range(0, N, step):
        rows = slice(start, min(start + step, N))
        values = moments.load(y[rows], x.dtype, scale, offset)
        logits = moments.logits(x, values, alpha, sigma, log_prior[rows]).double()
        logits = torch.nn.functional.pad(logits, (0, -logits.shape[1] % BLOCK), value=-math.inf)
        sums.append(logits.unflatten(1, (-1, BLOCK)).logsumexp(2))
    score = torch.cat(sums, 1)
    if x.device.type == "cpu" and not bool(torch.isfinite(score.logsumexp(1)).all()):
        raise UnusableValue("x: expected distances to the atoms that can be represented, got none")
    numbers = torch.arange(score.shape[1], dtype=torch.int64, device=x.device)
    block = (score + gumbel(seed, queries, numbers, 0)).argmax(1, keepdim=True)
    rows = BLOCK * block + torch.arange(BLOCK, dtype=torch.int64, device=x.device)
    inside = rows.clamp(max=N - 1)
    values = moments.load(y[inside], x.dtype, scale, offset)
    prior = torch.where(rows < N, log_prior[inside], -math.inf)
    score = moments.logits(x, values, alpha, sigma, prior).double()
    score = score + gumbel(seed, queries, rows, 1)
    return rows.gather(1, score.argmax(1, keepdim=True))[:, 0]


def _batch(info, in_dims, *args):
    """Every element is one more batch of queries, whose numbers go on where those of the element
    before end."""
    names = [a.name for a in op._schema.arguments][: len(args)]
    given, dims = (dict(zip(names, a, strict=True)) for a in (args, in_dims))
    size, numbers, total = info.batch_size, given["queries"], given["total"]
    if dims["queries"] is not None:
        numbers = numbers.movedim(dims["queries"], 0)
    steps = torch.arange(size, dtype=torch.int64, device=numbers.device) * total
    given |= {"queries": numbers + steps[:, None], "total": total * size}
    dims["queries"] = 0
    listed = given.get("atoms") is not None
    rule = batching.folded(op, names) if listed else batching.folded(op, per_atom=lists.PER_ATOM)
    return rule(info, tuple(dims.values()), *given.values())


_fallback = _cloud_by_cloud(_in_pytorch)
op = library.define(
    "draw",
    "(Tensor x, Tensor y, Tensor alpha, Tensor sigma, Tensor? log_prior, float scale, "
    "float offset, int seed, Tensor queries, int total, Tensor? atoms=None, "
    "Tensor? counts=None) -> Tensor",
    fallback=_fallback,
    fake=lambda x, *_: x.new_empty(x.shape[0], dtype=torch.int64),
    cuda=_cloud_by_cloud(_in_triton),
    batch=_batch,
    discrete=True,
)


def draw(
    x: Tensor,
    y: Tensor,
    alpha: Level,
    sigma: Level,
    log_prior: Tensor | None = None,
    *,
    seed: int,
    scale: float = 1.0,
    offset: float = 0.0,
    atoms: Tensor | None = None,
    counts: Tensor | None = None,
    batched: bool = False,
) -> Tensor:
    """Draws one atom per query from its posterior, exactly, in one pass.

    Use it for an exact sample of x_0 given x_t, for Gibbs sampling, and to couple batches by an
    entropic plan: with Sinkhorn's potentials as log_prior, it draws from a row of the plan.

    The atom is i with probability w_i = softmax_i(log pi_i - |x - alpha y_i|^2/(2 sigma^2)). The
    noise is Philox's, counted by the query's number in the batch and by the row of y
    (`draw.reference` says how): a call with the same arguments gives the same atoms, whatever the
    device, the backend and the number of threads, except where two candidates are within
    rounding of each other. Fresh draws take a fresh seed, such as
    ``int(torch.randint(2**63 - 1, (), generator=generator))``. Several atoms for each query are
    several calls, or one call with repeated queries, ``x.repeat_interleave(n, 0)``.

    Args:
        x: Queries ``[B, *E]``, float32 or float64: the compute dtype.
        y: Atoms ``[N, *E]``, stored as x.dtype, float32, float16, bfloat16 or uint8; their values
            are scale * y + offset.
        alpha: Signal level of each query, a number or [B]; 0 is legal: draws from the prior.
        sigma: Noise level of each query, a number or [B], positive.
        log_prior: Log weights [N], None for uniform ones; any constant may be added to them. -inf
            masks an atom, whatever it holds: it is never drawn.
        seed: From 0 to 2^63 - 1. Calls with one seed share their noise, so that the same arguments
            give the same draws. Under `vmap` the queries of all elements are one batch, so that
            their draws are independent.
        scale: Factor of the stored atoms.
        offset: What is added to them.
        atoms: Lists of atoms, int64 [M], as in `posterior`: no other is drawn.
        counts: How many of them each query has, int64 [B]; goes with atoms.
        batched: One call for G data sets, [G, B] in place of [B] and [G, N] of [N]; see
            `posterior`. All queries count as one batch, so that their draws are independent.

    Returns:
        Row numbers of y, or of y[g], int64 [B], batched [G, B]. They have no derivative; arguments
        that require grad are read as they are.

    Raises:
        TypeError: An argument has a type or dtype that it cannot have; the message names it.
        ValueError: So for a shape, a device or a value.
    """
    args = check.points(x, y, alpha, sigma, log_prior, scale, offset, batched)
    seed = check.integer("seed", seed, 0, 2**63 - 1)
    B = args[0].shape[0]
    queries = torch.arange(B, dtype=torch.int64, device=x.device)
    found = lists.arguments(atoms, counts, None, args[0], batched)
    given = {"x": x, "y": y, **check.given_levels(alpha, sigma, batched)}
    out = diagnosis.call(op, (*args, seed, queries, B, *found), **given)
    return out.reshape(x.shape[:2]) if batched else out
