"""log_prob, average and draw: the launchers on CPU tensors against the references."""

from __future__ import annotations

import math

import pytest
import torch
from cases import _normal
from data_ops import inputs

from dfkernels.ops import average, draw, log_prob
from dfkernels.ops.average import triton as average_kernels
from dfkernels.ops.common.triton import density, launch
from dfkernels.ops.draw import triton as draw_kernels
from dfkernels.ops.log_prob import triton as log_prob_kernels

average, draw, log_prob = average.reference, draw.reference, log_prob.reference
# B, N, d, sigma: every way to the logits
WAYS = {
    "one query": (1, 200, 20, 1.0),
    "few, by differences": (3, 200, 20, 0.3),
    "few, by products": (3, 200, 20, 9.0),
    "few, small d": (5, 150, 3, 1.0),
    "a query per thread": (65, 150, 3, 1.0),
    "no query": (0, 5, 3, 1.0),
}


@pytest.fixture(autouse=True)
def many_splits(monkeypatch):
    monkeypatch.setattr(launch, "MAX_TILES", 3)


def arguments(way, dtype, odd=True):
    """Those of the references; with `odd`, masked atoms hold NaN."""
    p = inputs(*WAYS[way], 0.0)
    given = {k: p[k].to(dtype) for k in ("x", "y", "alpha", "sigma", "log_prior")}
    if odd:
        given["y"][::5] = math.nan  # masked by `inputs`
    return given


def flat(given):
    return (*(given[k] for k in ("alpha", "sigma", "log_prior")), 1.0, 0.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_log_prob(way, dtype):
    """1e-12 in float64; in float32 some roundings of the largest logit that counts."""
    given = arguments(way, dtype)
    got = log_prob_kernels.launch(given["x"], given["y"], *flat(given))
    want = log_prob(*(t.double() for t in arguments(way, dtype, odd=False).values()))
    assert got.dtype == dtype and got.shape == want.shape
    tolerance = (1e-12 if dtype == torch.float64 else 4e-6) * (1 + want.abs())
    assert bool(((got - want).abs() <= tolerance).all())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_average(way, dtype):
    """Rows of masked atoms hold NaN, and their width is not that of the atoms."""
    given, B = arguments(way, dtype), WAYS[way][0]
    values = _normal(4)(WAYS[way][1], 7).to(dtype)
    odd = values.clone()
    odd[::5] = math.nan
    got = average_kernels.launch(given["x"], given["y"], odd, *flat(given))
    x, y, *rest = (t.double() for t in arguments(way, dtype, odd=False).values())
    want = average(x, y, values.double(), *rest)
    assert got[1].shape == (B, 7)
    for g, w in zip(got, want, strict=True):
        tolerance = (1e-12 if dtype == torch.float64 else 1e-5) * (1 + w.abs())
        assert g.dtype == dtype and bool(((g - w).abs() <= tolerance).all())


def test_values_may_be_stored_narrow():
    given = arguments("few, small d", torch.float32)
    values = _normal(4)(150, 3).bfloat16()
    got = average_kernels.launch(given["x"], given["y"], values, *flat(given))[1]
    want = average_kernels.launch(given["x"], given["y"], values.float(), *flat(given))[1]
    assert torch.equal(got, want)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_draw(way, dtype):
    """The reference's draws: its noise is in double, and no two candidates are close here. Large
    seeds and numbers of queries take all words of the counter."""
    given, B = arguments(way, dtype), WAYS[way][0]
    clean = [t.double() for t in arguments(way, dtype, odd=False).values()]
    for seed, first in ((1, 0), (2**62 + 12345, 2**33 + 7)):
        queries = first + torch.arange(B)
        got = draw_kernels.launch(given["x"], given["y"], *flat(given), seed, queries, B)
        assert got.dtype == torch.int64
        assert torch.equal(got, draw(*clean, seed=seed, queries=queries))


def test_few_queries_at_a_time(monkeypatch):
    """The numbers of the queries go with them."""
    given = arguments("few, small d", torch.float64)
    args = (given["x"], given["y"], *flat(given))
    whole = draw_kernels.launch(*args, 3, torch.arange(5), 5)
    log_q = log_prob_kernels.launch(*args)
    monkeypatch.setattr(launch, "SCRATCH", 1)
    assert torch.equal(draw_kernels.launch(*args, 3, torch.arange(5), 5), whole)
    assert float((log_prob_kernels.launch(*args) - log_q).abs().max()) <= 1e-13


@pytest.mark.parametrize("way", ["one query", "few, by differences", "a query per thread"])
def test_nan_in_nan_out(way):
    """Of a query, or of an atom that is not masked; a draw is some row."""
    for name, row in (("x", 0), ("y", 1)):
        given = arguments(way, torch.float32)
        given[name][row] = math.nan
        args = (given["x"], given["y"], *flat(given))
        assert bool(log_prob_kernels.launch(*args)[0].isnan())
        got = draw_kernels.launch(*args, 1, torch.arange(len(given["x"])), 1)
        assert bool(((got >= 0) & (got < len(given["y"]))).all())


def test_logits_are_not_kept_where_one_kernel_does_all():
    assert density.is_fused(64, 16, 4) and not density.is_fused(63, 16, 4)
    assert not density.is_fused(64, 17, 4) and not density.is_fused(64, 8, 8)
