"""Called: a model that is called in another way is still seen; a network's dtype is that of most of
its numbers.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from tensors import normal
from torch import nn

import dfkernels as df
from dfkernels import schedule
from dfkernels.methods._calls import dtype_of


class Lumina(nn.Module):
    """Takes 1 - sigma, and returns x_0 - eps as an object: its pipeline turns both round."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dropout = nn.Linear(2, 2).bfloat16(), nn.Dropout(0.5)

    def forward(self, x, t, scale=1.0):
        assert x.dtype == torch.bfloat16
        return SimpleNamespace(sample=scale * self.dropout(self.layer(x)) * t[:, None].to(x))


def turned(model, x, t, **conditions):
    return -model(x, 1 - t, **conditions).sample


def test_a_called_model_is_seen_and_a_lambda_hides_its_own():
    model, x = Lumina(), normal(4, 2)
    denoiser = df.Denoiser(
        df.methods.Called(model, turned), schedule.ReversedRectifiedFlow(), "flow"
    )
    assert list(denoiser.parameters()) == list(model.parameters())
    assert denoiser.training and not df.methods.Called(Lumina().eval(), turned).training
    times = torch.tensor([0.9, 0.5, 0.1])
    with pytest.warns(RuntimeWarning, match="first of 1 layers: model.dropout"):
        df.sample(denoiser, x, times)
    denoiser.eval()
    assert not model.dropout.training
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        eps = df.sample(denoiser, x, times).x[-1]
        wanted = x
        for t, s in ((0.9, 0.5), (0.5, 0.1)):  # DDIM of a flow is Euler
            field = -model(wanted.bfloat16(), torch.full((4,), 1 - t).double()).sample
            wanted = wanted + (s - t) * field
    assert eps.dtype == torch.float64 and torch.allclose(eps, wanted, rtol=1e-2, atol=1e-2)
    hidden = df.Denoiser(lambda x, t: turned(model, x, t), schedule.ReversedRectifiedFlow(), "flow")
    with pytest.raises(AssertionError):  # x comes in float64
        hidden(x, 0.5)
    assert list(hidden.parameters()) == []


def test_every_order_of_arguments_and_conditions_reach_the_call():
    mlp = nn.Linear(3, 2).double()
    joined = lambda mlp, t, x, factor=1: factor * mlp(torch.cat([x, t[:, None]], 1))
    denoiser = df.adapt.from_torchcfm(df.methods.Called(mlp, joined))
    x, t = normal(4, 2), torch.full((4,), 0.5, dtype=torch.float64)
    out = mlp(torch.cat([x, t[:, None]], 1))
    assert torch.allclose(denoiser(x, 0.5, factor=2), x + 0.5 * 2 * out)  # x_0 = x + sigma v
    named = df.methods.Called(mlp, lambda mlp, x, t: mlp(torch.cat([x, t[:, None]], 1)))
    scheduler = lambda t: SimpleNamespace(alpha_t=t, sigma_t=1 - t)
    found = df.adapt.from_flow_matching(named, scheduler)  # by the names of the arguments
    assert torch.allclose(found(x, 0.5), x + 0.5 * out)


class Exact(nn.Module):
    """Computes with x itself, around parameters in half precision."""

    full_precision = True

    def __init__(self):
        super().__init__()
        self.inner = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    def forward(self, x, t):
        assert x.dtype == t.dtype == torch.float64
        return x / (1 + t[:, None])


def mean(net, x, t):
    return net(x, t)


def velocity(net, t, x):
    """Of the path x = x_0/2 + eps/2 at t = 1/2, where x_0 = x + v/2."""
    return 2 * (net(x, t) - x)


WRAPPED = {
    "Called": lambda net: df.Denoiser(df.methods.Called(net, mean), schedule.EDM(), "sample"),
    "adapter": lambda net: df.adapt.from_k_diffusion(net),
    "Called in an adapter": lambda net: df.adapt.from_torchcfm(df.methods.Called(net, velocity)),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_a_network_that_takes_x_uncast_does_so_within_any_wrapper(how):
    x = normal(4, 2)
    assert torch.allclose(WRAPPED[how](Exact())(x, 0.5), x / 1.5, rtol=1e-14)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="^model: expected an nn.Module, got function$"):
        df.methods.Called(lambda x, t: x, turned)
    with pytest.raises(TypeError, match=r"^call: expected a callable call\(model, x, t\), got in"):
        df.methods.Called(nn.Linear(2, 2), 3)


@pytest.mark.parametrize("first", ["table", "integers", "lazy", "bytes"])
def test_the_dtype_is_that_of_most_numbers(first):
    """A table of embeddings or a norm that is kept in float32 does not decide."""
    network = nn.Module()
    network.first = {
        "table": lambda: nn.Embedding(4, 2),
        "integers": lambda: nn.ParameterList(
            [nn.Parameter(torch.zeros(99, dtype=torch.int8), requires_grad=False)]
        ),
        "lazy": lambda: nn.LazyLinear(3),
        "bytes": lambda: nn.ParameterList(
            [nn.Parameter(torch.zeros(99).to(torch.float8_e4m3fn), requires_grad=False)]
        ),
    }[first]()
    network.body = nn.Linear(8, 8).bfloat16()
    network.norm = nn.LayerNorm(8)
    assert dtype_of(network, normal(2, 8)) == torch.bfloat16
    assert dtype_of(nn.Identity(), normal(2, 8)) == torch.float64
