"""torchcfm and torchdiffeq: a data set as their network, and our methods over theirs."""

from __future__ import annotations

import sys
from types import ModuleType
from unittest import mock

import pytest
import torch
from small_data import digits, distance, noise

import dfkernels as df

torchdiffeq = pytest.importorskip("torchdiffeq")
cfm = pytest.importorskip("torchcfm.conditional_flow_matching")
from torchcfm.models.models import MLP  # noqa: E402

MATCHERS = {
    "CFM": cfm.ConditionalFlowMatcher(0.0),
    "CFM 0.3": cfm.ConditionalFlowMatcher(0.3),
    "target": cfm.TargetConditionalFlowMatcher(0.05),
    "VP": cfm.VariancePreservingConditionalFlowMatcher(0.0),
    "VP 0.2": cfm.VariancePreservingConditionalFlowMatcher(0.2),
}


@pytest.mark.parametrize("name", MATCHERS)
@pytest.mark.covers("torchcfm", "exact")
def test_the_velocity_is_the_regression_of_their_target(name):
    """E (v(x_t, t) - u_t) g(x_t) = 0 for every function g, for noise of the path's width too."""
    cloud, n = df.PointCloud(noise(5, 2, dtype=torch.float64)), 100_000
    which = torch.randint(5, (n,), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    t, x, u = MATCHERS[name].sample_location_and_conditional_flow(
        noise(n, 2, dtype=torch.float64, seed=2),
        cloud.y[which],
        torch.full((n,), 0.6, dtype=torch.float64),
    )
    error = df.adapt.as_torchcfm(cloud, MATCHERS[name])(t, x) - u
    for g in (torch.ones_like(error), x, x.sin()):
        products = error * g
        assert (products.mean(0).abs() < 5 * products.std(0) / n**0.5).all()


@pytest.mark.parametrize("path", [0.0, MATCHERS["CFM"], MATCHERS["VP"]], ids=str)
@pytest.mark.covers("torchcfm", "exact")
def test_their_solver_ends_on_atoms(path):
    cloud = digits(dtype=torch.float64)
    grid = torch.cat([torch.linspace(0, 0.9, 30), 1 - torch.logspace(-1.1, -4, 25)]).double()
    x = noise(4, 1, 8, 8, dtype=torch.float64)
    end = torchdiffeq.odeint(df.adapt.as_torchcfm(cloud, path), x, grid, method="midpoint")[-1]
    assert distance(end, cloud) < 1e-3


@pytest.mark.parametrize("name", MATCHERS)
def test_there_and_back_is_the_exact_denoiser(name):
    cloud, path = digits(dtype=torch.float64), MATCHERS[name]
    denoiser = df.adapt.from_torchcfm(df.adapt.as_torchcfm(cloud, path), path)
    exact = df.Denoiser.exact(cloud, denoiser.schedule)
    t = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    alpha, sigma = (level.view(4, 1, 1, 1) for level in denoiser.schedule(t))
    x = alpha * cloud.y[:4] + sigma * noise(4, 1, 8, 8, dtype=torch.float64)
    for method in ("forward", "eps", "score"):
        found, wanted = (getattr(d, method)(x, t) for d in (denoiser, exact))
        assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max(), method
    if name == "CFM 0.3":
        number = df.adapt.from_torchcfm(lambda t, x: x, 0.3).schedule
        assert torch.allclose(torch.stack(number(t)), torch.stack(denoiser.schedule(t)), rtol=1e-14)


def wrapped(model):
    """Their torch_wrapper, whose module also imports torchdyn, for its data sets only."""
    empty = {name: ModuleType(name) for name in ("torchdyn", "torchdyn.datasets")}
    empty["torchdyn.datasets"].generate_moons = None
    with mock.patch.dict(sys.modules, empty):
        from torchcfm.utils import torch_wrapper
    return torch_wrapper(model)


@pytest.mark.parametrize("how", ["function", "torch_wrapper"])
@pytest.mark.covers("torchcfm", "sample")
@pytest.mark.covers("torchcfm", "likelihood")
def test_our_sampler_and_likelihood_over_their_mlp_are_theirs(how):
    torch.manual_seed(0)
    mlp = MLP(dim=2, time_varying=True).requires_grad_(False)
    theirs = wrapped(mlp)
    given = theirs if how == "torch_wrapper" else lambda t, x: mlp(torch.cat([x, t[:, None]], 1))
    denoiser = df.adapt.from_torchcfm(given)
    x, grid = noise(5, 2), torch.linspace(0.02, 0.98, 20)
    end = torchdiffeq.odeint(theirs, x, grid, method="euler")[-1]
    ours = df.sample(denoiser, x, grid.double(), method="ddim").x[-1]
    assert (end - ours).abs().max() < 1e-5

    # a change of variables back to the noise
    def augmented(t, state):
        jacobian = torch.func.vmap(torch.func.jacrev(lambda x: theirs(t, x[None])[0]))(state[0])
        return theirs(t, state[0]), jacobian.diagonal(dim1=1, dim2=2).sum(1)

    back, change = torchdiffeq.odeint(
        augmented, (x, torch.zeros(5)), torch.tensor([1.0, 0.0]), rtol=1e-5, atol=1e-5
    )
    wanted = torch.distributions.Normal(0.0, 1.0).log_prob(back[-1]).sum(1) + change[-1]
    found = df.log_prob(denoiser, x, (1e-4, 1e4), "divergence", rtol=1e-4, atol=1e-4).log_prob
    assert (found - wanted).abs().max() < 1e-2


def test_coupled_flow_matchers_are_refused():
    for name in ("ExactOptimalTransport", "SchrodingerBridge"):
        matcher = getattr(cfm, f"{name}ConditionalFlowMatcher")(1.0)
        for adapter, given in (
            (df.adapt.as_torchcfm, digits()),
            (df.adapt.from_torchcfm, lambda t, x: x),
        ):
            with pytest.raises(ValueError, match=f"^path: .*got {name}.*, which couples them$"):
                adapter(given, matcher)
