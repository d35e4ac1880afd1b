"""top_k through an index: the atoms and weights of a search through all; and indices of clouds at
the ends of float32.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_certified import gaussian, normal, queries
from test_certified_masked import PATHS, both_paths, found

import dfkernels as df
from dfkernels.certified.build import build_index
from dfkernels.certified.select_atoms import op


def assert_same_with_an_index(x, cloud, alpha, sigma, k):
    cloud.index()
    want, got = (df.top_k(x, cloud, alpha, sigma, k, tolerance=t) for t in (None, 1e-6))
    assert torch.equal(got.index, want.index)
    torch.testing.assert_close(got.weight, want.weight, rtol=2e-6, atol=torch.finfo(x.dtype).tiny)


@both_paths
@pytest.mark.parametrize("N", [1, 2, 50, 300])
def test_a_search_for_the_heaviest_atom_keeps_it(N, path):
    """No weight may go in a search for atoms: all that remained were left out as the lightest."""
    y = gaussian(N, 40)
    x = queries(y, 0.3, "noisy", B=9)
    atoms, counts, _ = found(path, x, y, 1.0, 0.3, gap=0.0)
    assert bool(((counts > 0) | (counts == -1)).all())
    heaviest = torch.cdist(x.double(), y.double()).argmin(1)
    for selected, nearest, n in zip(
        atoms.split(counts.clamp_min(0).tolist()), heaviest, counts, strict=True
    ):
        assert n < 0 or nearest in selected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("k", [1, 3])
def test_log_weights_that_float32_rounds_to_the_same(k, path, monkeypatch):
    """The order is that of the float64 weights, which a search in float32 does not see."""
    monkeypatch.setattr(
        "dfkernels.cloud.select_atoms", op if path == "compiled" else in_pytorch(path)
    )
    y = normal(1, 40) + 1e-5 * normal(200, 40, seed=1)
    prior = -10 + 1e-7 * normal(200, seed=2, dtype=torch.float64)
    assert_same_with_an_index(y[:4] + 1e-3, df.PointCloud(y, prior), 1.0, 1.0, k)


def in_pytorch(path):
    """The search on devices without a kernel, where `op` is expected."""
    call = lambda *args: PATHS[path](*args)
    call._schema = op._schema
    return call


def test_equal_logits_by_rounding_come_in_the_order_of_the_atoms():
    """Beside the log weights, what distances differ by is less than a rounding of their sum."""
    y = 1e4 + 1e-3 * torch.randint(-1, 2, (200, 33), generator=torch.Generator().manual_seed(0))
    prior = torch.where(torch.arange(200) % 3 == 0, 300.0, -300.0)
    assert_same_with_an_index(1e-6 * y[::30], df.PointCloud(y, prior), 1e-6, 0.7, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_where_rounding_moves_logits(dtype):
    """Noise below the last digits of the data: the kernel's logits and those by differences are
    unlike each other."""
    y = 1e4 + 1e-3 * torch.randint(0, 256, (7, 33), generator=torch.Generator().manual_seed(0))
    cloud = df.PointCloud(y.to(dtype))
    for sigma in (1e-13, 1e-10, 1e-8):
        assert_same_with_an_index(0.7 * cloud.y[:4], cloud, 0.7, sigma, 2)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-8, 1e18, 1e30])
@pytest.mark.parametrize("rank", [1, 40])
def test_an_index_of_atoms_whose_squares_leave_float32(size, rank):
    y = (normal(60, rank, seed=1) @ normal(rank, 40, seed=2) * size).contiguous()
    assert all(bool(t.isfinite().all()) for t in df.PointCloud(y).index())


def test_an_index_of_atoms_that_differ_in_their_last_digits():
    """Squares of the differences' squares underflow in float32, and with them the principal
    axes."""
    for seed in range(40):
        two = 1 + normal(1, 512, seed=seed, dtype=torch.float64).expand(2, -1)
        y = two + 1e-9 * normal(2, 512, seed=seed + 1, dtype=torch.float64)
        assert all(bool(t.isfinite().all()) for t in build_index(y, 1.0, 0.0))


def test_an_index_that_float32_cannot_hold_says_so():
    with pytest.raises(
        ValueError, match=r"^index: expected atoms whose distances float32 can hold"
    ):
        df.PointCloud(1e100 * normal(30, 40, dtype=torch.float64)).index()
    assert math.isfinite(df.PointCloud(1e30 * normal(30, 40)).index().named_limits.radius)
