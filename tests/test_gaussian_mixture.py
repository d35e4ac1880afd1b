"""GaussianMixture against closed forms and autograd, everywhere where a PointCloud goes."""

from __future__ import annotations

import math

import pytest
import torch
from tensors import normal
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import dfkernels as df

N, EVENT, D = 7, (2, 3), 6
NOISE = [0.01, 0.3, 2.0]
MEANS, PRIOR = normal(N, *EVENT), normal(N, seed=1)
FACTOR = normal(D, D, seed=2) / 2
POSITIVE = normal(N, *EVENT, seed=3).square() / 4 + 0.02
WIDTHS = {
    "number": {"variance": 0.3},
    "each": {"variance": POSITIVE[:, 0, 0]},
    "diagonal of all": {"variance": POSITIVE[:1]},
    "diagonals": {"variance": POSITIVE},
    "full": {"covariance": FACTOR @ FACTOR.T},
}


def covariances(width):
    """[N, D, D] of one of WIDTHS."""
    if "covariance" in width:
        return width["covariance"].expand(N, D, D)
    variance = torch.as_tensor(width["variance"], dtype=torch.float64)
    rows = variance.reshape(len(variance) if variance.ndim else 1, -1)
    return torch.diag_embed(rows.expand(N, D))


def log_q(x, alpha, sigma, width):
    """log q_t at x [*E], in closed form."""
    noise = sigma**2 * torch.eye(D, dtype=torch.float64)
    each = MultivariateNormal(alpha * MEANS.flatten(1), alpha**2 * covariances(width) + noise)
    law = MixtureSameFamily(Categorical(logits=PRIOR), each, validate_args=False)
    return law.log_prob(x.flatten())


@pytest.fixture(params=WIDTHS)
def width(request):
    return WIDTHS[request.param]


@pytest.mark.parametrize("sigma", NOISE)
@pytest.mark.parametrize("alpha", [1.0, 0.4])
def test_everything_against_autograd_of_the_closed_form(width, alpha, sigma):
    x, v = normal(3, *EVENT, seed=4), normal(3, 2, *EVENT, seed=5)
    F = df.DiffusionFisher(x, df.GaussianMixture(MEANS, log_prior=PRIOR, **width), alpha, sigma)
    of = lambda f: torch.stack([f(log_q, argnums=0)(one, alpha, sigma, width) for one in x])
    score, hessian = of(torch.func.grad), of(torch.func.hessian).reshape(3, D, D)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    close(F.log_prob, torch.stack([log_q(one, alpha, sigma, width) for one in x]))
    close(F.score, score)
    close(F.eps, -sigma * score)
    close(F.denoised, (x + sigma**2 * score) / alpha)
    close(F.to_dense(), -hessian)
    close(F.trace(), -hessian.diagonal(dim1=1, dim2=2).sum(1))
    close(F.diagonal().flatten(1), -hessian.diagonal(dim1=1, dim2=2))
    close((F @ v).flatten(2), -v.flatten(2) @ hessian)


def test_derivatives_go_through(width):
    mixture = df.GaussianMixture(MEANS, log_prior=PRIOR, **width)
    x = normal(2, *EVENT, seed=6).requires_grad_()
    sigma = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    loss = lambda x, sigma: df.DiffusionFisher(x, mixture, 0.8, sigma).trace().sin().sum()
    assert torch.autograd.gradcheck(loss, (x, sigma))


def test_the_levels_may_differ_between_queries(width):
    mixture = df.GaussianMixture(MEANS, log_prior=PRIOR, **width)
    x, sigma = normal(3, *EVENT, seed=7), torch.tensor(NOISE, dtype=torch.float64)
    alpha = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    together = df.DiffusionFisher(x, mixture, alpha, sigma)
    for i in range(3):
        alone = df.DiffusionFisher(x[i : i + 1], mixture, alpha[i].item(), sigma[i].item())
        torch.testing.assert_close(together.log_prob[i], alone.log_prob[0])
        torch.testing.assert_close(together.trace()[i], alone.trace()[0])
    # pure noise: the posterior is the prior
    mean = (PRIOR.softmax(0)[:, None] * MEANS.flatten(1)).sum(0).reshape(EVENT)
    torch.testing.assert_close(together.denoised[2], mean)


def test_gaussian_data_have_one_fisher():
    S = FACTOR @ FACTOR.T
    one = df.GaussianMixture(MEANS[:1], covariance=S)
    x, alpha, sigma = normal(4, *EVENT, seed=8), 0.7, 0.4
    F = df.DiffusionFisher(x, one, alpha, sigma)
    inverse = torch.linalg.inv(alpha**2 * S + sigma**2 * torch.eye(D, dtype=torch.float64))
    torch.testing.assert_close(F.to_dense(), inverse.expand(4, D, D))
    score = -(x.flatten(1) - alpha * MEANS[0].flatten()) @ inverse
    torch.testing.assert_close(F.score.flatten(1), score)
    b = normal(4, *EVENT, seed=9)
    torch.testing.assert_close(
        F.solve(b, tol=1e-13).flatten(1), torch.linalg.solve(inverse, b.flatten(1).T).T
    )
    values, _ = F.eigsh(2, largest=False)
    torch.testing.assert_close(values[0], torch.linalg.eigvalsh(inverse)[:2])


@pytest.mark.parametrize("variance", [0.0, torch.zeros(N), torch.zeros(N, *EVENT)])
def test_without_width_it_is_the_point_cloud(variance):
    x, v = normal(3, *EVENT, seed=10), normal(3, *EVENT, seed=11)
    two = (
        df.DiffusionFisher(x, law, 0.9, 0.5)
        for law in (
            df.GaussianMixture(MEANS, variance=variance, log_prior=PRIOR),
            df.PointCloud(MEANS, PRIOR),
        )
    )
    mixture, cloud = two
    for name in ("log_prob", "score", "denoised", "ess", "eps"):
        torch.testing.assert_close(getattr(mixture, name), getattr(cloud, name))
    torch.testing.assert_close(mixture @ v, cloud @ v)
    torch.testing.assert_close(mixture.to_dense(), cloud.to_dense())
    assert mixture.eigsh(1)[0].shape == (3, 1)


def test_a_covariance_is_a_diagonal_in_its_eigenbasis():
    axes, _ = torch.linalg.qr(FACTOR)
    variance = POSITIVE[0].flatten()
    full = df.GaussianMixture(MEANS.flatten(1) @ axes.T, covariance=axes * variance @ axes.T)
    diagonal = df.GaussianMixture(MEANS.flatten(1), variance=variance[None])
    z, v = normal(3, D, seed=12), normal(3, 2, D, seed=13)
    turned = df.DiffusionFisher(z @ axes.T, full, 0.8, 0.2)
    straight = df.DiffusionFisher(z, diagonal, 0.8, 0.2)
    torch.testing.assert_close(turned.log_prob, straight.log_prob)
    torch.testing.assert_close(turned.denoised, straight.denoised @ axes.T)
    torch.testing.assert_close(turned @ (v @ axes.T), (straight @ v) @ axes.T)
    torch.testing.assert_close(turned.diagonal(), turned.to_dense().diagonal(dim1=1, dim2=2))


def test_a_singular_covariance_holds_at_positive_noise():
    direction = normal(D, 1, seed=14)
    mixture = df.GaussianMixture(MEANS, covariance=direction @ direction.T)
    F = df.DiffusionFisher(MEANS[:2], mixture, 1.0, 0.1)
    assert F.trace().isfinite().all() and torch.linalg.eigvalsh(F.to_dense()).max() < 100 + 1e-6


def test_float32_follows_float64(width):
    mixture = df.GaussianMixture(MEANS, log_prior=PRIOR, **width)
    x = normal(5, *EVENT, seed=15)
    narrow = df.DiffusionFisher(x.float(), mixture.to(torch.float32), 0.9, 0.01)
    wide = df.DiffusionFisher(x.float().double(), mixture, 0.9, 0.01)
    assert narrow.score.dtype == torch.float32
    for name in ("log_prob", "denoised", "score"):
        one, other = getattr(narrow, name).double(), getattr(wide, name)
        # 1e3 roundings: the logits, of 1e2 here, carry theirs into the weights
        assert (one - other).abs().max() <= 1e3 * 2**-24 * other.abs().max(), name


def test_eigenvalues_are_told_apart_far_below_one_over_sigma_squared():
    """With d > 512 the tolerance is relative to the size of F, which the widths bound."""
    d, variance = 600, torch.linspace(1, 2, 600, dtype=torch.float64)
    mixture = df.GaussianMixture(torch.zeros(1, d, dtype=torch.float64), variance=variance[None])
    F = df.DiffusionFisher(normal(1, d, seed=16), mixture, 1.0, 1e-4)
    values, _ = F.eigsh(1, largest=False)
    assert values.item() == pytest.approx(1 / (2 + 1e-8), rel=1e-6)


# ---- components, draws


def test_top_k_finds_the_components(width):
    mixture = df.GaussianMixture(MEANS, log_prior=PRIOR, **width)
    x, alpha, sigma = normal(4, *EVENT, seed=17), 0.8, 0.4
    noise = sigma**2 * torch.eye(D, dtype=torch.float64)
    each = MultivariateNormal(alpha * MEANS.flatten(1), alpha**2 * covariances(width) + noise)
    w = (PRIOR + each.log_prob(x.reshape(4, 1, D))).softmax(1)
    weight, index = w.sort(1, descending=True)
    found = df.top_k(x, mixture, alpha, sigma, 3)
    assert torch.equal(found.index, index[:, :3])
    torch.testing.assert_close(found.weight, weight[:, :3])


def test_top_k_tile_by_tile(monkeypatch):
    from dfkernels import _components

    mixture = df.GaussianMixture(MEANS, variance=POSITIVE, log_prior=PRIOR)
    x = normal(4, *EVENT, seed=17)
    whole, drawn = df.top_k(x, mixture, 1, 1, 4), mixture.draw(x, 1, 1, seed=3)
    monkeypatch.setattr(_components, "_NUMBERS", 2 * x.numel())
    parts, again = df.top_k(x, mixture, 1, 1, 4), mixture.draw(x, 1, 1, seed=3)
    assert torch.equal(parts.index, whole.index) and torch.equal(again.index, drawn.index)
    torch.testing.assert_close(parts.weight, whole.weight)


def test_draws_have_the_posterior_s_moments(width):
    mixture = df.GaussianMixture(MEANS, log_prior=PRIOR, **width)
    n, alpha, sigma = 40_000, 0.8, 0.9
    x = normal(1, *EVENT, seed=18)
    drawn = mixture.draw(x.expand(n, *EVENT), alpha, sigma, seed=5)
    F = df.DiffusionFisher(x, mixture, alpha, sigma)
    w = df.top_k(x, mixture, alpha, sigma, N)
    share = drawn.index.bincount(minlength=N)[w.index[0]] / n
    assert (share - w.weight[0]).abs().max() < 5 * 0.5 / n**0.5
    eye = torch.eye(D, dtype=torch.float64)
    covariance = (sigma / alpha) ** 2 * (eye - sigma**2 * F.to_dense()[0])
    draws = drawn.x_0.flatten(1)
    error = (draws.mean(0) - F.denoised.flatten()) / covariance.diagonal().sqrt()
    assert error.abs().max() < 5 / n**0.5
    assert (draws.T.cov() - covariance).abs().max() < 10 * covariance.diagonal().max() / n**0.5


def test_samples_have_the_law_s_moments(width):
    mixture, n = df.GaussianMixture(MEANS, log_prior=PRIOR, **width), 40_000
    y = mixture.sample(n, torch.Generator().manual_seed(0)).flatten(1)
    pi = PRIOR.softmax(0)
    mean = pi @ MEANS.flatten(1)
    between = (MEANS.flatten(1) - mean).T * pi @ (MEANS.flatten(1) - mean)
    covariance = (pi[:, None, None] * covariances(width)).sum(0) + between
    assert ((y.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max() < 5 / n**0.5
    assert (y.T.cov() - covariance).abs().max() < 10 * covariance.diagonal().max() / n**0.5


# ---- where a PointCloud goes


@pytest.mark.parametrize("name", ["full", "each"])
def test_the_likelihood_is_the_closed_form(name):
    width = WIDTHS[name]
    mixture = df.GaussianMixture(MEANS, log_prior=PRIOR, **width)
    ideal, low = df.Denoiser.exact(mixture, df.schedule.EDM()), 0.05
    x = mixture.sample(3, torch.Generator().manual_seed(1)) + low * normal(3, *EVENT, seed=19)
    how = {"noise": (low, 5e3), "data_std": 1.0}
    found = df.log_prob(ideal, x, trace="exact", **how)
    exact = torch.stack([log_q(one, 1.0, low, width) for one in x])
    # at s_max the normal prior is off by some <x, mean>/s_max^2 nats, of 1e-3 each here
    assert (found.log_prob - exact).abs().max() < 5e-3
    assert found.products == 0


def test_the_likelihood_by_the_denoiser_s_own_derivatives():
    mixture = df.GaussianMixture(MEANS, variance=POSITIVE, log_prior=PRIOR)
    ideal, x = df.Denoiser.exact(mixture, df.schedule.VP()), normal(2, *EVENT, seed=19)
    how = {"noise": (0.05, 40.0), "method": "heun", "steps": 8}
    with pytest.warns(RuntimeWarning, match="estimated error"):
        found, other = (df.log_prob(ideal, x, trace=t, **how) for t in ("exact", "divergence"))
    torch.testing.assert_close(found.log_prob, other.log_prob)


def test_samples_of_the_flow_follow_the_gaussian_map():
    """The flow of N(m, S) scales each axis by the ratio of its deviations."""
    S, schedule = FACTOR @ FACTOR.T, df.schedule.EDM()
    one = df.GaussianMixture(MEANS[:1], covariance=S)
    start = 20 * normal(4, *EVENT, seed=20)
    t = df.time_grid(schedule, 120, (0.01, 20.0))
    end = df.sample(df.Denoiser.exact(one, schedule), start, t, method="heun").x[-1]
    values, axes = torch.linalg.eigh(S)
    ratio = ((values + 0.01**2) / (values + 20.0**2)).sqrt()
    moved = MEANS[0].flatten() + (start.flatten(1) - MEANS[0].flatten()) @ axes * ratio @ axes.T
    torch.testing.assert_close(end.flatten(1), moved, rtol=0, atol=2e-3)
    test = df.transport_test(one, schedule, t, x=start)
    assert bool(test.monge(1e-9).all())
    A = test.log_norm.exp()[:, None, None] * test.A
    torch.testing.assert_close(A[0], axes * ratio @ axes.T, rtol=0, atol=2e-2)


@pytest.mark.parametrize("convention", ["jacobian", "authors", "slide"])
def test_transport_without_width_is_that_of_the_atoms(convention):
    schedule = df.schedule.EDM()
    t = df.time_grid(schedule, 30, (0.1, 5.0))
    y, x = MEANS[:, 0], 5 * normal(4, 3, seed=21)
    two = [
        df.transport_test(law, schedule, t, x=x, convention=convention)
        for law in (df.PointCloud(y, PRIOR), df.GaussianMixture(y, variance=0.0, log_prior=PRIOR))
    ]
    for one, other in zip(*two, strict=True):
        torch.testing.assert_close(one, other)


def test_guidance_by_its_exact_fisher(width):
    mixture, schedule = df.GaussianMixture(MEANS, log_prior=PRIOR, **width), df.schedule.EDM()
    ideal, t = df.Denoiser.exact(mixture, schedule), df.time_grid(schedule, 8, (0.3, 5.0))
    x, target = 5 * normal(3, *EVENT, seed=22), torch.zeros(EVENT, dtype=torch.float64)
    loss = lambda x_0: (x_0 - target).flatten(1).square().sum(1)
    exact, vjp = (
        df.guide(loss, x, t, ideal, form=form, steps=3, cloud=mixture) for form in ("exact", "vjp")
    )
    torch.testing.assert_close(exact.x, vjp.x)
    assert bool((exact.losses.amin(0) < exact.losses[0]).all())


@pytest.mark.parametrize("name", ["full", "diagonals"])
def test_check_knows_a_network_of_its_law(name):
    mixture = df.GaussianMixture(MEANS, log_prior=PRIOR, **WIDTHS[name])
    schedule = df.schedule.VP()
    ideal = df.Denoiser.exact(mixture, schedule)
    report = df.check(ideal, mixture)
    assert report.ok and all(level.ess == math.inf for level in report.levels)
    assert "inf" in str(report)
    wrong = df.Denoiser(lambda x, t: -ideal.eps(x, t), schedule)
    assert df.check(wrong, mixture).cause == "sign"


@pytest.mark.slow
def test_check_finds_the_scale_of_another_law():
    half = df.GaussianMixture(0.5 * MEANS, log_prior=PRIOR, variance=0.1)
    whole = df.GaussianMixture(MEANS, log_prior=PRIOR, variance=0.4)
    scaled = df.Denoiser.exact(half, df.schedule.VP())
    assert df.check(scaled, whole).cause == "data scale"


def test_a_law_is_mapped_with_its_widths(width):
    mixture, x = df.GaussianMixture(MEANS, log_prior=PRIOR, **width), normal(2, *EVENT, seed=23)
    for a, b in (([1.7], [0.3]), ([0.6, 2.0], [0.1, -0.4])):
        a, b = (torch.tensor(t, dtype=torch.float64) for t in (a, b))
        factor = a.view(-1, 1).expand(EVENT) if len(a) > 1 else a.expand(EVENT)
        shift = b.view(-1, 1) if len(b) > 1 else b
        mapped = mixture._mapped(a, b, 1 << 22)
        each = factor.flatten()
        cov = each[:, None] * covariances(width) * each
        flat = (MEANS * factor + shift).flatten(1)
        eye = 0.25 * torch.eye(D, dtype=torch.float64)
        law = MixtureSameFamily(Categorical(logits=PRIOR), MultivariateNormal(flat, cov + eye))
        torch.testing.assert_close(
            df.DiffusionFisher(x, mapped, 1.0, 0.5).log_prob, law.log_prob(x.flatten(1))
        )


def test_the_adapters_take_one():
    mixture = df.GaussianMixture(MEANS[:, None].float(), variance=0.3)
    x = normal(2, 1, *EVENT, seed=24).float()
    net = df.adapt.as_edm(mixture)
    expected = df.DiffusionFisher(x, mixture, 1.0, 0.7).denoised
    assert torch.equal(net(x, 0.7), expected) and net.img_channels == 1
    t = torch.tensor(0.4)
    velocity = df.adapt.as_torchcfm(mixture)
    fisher = df.DiffusionFisher(x, mixture, 0.4, 0.6)
    torch.testing.assert_close(velocity(t, x), fisher.denoised - fisher.eps)
    moved = net.to("cpu").double()
    assert moved.cloud.dtype == torch.float32  # casts leave a law alone


def test_what_asks_for_points_says_so():
    mixture = df.GaussianMixture(MEANS, variance=0.1)
    ideal = df.Denoiser.exact(mixture, df.schedule.EDM())
    with pytest.raises(ValueError, match="^tolerance: expected None with a GaussianMixture"):
        df.DiffusionFisher(MEANS, mixture, 1, 1, tolerance=1e-6)
    with pytest.raises(TypeError, match=r"^train: expected a PointCloud, .* learnt by heart"):
        df.audit(ideal, mixture, None)
    points = df.PointCloud(mixture.sample(64, torch.Generator().manual_seed(0)))
    report = df.audit(ideal, points, None, levels=2, points=0, samples=0, queries=8)
    assert len(report.levels) == 2
