"""azula: its samplers and guidance over a data set, and our methods over its denoisers."""

from __future__ import annotations

import math

import pytest
import torch
from small_data import digits, distance, noise

import dfkernels as df

pytest.importorskip("azula")

from azula import denoise, sample
from azula import noise as schedules
from azula.guidance.mmps import MMPSDenoiser
from azula.linalg.covariance import IsotropicCovariance

SCHEDULES = ["VPSchedule", "VESchedule", "CosineSchedule", "RectifiedSchedule", "DecaySchedule"]


def mlp(d=4):
    """A backbone(x, t)."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(d + 1, 16), torch.nn.Tanh(), torch.nn.Linear(16, d))

    class Backbone(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(torch.cat([x, t.expand(len(x))[:, None]], 1))

    return Backbone()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ["DDPMSampler", "DDIMSampler", "HeunSampler", "zABSampler"])
@pytest.mark.covers("azula", "exact")
def test_their_samplers_end_on_atoms(sampler, schedule):
    cloud = digits(dtype=torch.float64)
    denoiser = df.adapt.as_azula(cloud, getattr(schedules, schedule)())
    torch.manual_seed(0)
    run = getattr(sample, sampler)(denoiser, steps=40, silent=True, dtype=torch.float64)
    x = run(run.init((4, 1, 8, 8), dtype=torch.float64))
    assert distance(x, cloud) < 3e-3  # their last level is 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.covers("azula", "exact")
def test_their_ddim_over_the_data_set_is_ours(schedule):
    cloud, schedule = digits(dtype=torch.float64), getattr(schedules, schedule)()
    theirs = df.adapt.as_azula(cloud, schedule)
    denoiser = df.adapt.from_azula(theirs)
    run = sample.DDIMSampler(theirs, steps=20, silent=True, dtype=torch.float64)
    x = noise(4, 1, 8, 8, dtype=torch.float64) * schedule(torch.tensor(1.0).double())[1]
    ours = df.sample(denoiser, x, run.timesteps, method="ddim").x[-1]
    assert (run(x) - ours).abs().max() < 1e-9 * x.abs().max()


@pytest.mark.covers("azula", "exact")
def test_guidance_differentiates_the_mean_and_meets_the_measurement():
    cloud = digits(dtype=torch.float64)
    schedule = schedules.VPSchedule()
    denoiser = df.adapt.as_azula(cloud, schedule)
    t = torch.tensor(0.4, dtype=torch.float64)
    alpha, sigma = schedule(t)
    x = (alpha * cloud.y[:3] + sigma * noise(3, 1, 8, 8, dtype=torch.float64)).requires_grad_()
    v = noise(3, 1, 8, 8, dtype=torch.float64, seed=1)
    # what MMPS takes for the covariance of x_0 given x_t, and what it is
    product = sigma**2 / alpha * torch.autograd.grad(denoiser(x, t).mean, x, v)[0]
    fisher = df.DiffusionFisher(x.detach(), cloud, alpha, sigma)
    exact = (sigma / alpha) ** 2 * (v - sigma**2 * (fisher @ v))
    assert (product - exact).abs().max() < 1e-9
    A = lambda x: x[..., ::2, ::2]
    guided = MMPSDenoiser(
        denoiser, A(cloud.y[:3]), A, IsotropicCovariance(torch.tensor(0.1, dtype=torch.float64))
    )
    torch.manual_seed(0)
    run = sample.DDPMSampler(guided, steps=64, silent=True, dtype=torch.float64)
    made = run(run.init((3, 1, 8, 8), dtype=torch.float64))
    free = sample.DDPMSampler(denoiser, steps=64, silent=True, dtype=torch.float64)
    without = free(free.init((3, 1, 8, 8), dtype=torch.float64))
    residual = [(A(a) - A(cloud.y[:3])).square().mean() for a in (made, without)]
    assert residual[0] < residual[1] / 2


@pytest.mark.parametrize("kind", ["KarrasDenoiser", "SimpleDenoiser"])
@pytest.mark.parametrize("schedule", ["VPSchedule", "RectifiedSchedule"])
@pytest.mark.covers("azula", "sample")
def test_our_sampler_over_their_denoiser_is_their_sampler(kind, schedule):
    schedule = getattr(schedules, schedule)()
    theirs = getattr(denoise, kind)(mlp(), schedule).requires_grad_(False)
    denoiser = df.adapt.from_azula(theirs)
    run = sample.DDIMSampler(theirs, steps=16, silent=True, dtype=torch.float64)
    x = noise(5, 4)
    ours = df.sample(denoiser, x, run.timesteps, method="ddim").x[-1]
    assert (run(x) - ours).abs().max() < 1e-4 * ours.abs().max()
    assert [p is q for p, q in zip(theirs.parameters(), denoiser.parameters(), strict=True)] == [
        True
    ] * 4


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.covers("azula", "likelihood")
def test_the_likelihood_of_their_gaussian_is_the_gaussian_s(schedule):
    schedule = getattr(schedules, schedule)()
    mean, variance = torch.tensor([0.5, -1.0], dtype=torch.float64), 0.7
    theirs = denoise.GaussianDenoiser(
        mean, IsotropicCovariance(torch.tensor(variance, dtype=torch.float64)), schedule
    )
    denoiser = df.adapt.from_azula(theirs)
    level = (0.05, 500.0)
    t = denoiser.schedule.t_of_log_snr(-2 * math.log(level[0]))
    alpha, sigma = denoiser.schedule(t)
    x = alpha * (mean + noise(4, 2, dtype=torch.float64))
    found = df.log_prob(
        denoiser, x, level, "divergence", data_std=variance**0.5, rtol=1e-5, atol=1e-5
    ).log_prob
    scale = (alpha**2 * variance + sigma**2).sqrt()
    wanted = torch.distributions.Normal(alpha * mean, scale).log_prob(x).sum(1)
    # the mean at the noisiest level, which the prior leaves out
    assert (found - wanted).abs().max() < 2e-2
