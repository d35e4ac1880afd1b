"""kept_atoms on CUDA: bounds on all logits from the first level, then from the tail on those that
are left.

The tail is launched without a look at what is left; a tile of atoms that no query asks for costs
the reading of its bounds. Only the end synchronises: how much the op returns depends on the data,
so that no CUDA graph can capture it.
"""

from __future__ import annotations

import math

import torch
import triton
from torch.nn.functional import pad

from ..ops.common.moments import load
from .cascade import BLOCK, Queries
from .fields import FIELDS, TILE, check_layout, check_values
from .triton_bounds import add_tail, first_level

PAIRS = 2**25  # pairs of queries and atoms at once, or numbers of atoms for their exact logits
SAMPLE = 64  # atoms that tell whether most are needed
SPAN = (
    2**17 - 128
)  # coordinates whose products of digits, 2^14 each at most, cannot overflow 32 bits
MOST = 127 * 2**24  # the leading digit fits 8 bits


def _digits(v):
    """v [Q, n] in units of `unit`: digits to base 256, [Q, 4, n]; unit [Q, 1]; what they lose of
    v."""
    unit = (v.abs().amax(1, keepdim=True) / MOST).clamp_min(1e-300)
    m = (v / unit).round()
    signed = (m.long() + 0x808080).int() ^ 0x808080  # bytes from -128 to 127
    return signed.view(torch.int8).unflatten(1, (-1, 4)).mT.contiguous(), unit, v - m * unit


def _below(s, k, mid, up):
    """Above which an upper end has to lie: [Q, 1]."""
    for by in (mid, up):  # right in much noise; right where the query almost is an atom
        s.improve(by.argmax(1, keepdim=True) if k == 1 else by.topk(k, 1).indices)
    return torch.nextafter(s.least.float(), torch.full_like(mid[:, :1], -math.inf))


def _dense(s, up, below):
    """[Q, 1]: the queries for which all atoms are cheaper, in a block of queries like each, or with
    numbers out of range of float.
    """
    N, blocks = up.shape[1], triton.cdiv(len(up), BLOCK)
    rows = torch.arange(SAMPLE, device=up.device, dtype=torch.int64) * N // SAMPLE
    t = load(s.y[rows], torch.float64, s.scale, s.offset) - s.centre
    t = t.nan_to_num(0.0)  # a masked atom may hold anything
    logits = (
        s.alpha * (s.z @ t.T) - s.alpha**2 / 2 * t.square().sum(1) + s.variance * s.log_prior[rows]
    )
    read = BLOCK * (logits >= s.least).double().mean(1, keepdim=True)
    left = (~(up < below)).double().mean(1, keepdim=True)
    # the rows kept are read, written side by side, and read again, query by query
    copies = 3 * min(blocks, 8)
    costly = (left > 0.25) & (copies * read + 0.4 * left >= 0.9)
    size = (1 + s.alpha**2) * (1 + (s.size + s.radius) ** 2)
    usable = (s.variance > 1e-24) & (s.gap + 100 * s.variance < 1e24) & (size < 1e24)
    return costly | ~usable


def screen(s, k, basis, step, first, tail, size, scales, rest, shift, **others):
    """(up [Q, N], below [Q, 1], dense [Q, 1]) of Queries: both levels, without a
    synchronisation."""
    Q, N, K = len(s.x), len(s.y), len(basis)
    a = s.z @ basis.double().T
    # sums of the first level, and at most five roundings where the tail is added
    floats = 2.0**-24 * (K + 4) * a.norm(dim=1, keepdim=True) + 2.0**-21 * s.size
    prior = s.log_prior.float()
    product, mid, up = (size.new_empty(Q, N) for _ in range(3))
    blocks = triton.cdiv(Q, BLOCK)

    def known(level, width, floats):
        above = torch.cat([width.reach, width.along, width.code + floats], 1).float()
        above = torch.nextafter(above, torch.full_like(above, math.inf))
        exact = torch.cat([s.alpha, s.alpha**2 / 2, s.variance], 1).float()
        return torch.cat([exact, above], 1), size, rest[level], shift[level], prior

    first_level[(triton.cdiv(N, 256) * blocks,)](
        *(
            first,
            scales[0],
            (a * step).float(),
            *known(0, s.of_axes(a), floats),
            product,
            mid,
            up,
            Q,
            N,
        ),
        K=K,
        TILE=TILE,
        ATOMS=256,
        QUERIES=BLOCK,
        num_warps=2,
    )
    below = _below(s, k, mid, up)
    dense = _dense(s, up, below)
    if len(tail):
        digits, unit, lost = _digits(pad(s.z, (0, tail.shape[1] - s.z.shape[1])))
        floats = 4 * (floats + lost.norm(dim=1, keepdim=True))
        add_tail[(triton.cdiv(N, 128) * blocks,)](
            *(tail, scales[1], digits, unit.float(), *known(1, s.of_tail(a), floats)),
            *(below.masked_fill(dense, math.inf), product, mid, up, Q, N, tail.shape[1]),
            ATOMS=128,
            D=128,
            SPAN=SPAN,
            QUERIES=BLOCK,
            num_warps=8,
        )
        below = _below(s, k, mid, up)
    return up, below, dense


def _trim(s, up, dropped, rows, atoms):
    """(which pairs to keep, dropped [Q]): without the lightest, as many as may go; gap allows for
    all atoms at its edge. By distance from the best, in quarters of a nat: `trim` in
    csrc/certified/cascade.h.
    """
    Q, N, buckets = *up.shape, 256
    below = ((s.best - s.margin)[rows, 0] - up[rows, atoms]) / s.variance[rows, 0]
    bucket = (4 * below).nan_to_num(0.0).clamp(0, buckets - 1).long()
    counts = torch.bincount(rows * buckets + bucket, minlength=Q * buckets).view(Q, buckets)
    mass = counts * torch.exp(torch.arange(buckets, device=up.device, dtype=torch.float64) / -4)
    beyond = pad(mass.flip(1).cumsum(1).flip(1), (0, 1))
    room = N * torch.exp(-s.gap / s.variance)[:, 0] * (1 - 1e-6) - dropped
    cut = (beyond > room[:, None]).sum(1).clamp(1, buckets)
    return bucket < cut[rows], dropped + beyond.gather(1, cut[:, None])[:, 0] * (1 + 1e-9)


def launch(x, y, alpha, sigma, log_prior, scale, offset, *rest):
    """The op for at least one query."""
    *index, gap, k = rest
    index, found = {name: t.contiguous() for name, t in zip(FIELDS, index, strict=True)}, []
    check_layout(index, *y.shape, x.device)
    if not (0 <= gap < math.inf and 1 <= k <= len(y)):
        raise RuntimeError(
            f"gap, k: expected finite numbers >= 0 and from 1 to {len(y)}, got {gap}, {k}"
        )
    step = max(BLOCK, PAIRS // max(len(y), k * y.shape[1]) // BLOCK * BLOCK)
    with torch.cuda.device_of(x):
        for b in range(0, len(x), step):
            some = slice(b, b + step)
            s = Queries(x[some], y, alpha[some], sigma[some], log_prior, scale, offset, index, gap)
            up, below, dense = screen(s, k, **index)
            dense |= s.takes_all()
            gone = up < below
            mass = ((up - (s.best - s.margin)) / s.variance).exp_().masked_fill_(~gone, 0).sum(1)
            mass = (mass + s.mass_apart()[:, 0]) * (1 + 1e-9)
            rows, atoms = (~(gone | dense)).nonzero().unbind(1)
            if k == 1:
                keep, mass = _trim(s, up, mass, rows, atoms)
                rows, atoms = rows[keep], atoms[keep]
            dense = dense[:, 0]
            counts = torch.bincount(rows, minlength=len(up)).masked_fill(dense, -1)
            found.append((atoms, counts, mass.masked_fill(dense, 0)))
    check_values(index)  # now that the device is waited for anyway
    return tuple(torch.cat(t) for t in zip(*found, strict=True))
