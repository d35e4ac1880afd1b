"""flow_matching (CC-BY-NC: for these tests only): its solver over a data set, our methods over its
models.
"""

from __future__ import annotations

import pytest
import torch
from small_data import digits, distance, noise

import dfkernels as df

pytest.importorskip("flow_matching")

from flow_matching.path import AffineProbPath, CondOTProbPath
from flow_matching.path import scheduler as schedulers
from flow_matching.solver import ODESolver

PATHS = {
    "CondOT": CondOTProbPath(),
    "Cosine": AffineProbPath(schedulers.CosineScheduler()),
    "VP": AffineProbPath(schedulers.VPScheduler()),
    "LinearVP": AffineProbPath(schedulers.LinearVPScheduler()),
    "Polynomial": AffineProbPath(schedulers.PolynomialConvexScheduler(2.0)),
}


def model(d=2):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(d + 1, 32), torch.nn.Tanh(), torch.nn.Linear(32, d))

    class Velocity(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(torch.cat([x, t.reshape(-1, 1).expand(len(x), 1).to(x)], 1))

    return Velocity().requires_grad_(False)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.covers("flow_matching", "exact")
def test_their_solver_ends_on_atoms(name):
    cloud = digits(dtype=torch.float64)
    end = 1 - torch.logspace(-1, -4, 25, dtype=torch.float64)
    grid = torch.cat([torch.linspace(0.0, 0.9, 30, dtype=torch.float64)[:-1], end])
    x = ODESolver(df.adapt.as_velocity(cloud, PATHS[name])).sample(
        x_init=noise(4, 1, 8, 8, dtype=torch.float64),
        step_size=None,
        method="midpoint",
        time_grid=grid,
    )
    alpha, sigma = df.adapt.from_flow_matching(lambda x, t: x, PATHS[name]).schedule(grid[-1])
    assert distance(x / alpha, cloud) < 3 * sigma / alpha


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.covers("flow_matching", "exact")
def test_the_velocity_is_the_regression_of_their_target(name):
    """E (v(x_t, t) - dx_t) g(x_t) = 0 for every function g."""
    cloud, n = df.PointCloud(noise(5, 2, dtype=torch.float64)), 100_000
    which = torch.randint(5, (n,), generator=torch.Generator().manual_seed(1))
    t = torch.full((n,), 0.4, dtype=torch.float64)
    drawn = PATHS[name].sample(
        x_0=noise(n, 2, dtype=torch.float64, seed=2), x_1=cloud.y[which], t=t
    )
    error = df.adapt.as_velocity(cloud, PATHS[name])(x=drawn.x_t, t=t) - drawn.dx_t
    for g in (torch.ones_like(error), drawn.x_t, drawn.x_t.sin()):
        products = error * g
        assert (products.mean(0).abs() < 5 * products.std(0) / n**0.5).all()


@pytest.mark.parametrize("name", PATHS)
def test_there_and_back_is_the_exact_denoiser(name):
    cloud = digits(dtype=torch.float64)
    denoiser = df.adapt.from_flow_matching(df.adapt.as_velocity(cloud, PATHS[name]), PATHS[name])
    exact = df.Denoiser.exact(cloud, denoiser.schedule)
    t = torch.tensor([0.05, 0.3, 0.7, 0.97], dtype=torch.float64)
    assert torch.allclose(
        denoiser.schedule.t_of_log_snr(denoiser.schedule.log_snr(t)), t, atol=1e-12
    )
    alpha, sigma = (level.view(4, 1, 1, 1) for level in denoiser.schedule(t))
    x = alpha * cloud.y[:4] + sigma * noise(4, 1, 8, 8, dtype=torch.float64)
    for method in ("forward", "eps", "score"):
        found, wanted = (getattr(d, method)(x, t) for d in (denoiser, exact))
        assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max(), method


@pytest.mark.covers("flow_matching", "sample")
def test_our_sampler_over_their_model_is_their_solver():
    """One DDIM step of a rectified flow is one Euler step."""
    velocity, x = model(), noise(6, 2)
    denoiser = df.adapt.from_flow_matching(velocity, CondOTProbPath())
    grid = torch.linspace(0.02, 0.98, 20)
    theirs = ODESolver(velocity).sample(x_init=x, step_size=None, method="euler", time_grid=grid)
    ours = df.sample(denoiser, x, grid.double(), method="ddim").x[-1]
    assert (theirs - ours).abs().max() < 1e-5


@pytest.mark.covers("flow_matching", "likelihood")
def test_the_likelihood_of_their_model_is_their_likelihood():
    """The change of variables between the same ends: theirs over all of [0, 1], ours from the noise
    (s = 10^4) to s = 10^-4, each with the exact divergence.
    """
    velocity = model()
    x = noise(4, 2)
    normal = torch.distributions.Normal(0.0, 1.0)
    _, theirs = ODESolver(velocity).compute_likelihood(
        x_1=x,
        log_p0=lambda x: normal.log_prob(x).sum(1),
        step_size=0.02,
        method="midpoint",
        exact_divergence=True,
    )
    denoiser = df.adapt.from_flow_matching(velocity, CondOTProbPath())
    with torch.no_grad():
        ours = df.log_prob(denoiser, x, (1e-4, 1e4), "divergence", rtol=1e-4, atol=1e-4).log_prob
    assert (theirs - ours).abs().max() < 1e-2


def test_geodesic_and_discrete_paths_are_refused():
    from flow_matching.path import GeodesicProbPath, MixtureDiscreteProbPath
    from flow_matching.utils.manifolds import Sphere

    scheduler = CondOTProbPath().scheduler
    for path in (GeodesicProbPath(scheduler, Sphere()), MixtureDiscreteProbPath(scheduler)):
        for adapter in (
            lambda path=path: df.adapt.from_flow_matching(lambda x, t: x, path),
            lambda path=path: df.adapt.as_velocity(digits(), path),
        ):
            with pytest.raises(TypeError, match=f"^path: .* got {type(path).__name__}$"):
                adapter()


def test_there_is_no_velocity_at_the_data():
    velocity = df.adapt.as_velocity(digits(), CondOTProbPath())
    with pytest.raises(ValueError, match="^t: expected times with noise, got 1, where sigma = 0"):
        velocity(x=noise(2, 1, 8, 8), t=torch.tensor(1.0))
    with pytest.raises(TypeError, match="^path: expected a path with a `scheduler`, .* got int$"):
        df.adapt.as_velocity(digits(), 3)
