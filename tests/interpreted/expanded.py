"""The expanded form by parts: its bounds, who takes products, and the error at every noise
level, against float64 and plain PyTorch's two forms."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from cases import DATA_OPS, _normal
from data_ops import by_launchers, inputs
from difference import EPS, difference_form, errors, far

from dfkernels.ops.common.triton import launch, products
from dfkernels.ops.common.triton import logits as logits_of
from dfkernels.ops.common.triton import problem as problem_of
from dfkernels.ops.common.triton.problem import make_problem

WAYS = {"few": 64, "many": 2}  # what counts as few


@pytest.fixture
def way(request, monkeypatch):
    """By the kernels for few rows, or by those for many, in several chunks and chains."""
    monkeypatch.setattr(logits_of, "FEW", WAYS[request.param])
    monkeypatch.setattr(logits_of, "PREPARED", 1)
    monkeypatch.setattr(logits_of, "CHUNK", 128)
    monkeypatch.setattr(products, "CHAINS", 1)
    return request.param


every_way = pytest.mark.parametrize("way", WAYS, indirect=True)


def problem(p, y=None, scale=1.0, offset=0.0):
    y = p["y"] if y is None else y
    return make_problem(p["x"], y, None, p["alpha"], p["sigma"], p["log_prior"], scale, offset)


def exact_logits(p, a):
    """In double and base 2, less what the problem's queries leave out."""
    log_pi = torch.log_softmax(p["log_prior"].double(), 0)
    u = (p["x"][:, None] - p["alpha"][:, None, None] * p["y"]).double()
    u /= p["sigma"].double()[:, None, None]
    return (log_pi - 0.5 * u.square().sum(-1) - a.queries.common[:, None]) / math.log(2)


def bounds(a):
    """What the filter writes, before anything is computed anew: (upper [B, N], floor [B])."""
    seen = []
    keep = lambda p, bounds, floor, largest: seen.append(floor) or bounds
    with mock.patch.object(logits_of, "by_differences", keep):
        return logits_of.expanded(a).value, seen[0]


@every_way
@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize(
    "storage, sigma",
    [
        *((torch.float32, sigma) for sigma in (1e-2, 1.0, 1e2)),
        *((storage, 1.0) for storage in (torch.float16, torch.bfloat16)),
    ],
    ids=str,
)
def test_the_filter_bounds_every_logit(way, storage, sigma, offset, monkeypatch):
    p = inputs(5, 150, 40, sigma, offset)
    y = p["y"].to(storage)
    p["y"] = y.float()
    monkeypatch.setattr(problem_of, "NEAR", -1)  # nobody takes products
    a = problem(p, y)
    exact = exact_logits(p, a)
    upper, floor = bounds(a)
    valid = p["log_prior"] > -math.inf
    slack = 1e-7 * exact[:, valid].abs()
    assert bool((upper[:, valid] >= exact[:, valid] - slack).all())
    assert bool((floor <= exact.max(1).values + 1e-7 * exact.max(1).values.abs()).all())
    assert bool((upper[:, ~valid] == -math.inf).all())
    logits = logits_of.expanded(a).value
    matters = exact >= (exact.max(1).values - a.gap)[:, None]
    assert float((logits - exact)[matters].abs().max()) <= 1e-5 * float(exact[matters].abs().max())


@pytest.mark.parametrize("way, share", [("few", 2e-3), ("many", 0.5)], indirect=["way"])
def test_the_bound_bites(way, share, monkeypatch):
    """Where every coordinate is rounded by as much as can be, in the same direction, the error of
    one part is more than half of its bound. That of three parts is for additions that all truncate,
    which they do not."""
    # all but half way between two bfloat16, or float16, numbers
    half = 1 + (2.0**-8 if way == "few" else 2.0**-11) - 2.0**-20
    signs = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0)
    p = {"alpha": torch.ones(3), "sigma": torch.ones(3), "log_prior": torch.zeros(2)}
    p["y"] = half * torch.stack([signs, -signs])
    p["x"] = (half * signs).expand(3, -1).contiguous()
    monkeypatch.setattr(problem_of, "NEAR", -1)
    a = problem(p)
    exact = exact_logits(p, a)
    upper, _ = bounds(a)
    bound, error = _error_of(a, upper, exact)
    assert bool((error <= bound).all()) and float((error / bound).max()) >= share


def _error_of(a, upper, exact):
    """(bound, error) of the logits, with the bound taken off by a second call without it."""
    with mock.patch.object(logits_of, "_coefficients", without_bound(logits_of._coefficients)):
        plain, _ = bounds(a)
    return (upper - plain).double(), (plain - exact).abs()


def without_bound(coefficients):
    def changed(*given):
        out = coefficients(*given)
        out[3:] = 0
        return out

    return changed


@every_way
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_queries_in_large_noise_take_products(way, offset):
    """At sigma = 3 times the data's spread all of them; at a tenth none. Narrow atoms far from the
    origin, which are read untouched, only at 30 times."""
    for sigma, storage, expected in (
        (3.0, torch.float32, 1),
        (0.1, torch.float32, 0),
        (3.0, torch.float16, int(offset == 0)),
        (30.0, torch.float16, 1),
    ):
        p = inputs(5, 150, 40, sigma, offset)
        found = logits_of.expanded(problem(p, p["y"].to(storage)))
        assert set(found.by_products.tolist()) == {expected}


def expanded_form(x, y, alpha, sigma, log_prior, v):
    """The posterior mean as PyTorch users write it, in float32."""
    square = x.square().sum(1)[:, None] + (alpha**2)[:, None] * y.square().sum(1)
    logits = torch.log_softmax(log_prior, 0) - (square - 2 * alpha[:, None] * (x @ y.T)) / (
        2 * sigma**2
    ).unsqueeze(1)
    return torch.softmax(logits, 1) @ y


STORAGE = {  # dtype, scale and offset of what is stored, offset of the data, levels
    "float32": (torch.float32, 1.0, 0.0, 0.0, (1e-3, 0.1, 1.0, 3.0, 1e3)),
    "float32, far": (torch.float32, 1.0, 0.0, 10.0, (0.1, 3.0, 1e3)),
    "float16, far": (torch.float16, 1.0, 0.0, 10.0, (0.1, 3.0, 15.0)),
    "bfloat16": (torch.bfloat16, 1.0, 0.0, 0.0, (1e-3, 0.1, 3.0, 1e3)),
    "uint8": (torch.uint8, 0.02, -2.0, 0.0, (1.0, 30.0)),
}


@every_way
@pytest.mark.parametrize("name", STORAGE)
def test_error_at_every_level(way, name):
    """At most twice that of the better of plain PyTorch's forms, and four roundings of the output;
    every output against the difference form."""
    d, (dtype, scale, offset, far, levels) = 100, STORAGE[name]
    for sigma in levels:
        p = inputs(4, 140, d, sigma, far)
        y = ((p["y"] - offset) / scale).clamp(*((0, 255) if dtype == torch.uint8 else (-1e4, 1e4)))
        y = y.to(dtype)
        p["y"] = scale * y.float() + offset
        narrow = {"scale": scale, "offset": offset}
        ops = DATA_OPS[: 3 if sigma in (0.1, 3.0, 30.0) and name in ("float32", "uint8") else 1]
        got = by_launchers(p, 4, ops, y=y, **narrow)
        exact = difference_form(**p)
        plain = difference_form(**p, dtype=torch.float32)
        unit = {
            "log_prob": 1 + exact["log_prob"].abs(),
            "fisher_trace": d * p["sigma"].double() ** -2,
        }
        rms = lambda e: float(e.square().mean().sqrt())
        exact = {k: exact[k] for k in got}
        ours, theirs = errors(got, exact, unit), errors(plain, exact, unit)
        other = (expanded_form(**{k: p[k] for k in p}) - exact["mean"]).norm(dim=1)
        theirs["mean"] = torch.minimum(theirs["mean"], other / exact["mean"].norm(dim=1))
        allowed = {k: 2 * rms(theirs[k]) + (10 if k == "ess" else 4) * EPS for k in exact}
        bad = {k: (rms(ours[k]), allowed[k]) for k in exact if not rms(ours[k]) <= allowed[k]}
        assert bad == {}, sigma


@every_way
def test_high_noise_in_many_dimensions(way):
    """Where logits that contain |x|^2 are thousands, and their rounding was 2e-5 of the mean."""
    N, d, sigma = 128, 4096, 192.0
    y = _normal(1)(N, d).bfloat16()
    x = y[:4].float() + sigma * _normal(2)(4, d).float()
    p = dict(x=x, y=y.float(), alpha=torch.ones(4), sigma=torch.full((4,), sigma))
    p |= {"log_prior": torch.zeros(N), "v": _normal(3)(4, 1, d).float()}
    exact = difference_form(**p)["mean"]
    error = lambda mean, exact=exact: float(((mean - exact).norm(dim=1) / exact.norm(dim=1)).max())
    got = error(by_launchers(p, 4, ["posterior"], y=y)["mean"])
    best = min(
        error(f) for f in (difference_form(**p, dtype=torch.float32)["mean"], expanded_form(**p))
    )
    assert got <= 2e-6 and got <= 2 * best + 2 * EPS
    if way == "few":
        alone = {k: t[:1] if len(t) == 4 else t for k, t in p.items()}
        assert error(by_launchers(alone, 1, ["posterior"])["mean"], exact[:1]) <= 2e-6


@every_way
def test_a_term_that_overflows_where_a_difference_does_not(way):
    """Queries at their atoms, so far from the centre, for their noise, that <x', y'>/sigma^2 is no
    float32, but its half is: each is its atom's."""
    p = inputs(4, 140, 40, 1.0, 0.0) | {"alpha": torch.ones(4), "log_prior": torch.zeros(140)}
    p["y"] *= 18.6 / p["y"].norm(dim=1, keepdim=True)
    p |= {"x": p["y"][5:140:40].clone(), "sigma": torch.full((4,), 1e-18)}
    got = by_launchers(p, 4, ["posterior"])
    assert torch.equal(got["mean"], p["x"])
    want = -40 * (math.log(1e-18) + 0.5 * math.log(2 * math.pi)) - math.log(140)
    assert bool(((got["log_prob"] - want).abs() <= 1e-6 * abs(want)).all())


many = pytest.mark.parametrize("way", ["many"], indirect=True)


@many
def test_queries_in_all_kinds_of_noise_together(way):
    """Those that take products beside those that do not; a program of products has both."""
    p = inputs(4, 140, 40, 1.0, 0.0)
    p["sigma"] = torch.tensor([0.05, 4.0, 0.3, 40.0])
    p["x"] = p["x"] + (p["sigma"] - 1)[:, None] * _normal(7)(4, 40).float()
    found = logits_of.expanded(problem(p))
    assert found.by_products.tolist() == [0, 1, 0, 1]
    assert torch.equal(found.max_logit, found.value.amax(1))
    assert far(p, by_launchers(p, 4, ["posterior"])) == {}
    seen = []
    alone = lambda p: seen.append(p.sigma.tolist()) or p.x
    args = [p[k] for k in ("x", "y", "alpha", "sigma", "log_prior")]
    back = launch.in_query_groups(alone, *args[:2], None, *args[2:], 1.0, 0.0)
    assert torch.equal(back, p["x"])
    assert seen == [torch.tensor([0.05, 0.3, 4.0, 40.0]).tolist()]


@many
def test_atoms_of_all_sizes(way):
    """Atoms that no one scale would hold, and outliers whose weight is 0, of which one has an
    infinite square."""
    p = inputs(4, 140, 40, 30.0, 0.0) | {"log_prior": torch.zeros(140)}
    p["y"][:50] *= 1e-3
    p["y"][50:100] *= 1e-8
    p["y"][7], p["y"][9], p["y"][11] = 1e9, 1e25, 0.0
    assert logits_of.expanded(problem(p)).by_products.tolist() == [1, 1, 1, 1]
    got = by_launchers(p, 4, ["posterior"])
    got["log_prob"] += math.log(140 / 138)
    keep = torch.tensor([i for i in range(140) if i not in (7, 9)])
    inside = p | {"y": p["y"][keep], "log_prior": p["log_prior"][keep]}
    assert far(inside, got) == {}


@many
@pytest.mark.parametrize("size", [3e-17, 1e16])
def test_data_of_any_size(way, size):
    """Weights times projections times scales are of its square."""
    p = inputs(4, 70, 20, 3.0, 0.0)
    p |= {k: size * p[k] for k in ("x", "y", "sigma")}
    assert far(p, by_launchers(p, 4, ["fisher_matvec"])) == {}


@many
@pytest.mark.parametrize("name", ["x", "y"])
def test_what_is_no_number_shows(way, name):
    p = inputs(4, 70, 20, 3.0, 0.0) | {"log_prior": torch.zeros(70)}
    p[name][0] = math.nan
    assert bool(by_launchers(p, 4, ["posterior"])["mean"][0].isnan().any())
