"""``select_atoms`` on CUDA: bounds on all logits from the coarse codes, then from the fine codes on
those of the candidates.

The fine level is launched without a look at which candidates are left; a tile of atoms that no
query needs costs the reading of its bounds. Only the end synchronises: the size of the result
depends on the data, so that no CUDA graph can capture the op.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from .._constants import CODE_TILE, QUERY_GROUP
from ..ops.common.moments import load
from . import triton_bounds
from .bounds import ProductError, Queries, parsed
from .index import check_values
from .rounding import FEW_ROUNDINGS, float_sums, round_down, round_up

kernels: Any = triton_bounds  # launches have no types

PAIRS = 2**27  # pairs of queries and atoms at once, of 13 bytes each
NUMBERS = 2**24  # of atoms for their exact logits, at once
SAMPLE = 64  # atoms that tell whether most are needed
SPAN = 2**17 - 128  # coordinates whose products of digits, 2^14 at most, do not overflow int32
LARGEST = 127 * 2**24  # the largest integer for a coordinate: its leading digit fits 8 bits
BUCKETS = 256  # of upper bounds, each a quarter of a nat wide


class Bounds(NamedTuple):
    """Upper bounds of the logits of all pairs, and what they are compared with."""

    upper: Tensor  # [Q, N]
    threshold: Tensor  # [Q, 1]
    takes_all: Tensor  # bool [Q, 1]: the queries for which all atoms are cheaper


def search(q: Queries, k: int) -> Bounds:
    """Goes through both levels of the index without a synchronisation."""
    index, (Q, d), N = q.index, q.x.shape, len(q.y)
    K = len(index.basis)
    groups = triton.cdiv(Q, QUERY_GROUP)
    a = q.z @ index.basis.double().T
    in_float = float_sums(K, a.norm(dim=1, keepdim=True), q.z_norm)
    prior = q.log_prior.float()
    product, estimate, upper = (index.atom_norm.new_empty(Q, N) for _ in range(3))

    def known(level: int, error: ProductError, in_float: Tensor) -> list[Any]:
        """What both kernels take of the queries and of the index."""
        exact = torch.cat([q.alpha, q.alpha**2 / 2, q.variance], 1).float()
        code_error = error.code_error + in_float
        rounded_up = torch.cat([error.query_remainder, error.query_on_axes, code_error], 1)
        remainder_norm, axis_error = index.remainder_norm[level], index.axis_error[level]
        coefficients = torch.cat([exact, round_up(rounded_up)], 1)
        return [coefficients, index.atom_norm, remainder_norm, axis_error, prior]

    kernels.bound_from_coarse[(triton.cdiv(N, 256) * groups,)](
        *(index.coarse_codes, index.code_scale[0], (a * index.axis_scale).float()),
        *known(0, q.coarse_error(a), in_float),
        *(product, estimate, upper, Q, N),
        K=K,
        TILE=CODE_TILE,
        ATOMS=256,
        QUERIES=QUERY_GROUP,
        num_warps=2,
    )
    threshold = _threshold(q, k, estimate, upper)
    takes_all = _all_is_cheaper(q, upper, threshold)
    if len(index.fine_codes):
        padded = index.fine_codes.shape[1]
        digits, unit, lost = _digits(pad(q.z, (0, padded - d)))
        in_float = 4 * (in_float + lost.norm(dim=1, keepdim=True))
        kernels.bound_from_fine[(triton.cdiv(N, 128) * groups,)](
            *(index.fine_codes, index.code_scale[1], digits, unit.float()),
            *known(1, q.fine_error(a), in_float),
            threshold.masked_fill(takes_all, torch.inf),
            *(product, estimate, upper, Q, N, padded),
            ATOMS=128,
            D=128,
            SPAN=SPAN,
            QUERIES=QUERY_GROUP,
            num_warps=8,
        )
        threshold = _threshold(q, k, estimate, upper)
    return Bounds(upper, threshold, takes_all)


def _digits(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """v [Q, n] as integer multiples of a unit [Q, 1], in digits to base 256.

    Returns (digits int8 [Q, 4, n], unit, what rounding to integers takes off v).
    """
    unit = (v.abs().amax(1, keepdim=True) / LARGEST).clamp_min(1e-300)
    m = (v / unit).round()
    signed = (m.long() + 0x808080).int() ^ 0x808080  # bytes from -128 to 127
    return signed.view(torch.int8).unflatten(1, (-1, 4)).mT.contiguous(), unit, v - m * unit


def _threshold(q: Queries, k: int, estimate: Tensor, upper: Tensor) -> Tensor:
    """The float32 threshold [Q, 1], with the logits of the most promising atoms known exactly.

    The largest estimates are right in much noise, the largest upper bounds where a query almost is
    an atom.
    """
    largest = lambda t: t.argmax(1, keepdim=True) if k == 1 else t.topk(k, 1).indices
    q.raise_kth_logit(torch.stack([largest(estimate), largest(upper)], 1))
    return round_down(q.threshold)


def _all_is_cheaper(q: Queries, upper: Tensor, threshold: Tensor) -> Tensor:
    """bool [Q, 1]: queries that should take all atoms, were their group made of queries like them.

    So should queries with numbers out of the range of float32.
    """
    N, groups = upper.shape[1], -(-len(upper) // QUERY_GROUP)
    rows = torch.arange(SAMPLE, device=upper.device, dtype=torch.int64) * N // SAMPLE
    t = load(q.y[rows], torch.float64, q.scale, q.offset) - q.index.centre
    t = t.nan_to_num(0.0)  # a masked atom may hold anything
    logits = q.alpha * (q.z @ t.T) - q.alpha**2 / 2 * t.square().sum(1)
    logits = logits + q.variance * q.log_prior[rows]
    read = QUERY_GROUP * (logits >= q.threshold).double().mean(1, keepdim=True)
    left = 1 - (upper < threshold).sum(1, keepdim=True, dtype=torch.float64) / N
    # each query reads its own rows; up to eight groups would share a pass over all atoms
    costly = (left > 0.25) & (min(groups, 8) * read + 0.4 * left >= 0.9)
    size = (1 + q.alpha**2) * (1 + (q.z_norm + q.limits.radius) ** 2)
    usable = (q.variance > 1e-24) & (q.gap + 100 * q.variance < 1e24) & (size < 1e24)
    return costly | ~usable


def weighed(
    q: Queries, upper: Tensor, threshold: Tensor, takes_all: Tensor
) -> tuple[Tensor, Tensor]:
    """(bool [Q, N]: the atoms that stay, none where all are taken; [Q]: what the others weigh)."""
    Q, N = upper.shape
    stays = torch.empty_like(upper, dtype=torch.bool)
    dropped = upper.new_empty(Q, -(-N // 2048), dtype=torch.float64)
    kernels.weigh_dropped[(dropped.numel(),)](
        upper,
        threshold.contiguous(),
        (q.kth_logit - q.coordinate_error).contiguous(),
        q.variance.contiguous(),
        takes_all.contiguous(),
        stays,
        dropped,
        N,
        ATOMS=2048,
        num_warps=4,
    )
    return stays, dropped.sum(1)


def _from_each_on(weight: Tensor) -> Tensor:
    """What each of BUCKETS buckets and all after it weigh, [Q, BUCKETS + 1], the last one nothing.

    By doubling: where PyTorch is told to be deterministic, it refuses cumulative sums of floats on
    CUDA.
    """
    reach = 1
    while reach < BUCKETS:
        weight = weight + pad(weight[:, reach:], (0, reach))
        reach *= 2
    return pad(weight, (0, 1))


def _without_the_lightest(
    q: Queries, upper: Tensor, dropped: Tensor, rows: Tensor, atoms: Tensor
) -> tuple[Tensor, Tensor]:
    """(which pairs (row, atom) stay, dropped [Q]) when as many of the lightest go as may.

    `gap` allows for all N atoms at its edge. Pairs go by their distance from the k-th logit, in
    quarters of a nat, as in csrc/certified/.
    """
    Q, N = upper.shape
    below = ((q.kth_logit - q.coordinate_error)[rows, 0] - upper[rows, atoms]) / q.variance[rows, 0]
    bucket = (4 * below).nan_to_num(0.0).clamp(0, BUCKETS - 1).long()
    counts = torch.bincount(rows * BUCKETS + bucket, minlength=Q * BUCKETS).view(Q, BUCKETS)
    edges = torch.arange(BUCKETS, device=upper.device, dtype=torch.float64) / -4
    weight = counts * torch.exp(edges)
    beyond = _from_each_on(weight)
    allowed = N * torch.exp(-q.gap / q.variance)[:, 0] * (1 - 1e-6) - dropped
    cut = (beyond > allowed[:, None]).sum(1).clamp(1, BUCKETS)
    return bucket < cut[rows], dropped + beyond.gather(1, cut[:, None])[:, 0] * FEW_ROUNDINGS


def _select(q: Queries, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The op for some queries."""
    upper, threshold, takes_all = search(q, k)
    takes_all |= q.takes_all()
    stays, dropped = weighed(q, upper, threshold, takes_all)
    dropped = (dropped + q.remote_weight()[:, 0]) * FEW_ROUNDINGS
    rows, atoms = stays.nonzero().unbind(1)
    if k == 1:
        stays, dropped = _without_the_lightest(q, upper, dropped, rows, atoms)
        rows, atoms = rows[stays], atoms[stays]
    takes_all = takes_all[:, 0]
    counts = torch.bincount(rows, minlength=len(upper)).masked_fill(takes_all, -1)
    return atoms, counts, dropped.masked_fill(takes_all, 0)


def launch(*args) -> tuple[Tensor, Tensor, Tensor]:
    """The op, whose arguments select_atoms.py explains, for at least one query."""
    sought, index, gap, k = parsed(args)
    x, y = sought.x, sought.y
    step = min(PAIRS // len(y), NUMBERS // (2 * k * y.shape[1]))
    step = max(QUERY_GROUP, step // QUERY_GROUP * QUERY_GROUP)
    found = []
    with torch.cuda.device_of(x):
        for b in range(0, len(x), step):
            q = Queries(sought.part(slice(b, b + step)), index, gap)
            found.append(_select(q, k))
    check_values(index)  # now that the device is waited for anyway
    atoms, counts, dropped = (torch.cat(parts) for parts in zip(*found, strict=True))
    return atoms, counts, dropped
