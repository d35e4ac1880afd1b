"""A law known by a sampler: against closed forms of Gaussians and mixtures, the coverage of its
error bars, importance weights, degenerate weights, and runs that go on."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
import weakref

import pytest
import torch
from tensors import rng
from test_global_state import STATES

import dfkernels as df
from dfkernels.methods import monte_carlo
from dfkernels.methods.degenerate import DegenerateWeights
from dfkernels.methods.monte_carlo import GROUPS, LEAST_ESS, estimate

f64 = torch.float64
NAMES = ("log_prob", "mean", "score", "fisher_trace", "fisher_matvec")
INTERVAL = 2.0395  # 97.5 % quantile of Student's t with 31 degrees of freedom

# three Gaussians in the plane: weights, means, standard deviations
WEIGHT = torch.tensor([0.5, 0.3, 0.2], dtype=f64)
MEAN = torch.tensor([[0.0, 0.0], [2.5, 0.5], [-1.0, 2.0]], dtype=f64)
SPREAD = torch.tensor([1.0, 0.5, 0.3], dtype=f64)


def mixture(n, generator):
    k = torch.multinomial(WEIGHT, n, True, generator=generator)
    return MEAN[k] + SPREAD[k, None] * torch.randn(n, 2, dtype=f64, generator=generator)


def truth(x, alpha, sigma, v):
    """The mixture's results in closed form, by autograd of its log-density under noise."""

    def log_prob(x):
        variance = (alpha * SPREAD) ** 2 + sigma**2
        square = (x - alpha * MEAN).square().sum(1)
        return torch.logsumexp(
            WEIGHT.log() - square / (2 * variance) - (2 * math.pi * variance).log(), 0
        )

    F = -torch.stack([torch.autograd.functional.hessian(log_prob, row) for row in x])
    score = torch.func.vmap(torch.func.grad(log_prob))(x)
    return {
        "log_prob": torch.func.vmap(log_prob)(x),
        "score": score,
        "mean": (x + sigma**2 * score) / alpha,
        "fisher_trace": F.diagonal(dim1=1, dim2=2).sum(1),
        "fisher_matvec": (F @ v[..., None])[..., 0],
    }


X = torch.tensor([[0.0, 0.5], [2.4, 0.0], [-1.0, 1.5], [1.2, 0.3], [0.3, -1.2]], dtype=f64)
V = torch.randn(5, 2, dtype=f64, generator=rng(9))
LEVELS = (0.9, 0.5)


def recorded(sampler):
    """The sampler, and the list of what it has drawn."""
    drawn = []

    def call(n, generator):
        drawn.append(sampler(n, generator))
        return drawn[-1]

    return call, drawn


def test_a_mixture_in_closed_form():
    exact, result = truth(X, *LEVELS, V), estimate(mixture, X, *LEVELS, n=64_000, v=V)
    assert result.draws == 64_000 and bool(result.reliable.all())
    for name, value in exact.items():
        error = getattr(result, name + "_error")
        assert error.shape == value.shape == getattr(result, name).shape
        assert bool(((getattr(result, name) - value).abs() <= 4.5 * error).all()), name
    assert float(result.log_prob_error.max()) <= 0.03
    assert float(result.score_error.max()) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("weighted, seeds", [(False, 32), (True, 20)])
def test_intervals_of_95_percent_cover_as_many(weighted, seeds):
    """At five queries, which have an ESS of 100 to 1400."""
    exact = truth(X, *LEVELS, V)
    sampler = wrong if weighted else mixture
    covered = {name: [] for name in NAMES}
    for seed in range(seeds):
        result = estimate(sampler, X, *LEVELS, n=4800, v=V, seed=seed)
        assert bool(result.reliable.all())
        for name in NAMES:
            error = INTERVAL * getattr(result, name + "_error")
            inside = (getattr(result, name) - exact[name]).abs() <= error
            covered[name].append(inside.double().mean())
    shares = {name: float(torch.stack(c).mean()) for name, c in covered.items()}
    assert all(0.90 <= share <= 0.98 for share in shares.values()), shares


def wrong(n, generator):
    """Draws of a Gaussian that is wider than the mixture and off it, with importance weights."""
    centre = torch.tensor([0.8, 0.8], dtype=f64)
    y = centre + 1.8 * torch.randn(n, 2, dtype=f64, generator=generator)
    square = (y[:, None] - MEAN).square().sum(2)
    density = torch.logsumexp(WEIGHT.log() - square / (2 * SPREAD**2) - 2 * SPREAD.log(), 1)
    # up to a constant, which has no influence
    return y, density + (y - centre).square().sum(1) / (2 * 1.8**2) + 700.0


def test_importance_weights_correct_a_wrong_proposal():
    exact = truth(X, *LEVELS, V)
    with_weights = estimate(wrong, X, *LEVELS, n=64_000, v=V)
    without = estimate(lambda n, g: wrong(n, g)[0], X, *LEVELS, n=64_000, v=V)
    for name, value in exact.items():
        error = getattr(with_weights, name + "_error")
        far = (getattr(with_weights, name) - value).abs()
        assert bool((far <= 4.5 * error).all()), name
        assert bool(((getattr(without, name) - value).abs() > 20 * error).any()), name


@pytest.mark.parametrize("sampler", [mixture, wrong])
def test_it_is_the_cloud_of_all_draws_and_its_errors_are_the_delta_methods(sampler):
    """Every result and the ESS are those of one pass over the draws. The errors are compared with
    those of linearised ratios; 32 groups estimate a standard error to 13 %."""
    call, drawn = recorded(sampler)
    result = estimate(call, X, *LEVELS, n=32_000, v=V)
    y, log_weight = drawn, None
    if sampler is wrong:
        y, log_weight = [d[0] for d in drawn], torch.cat([d[1] for d in drawn])
    y = torch.cat(y)
    assert len(y) == result.draws == 32_000
    F = df.DiffusionFisher(X, df.PointCloud(y, log_weight), *LEVELS)
    for found, want in (
        (result.log_prob, F.log_prob),
        (result.mean, F.denoised),
        (result.score, F.score),
        (result.fisher_trace, F.trace()),
        (result.fisher_matvec, F @ V),
        (result.ess, F.ess),
        (df.merge(result.groups).posterior().log_prob, F.log_prob),
    ):
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    alpha, sigma = LEVELS
    prior = torch.full((len(y),), -math.log(len(y)), dtype=f64)
    prior = prior if log_weight is None else log_weight.log_softmax(0)
    w = torch.softmax(prior - (X[:, None] - alpha * y).square().sum(2) / (2 * sigma**2), 1)
    r = y - result.mean[:, None]
    along = (r * V[:, None]).sum(2, keepdim=True)
    C = torch.einsum("bn,bnd->bd", w, along * r)
    variance = (w * r.square().sum(2)).sum(1, keepdim=True)
    scale = alpha**2 / sigma**4
    delta = {
        "log_prob": (w - prior.exp()).square().sum(1).sqrt(),
        "mean": (w[..., None] * r).square().sum(1).sqrt(),
        "score": alpha / sigma**2 * (w[..., None] * r).square().sum(1).sqrt(),
        "fisher_trace": scale * (w * (r.square().sum(2) - variance)).square().sum(1).sqrt(),
        "fisher_matvec": scale * (w[..., None] * (along * r - C[:, None])).square().sum(1).sqrt(),
    }
    for name, want in delta.items():
        ratio = getattr(result, name + "_error") / want
        assert float(ratio.min()) >= 0.6 and float(ratio.max()) <= 1.5, (name, ratio)
        assert 0.85 <= float(ratio.mean()) <= 1.15, (name, ratio)


def test_degenerate_weights_are_flagged():
    """Far from all draws and at low noise few of them weigh: said by a warning and by `reliable`,
    and rightly, since the truth is many errors away."""
    x = torch.tensor([[0.0, 0.5], [9.0, 0.0]], dtype=f64)
    with pytest.warns(DegenerateWeights) as warned:
        result = estimate(mixture, x, 1.0, 0.3, n=16_000)
    assert warned[0].filename == __file__
    assert str(warned[0].message).startswith(
        "at 1 of 2 queries the effective number of draws is below 100, at the worst "
        f"{float(result.ess[1]):.1f} of 16000: the errors stated there are not to be believed"
    )
    assert result.reliable.tolist() == [True, False]
    assert float(result.ess[1]) < 10 < LEAST_ESS < float(result.ess[0])
    exact = truth(x, 1.0, 0.3, x)["fisher_trace"]
    off = (result.fisher_trace - exact).abs() / result.fisher_trace_error
    assert float(off[0]) < 4 < float(off[1])


def same(a, b):
    for name in (*NAMES, *(name + "_error" for name in NAMES), "ess", "reliable"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.draws == b.draws and torch.equal(a.generator_state, b.generator_state)


def test_a_run_that_goes_on_is_one_run_to_the_bit():
    whole = estimate(mixture, X, *LEVELS, n=9600, batch=100, v=V, seed=3)
    first = estimate(mixture, X, *LEVELS, n=3200, batch=100, v=V, seed=3)
    file = io.BytesIO()
    torch.save(first, file)
    file.seek(0)
    kept = torch.load(file, weights_only=False)
    same(estimate(mixture, X, *LEVELS, n=9600, batch=100, v=V, start=kept), whole)
    nothing_to_do = estimate(mixture, X, *LEVELS, n=100, v=V, start=first)
    same(nothing_to_do, first)


def test_the_batch_changes_the_draws_and_not_the_law():
    a, b = (estimate(mixture, X, *LEVELS, n=32_000, batch=batch, seed=1) for batch in (77, 1000))
    assert a.draws == 77 * 32 * 13 and b.draws == 32_000
    error = (a.log_prob_error.square() + b.log_prob_error.square()).sqrt()
    assert bool(((a.log_prob - b.log_prob).abs() <= 4 * error).all())


def test_it_stops_at_the_tolerance():
    result = estimate(mixture, X, *LEVELS, n=10**6, batch=100, tol=0.03, seed=2)
    assert float(result.log_prob_error.max()) <= 0.03 and bool(result.reliable.all())
    assert result.draws % (32 * 100) == 0 and result.draws < 10**5
    before = estimate(mixture, X, *LEVELS, n=result.draws - 3200, batch=100, seed=2)
    assert float(before.log_prob_error.max()) > 0.03
    missed = estimate(mixture, X, *LEVELS, n=6400, batch=100, tol=1e-4)
    assert missed.draws == 6400 and float(missed.log_prob_error.max()) > 1e-4


def test_no_batch_is_kept_and_progress_is_reported():
    alive, said = [], []

    def sampler(n, generator):
        assert n == 50 and sum(ref() is not None for ref in alive) == 0
        y = mixture(n, generator)
        alive.append(weakref.ref(y))
        return y

    estimate(sampler, X, 1.0, 2.0, n=3000, batch=50, callback=lambda *at: said.append(at))
    assert len(alive) == 2 * GROUPS
    assert said == [(50 * i, 3200) for i in range(1, 65)]


@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
@pytest.mark.parametrize("stored", [torch.float16, None], ids=str)
def test_event_shapes_dtypes_and_several_vectors(dtype, stored):
    def sampler(n, generator):
        y = torch.randn(n, 2, 3, dtype=dtype, generator=generator)
        return y if stored is None else y.to(stored)

    x = torch.randn(4, 2, 3, dtype=dtype, generator=rng(0))
    v = torch.randn(4, 5, 2, 3, dtype=dtype, generator=rng(1))
    sigma = torch.tensor([1.0, 2.0, 3.0, 20.0], dtype=dtype)
    result = estimate(sampler, x, 1.0, sigma, n=64_000, v=v)
    assert {getattr(result, name).dtype for name in (*NAMES, "ess")} == {dtype}
    variance = (1 + sigma**2).reshape(4, 1, 1)
    exact = {
        "mean": x / variance,
        "score": -x / variance,
        "fisher_matvec": v / variance[:, None],
        "fisher_trace": 6 / variance[:, 0, 0],
    }
    for name, value in exact.items():
        error = getattr(result, name + "_error")
        assert getattr(result, name).shape == error.shape == value.shape
        assert bool(((getattr(result, name) - value).abs() <= 5 * error + 1e-6).all()), name


def test_no_queries_and_single_draws():
    empty = estimate(mixture, X[:0], 1.0, 1.0, n=10, v=V[:0])
    assert empty.draws == 32 and empty.mean.shape == empty.fisher_matvec.shape == (0, 2)
    with pytest.warns(DegenerateWeights):
        few = estimate(mixture, X, 1.0, 1.0, n=1)
    assert few.draws == GROUPS and not bool(few.reliable.any())
    assert bool(few.log_prob_error.isfinite().all())


def test_draws_without_weight():
    """Those beyond a half-plane weigh nothing; in some batches, then in all."""

    def half(n, generator):
        y = mixture(n, generator)
        return y, torch.where(y[:, 0] > -0.5, 0.0, -math.inf)

    call, drawn = recorded(half)
    result = estimate(call, X, 1.0, 1.5, n=960, batch=1)
    y, log_weight = (torch.cat([d[i] for d in drawn]) for i in range(2))
    assert any(bool((d[1] == -math.inf).all()) for d in drawn)
    F = df.DiffusionFisher(X, df.PointCloud(y[log_weight == 0]), 1.0, 1.5)
    torch.testing.assert_close(result.log_prob, F.log_prob, rtol=1e-10, atol=1e-10)
    nothing = lambda n, g: (mixture(n, g), torch.full((n,), -math.inf))
    with pytest.raises(ValueError) as raised:
        estimate(nothing, X, 1.0, 1.0, n=64, tol=0.1)
    assert str(raised.value) == "sampler: expected draws with a weight, got -inf for all 64"
    one = iter(range(10**6))  # a single draw weighs: without its group there is nothing
    single = lambda n, g: (mixture(n, g), torch.full((n,), 0.0 if next(one) == 5 else -math.inf))
    with pytest.warns(DegenerateWeights):
        result = estimate(single, X, 1.0, 1.0, n=32)
    assert bool((result.log_prob_error == math.inf).all()) and not bool(result.reliable.any())
    assert bool((result.score_error == math.inf).all())
    assert len(repr(result)) < 3000
    one = iter(range(10**6))
    with pytest.warns(DegenerateWeights):
        result = estimate(single, X, 0.0, 1.0, n=32)  # noise alone
    assert torch.equal(result.score_error, 0 * X) and torch.equal(result.score, -X)


def test_global_state_changes_nothing():
    x = X.float()
    sampler = lambda n, g: torch.randn(n, 2, generator=g, device="cpu", dtype=torch.float32)
    expected = estimate(sampler, x, 1.0, 1.0, n=3200, v=x)
    with contextlib.ExitStack() as states:
        names = (
            "default dtype float64",
            "default device meta",
            "autocast bfloat16",
            "inference mode",
        )
        for name in names:
            states.enter_context(STATES[name]())
        torch.manual_seed(123)
        found = estimate(sampler, x, 1.0, 1.0, n=3200, v=x)
    same(found, expected)
    assert not found.mean.is_inference() and not found.mean.requires_grad


def returning(value):
    return lambda n, generator: value


NAN = torch.full((32, 2), math.nan, dtype=f64)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"sampler": X}, TypeError, "sampler: expected a function (n, generator) -> y, got Tensor"),
        ({"sampler": returning(None)}, TypeError, "sampler: y: expected a tensor, got NoneType"),
        (
            {"sampler": returning(X)},
            ValueError,
            "sampler: y: expected shape [32, 2], got [5, 2]",
        ),
        (
            {"sampler": returning(NAN)},
            ValueError,
            "sampler: y: expected finite values, got nan at index [0, 0]",
        ),
        (
            {"sampler": returning((0 * NAN[:, :1], NAN[:, 0]))},
            ValueError,
            "sampler: y: expected shape [32, 2], got [32, 1]",
        ),
        (
            {"sampler": returning((torch.zeros(32, 2), NAN[:1, 0]))},
            ValueError,
            "sampler: log_weight: expected shape [32], got [1]",
        ),
        (
            {"sampler": returning((torch.zeros(32, 2), NAN[:, 0]))},
            ValueError,
            "sampler: log_weight: expected values < inf and not nan, got nan",
        ),
        (
            {"x": X.float(), "sampler": returning(torch.zeros(32, 2, dtype=f64))},
            TypeError,
            "sampler: y: expected float32 or narrower to go with float32 x, got float64: convert x "
            "or y",
        ),
        ({"n": 0}, ValueError, "n: expected an integer of at least 1, got 0"),
        (
            {"seed": -1},
            ValueError,
            f"seed: expected an integer from 0 to {2**63 - 1}, got -1",
        ),
        ({"batch": 0}, ValueError, "batch: expected an integer of at least 1, got 0"),
        ({"tol": 0.0}, ValueError, "tol: expected a finite value > 0, got 0.0"),
        ({"sigma": -1.0}, ValueError, "sigma: expected a finite value > 0, got -1.0"),
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        (
            {"x": X[0]},
            ValueError,
            "x: expected shape [B, 2] to go with the sampler's draws of shape [32, 2], got [2]: "
            "[None] makes a batch of one",
        ),
        ({"v": X[:1]}, ValueError, "v: expected shape [5, 2] or [5, K, 2], got [1, 2]"),
        ({"start": 3}, TypeError, "start: expected an Estimate, got int"),
    ],
)
def test_refusals(change, error, message):
    given = {"sampler": mixture, "x": X, "alpha": 1.0, "sigma": 1.0, "n": 1000} | change
    with pytest.raises(error) as raised:
        estimate(**given)
    assert str(raised.value) == message


def test_a_start_for_other_queries_is_refused():
    first = estimate(mixture, X, 1.0, 2.0, n=6400)
    with pytest.raises(ValueError) as raised:
        estimate(mixture, X, 1.0, 2.1, n=9600, start=first)
    assert str(raised.value) == (
        "start: expected an estimate for these queries: parts: expected the same sigma for all of "
        "them, got another: only parts for the same queries, on one device, can be merged"
    )


def test_it_is_silent_where_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate(mixture, X, *LEVELS, n=6400)
    assert monte_carlo.GROUPS == 32
