"""Atoms that carry no weight, masked or so far out that their distances overflow, whatever they
hold and however many they are; and atoms so far out that do carry weight, which must be an error
and never left out.
"""

from __future__ import annotations

import math

import pytest
import torch
from difference import by_ops
from needs import needs_native

from dfkernels import ops

pytestmark = needs_native

# (B, d): atoms in the lanes; rows by rows; rows transposed; rows in place
PATHS = [(1, 1), (3, 2), (5, 16), (5, 17), (20, 17), (20, 64), (3, 200)]
N = 300
LEVELS = (0.05, 0.7, 20.0)  # by differences, between, by the expanded form


def problem(b, d, sigma, dtype, offset=3.0):
    g = torch.Generator().manual_seed(d + b)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    y = normal(N, d) + offset
    return {
        "x": y[:b] + sigma * normal(b, d),
        "y": y,
        "alpha": torch.linspace(0.5, 1, b, dtype=dtype),
        "sigma": torch.full((b,), sigma, dtype=dtype),
        "log_prior": normal(N),
        "v": normal(b, 2, d),
    }


def among(p, share, value, log_prior):
    """p with atoms of this value and log_prior strewn in, so that they are this share of all."""
    more = round(N * share / (1 - share))
    new = torch.randperm(N + more, generator=torch.Generator().manual_seed(more)) >= N
    y, prior = (
        p["y"].new_full((N + more, p["y"].shape[1]), value),
        p["y"].new_full((N + more,), log_prior),
    )
    y[~new], prior[~new] = p["y"], p["log_prior"]
    return p | {"y": y, "log_prior": prior}, (~new).nonzero()[:, 0]


def outputs(p, atoms=None, counts=None):
    return by_ops(
        *(p[k] for k in ("x", "y", "alpha", "sigma", "log_prior", "v")),
        dense=True,
        atoms=atoms,
        counts=counts,
    )


def assert_alike(got, want, p, rtol=0.0):
    eps = torch.finfo(p["x"].dtype).eps
    for name in want:
        if name == "log_prob":
            unit = 1 + want[name].abs().max()
        else:
            unit = want[name].abs().max() + (p["sigma"] ** -2).max() * (name not in ("mean", "ess"))
        bound = rtol * unit
        if name.startswith("log_prob"):  # the priors are added up in another order
            bound = bound + 8 * eps * (1 + want[name].abs().max())
        assert float((got[name] - want[name]).abs().max()) <= float(bound), name


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e20, -3e38, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("b, d", PATHS)
def test_a_masked_atom_is_as_none_whatever_it_holds(b, d, dtype, value):
    for sigma, share in zip(LEVELS, (0.02, 0.3, 0.9), strict=True):
        p = problem(b, d, sigma, dtype)
        if value == 1e300 and dtype == torch.float32:
            value = 3e38
        masked, _ = among(p, share, value, -math.inf)
        assert_alike(outputs(masked), outputs(p), p)


@pytest.mark.parametrize(
    "dtype, value", [(torch.float32, 1e20), (torch.float32, -3e38), (torch.float64, 1e300)]
)
@pytest.mark.parametrize("b, d", PATHS)
def test_an_outlier_without_weight_is_as_none(b, d, dtype, value):
    for sigma, share in zip(LEVELS, (0.02, 0.3, 0.9), strict=True):
        p = problem(b, d, sigma, dtype)
        far, _ = among(p, share, value, 0.0)
        want = outputs(p)
        for name in ("log_prob", "log_prob_alone"):
            want[name] = want[name] + (p["log_prior"].logsumexp(0) - far["log_prior"].logsumexp(0))
        # tiles end elsewhere: sums in another order
        assert_alike(outputs(far), want, p, rtol=256 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("value", [math.nan, 1e20, 3e38])
@pytest.mark.parametrize("b, d", PATHS)
def test_lists_do_not_see_them_either(b, d, value):
    for sigma in LEVELS:
        p = problem(b, d, sigma, torch.float32)
        more, own = among(p, 0.3, value, -math.inf if math.isnan(value) else 0.0)
        n = len(more["y"])
        every = torch.arange(n).repeat(b), torch.full((b,), n)
        some = own.repeat(b), torch.full((b,), len(own))
        assert_alike(outputs(more, *every), outputs(more, *some), p, rtol=256 * 2.0**-23)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_fill_value_does_not_move_the_centre(stored):
    """Data far from the origin are taken about their middle, which a fill value among the first
    atoms is not."""
    p = problem(20, 64, 20.0, torch.float32, offset=1000.0)
    p["y"] = p["y"].to(stored).float()
    filled = p | {"y": p["y"].clone(), "log_prior": torch.zeros(N)}
    filled["y"][:3] = 1e20
    without = p | {"y": p["y"][3:], "log_prior": torch.zeros(N - 3)}
    got, want = outputs(filled | {"y": filled["y"].to(stored)}), outputs(without)
    want["log_prob"] = want["log_prob"] + math.log((N - 3) / N)
    assert_alike(got, want, p, rtol=256 * 2.0**-23)


@pytest.mark.parametrize("b, d", PATHS)
@pytest.mark.parametrize("op", [ops.posterior, ops.fisher_diagonal])
def test_an_outlier_with_weight_is_an_error(op, b, d):
    """At noise of its own size, in pure noise, and beside the query: its square overflows, its
    weight does not vanish."""
    y = torch.randn(N, d, generator=torch.Generator().manual_seed(0))
    y[N // 2] = 1e20
    near = {"sigma": 1e20}, {"alpha": 0.0}, {"alpha": 1e-20}, {"x": 1e20}
    for change in near:
        args = {"x": 0.0, "alpha": 1.0, "sigma": 1.0} | change
        with pytest.raises(ValueError, match="(y|x|result): expected"):
            op(torch.full((b, d), args["x"]), y, args["alpha"], args["sigma"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chains_do_not_see_them(dtype):
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.randn(n, 2, generator=generator, dtype=torch.float64).to(dtype) for n in (30, 5))
    sigma = torch.logspace(1, -1, 30, dtype=torch.float64)
    alpha = torch.ones_like(sigma)
    want = ops.transport_chain(10 * x, y, alpha, sigma, torch.zeros(30, dtype=dtype))
    for value in (math.nan, math.inf, 1e20, 3e38):
        more = torch.cat([y.new_full((40, 2), value), y])
        prior = torch.zeros(70, dtype=dtype)
        prior[:40] = 0.0 if math.isfinite(value) and value < 1e30 else -math.inf
        got = ops.transport_chain(10 * x, more, alpha, sigma, prior)
        for a, e in zip(got, want, strict=True):
            assert float((a - e).abs().max()) <= 1000 * torch.finfo(dtype).eps * (
                1 + float(e.abs().max())
            )
    for value in (3e38, 1e300):
        if value < torch.finfo(dtype).max:
            got = ops.transport_chain(
                10 * x, torch.cat([y.new_full((1, 2), value), y]), alpha, sigma
            )
            assert float((got.x - want.x).abs().max()) <= 1000 * torch.finfo(dtype).eps


def test_the_order_of_noise_levels_in_a_batch_changes_no_bit():
    """Queries are sorted by noise before the kernels take them in groups, and results put back in
    their places."""
    for b, d in [(9, 3), (20, 17), (40, 64), (33, 130)]:
        p = problem(b, d, 1.0, torch.float32)
        p["sigma"] = torch.logspace(-2, 2, b)[
            torch.randperm(b, generator=torch.Generator().manual_seed(b))
        ]
        order = (p["sigma"] / p["alpha"]).argsort()
        got = outputs(p)
        sorted_ = outputs(p | {k: p[k][order] for k in ("x", "alpha", "sigma", "v")})
        for name, out in got.items():
            assert torch.equal(out[order], sorted_[name]), (name, b, d)
