"""What users of other libraries have asked for there, each with the smallest input that shows it.

More of them are elsewhere: derivatives through attention in tests/test_attention.py, samplers from
a table that ends without signal in tests/test_denoiser_calls.py, a table that starts without noise
in tests/test_schedule.py, levels that are shifted twice in tests/ecosystem/test_traps.py, signs of
memorisation in tests/test_audit.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits
from tensors import normal
from torch import nn

import dfkernels as df
from dfkernels import schedule


def gaussian_log_prob(x, mean, std):
    return torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1)


def at(sch, s):
    """t, alpha, sigma where sigma/alpha = s."""
    t = sch.t_of_log_snr(-2 * math.log(s))
    return t, *sch(t)


def mlp(width, dtype):
    torch.manual_seed(0)
    layers = nn.Linear(3, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
    return nn.Sequential(*layers, nn.Linear(width, 2)).to(dtype)


def time_first(model, t, x):
    return model(torch.cat([x, t[:, None]], 1))


def time_last(model, x, t):
    return time_first(model, t, x)


# log q of a model ---------------------------------------------------------------------------------

TURN = 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8
CENTRES = 2 * torch.stack([TURN.cos(), TURN.sin()], 1)


def eight_gaussians_log_prob(x, std):
    squares = torch.cdist(x.double(), CENTRES).square()
    return torch.logsumexp(-squares / (2 * std**2), 1) - math.log(8 * 2 * math.pi * std**2)


def test_the_log_density_of_a_flow_of_eight_gaussians():
    """Of the path of width 0.3 the exact velocity over eight atoms has their mixture as its end."""
    exact = df.adapt.as_torchcfm(df.PointCloud(CENTRES), 0.3)
    denoiser = df.adapt.from_torchcfm(exact, 0.3)
    x = CENTRES.repeat(2, 1) + 0.3 * normal(16, 2)
    found = df.log_prob(denoiser, x, (0.3, 1e3), "divergence", data_std=2**0.5)
    assert (found.log_prob - eight_gaussians_log_prob(x, 0.3)).abs().max() < 1e-3


def test_the_log_density_of_a_trained_mlp_of_time_and_state():
    model, generator = mlp(64, torch.float32), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(300):
        which = torch.randint(8, (512,), generator=generator)
        data = CENTRES[which].float() + 0.3 * torch.randn(512, 2, generator=generator)
        start, t = torch.randn(512, 2, generator=generator), torch.rand(512, generator=generator)
        x = t[:, None] * data + (1 - t[:, None]) * start
        loss = (time_first(model, t, x) - (data - start)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    denoiser = df.adapt.from_torchcfm(df.methods.Called(model, time_first))
    t, alpha, sigma = at(denoiser.schedule, 0.1)
    data = CENTRES.repeat(16, 1) + 0.3 * normal(128, 2, seed=1)
    x = (alpha * data + sigma * normal(128, 2, seed=2)).float()
    with torch.no_grad():
        found = df.log_prob(denoiser, x, (0.1, 1e3), "divergence", rtol=1e-3, atol=1e-3).log_prob
    wanted = eight_gaussians_log_prob(x / alpha, 0.1**0.5) - 2 * alpha.log()
    assert 0 < (wanted.mean() - found.mean()).item() < 0.3  # more by the divergence from the truth


def test_a_log_density_has_gradients_in_the_parameters():
    """Points of a checkerboard."""
    model = mlp(16, torch.float64)
    denoiser = df.Denoiser(df.methods.Called(model, time_last), schedule.RectifiedFlow(), "flow")
    cells = torch.randint(2, (6, 2), generator=torch.Generator().manual_seed(0))
    x = 2 * cells - 1 + torch.rand(6, 2, generator=torch.Generator().manual_seed(1)).double()

    def nats():
        how = dict(noise=(0.1, 10.0), trace="divergence", method="heun", steps=4)
        return df.log_prob(denoiser, x, **how).log_prob.mean()

    weight = model[0].weight
    gradient = torch.autograd.grad(nats(), weight)[0]
    ends = []
    with torch.no_grad():
        for step in (1e-5, -2e-5, 1e-5):
            weight += step * gradient
            ends.append(nats())
    slope = (ends[0] - ends[1]) / 2e-5
    assert slope > 0 and torch.allclose(slope, gradient.square().sum(), rtol=1e-6)


@pytest.mark.parametrize("probes", [1, 4, 64])
def test_the_variance_falls_with_the_number_of_probes(probes):
    """In two dimensions v^T J v = tr J + 2 J_12 v_1 v_2 for signs v: one probe is off by the same
    amount either way, and K of them by its K-th part in variance.
    """
    J = torch.tensor([[0.5, 0.3], [0.3, 0.8]], dtype=torch.float64)
    denoiser = df.Denoiser(lambda x, t: x @ J * t[:, None] / (1 + t[:, None] ** 2), schedule.EDM())
    x = torch.tensor([[0.4, -1.0]], dtype=torch.float64).expand(2000, 2)
    how = dict(noise=(0.1, 20.0), method="rk4", steps=16)
    exact = df.log_prob(denoiser, x[:1], trace="divergence", **how).log_prob
    generator = torch.Generator().manual_seed(0)
    off = df.log_prob(denoiser, x, trace=df.Hutchinson(generator, probes), **how).log_prob - exact
    one = df.log_prob(
        denoiser, x[:1], trace=df.Hutchinson(torch.Generator().manual_seed(0)), **how
    ).log_prob
    unit = (one - exact).abs()
    if probes == 1:
        assert torch.allclose(off.abs(), unit.expand(2000), rtol=1e-9)
    assert off.var(correction=0).item() == pytest.approx(unit.item() ** 2 / probes, rel=0.15)
    assert off.mean().abs() < 4 * unit / (2000 * probes) ** 0.5


def test_a_likelihood_has_a_generator_an_exact_trace_and_bits_and_reads_no_values():
    """Of a Gaussian; under vmap nothing could look at a value."""
    denoiser = df.Denoiser(lambda x, t: t[:, None] * x / (0.49 + t[:, None] ** 2), schedule.EDM())
    x = normal(5, 3)
    how = dict(noise=(0.05, 30.0), method="rk4", steps=64, data_std=0.7)
    exact = df.log_prob(denoiser, x, trace="divergence", width=0.5, **how)
    std = (0.49 + 0.05**2) ** 0.5
    assert torch.allclose(exact.log_prob, gaussian_log_prob(x, 0.0, std), atol=1e-5)
    assert torch.allclose(exact.bits_per_dim, -exact.log_prob / (3 * math.log(2)) + 1)
    mapped = torch.vmap(
        lambda x: df.log_prob(denoiser, x[None], trace="divergence", **how).log_prob
    )
    assert torch.allclose(mapped(x)[:, 0], exact.log_prob, rtol=1e-12)
    twice = [
        df.log_prob(
            denoiser, x, trace="hutchinson", generator=torch.Generator().manual_seed(3), **how
        ).log_prob
        for _ in range(2)
    ]
    assert torch.equal(*twice)


def test_a_log_density_of_data_in_any_units():
    """Paths in the plane, in metres: no bins of 1/255, no offset for images in [-1, 1]."""
    mean, std, metre = normal(8, 2, seed=4), 0.5, 100.0

    def denoiser(unit):
        def x0(x, t):
            variance = (unit * std) ** 2
            level = t.view(-1, 1, 1) ** 2
            return (variance * x + level * unit * mean) / (variance + level)

        return df.Denoiser(x0, schedule.EDM(), "sample")

    x = mean + std * normal(3, 8, 2, seed=5)
    found = [
        df.log_prob(
            denoiser(unit), unit * x, (0.01 * unit, 1e3 * unit), "divergence", data_std=unit * std
        )
        for unit in (1.0, metre)
    ]
    wanted = gaussian_log_prob(x, mean, (std**2 + 1e-4) ** 0.5)
    assert torch.allclose(found[0].log_prob, wanted, atol=1e-2)  # its error estimate is 1e-3
    assert torch.allclose(found[0].bits_per_dim, -found[0].log_prob / (16 * math.log(2)))
    change = found[1].log_prob - found[0].log_prob
    assert torch.allclose(change, torch.full_like(change, -16 * math.log(metre)), atol=1e-4)


def test_a_posterior_of_simulation_has_a_density_at_one_call_per_evaluation_and_a_mode():
    """theta ~ N(0, I), seen with noise of deviation 0.5: the posterior is N(0.8 seen, 0.2 I). Its
    score network is conditional, and so is the trace network, which spares the derivatives.
    """
    sch, calls = schedule.VP(), []

    def levels(t):
        alpha, sigma = (level.view(-1, 1) for level in sch(t))
        return alpha, sigma, 0.2 * alpha**2 + sigma**2

    def eps(x, t, seen):
        calls.append("score")
        alpha, sigma, variance = levels(t)
        return sigma * (x - alpha * 0.8 * seen) / variance

    def residual(x, t, seen):
        calls.append("trace")
        _, sigma, variance = levels(t)
        return (1 - sigma**2 / variance)[:, 0].expand(len(x))

    denoiser, seen = df.Denoiser(eps, sch), normal(4, 3)
    t, alpha, sigma = at(sch, 0.05)
    x = alpha * (0.8 * seen + 0.2**0.5 * normal(4, 3, seed=1))
    result = df.log_prob(
        denoiser,
        x,
        (0.05, 150.0),
        df.MatchedTrace(residual, denoiser),
        method="rk4",
        steps=40,
        data_std=0.2**0.5,
        seen=seen,
    )
    wanted = gaussian_log_prob(x, alpha * 0.8 * seen, (0.2 * alpha**2 + sigma**2).sqrt())
    assert torch.allclose(result.log_prob, wanted, atol=1e-2)  # the prior has mean 0
    assert result.evaluations == calls.count("score") == calls.count("trace") == 4 * 40 + 1
    assert result.products == 0
    score = denoiser.score(alpha * 0.8 * seen, t, seen=seen)  # the mode: no path, one call
    assert score.abs().max() < 1e-12 and denoiser.evaluations == result.evaluations + 1


# oracles: what a network should return, a trace, a variance ---------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.4, 0.9])
def test_the_target_of_a_flow_has_a_closed_form_for_two_atoms(t):
    """E[x_1 | x] = tanh(alpha x/sigma^2) for x_1 = -1 or 1."""
    cloud, x = df.PointCloud(torch.tensor([[-1.0], [1.0]]).double()), normal(6, 1)
    sigma = 1 - t
    mean = torch.tanh(t * x / sigma**2)
    wanted = mean - (x - t * mean) / sigma
    found = df.adapt.as_torchcfm(cloud)(t, x)
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-12)


def test_the_velocity_has_no_clamp_next_to_the_data():
    """At 1 - t = 10^-6, where networks divide by max(1 - t, 0.05)."""
    cloud, noise, t = df.PointCloud(normal(9, 4)), normal(9, 4, seed=1), 1 - 1e-6
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 0.3)):
        x = (t * cloud.y + (1 - t) * noise).to(dtype)
        found = df.adapt.as_torchcfm(cloud.to(dtype))(t, x)
        # x itself is rounded, and its noise is what is left of it
        assert torch.allclose(found, (cloud.y - noise).to(dtype), atol=tolerance)
    kept = df.adapt.from_torchcfm(df.adapt.as_torchcfm(cloud))
    x = t * cloud.y + (1 - t) * noise
    assert torch.allclose(kept(x, t), cloud.y, atol=1e-9)


def test_an_estimate_of_a_trace_has_a_referee():
    """Of a linear map that is not symmetric, over sigma."""
    J = normal(5, 5, seed=2)
    denoiser, x = df.Denoiser(lambda x, t: x @ J.T, schedule.EDM()), normal(3, 5)
    t = torch.tensor(2.0, dtype=torch.float64)
    exact = df.Divergence().begin(denoiser, x)(x, t)[1]
    assert torch.allclose(exact, J.trace().expand(3) / 2, rtol=1e-12)
    probes = 4000
    estimate = df.Hutchinson(torch.Generator().manual_seed(0), probes).begin(denoiser, x)(x, t)[1]
    off_diagonal = (J + J.T).square().sum() - (J + J.T).diagonal().square().sum()
    deviation = (off_diagonal / 2 / probes).sqrt() / 2
    assert (estimate.mean(0) - exact).abs().max() < 4 * deviation


def direct(cloud, x, alpha, sigma):
    """The posterior's weights [B, N] and mean [B, d] by their definition, in float64."""
    y = cloud.y.double().flatten(1) * cloud.scale + cloud.offset
    weights = torch.softmax(
        -torch.cdist(x.double().flatten(1), alpha * y).square() / (2 * sigma**2), 1
    )
    return weights, weights @ y, y


def test_the_ideal_denoiser_of_8_bit_images():
    images = torch.randint(256, (500, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    cloud = df.PointCloud(images.to(torch.uint8), scale=2 / 255, offset=-1)
    net = df.adapt.as_edm(cloud)
    for sigma in (0.2, 3.0, 20.0):
        x = (cloud.y[:6].double() * cloud.scale - 1 + sigma * normal(6, 3, 8, 8)).float()
        wanted = direct(cloud, x, 1.0, sigma)[1]
        assert (net(x, sigma).flatten(1) - wanted).abs().max() < 1e-5


def digits(n=300):
    return df.PointCloud(torch.tensor(load_digits().data[:n] / 8 - 1))


def test_a_posterior_covariance_is_the_derivative_of_the_mean():
    """What moment matching and pseudo-inverse guidance take for it, beside its definition: of the
    data set, and by one product with the Jacobian of any network.
    """
    cloud, sch = digits(), schedule.VP()
    denoiser, (t, alpha, sigma) = df.Denoiser.exact(cloud, sch), at(sch, 2.0)
    x, v = alpha * cloud.y[:4] + sigma * normal(4, 64), normal(4, 64, seed=1)
    weights, mean, y = direct(cloud, x, alpha, sigma)
    centred = y - mean[:, None]
    wanted = torch.einsum("bn,bnd,bne,be->bd", weights, centred, centred, v)
    pulled = torch.func.vjp(lambda x: denoiser(x, t), x)[1](v)[0]
    assert torch.allclose(sigma**2 / alpha * pulled, wanted, rtol=1e-8, atol=1e-10)
    for form, of in (("exact", dict(cloud=cloud)), ("vjp", {})):
        fisher = df.methods.endpoint.fisher(form, x, t, denoiser, **of)
        product = (sigma / alpha) ** 2 * (v - sigma**2 * (fisher @ v))
        assert torch.allclose(product, wanted, rtol=1e-8, atol=1e-9), form


def test_a_row_sum_is_not_the_posterior_variance():
    """The shortcut C 1 for diag C, beside the exact diagonal, on digits."""
    cloud, sigma = digits(), 2.0
    x = cloud.y[:3] + sigma * normal(3, 64)
    F = df.DiffusionFisher(x, cloud, 1.0, sigma)
    exact = sigma**2 * (1 - sigma**2 * F.diagonal())
    rows = sigma**2 * (1 - sigma**2 * (F @ torch.ones_like(x)))
    weights, mean, y = direct(cloud, x, 1.0, sigma)
    centred = y - mean[:, None]
    assert torch.allclose(exact, torch.einsum("bn,bnd->bd", weights, centred**2), atol=1e-10)
    assert torch.allclose(rows, torch.einsum("bn,bnd,bne->bd", weights, centred, centred))
    assert (
        rows - exact
    ).abs().mean() > 0.3 * exact.mean() and rows.min() < -0.05 < 0 <= exact.min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_variance_of_a_pixel_is_negative(dtype):
    """Beyond rounding, from one atom with all the weight to all of them."""
    cloud = digits()
    for sigma in (0.01, 0.3, 1.0, 5.0, 100.0):
        x = (cloud.y[:8] + sigma * normal(8, 64)).to(dtype)
        relative = 1 - sigma**2 * df.ops.fisher_diagonal(x, cloud.y.to(dtype), 1.0, sigma)
        assert relative.min() >= -4 * torch.finfo(dtype).eps
        weights, mean, y = direct(cloud, x, 1.0, sigma)
        wanted = torch.einsum("bn,bnd->bd", weights, (y - mean[:, None]) ** 2) / sigma**2
        assert torch.allclose(relative.double(), wanted, rtol=1e-3, atol=1e-5)


def test_the_variance_of_every_pixel_along_a_trajectory():
    cloud, sch = digits(), schedule.EDM()
    t = df.time_grid(sch, 12, (0.05, 100.0))
    path = df.sample(df.Denoiser.exact(cloud, sch), 100 * normal(2, 64), t, "heun")
    variance = torch.stack(
        [
            s**2 * (1 - s**2 * df.DiffusionFisher(x, cloud, 1.0, s).diagonal())
            for x, s in zip(path.x, path.t, strict=True)
        ]
    )
    assert variance.shape == (13, 2, 64)
    total = variance.sum(2)
    prior = (cloud.y - cloud.y.mean(0)).square().mean(0)
    assert torch.allclose(variance[0], prior.expand(2, 64), rtol=0.05, atol=1e-3)
    assert bool((total[-1] < 1e-6 * total[0]).all())


@pytest.mark.parametrize("method, order", [("ddim", 1), ("heun", 2)])
def test_the_order_of_a_solver_over_an_oracle(method, order):
    """The exact network of a data set takes the place of a trained one."""
    denoiser = df.adapt.from_edm(df.adapt.as_edm(df.PointCloud(normal(40, 3, seed=6))))
    x = 20 * normal(5, 3)

    def end(steps, method=method):
        t = df.time_grid(denoiser.schedule, steps, (0.7, 20.0))
        return df.sample(denoiser, x, t, method).x[-1]

    truth = end(1000, "heun")
    errors = torch.stack([(end(steps) - truth).norm() for steps in (20, 40, 80)])
    slopes = (errors[:-1] / errors[1:]).log2()
    assert torch.allclose(slopes, torch.full_like(slopes, order), atol=0.25), slopes
