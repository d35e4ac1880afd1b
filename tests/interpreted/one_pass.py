"""One pass over the atoms for many queries in few dimensions: values at every noise, bounds, order
of the queries, hostile values."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import _normal
from data_ops import inputs
from difference import difference_form, errors

from dfkernels.ops.common.triton import fused, launch
from dfkernels.ops.common.triton.problem import make_problem
from dfkernels.ops.fisher_diagonal import triton as diagonal_kernels
from dfkernels.ops.fisher_matvec import triton as matvec_kernels
from dfkernels.ops.log_prob import triton as log_prob_kernels
from dfkernels.ops.posterior import triton as posterior_kernels

EPS = 2.0**-23
# B, N, d: without tensor cores and with them, whole and odd numbers of coordinates
SHAPES = {"two": (64, 90, 2), "five": (64, 40, 5), "twelve": (64, 40, 12), "forty": (21, 70, 40)}


@pytest.fixture(autouse=True)
def many_splits(monkeypatch):
    """Splits of a few tiles already where there are few atoms; and a pass for few queries."""
    monkeypatch.setattr(launch, "MAX_TILES", 4)
    monkeypatch.setattr(fused, "MOST_TILES", 4)
    monkeypatch.setattr(fused, "LEAST_QUERIES", 4)


LEVELS = torch.tensor([1e-3, 0.03, 0.3, 1.0, 3.0, 30.0, 1e3])


def problem(B, N, d, sigma, offset=0.0, *, prior=True):
    """Queries of one noise level, or of several in turn."""
    sigma = torch.as_tensor(sigma).repeat(B)[:B]
    p = inputs(B, N, d, 0.0, offset)
    p |= {"x": p["x"] + sigma[:, None] * _normal(1)(B, d).float(), "sigma": sigma}
    return p if prior else p | {"log_prior": None}


def call(p, *, scale=1.0, offset=0.0, y=None):
    """All outputs of the launchers for contiguous float32 tensors."""
    args = [p["x"], p["y"] if y is None else y]
    rest = (p["alpha"], p["sigma"], p["log_prior"], scale, offset)
    log_prob, mean, trace, ess = posterior_kernels.launch(*args, *rest)
    product = matvec_kernels.launch(*args, p["v"], *rest, fisher=True)
    return {
        "log_prob": log_prob,
        "mean": mean,
        "fisher_trace": trace,
        "ess": ess,
        "log_prob_alone": log_prob_kernels.launch(*args, *rest),
        "matvec": product,
        "diagonal": diagonal_kernels.launch(*args, *rest),
    }


def expanded_form(p):
    """Plain float32 torch by matrix products, without |x|^2 in the logits."""
    x, y, v, alpha = p["x"], p["y"], p["v"][:, 0], p["alpha"]
    ratio, log_pi = alpha / p["sigma"] ** 2, torch.log_softmax(p["log_prior"], 0)
    norm = y.square().sum(1)
    logits = (ratio[:, None] * x) @ y.T - (alpha * ratio / 2)[:, None] * norm + log_pi
    w = torch.softmax(logits, 1)
    along = v @ y.T
    along = w * (along - (w * along).sum(1, keepdim=True))
    precision = p["sigma"][:, None] ** -2
    product = (v - (alpha * ratio)[:, None] * (along @ y)) * precision
    variance = w @ (y * y) - (w @ y) ** 2
    constant = x.shape[1] / 2 * torch.log(2 * torch.pi * p["sigma"] ** 2)
    log_prob = torch.logsumexp(logits, 1) - x.square().sum(1) / 2 / p["sigma"] ** 2 - constant
    ess = 1 / w.square().sum(1)
    return {
        "mean": w @ y,
        "log_prob": log_prob,
        "ess": ess,
        "matvec": product[:, None],
        "diagonal": (1 - (alpha * ratio)[:, None] * variance) * precision,
    }


def too_far(p, got):
    """(name, sigma) -> (error, allowed): RMS over the queries of a noise level, allowed twice that
    of the better of plain torch's two forms and four roundings of the output, ten for
    1/sum w^2."""
    exact = difference_form(**p)
    plain = [difference_form(**p, dtype=torch.float32), expanded_form(p)]
    unit = {
        "log_prob": 1 + exact["log_prob"].abs(),
        "fisher_trace": p["x"].shape[1] * p["sigma"].double() ** -2,
    }
    found = {}
    for name, out in got.items():
        all_errors = [
            errors({name: f[name]}, {name: exact[name]}, unit)[name]
            for f in ({name: out}, *plain)
            if name in f
        ]
        for sigma in p["sigma"].unique():
            rms = [float(e[p["sigma"] == sigma].square().mean().sqrt()) for e in all_errors]
            better = min(e for e in rms[1:] if not math.isnan(e))
            allowed = 2 * better + (10 if name == "ess" else 4) * EPS
            if not rms[0] <= allowed:
                found[name, float(sigma)] = (rms[0], allowed)
    return found


@pytest.mark.parametrize("shape, offset", [*((s, 0.0) for s in SHAPES), ("two", 10.0)])
def test_errors_at_every_noise(shape, offset, monkeypatch):
    """From 1e-3 to 1e3 of the data's spread in one call, queries that take products beside such
    that do not; also with an offset of ten times the spread, where the expanded form loses
    digits."""
    p = problem(*SHAPES[shape], LEVELS, offset)
    monkeypatch.setattr(fused, "MOST_TILES", 1 if SHAPES[shape][2] > fused.SMALL_D else 4)
    one = prepared(p)
    taken = one.by_products[one.back].bool()
    assert bool(taken[p["sigma"] >= 30].all()) and not bool(taken[p["sigma"] < 0.1].any())
    assert torch.equal(one.problem.x[one.back], p["x"])
    assert bool((one.by_products.diff() >= 0).all())  # those that take products come last
    assert too_far(p, call(p)) == {}


def test_a_hundred_coordinates():
    """Where only posterior and log_prob have a pass."""
    p = problem(12, 40, 100, torch.tensor([0.1, 1.5, 1e3]))
    one = prepared(p)
    taken = one.by_products[one.back].bool()
    assert bool(taken[p["sigma"] > 1].all()) and not bool(taken[p["sigma"] < 1].any())
    args = (p["x"], p["y"], p["alpha"], p["sigma"], p["log_prior"], 1.0, 0.0)
    names, outs = ("log_prob", "mean", "fisher_trace", "ess"), posterior_kernels.launch(*args)
    got = dict(zip(names, outs, strict=True)) | {"log_prob_alone": log_prob_kernels.launch(*args)}
    assert too_far(p, got) == {}


def prepared(p):
    given = (p["x"], p["y"], None, p["alpha"], p["sigma"], p["log_prior"], 1.0, 0.0)
    plan = fused.plan_for(p["x"], p["y"], None, "posterior")
    return fused.prepared(make_problem(*given, anchor=False), plan)


def test_without_a_prior_and_in_groups(monkeypatch):
    """The same numbers in groups of queries, but for roundings: a group is cut otherwise."""
    p = problem(12, 18, 6, 2.0, prior=False)
    whole = call(p)
    want = difference_form(**p)
    assert float((whole["mean"] - want["mean"]).abs().max()) <= 1e-6
    plan = fused.plan_for(p["x"], p["y"], None, "diagonal")
    room = fused.scratch(18, 6, 1, 12, plan, fused.device_of(p["x"]))
    monkeypatch.setattr(launch, "SCRATCH", 6 * room)
    again = call(p)
    for name, out in whole.items():
        assert float((again[name] - out).abs().max()) <= 1e-5 * float(out.abs().max()), name


@pytest.mark.parametrize("B, N, d", [(8, 40, 3), (8, 20, 20)])
def test_many_vectors_share_a_pass(B, N, d):
    p = problem(B, N, d, 3.0)
    v = _normal(9)(B, 2, d).float()
    args = [p["x"], p["y"]]
    rest = (p["alpha"], p["sigma"], p["log_prior"], 1.0, 0.0)
    run = partial(matvec_kernels.launch, fisher=True)
    together = run(*args, v, *rest)
    for k in range(2):
        alone = run(*args, v[:, k : k + 1].contiguous(), *rest)[:, 0]
        assert float((together[:, k] - alone).abs().max()) <= 1e-6 * float(alone.abs().max())


@pytest.mark.parametrize("storage, d", [(torch.bfloat16, 3), (torch.uint8, 20)])
def test_storage(storage, d):
    p = problem(8, 40, d, 1.0)
    stored = (40 * p["y"] + 100).clamp(0, 255).to(storage)
    p["y"] = 0.02 * stored.float() - 2
    assert too_far(p, call(p, scale=0.02, offset=-2.0, y=stored)) == {}


def test_the_rule_bounds_the_terms_of_a_logit():
    """A query that is not near takes products only where every term of every logit is at most
    d + SPARE, and in large noise all do."""
    for d in (2, 20):
        p = problem(60, 100, d, 1.0)
        p["sigma"] = torch.logspace(-2, 2, 60)
        one = prepared(p)
        a, centre = one.problem, one.centre.double()
        t = torch.where((a.log_pi > -math.inf)[:, None], a.y - centre, 0)
        x = a.x.double() - a.alpha[:, None] * centre
        ratio = a.alpha.double() / a.sigma.double() ** 2
        dots = (ratio[:, None] * (x @ t.T)).abs()
        squares = (a.alpha * ratio)[:, None] * t.square().sum(1) / 2
        largest = (dots + squares).amax(1)
        takes = one.by_products > 0
        near = x.square().sum(1) <= fused.NEAR * d * a.sigma.double() ** 2
        assert bool((largest[takes & ~near] <= d + fused.SPARE).all()) and bool(takes[near].all())
        assert bool((largest[~takes] >= 0.1 * (d + fused.SPARE)).all())
        assert 10 < int(takes.sum()) < 50 and bool(takes[one.back][-5:].all())


@pytest.mark.parametrize("d", [3, 20])
@pytest.mark.parametrize("sigma, offset", [(1e-2, 0.0), (0.3, 10.0), (3.0, 0.0)])
def test_bounds(d, sigma, offset, monkeypatch):
    """Of every strip, and of the largest logit; they bite: within 3 % of the size of the terms."""
    monkeypatch.setattr(fused, "SPARE", -math.inf)
    monkeypatch.setattr(fused, "NEAR", -1)  # nobody takes products
    p = problem(64, 140, d, sigma, offset)
    one = prepared(p)
    upper, floor = fused._bounds(one, fused.device_of(p["x"]))
    a = one.problem
    x, y = a.x.double() - a.alpha[:, None] * one.centre, a.y.double() - one.centre
    factor = (a.alpha / a.sigma.double() ** 2)[:, None] / math.log(2)
    logits = factor * (x @ y.T - a.alpha[:, None] / 2 * y.square().sum(1))
    logits = (logits + a.log_pi / math.log(2)).nan_to_num(nan=-math.inf)
    strip = one.plan.strip
    pad = torch.full((64, -140 % len(one.weights)), -math.inf, dtype=torch.float64)
    strips = torch.cat([logits, pad], 1)[:, : upper.shape[1] * strip]
    largest = strips.unflatten(1, (-1, strip)).amax(2)
    exists = largest > -math.inf
    size = factor.abs() * x.norm(dim=1, keepdim=True) * y.norm(dim=1).max()
    assert bool((upper >= largest)[exists].all())
    assert bool((upper <= largest + 0.03 * size)[exists].all())
    top = logits.amax(1)
    assert bool((floor <= top).all()) and bool((floor >= top - 0.03 * size[:, 0]).all())


@pytest.mark.parametrize("d", [3, 20])
@pytest.mark.parametrize("name, row", [("x", 0), ("y", 1), ("sigma", 0)])
def test_nan_in_nan_out(name, row, d):
    """Of a query in little noise, or in much, and of an atom that is not masked."""
    p = problem(8, 30, d, torch.tensor([0.1, 30.0]))
    p["log_prior"][1] = 0.0
    p[name][row : row + 2] = math.nan
    args = (p["x"], p["y"], p["alpha"], p["sigma"], p["log_prior"], 1.0, 0.0)
    mean, log_prob = posterior_kernels.launch(*args)[1], log_prob_kernels.launch(*args)
    of_all = name == "y"
    assert bool(mean[:2].isnan().any(1).all()) and bool(log_prob[:2].isnan().all())
    assert bool(mean[2:].isnan().any()) == bool(log_prob[2:].isnan().any()) == of_all


@pytest.mark.parametrize("d", [3, 20])
def test_masked_atoms_may_hold_anything_and_outliers_have_no_weight(d):
    p = problem(8, 30, d, 0.5)
    odd = p | {"y": p["y"].clone()}
    odd["y"][::5] = math.nan  # masked by `inputs`
    got = call(odd)
    assert too_far(p, got) == {}
    far_out = p | {"y": p["y"].clone()}
    far_out["y"][1] = 1e30
    args = (far_out["x"], far_out["y"], p["alpha"], p["sigma"], p["log_prior"], 1.0, 0.0)
    got = posterior_kernels.launch(*args)[1]
    kept = p | {"y": p["y"].clone(), "log_prior": p["log_prior"].clone()}
    kept["log_prior"][1] = -math.inf
    want = difference_form(**kept)["mean"]
    assert float((got - want).abs().max()) <= 1e-5


@pytest.mark.parametrize("d", [3, 20])
def test_an_outlier_whose_square_overflows_sends_all_queries_to_differences(d):
    """Also those near the centre, which is that of the others: the outlier is not sampled."""
    p = problem(8, 140, d, 3.0)
    p["y"][1], p["log_prior"][1] = 1e30, 0.0
    assert not bool(prepared(p).by_products.any())
    args = (p["x"], p["y"], p["alpha"], p["sigma"], p["log_prior"], 1.0, 0.0)
    got = (*posterior_kernels.launch(*args)[:3], diagonal_kernels.launch(*args))
    p["y"][1] = 1e4  # as far as matters
    want = difference_form(**p)
    for g, name in zip(got, ("log_prob", "mean", "fisher_trace", "diagonal"), strict=True):
        assert float((g - want[name]).abs().max()) <= 1e-5 * float(want[name].abs().max()), name


def test_the_same_bits_every_time():
    p = problem(8, 20, 5, 1.0)
    args = (p["x"], p["y"], p["alpha"], p["sigma"], p["log_prior"], 1.0, 0.0)
    once, again = posterior_kernels.launch(*args), posterior_kernels.launch(*args)
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))
