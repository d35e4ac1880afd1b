"""Certified sparse evaluation: what is left out weighs no more than it says, whatever the cloud;
the results lie within their bounds.

Every comparison is with all atoms in float64, by differences.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dfkernels as df
from dfkernels import fisher
from dfkernels._torch import native
from dfkernels.certified import select_atoms
from dfkernels.certified.bounds import Sought
from dfkernels.certified.pytorch import Search, search_in_pytorch
from dfkernels.certified.reference import logits

EPS = 1e-6


@pytest.fixture(autouse=True)
def no_cloud_is_small(monkeypatch):
    monkeypatch.setattr(fisher, "_is_small", lambda cloud: False)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def gaussian(N, d, seed=0):
    """Spectrum 1/k, as natural images have."""
    return normal(N, d, seed=seed) / torch.arange(1, d + 1) ** 0.5


def duplicates(N, d, seed=0):
    return gaussian(max(1, N // 7), d, seed)[torch.arange(N) % max(1, N // 7)]


def outliers(N, d, seed=0):
    y = gaussian(N, d, seed)
    y[:: max(1, N // 3)] *= 1e4
    return y


def low_rank(N, d, seed=0):
    return normal(N, 3, seed=seed) @ normal(3, d, seed=seed + 1)


def one_cluster(N, d, seed=0):
    """Far from the origin, all atoms within float32's grain of each other or a little more."""
    return 1e3 + 1e-3 * normal(N, d, seed=seed)


def all_equal(N, d, seed=0):
    return normal(1, d, seed=seed).expand(N, d).contiguous()


def two_clusters(N, d, seed=0):
    return 0.01 * gaussian(N, d, seed) + 5.0 * (torch.arange(N) % 2)[:, None]


def grainy(N, d, seed=0):
    """Families a thousandth wide, of three dimensions: codes leave nothing over, and float32's
    rounding of logits is far more than the gap in little noise.
    """
    V = normal(3, d, seed=seed + 1)
    family = 5 * normal(max(1, N // 20), 3, seed=seed)
    return (family[torch.arange(N) % len(family)] + 1e-3 * normal(N, 3, seed=seed + 2)) @ V


CLOUDS = [gaussian, duplicates, outliers, low_rank, one_cluster, all_equal, two_clusters, grainy]


def queries(y, sigma, kind, B=11, seed=5):
    """Noisy atoms, atoms themselves, or points far outside."""
    picked = y[torch.arange(B) * 7919 % len(y)]
    noise = normal(B, y.shape[1], seed=seed)
    if kind == "outside":
        return picked + 50 * y.std() * noise / noise.norm(dim=1, keepdim=True) * y.shape[1] ** 0.5
    return picked + (sigma * noise if kind == "noisy" else 0)


def check(x, cloud, alpha, sigma, tolerance=EPS, path="op"):
    """The certificate, against all logits; returns how many atoms each query has, -1:
    all."""
    B, N = len(x), len(cloud)
    level = lambda a: torch.as_tensor(a, dtype=x.dtype).expand(B)
    alpha, sigma = level(alpha), level(sigma)
    prior = None if cloud.log_prior is None else cloud.log_prior.to(x.dtype)
    args = (x, cloud.y, alpha, sigma, prior, cloud.scale, cloud.offset)
    gap = math.log(N / tolerance)
    if path == "op":
        atoms, counts, dropped = select_atoms.op(*args, *cloud.index(), gap, 1)
    else:
        atoms, counts, dropped = search_in_pytorch(*args, *cloud.index(), gap, 1)
    assert atoms.dtype == counts.dtype == torch.int64 and dropped.dtype == torch.float64
    w = logits(*args).softmax(1)
    lists = iter(atoms.split(counts.clamp_min(0).tolist()))
    for b, n in enumerate(counts.tolist()):
        rows = next(lists)
        if n < 0:
            assert float(dropped[b]) == 0
            continue
        assert bool((rows.diff() > 0).all())
        left = torch.ones(N, dtype=torch.bool)
        left[rows] = False
        assert float(w[b, left].sum()) <= float(dropped[b]) * (1 + 1e-9) + 1e-15
        assert float(dropped[b]) <= tolerance
    return counts


@lru_cache
def indexed(make, N, d):
    cloud = df.PointCloud(make(N, d))
    cloud.index()
    return cloud


@pytest.mark.parametrize("path", ["op", "pytorch"])
@pytest.mark.parametrize("make", CLOUDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("N, d", [(1, 40), (63, 32), (300, 64), (400, 200), (300, 800)])
def test_what_is_left_out_weighs_less_than_it_says(make, N, d, path):
    """All levels of noise and all kinds of queries beside one another."""
    cloud, levels = indexed(make, N, d), (1e-3, 0.05, 0.5, 3.0, 100.0)
    pairs = [(sigma, kind) for sigma in levels for kind in ("noisy", "atom", "outside")]
    x = torch.cat([queries(cloud.y, *pair, B=2, seed=5 + i) for i, pair in enumerate(pairs)])
    sigma = torch.tensor([sigma for sigma, _ in pairs]).repeat_interleave(2)
    check(x, cloud, 1.0, sigma, path=path)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(CLOUDS), st.integers(1, 300), st.integers(8, 300), st.floats(-3, 2),
    st.floats(-1.5, 1.5), st.sampled_from(["noisy", "atom", "outside"]), st.booleans(),
    st.floats(-9, -0.1), st.integers(0, 10**6),
)  # fmt: skip
def test_any_cloud(make, N, d, log_sigma, alpha, kind, masked, log_eps, seed):
    y, sigma = make(N, d, seed), 10.0**log_sigma
    prior = None
    if masked:
        prior = 5 * normal(N, seed=seed)
        prior[normal(N, seed=seed + 1) > 1] = -math.inf
        prior[0] = 300.0
    cloud = df.PointCloud(y, prior)
    cloud.index(seed=seed % 3)
    check(alpha * queries(y, sigma, kind, B=3, seed=seed), cloud, alpha, sigma, 10.0**log_eps)


@pytest.mark.parametrize("N, d", [(3000, 64), (3000, 800)])
def test_little_is_kept_in_little_noise(N, d):
    """Else the tests above would hold for a kernel that keeps all."""
    cloud = df.PointCloud(gaussian(N, d))
    cloud.index()
    for sigma, most in ((0.002, 2.0), (0.05, 40.0)):
        counts = check(queries(cloud.y, sigma, "noisy"), cloud, 1.0, sigma)
        assert int(counts.min()) >= 1 and float(counts.double().mean()) <= most


NARROW = (torch.float16, torch.bfloat16, torch.uint8)


@pytest.mark.parametrize(
    "storage, dtype",
    [
        (torch.float64, torch.float64),
        *[(s, t) for s in NARROW for t in (torch.float32, torch.float64)],
    ],
)
def test_storage_and_dtype(storage, dtype):
    y = (30 * gaussian(500, 160) + 128).clamp(0, 255).to(storage)
    cloud = df.PointCloud(y, scale=2 / 255, offset=-1.0)
    cloud.index()
    real = y.to(dtype) * (2 / 255) - 1
    for sigma in (0.01, 0.2, 2.0):
        check(queries(real, sigma, "noisy").to(dtype), cloud, 1.0, sigma)


def test_levels_may_differ_and_alpha_be_zero():
    cloud = df.PointCloud(gaussian(500, 150), normal(500))
    cloud.index()
    alpha = torch.tensor([0.0, -0.7, 1.0, 0.3, 1e-3, 1.0, 1.0, 2.0, 1.0, 0.5, 1.0])
    sigma = torch.logspace(-2, 2, 11)
    check(alpha[:, None] * queries(cloud.y, 0.1, "noisy"), cloud, alpha, sigma)


@pytest.mark.parametrize("factor", [1e-14, 1e-6, 1e8, 1e16])
def test_units_of_the_data(factor):
    """Out of float's range nothing is left out."""
    cloud = df.PointCloud(gaussian(300, 130) * factor)
    cloud.index()
    check(queries(cloud.y, 0.05 * factor, "noisy"), cloud, 1.0, 0.05 * factor)


@lru_cache
def clouds():
    return list(_clouds())


def _clouds():
    y = gaussian(2000, 192).reshape(2000, 3, 8, 8)
    prior = normal(2000, seed=3)
    prior[::9] = -math.inf
    for p in (None, prior):
        cloud = df.PointCloud(y, p)
        cloud.index()
        yield cloud


@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.3, 1.0, 10.0])
def test_results_lie_within_their_bounds(sigma):
    """log_prob, mean, trace, F v, diagonal and dense F in float64, where rounding does not hide the
    bounds."""
    for cloud in clouds():
        x = queries(cloud.y.flatten(1), sigma, "noisy").double().reshape(-1, 3, 8, 8)
        sparse = df.DiffusionFisher(x, cloud, 0.9, sigma, tolerance=1e-4)
        dense = df.DiffusionFisher(x, cloud, 0.9, sigma)
        rounding = 1e-9
        gap = dense.log_prob - sparse.log_prob
        assert bool((gap >= -rounding).all()) and bool(
            (gap <= sparse.log_prob_error + rounding).all()
        )
        off = (dense.denoised - sparse.denoised).flatten(1).norm(dim=1)
        assert bool((off <= sparse.mean_error + rounding).all())
        allowed = sparse.fisher_error + rounding / sigma**2
        assert bool(((dense.trace() - sparse.trace()).abs() <= allowed).all())
        v = normal(len(x), 2, 3, 8, 8, seed=9, dtype=torch.float64)
        off = (dense @ v - sparse @ v).flatten(2).norm(dim=2) / v.flatten(2).norm(dim=2)
        assert bool((off <= allowed[:, None]).all())
        for name in ("diagonal", "to_dense"):
            a, b = getattr(dense, name)(), getattr(sparse, name)()
            assert a.shape == b.shape
            assert bool(((a - b).flatten(1).abs().amax(1) <= allowed).all()), name
        dense_norm = torch.linalg.matrix_norm(dense.to_dense() - sparse.to_dense(), 2)
        assert bool((dense_norm <= allowed).all())
        assert bool((sparse.dropped_mass <= 1e-4).all())
        if sigma <= 0.1:
            assert bool((sparse.atoms_read < 500).all()) and bool((sparse.atoms_read >= 1).all())
        if sigma == 10 and native.available:  # PyTorch's path never takes the dense one
            assert sparse.atoms_read.tolist() == [2000] * len(x) and bool(
                (sparse.dropped_mass == 0).all()
            )


def test_noise_levels_side_by_side():
    """Some blocks of queries take all atoms, others few; the order of the queries stays."""
    [cloud, _] = clouds()
    sigma = torch.tensor([0.01] * 8 + [10.0] * 8 + [0.05] * 5 + [20.0] * 3, dtype=torch.float64)
    x = queries(cloud.y.flatten(1), 0.01, "noisy", B=24).double().reshape(-1, 3, 8, 8)
    sparse, dense = (df.DiffusionFisher(x, cloud, 1.0, sigma, tolerance=t) for t in (1e-8, None))
    assert set(sparse.atoms_read[8:16].tolist()) == {2000} and bool(
        (sparse.atoms_read[:8] < 500).all()
    )
    for name in ("log_prob", "denoised", "ess"):
        assert torch.allclose(getattr(sparse, name), getattr(dense, name), rtol=1e-6, atol=1e-6)


def test_derivatives_are_those_of_the_selected_atoms():
    [cloud, _] = clouds()
    x = (
        queries(cloud.y.flatten(1), 0.05, "noisy", B=3)
        .double()
        .reshape(-1, 3, 8, 8)
        .requires_grad_()
    )
    dense = torch.empty(0)
    for tolerance in (None, 1e-9):
        F = df.DiffusionFisher(x, cloud, 1.0, 0.05, tolerance=tolerance)
        (score,) = torch.autograd.grad(F.log_prob.sum(), x)
        assert torch.allclose(score, F.score, rtol=1e-9, atol=1e-6)
        trace = df.DiffusionFisher(x, cloud, 1.0, 0.05, tolerance=tolerance).trace().sum()
        (slope,) = torch.autograd.grad(trace, x)
        dense = slope if tolerance is None else dense
        assert torch.allclose(slope, dense, rtol=1e-5, atol=1e-3 * float(dense.abs().max()))
    solved = F.solve(torch.ones_like(x), damping=3 / 0.05**2)
    assert torch.allclose(F @ solved + 3 / 0.05**2 * solved, torch.ones_like(x), atol=1e-6)


def test_no_queries():
    [cloud, _] = clouds()
    F = df.DiffusionFisher(torch.empty(0, 3, 8, 8), cloud, 1.0, 0.1, tolerance=EPS)
    assert F.denoised.shape == (0, 3, 8, 8) and F.dropped_mass.shape == F.atoms_read.shape == (0,)


def test_small_clouds_are_taken_whole(monkeypatch):
    monkeypatch.undo()
    [cloud, _] = clouds()
    F = df.DiffusionFisher(cloud.y[:2], cloud, 1.0, 0.01, tolerance=EPS)
    assert F.atoms_read.tolist() == [2000, 2000] and F.mean_error.tolist() == [0.0, 0.0]


def test_dense_has_no_error():
    [cloud, _] = clouds()
    F = df.DiffusionFisher(torch.zeros(2, 3, 8, 8), cloud, 1.0, 0.1)
    assert F.atoms_read.tolist() == [2000, 2000]
    for bound in (F.dropped_mass, F.log_prob_error, F.mean_error, F.fisher_error):
        assert bound.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("isa, threads", [("base", 2), ("v3", 1)])
def test_the_same_certificate_on_other_instruction_sets(isa, threads):
    """Intrinsics, generic code, one thread and two: the same atoms, up to the order of float
    sums."""
    if isa not in native.info().get("isa_levels", []):
        pytest.skip(f"{isa} is not compiled")
    code = (
        "import torch, math; from tests import test_certified as t; import dfkernels as df;"
        f"torch.set_num_threads({threads});"
        "cloud = df.PointCloud(t.gaussian(900, 800)); cloud.index();"
        "print([int(t.check(t.queries(cloud.y, s, 'noisy'), cloud, 1.0, s).sum())"
        " for s in (0.01, 0.1, 0.4)])"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ
        | {
            "DFKERNELS_ISA": isa,
            "PYTHONPATH": os.pathsep.join([root, os.path.join(root, "tests")]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    cloud = df.PointCloud(gaussian(900, 800))
    cloud.index()
    here = [int(check(queries(cloud.y, s, "noisy"), cloud, 1.0, s).sum()) for s in (0.01, 0.1, 0.4)]
    there = eval(done.stdout)
    assert all(abs(a - b) <= 2 + a // 50 for a, b in zip(here, there, strict=True)), (here, there)


def test_every_level_bounds_every_logit():
    """The bounds themselves, at each level, before anything is compared with anything."""
    cloud = df.PointCloud(gaussian(1400, 800))
    x = queries(cloud.y, 0.2, "noisy", B=4)
    alpha, sigma = torch.full((4,), 0.9), torch.full((4,), 0.2)
    exact = logits(x, cloud.y, alpha, sigma, None, 1.0, 0.0)
    index, seen = cloud.index(), []

    class Watched(Search):
        def bounds(self, atoms, product, norm_square, error):
            t = cloud.y[atoms].double() - index.centre.double()
            true = self.z @ t.T
            assert bool(((true - product).abs() <= error).all())
            seen.append(float(((true - product).abs() / error).max()))
            return super().bounds(atoms, product, norm_square, error)

    sought = Sought(x, cloud.y, alpha, sigma, None, 1.0, 0.0)
    s = Watched(sought, index, math.log(1400 / EPS), 1)
    s.run()
    assert len(seen) == 2 and min(seen) > 0.02  # both levels; neither is idle
    assert bool((exact.softmax(1)[~s.selected()] <= EPS).all())


def test_index_needs_an_index():
    cloud = df.PointCloud(gaussian(50, 40))
    x = torch.zeros(1, 40)
    with pytest.raises(
        ValueError, match=r"tolerance: the cloud has no index: call cloud.index\(\) first"
    ):
        df.DiffusionFisher(x, cloud, 1.0, 0.1, tolerance=EPS)
    cloud.index()
    for wrong in (0.0, 1.0, -1e-3, 1.5):
        with pytest.raises(ValueError, match=r"tolerance: expected a number in \(0, 1\), or None"):
            df.DiffusionFisher(x, cloud, 1.0, 0.1, tolerance=wrong)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="tolerance: expected a finite value"):
            df.DiffusionFisher(x, cloud, 1.0, 0.1, tolerance=wrong)
    with pytest.raises(TypeError, match="tolerance: expected a number, got str"):
        df.DiffusionFisher(x, cloud, 1.0, 0.1, tolerance="small")
    bad = torch.zeros(1, 40).index_fill(1, torch.tensor(3), math.nan)
    with pytest.raises(ValueError, match=r"x: expected finite values, got nan at index \[0, 3\]"):
        _ = df.DiffusionFisher(bad, cloud, 1.0, 0.1, tolerance=EPS).denoised


def test_transforms_say_that_they_are_not_there():
    cloud = df.PointCloud(gaussian(50, 40))
    cloud.index()
    with pytest.raises(NotImplementedError, match="tolerance: expected no vmap and no derivative"):
        torch.func.vmap(
            lambda x: df.DiffusionFisher(x[None], cloud, 1.0, 0.1, tolerance=EPS).denoised
        )(torch.zeros(2, 40))


def test_a_trajectory_ends_where_the_dense_one_does():
    [cloud, _] = clouds()
    schedule = df.schedule.EDM()
    t = df.methods.grid.time_grid(schedule, 12, (0.01, 20.0), "edm")
    x = 20 * normal(6, 3, 8, 8, seed=2)
    ends = [
        df.methods.samplers.sample(
            df.methods.Denoiser.exact(cloud, schedule, tolerance=eps), x, t, "ddim"
        ).x[-1]
        for eps in (None, EPS)
    ]
    assert torch.allclose(*ends, atol=1e-4)


@pytest.mark.skipif(not native.available, reason="no compiled part")
def test_masked_atoms_are_not_read():
    """Where a mask leaves few atoms the kernel goes over these alone: as with them alone, to the
    last bits."""
    y, prior = gaussian(1000, 96), normal(1000, seed=1)
    few = torch.arange(0, 1000, 3)
    mask = torch.full((1000,), -math.inf)
    mask[few] = prior[few]
    x = queries(y, 0.5, "noisy")
    v = normal(len(x), 96, seed=4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            df.ops.posterior(x, y, 1.0, 0.5, mask),
            df.ops.posterior(x, y[few], 1.0, 0.5, prior[few]),
            strict=True,
        )
    )
    for op in (df.ops.fisher_matvec, lambda x, y, v, *a: df.ops.fisher_dense(x, y, *a)):
        assert torch.equal(op(x, y, v, 1.0, 0.5, mask), op(x, y[few], v, 1.0, 0.5, prior[few]))
