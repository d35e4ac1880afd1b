"""A sampler that starts without the noise of its first node says so."""

from __future__ import annotations

import warnings

import pytest
import torch

import dfkernels as df

GENERATOR = torch.Generator().manual_seed(0)
CLOUD = df.PointCloud(torch.randn(50, 8, dtype=torch.float64, generator=GENERATOR))
EPS = torch.randn(16, 8, dtype=torch.float64, generator=GENERATOR)
SCHEDULES = [df.schedule.VP(), df.schedule.EDM(), df.schedule.VE(), df.schedule.RectifiedFlow()]


def ancestral(denoiser, x, t):
    return df.methods.ancestral.sample(denoiser, x, t, generator=GENERATOR)


SAMPLERS = {"sample": df.sample, "ancestral.sample": ancestral}


def warned(sampler, x, schedule=SCHEDULES[1]):
    """What was said, and the samples, which are the same whatever is said."""
    denoiser = df.Denoiser.exact(CLOUD, schedule)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = SAMPLERS[sampler](denoiser, x, df.time_grid(schedule, 2, (0.1, 40.0)))
    assert path.x[-1].shape == x.shape
    return [str(w.message) for w in caught if w.category is RuntimeWarning]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_noise_without_sigma_is_named(sampler):
    size = EPS.square().mean().sqrt()
    assert warned(sampler, EPS) == [
        f"{sampler}: expected x = alpha x_0 + sigma eps with sigma = 40 at t[0], got a root mean "
        f"square of {size:.3g}: was sigma left out, as in sigma * torch.randn?"
    ]
    assert len(warned(sampler, 19.9 / size * EPS)) == 1
    assert warned(sampler, 20.1 / size * EPS) == []


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_a_start_with_its_noise_says_nothing(sampler, schedule):
    sigma = schedule.sigma(schedule.t_of_log_snr(torch.tensor(40.0).log() * -2))
    assert warned(sampler, sigma * EPS, schedule) == []


def test_few_numbers_and_hidden_ones_say_nothing():
    """Of few numbers it may be chance; under vmap there is none to look at."""
    assert warned("sample", EPS[:7]) == []
    denoiser = df.Denoiser.exact(CLOUD, df.schedule.EDM())
    t = df.time_grid(denoiser.schedule, 2, (0.1, 40.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        torch.func.vmap(lambda x: df.sample(denoiser, x, t).x[-1])(EPS.expand(2, -1, -1))
