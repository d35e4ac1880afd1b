"""Reductions over segments, against loops over them."""

from __future__ import annotations

import math

import torch

from dfkernels.ops.common import segments


def cut(lengths, seed=0):
    t = torch.randn(
        int(lengths.sum()), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return t, t.split(lengths.tolist())


def test_logsumexp():
    """Segments of one number, of many, of large numbers, and of none but -inf."""
    lengths = torch.tensor([1, 5000, 3, 2, 40])
    t, _ = cut(lengths)
    t[5001:5004] += 900
    t[5004:5006] = -math.inf
    t[5010] = -math.inf
    got = segments.logsumexp(t, lengths)
    want = torch.stack([part.logsumexp(0) for part in t.split(lengths.tolist())])
    assert float(got[3]) == -math.inf
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    t[5020] = math.nan
    assert segments.logsumexp(t, lengths).isnan().tolist() == [False, False, False, False, True]


def test_sums_of_rows():
    lengths = torch.tensor([2, 1, 7])
    t = cut(3 * lengths)[0].view(10, 3)
    want = torch.stack([part.sum(0) for part in t.split(lengths.tolist())])
    torch.testing.assert_close(segments.sums(t, lengths), want, rtol=1e-14, atol=1e-14)
    assert segments.sums(t[:, :0], lengths).shape == (3, 0)


def test_the_first_of_equal_ones_is_the_largest():
    lengths = torch.tensor([1, 4, 3, 300, 2])
    t, _ = cut(lengths)
    t[1:5] = torch.tensor([0.0, 2.0, 2.0, 1.0])
    t[5:8] = -math.inf
    t[308:] = torch.tensor([1.0, math.nan])
    got = segments.first_largest(t, lengths)
    begin = lengths.cumsum(0) - lengths
    want = torch.stack([part.argmax() for part in t.split(lengths.tolist())]) + begin
    assert got.dtype == torch.int64 and torch.equal(got, want)
    assert got[:3].tolist() == [0, 2, 5] and int(got[4]) == 309
