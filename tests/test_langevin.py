"""Langevin chains: every proposal against dense matrices, detailed balance in closed form, the law
that Metropolis and Gibbs keep, networks, and what bad input is told.
"""

from __future__ import annotations

import math

import pytest
import torch
from tensors import normal, rng
from torch.distributions import MultivariateNormal

import dfkernels as df
from dfkernels.methods.langevin import PRECONDITIONERS, gibbs, langevin, printed_correction
from dfkernels.methods.langevin._metropolis import Link, linked, log_ratio
from dfkernels.methods.langevin._step import Settings, at

f64 = torch.float64
SCH = df.schedule.VP()
T = SCH.t_of_log_snr(0.5)  # sigma/alpha = 0.78


def exact(N=6, d=3, seed=0, scale=1.0, schedule=SCH):
    prior = normal(N, seed=seed + 50)
    return df.Denoiser.exact(df.PointCloud(scale * normal(N, d, seed=seed), prior), schedule)


def settings(kind, x, metropolis, step=0.4, lanczos=20):
    damping = {"damped": 0.2, "rank-one": 30.0, "paper": 0.7}.get(kind, 0.0)
    x0 = normal(*x.shape, seed=9) if kind == "rank-one" else None
    return Settings(kind, step, damping, x0, lanczos, metropolis)


def dense(denoiser, x, how):
    """Mean and covariance of the proposal, by dense matrices from the weights themselves."""
    data = denoiser.network.cloud
    alpha, sigma = SCH(T)
    logits = data.log_prior.double() - ((x[:, None] - alpha * data.y) / sigma).square().sum(2) / 2
    w = logits.softmax(1)
    mean = w @ data.y
    r = data.y - mean[:, None]
    C = torch.einsum("bn,bni,bnj->bij", w, r, r)
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    S = eye - (alpha / sigma) ** 2 * C
    score = (alpha * mean - x) / sigma**2
    if how.preconditioner == "gibbs":
        M = sigma**2 * eye + alpha**2 * C
    elif how.preconditioner == "damped":
        values, V = torch.linalg.eigh(S)
        M = sigma**2 * V @ torch.diag_embed(1 / (values.abs() + how.damping)) @ V.mT
    elif how.preconditioner == "rank-one":
        r = how.x0 - mean
        outer = (alpha / sigma) ** 2 * r[:, :, None] * r[:, None]
        M = sigma**2 * torch.linalg.inv((1 + how.damping) * eye - outer)
    else:
        M = sigma**2 * eye.expand_as(S)
    return x + how.step_size * (M @ score[..., None])[..., 0], 2 * how.step_size * M


@pytest.mark.parametrize("metropolis", [False, True])
@pytest.mark.parametrize("kind", PRECONDITIONERS)
def test_a_proposal_has_the_mean_and_covariance_of_its_formula(kind, metropolis):
    denoiser, x = exact(), normal(4, 3, seed=1)
    how = settings(kind, x, metropolis)
    proposal = how.propose(at(denoiser, x, T, "jvp"))
    mean, covariance = dense(denoiser, x, how)
    middle = proposal.draw(torch.zeros_like(x))
    torch.testing.assert_close(middle, mean, rtol=0, atol=1e-12)
    axes = torch.eye(3, dtype=f64)
    root = torch.stack([proposal.draw(e.expand(4, 3)) - middle for e in axes], 2)
    torch.testing.assert_close(root @ root.mT, covariance, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", PRECONDITIONERS)
def test_the_ratio_is_that_of_detailed_balance(kind):
    """Against dense normal densities and log q of the atoms, term by term."""
    denoiser, x, y = exact(), normal(5, 3, seed=1), normal(5, 3, seed=2)
    how = settings(kind, x, True)
    here, there = (linked(denoiser, z, T, how) for z in (x, y))
    forward, backward = (MultivariateNormal(*dense(denoiser, z, how)) for z in (x, y))
    data = denoiser.network.cloud
    alpha, sigma = SCH(T)

    def log_q(z):
        square = ((z[:, None] - alpha * data.y) / sigma).square().sum(2)
        return (data.log_prior.log_softmax(0) - square / 2).logsumexp(1)

    want = log_q(y) + backward.log_prob(x) - log_q(x) - forward.log_prob(y)
    torch.testing.assert_close(log_ratio(here, there), want, rtol=0, atol=1e-10)
    torch.testing.assert_close(log_ratio(there, here), -want, rtol=0, atol=1e-10)


def within(found, want, size=5.0):
    """Whether means over the chains [n, ...] are those wanted, to so many standard errors."""
    error = found.std(0) / math.sqrt(len(found))
    return bool(((found.mean(0) - want).abs() <= size * error).all())


def moments(x):
    return torch.cat([x, x.square(), (x[:, :1] * x[:, 1:]), (2 * x).cos()], 1)


@pytest.mark.parametrize("kind", PRECONDITIONERS)
def test_metropolis_keeps_the_law(kind):
    """Chains that start in q stay in it; unadjusted ones leave it by many standard errors."""
    n, draw = 4000, rng(3)
    denoiser = exact(4, 2)
    data = denoiser.network.cloud
    alpha, sigma = SCH(T)
    w = data.log_prior.softmax(0)
    rows = torch.multinomial(w, n, True, generator=draw)
    x = alpha * data.y[rows] + sigma * torch.randn(n, 2, dtype=f64, generator=draw)
    y, s = alpha * data.y, sigma**2
    want = torch.cat(
        [
            w @ y,
            w @ y.square() + s,
            w @ (y[:, :1] * y[:, 1:]),
            w @ (2 * y).cos() * (-2 * s).exp(),
        ]
    )
    extra = {
        "damped": {"damping": 0.3},
        "rank-one": {"damping": 20.0, "x0": torch.zeros_like(x)},
        "paper": {"damping": 1.0},
    }.get(kind, {})
    step = 25.0 if kind == "rank-one" else 1.2
    run = lambda metropolis: langevin(
        denoiser, x, T, 15, kind, generator=rng(4), step_size=step, metropolis=metropolis, **extra
    )
    adjusted = run(True)
    assert within(moments(x), want) and within(moments(adjusted.x), want)
    assert 0.3 < adjusted.acceptance.mean() < 0.99
    moved = (adjusted.x != x).any(1)
    assert torch.equal(moved, adjusted.acceptance > 0)
    assert not within(moments(run(False).x), want, 8.0)


def test_gibbs_keeps_the_law_and_its_sweep_has_the_covariance_of_the_preconditioner():
    denoiser = exact(5, 3)
    x = normal(1, 3, seed=2).expand(20_000, 3)
    found = gibbs(denoiser, x, T, 1, generator=rng())
    how = settings("gibbs", x[:1], True, step=0.5)  # 2 h = 1
    _, covariance = dense(denoiser, x[:1], how)
    alpha = SCH(T)[0]
    centre = alpha * denoiser(x[:1], T)
    assert within(found, centre[0])
    off = found - centre
    assert within((off[:, :, None] * off[:, None]).flatten(1), covariance.flatten())
    far = gibbs(denoiser, x[:4000], T, 30, generator=rng(1))
    data = denoiser.network.cloud
    assert within(far, alpha * data.log_prior.double().softmax(0) @ data.y)


def network_of(denoiser):
    """The data set as a network that nobody knows to be one."""
    data = denoiser.network.cloud

    def network(x, t):
        return df.ops.posterior(x, data.y, *SCH(t), data._log_pi(x.dtype)).mean

    return df.Denoiser(network, SCH, "sample")


@pytest.mark.parametrize("mode, tol", [("jvp", 1e-10), ("vjp", 1e-10), ("finite-difference", 1e-6)])
@pytest.mark.parametrize("kind", ["none", "gibbs", "damped"])
def test_a_network_is_stepped_as_the_data_set_that_it_is(kind, mode, tol):
    denoiser, x = exact(), normal(4, 3, seed=1)
    extra = {"none": {}, "gibbs": {"lanczos": 3}, "damped": {"lanczos": 3, "damping": 0.3}}[kind]
    one, two = (
        langevin(d, x, T, 3, kind, generator=rng(), mode=mode, **extra).x
        for d in (denoiser, network_of(denoiser))
    )
    torch.testing.assert_close(one, two, rtol=0, atol=tol)


def test_few_lanczos_steps_in_many_dimensions_are_nearly_exact():
    denoiser, x = exact(50, 40, scale=0.3), normal(3, 40, seed=1)
    run = lambda k: langevin(denoiser, x, T, 1, "gibbs", generator=rng(), lanczos=k).x
    error = [(run(k) - run(40)).abs().max().item() for k in (2, 6, 12)]
    assert error[0] > 1e-6 and error[2] < 1e-3 * error[0]


def test_it_goes_on_where_it_stopped_bit_for_bit():
    denoiser, x = exact(), normal(4, 3, seed=1)
    for run in (
        lambda x, k, g: langevin(denoiser, x, T, k, "gibbs", generator=g).x,
        lambda x, k, g: langevin(denoiser, x, T, k, "gibbs", generator=g, metropolis=True).x,
        lambda x, k, g: gibbs(denoiser, x, T, k, generator=g),
    ):
        parts, whole = rng(7), rng(7)
        assert torch.equal(run(run(x, 2, parts), 3, parts), run(x, 5, whole))
        still = run(x, 0, parts)
        assert torch.equal(still, x) and still.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
def test_events_levels_and_dtypes(dtype):
    """A level for each sample, images, strides; samples do not depend on each other."""
    y = normal(7, 2, 2, seed=3, dtype=dtype)
    denoiser = df.Denoiser.exact(df.PointCloud(y), SCH)
    x, t = normal(3, 2, 4, seed=1, dtype=dtype)[..., ::2], torch.tensor([0.2, 0.5, 0.9])
    for kind, extra in (("gibbs", {}), ("damped", {"damping": 0.1})):
        for metropolis in (False, True):
            found = langevin(
                denoiser, x, t, 3, kind, generator=rng(), metropolis=metropolis, **extra
            )
            assert found.x.shape == x.shape and found.x.dtype == dtype
            assert found.x.is_contiguous() and not found.x.requires_grad
            assert (found.acceptance is None) != metropolis
    assert gibbs(denoiser, x, t, 2, generator=rng()).dtype == dtype
    seen = []
    langevin(denoiser, x, t, 2, generator=rng(), callback=lambda *at: seen.append(at))
    gibbs(denoiser, x, t, 2, generator=rng(), callback=lambda *at: seen.append(at))
    assert seen == [(1, 2), (2, 2)] * 2


def test_one_atom_is_a_gaussian():
    """S = I: every chain is the same walk towards it, h m in units of the noise."""
    denoiser = df.Denoiser.exact(df.PointCloud(torch.tensor([[1.0, -2.0]], dtype=f64)), SCH)
    x, (alpha, sigma) = normal(3, 2, seed=1), SCH(T)
    xi = normal(3, 2)
    for kind, extra, m in (
        ("none", {}, 1.0),
        ("gibbs", {}, 1.0),
        ("damped", {"damping": 0.25}, 0.8),
    ):
        found = langevin(denoiser, x, T, 1, kind, generator=rng(), step_size=0.3, **extra).x
        want = x + 0.3 * m * (alpha * denoiser.network.cloud.y - x) + (0.6 * m) ** 0.5 * sigma * xi
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_pure_noise():
    """alpha = 0: q is the noise's own law, and every preconditioner but the damped ones is 1."""
    denoiser = exact(schedule=df.schedule.RectifiedFlow())
    x, xi = normal(3, 3, seed=1), normal(3, 3)
    for kind, extra, m in (
        ("none", {}, 1.0),
        ("gibbs", {}, 1.0),
        ("rank-one", {"damping": 1.0, "x0": x}, 0.5),
    ):
        found = langevin(denoiser, x, 0.0, 1, kind, generator=rng(), step_size=0.3, **extra).x
        want = (1 - 0.3 * m) * x + (0.6 * m) ** 0.5 * xi
        torch.testing.assert_close(found, want, rtol=0, atol=1e-12)


def test_stored_bytes_and_masked_atoms():
    """uint8 atoms with a scale and an offset; an atom of no weight that holds NaN."""
    y = torch.tensor([[0, 255], [255, 0], [7, 9]], dtype=torch.uint8)
    prior = torch.tensor([0.0, 0.0, -math.inf], dtype=f64)
    stored = df.PointCloud(y, prior, scale=2 / 255, offset=-1)
    wide = df.PointCloud(
        torch.tensor([[-1.0, 1.0], [1.0, -1.0], [math.nan, 0.0]], dtype=f64), prior
    )
    x = normal(4, 2, seed=1)
    for run in (
        lambda d: gibbs(d, x, T, 5, generator=rng()),
        lambda d: langevin(d, x, T, 5, "gibbs", generator=rng(), metropolis=True).x,
    ):
        one, two = (run(df.Denoiser.exact(cloud, SCH)) for cloud in (stored, wide))
        torch.testing.assert_close(one, two, rtol=0, atol=1e-12)


# ---- the published correction


def test_the_printed_correction_is_its_formula_and_changes_nothing():
    n, before = normal(4, 2, 3, seed=1), normal(4, 2, 3, seed=2)
    torch.testing.assert_close(printed_correction(n, 0.3), n, rtol=1e-12, atol=0)
    e = (0.2 * before + 0.8 * n).flatten(1)
    outer = 0.3 * torch.eye(6, dtype=f64) + e[:, :, None] * e[:, None]
    m = torch.linalg.solve(outer, n.flatten(1))
    want = m * (n.flatten(1).norm(dim=1) / m.norm(dim=1))[:, None]
    found = printed_correction(n, 0.3, before, 0.2)
    torch.testing.assert_close(found.flatten(1), want, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found.flatten(1).norm(dim=1), n.flatten(1).norm(dim=1))


def test_in_float32_the_printed_correction_turns_by_the_rounding_of_a_difference():
    """About eps (lamb + |n|^2)/lamb times the rounding of three operations, up to a right angle."""
    n = normal(64, 3072, seed=1, dtype=torch.float32)
    for lamb in (1e-2, 1e-1, 1.0):
        m = printed_correction(n, lamb)
        unit = [v.double() / v.double().norm(dim=1, keepdim=True) for v in (n, m)]
        angle = (unit[0] - unit[1]).norm(dim=1).median().item()
        expected = torch.finfo(torch.float32).eps / 2 * 3072 / lamb
        assert 0.3 * expected <= angle <= 3 * expected


def test_paper_is_plain_langevin():
    denoiser, x = exact(), normal(4, 3, seed=1)
    one = langevin(denoiser, x, T, 5, "paper", generator=rng(), damping=0.01).x
    two = langevin(denoiser, x, T, 5, "none", generator=rng()).x
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)


def test_arguments_need_no_particular_state_of_torch():
    """Beside the states of test_global_state_methods: tensors that need a gradient."""
    denoiser, x = exact(), normal(4, 3, seed=1)
    run = lambda x: langevin(denoiser, x, T, 2, "gibbs", generator=rng(), metropolis=True)
    want = run(x)
    found = run(x.clone().requires_grad_())
    assert torch.equal(found.x, want.x) and not found.x.requires_grad
    state = torch.random.get_rng_state()
    run(x)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(linked(denoiser, x, T, settings("none", x, True)), Link)


# ---- bad input

X = normal(2, 3, seed=1)
KNOWN = exact()
NETWORK = df.Denoiser(lambda x, t: x, SCH, "sample")
BASE = dict(denoiser=KNOWN, x=X, t=T, steps=1, generator=rng())


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(denoiser=3), TypeError, "denoiser: expected a Denoiser, got int"),
        (dict(x=[1.0]), TypeError, "x: expected a tensor, got list"),
        (dict(x=X / 0), ValueError, r"x: expected finite values, got .*inf at index \[0, 0\]"),
        (dict(x=X[:, :2]), ValueError, r"x: expected shape \[B, 3\] to match the cloud, got"),
        (dict(steps=-1), ValueError, "steps: expected an integer of at least 0, got -1"),
        (dict(generator=0), TypeError, "generator: expected a torch.Generator, got int"),
        (dict(t=7.0), ValueError, r"t: expected values in \[0, 1\]"),
        (dict(step_size=0.0), ValueError, "step_size: expected a finite value > 0, got 0.0"),
        (
            dict(preconditioner="newton"),
            ValueError,
            "preconditioner: expected 'none' or 'gibbs' or 'damped' or .* got 'newton'",
        ),
        (
            dict(preconditioner="damped"),
            ValueError,
            "damping: expected a number > 0 for preconditioner 'damped', got None",
        ),
        (
            dict(preconditioner="damped", damping=0.0),
            ValueError,
            "damping: expected a finite value > 0, got 0.0",
        ),
        (dict(damping=0.1), ValueError, "damping: expected None for preconditioner 'none', got 0."),
        (
            dict(preconditioner="rank-one", damping=1.0),
            ValueError,
            r"x0: expected the end of each chain, \[2, 3\], for preconditioner 'rank-one', got No",
        ),
        (dict(x0=X), ValueError, "x0: expected None for preconditioner 'none', got a tensor"),
        (
            dict(preconditioner="rank-one", damping=1.0, x0=X[:1]),
            ValueError,
            r"x0: expected shape \[2, 3\] like x, got \[1, 3\]",
        ),
        (dict(mode="fd"), ValueError, "mode: expected 'jvp' or 'vjp' or 'finite-difference', got"),
        (
            dict(preconditioner="gibbs", lanczos=0),
            ValueError,
            "lanczos: expected an integer of at least 1, got 0",
        ),
        (dict(lanczos=3), ValueError, "lanczos: expected None for preconditioner 'none', got 3"),
        (
            dict(preconditioner="gibbs", lanczos=3, metropolis=True),
            ValueError,
            "lanczos: expected None with metropolis=True, which decomposes a dense F, got 3",
        ),
        (
            dict(denoiser=NETWORK, metropolis=True),
            ValueError,
            r"metropolis: expected False for a network, whose log q is not known \(it is for",
        ),
        (dict(metropolis="yes"), ValueError, "metropolis: expected False or True, got 'yes'"),
        (dict(label=1), ValueError, "conditions: expected none for a data set, got label"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        langevin(**(BASE | change))


def test_a_damping_too_small_says_which_is_needed():
    far = X + 10
    with pytest.raises(ValueError, match="damping: expected more than .* 'rank-one', ") as said:
        langevin(KNOWN, X, T, 1, "rank-one", generator=rng(), damping=0.5, x0=far)
    least = float(str(said.value).partition("'rank-one', ")[2].partition(" at sample")[0])
    alpha, sigma = SCH(T)
    r = far - KNOWN(X, T)
    want = ((alpha / sigma) ** 2 * r.square().sum(1) - 1).max().item()
    assert least == pytest.approx(want, rel=1e-3)
    langevin(KNOWN, X, T, 1, "rank-one", generator=rng(), damping=1.01 * want, x0=far)


def test_bad_input_of_gibbs_and_of_the_correction():
    with pytest.raises(ValueError, match="denoiser: expected a data set, Denoiser.exact.*, got De"):
        gibbs(NETWORK, X, T, 1, generator=rng())
    with pytest.raises(TypeError, match="denoiser: expected a Denoiser, got PointCloud"):
        gibbs(KNOWN.network.cloud, X, T, 1, generator=rng())
    with pytest.raises(ValueError, match="kappa: expected a number from 0 to 1, got 2"):
        printed_correction(X, 0.1, X, 2.0)
    with pytest.raises(ValueError, match="previous: expected the last n with kappa > 0, else None"):
        printed_correction(X, 0.1, kappa=0.5)
    with pytest.raises(ValueError, match="damping: expected a finite value > 0, got -1.0"):
        printed_correction(X, -1.0)


@pytest.mark.parametrize("metropolis", [False, True])
def test_chains_that_run_away_name_the_step(metropolis):
    denoiser, x = exact(), normal(2, 3)
    huge = {"step_size": 1e160 if metropolis else 1e3, "generator": rng(), "metropolis": metropolis}
    with pytest.raises(
        ValueError, match=r"^step_size: expected one at which .*: they ran away in \d+"
    ):
        langevin(denoiser, x, T, 200, **huge)
    with pytest.raises(ValueError, match="^x: expected distances to the atoms that can be rep"):
        langevin(denoiser, 1e200 * x, T, 2, generator=rng(), metropolis=metropolis)
