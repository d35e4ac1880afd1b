"""fisher_dense by products of halves: blocks of F, and atoms of all sizes."""

from __future__ import annotations

import math

import pytest
import torch
from data_ops import by_launchers, inputs
from difference import far

from dfkernels.ops.common.triton.problem import make_problem
from dfkernels.ops.fisher_dense import triton as dense


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(dense, "block_sizes", lambda d, device: {"D": 32, "num_warps": 4})


@pytest.mark.parametrize("sigma, offset", [(0.3, 10.0), (3.0, 0.0)])
def test_blocks_make_the_whole(sigma, offset):
    """Two by two, of which the last are cut off; F is symmetric to the last bit."""
    p = inputs(2, 70, 40, sigma, offset)
    got = by_launchers(p, 2, ["fisher_dense"])
    assert far(p, got) == {} and torch.equal(got["dense"], got["dense"].mT)


def test_atoms_of_all_sizes():
    """Each has a scale of its own: outliers whose weight is 0 change nothing, and an atom that is
    small beside the others counts."""
    p = inputs(2, 70, 40, 30.0, 0.0) | {"log_prior": torch.zeros(70)}
    p["y"][:30] *= 1e-3
    p["y"][30:50] *= 1e-8
    p["y"][7], p["y"][9] = 1e9, 1e25
    keep = torch.tensor([i for i in range(70) if i not in (7, 9)])
    inside = p | {"y": p["y"][keep], "log_prior": p["log_prior"][keep]}
    assert far(inside, by_launchers(p, 2, ["fisher_dense"])) == {}


def test_an_outlier_with_a_small_weight():
    """It adds as much to C as all others, and does not take their digits."""
    y = torch.randn(64, 20, generator=torch.Generator().manual_seed(3))
    y[5, 0] = 3e8
    log_prior = torch.zeros(64)
    log_prior[5] = -2 * math.log(3e7)
    level = torch.full((2,), 1e12)
    p = make_problem(torch.zeros(2, 20), y, None, level / level, level, log_prior, 1.0, 0.0)
    w, wide = torch.softmax(log_prior.double(), 0), y.double()
    centred = wide - w @ wide
    exact = centred.T @ (w[:, None] * centred)
    assert float(exact[0, 0]) >= 1.5 * float(exact[1, 1])
    error = (dense._covariance(p)[2] - exact).abs()
    assert float(error[:, 1:].max()) <= 1e-6


def test_what_is_no_number_shows():
    p = inputs(2, 70, 20, 1.0, 0.0) | {"log_prior": torch.zeros(70)}
    p["y"][3, 4] = math.nan
    assert bool(by_launchers(p, 2, ["fisher_dense"])["dense"].isnan().all())
