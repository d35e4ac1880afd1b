"""A network may change what it is given, and return the same memory at every call: results and the
caller's tensors stay as they are.
"""

from __future__ import annotations

import pytest
import torch

import dfkernels as df

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(4, 2, 3, dtype=torch.float64, generator=GENERATOR)
V = torch.randn(X.shape, dtype=torch.float64, generator=GENERATOR)
TIMES = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)


def network(x, t):
    return (x / (1 + t[:, None, None])).sin() * t[:, None, None]


def changing(x, t):
    """The same, in place."""
    size = t[:, None, None].clone()
    t.zero_()
    x /= 1 + size
    x.sin_()
    x *= size
    return x


class Static:
    """The same, in memory of its own, as a captured CUDA graph."""

    def __init__(self, function=network):
        self.function, self.out = function, None

    def __call__(self, x, t, **conditions):
        found = self.function(x, t, **conditions).detach()
        self.out = found.clone() if self.out is None else self.out.copy_(found)
        return self.out


def both(x, t, label):
    return network(x, t) + label


def both_changing(x, t, label):
    return changing(x, t) + label


def guided(network):
    return df.ClassifierFreeGuidance(network, 3.0, {"label": 0.1})


CALLS = {
    "the posterior mean": lambda d: d(X, TIMES),
    "the noise": lambda d: d.eps(X, TIMES),
    "both": lambda d: torch.stack(d.both(X, TIMES)),
    "samples": lambda d: df.sample(d, X, df.time_grid(d.schedule, 3, (0.2, 3.0)), method="heun").x[
        -1
    ],
    "a likelihood": lambda d: (
        df.log_prob(d, X, (0.2, 3.0), "divergence", method="heun", steps=2).log_prob
    ),
    "a product": lambda d: df.methods.endpoint.fisher("vjp", X, TIMES, d) @ V,
    "a product, forward": lambda d: df.methods.endpoint.fisher("jvp", X, TIMES, d) @ V,
}


@pytest.mark.parametrize("gradients", [True, False], ids=("gradients", "no gradients"))
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "score"])
@pytest.mark.parametrize("what", CALLS)
def test_a_network_that_works_in_place_gives_the_same(what, prediction_type, gradients):
    kept = X.clone(), TIMES.clone()
    expected, found = (
        df.Denoiser(n, df.schedule.VP(), prediction_type) for n in (network, changing)
    )
    with torch.set_grad_enabled(gradients):
        assert torch.allclose(CALLS[what](found), CALLS[what](expected), rtol=1e-12, atol=1e-12)
    assert torch.equal(X, kept[0])
    assert torch.equal(TIMES, kept[1])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "score"])
@pytest.mark.parametrize("method", ["ddim", "heun", "o-belm"])
def test_a_network_that_returns_the_same_memory_gives_the_same(method, prediction_type):
    expected, found = (
        df.Denoiser(n, df.schedule.VP(), prediction_type) for n in (network, Static())
    )
    t = df.time_grid(expected.schedule, 3, (0.2, 3.0))
    with torch.no_grad():
        samples = [df.sample(d, X, t, method=method).x[-1] for d in (found, expected)]
        assert torch.equal(*samples)
        first = found.eps(X, 0.2), found(X, 0.2)
        found.eps(X, 0.8)
        assert torch.equal(first[0], expected.eps(X, 0.2))
        assert torch.equal(first[1], expected(X, 0.2))


@pytest.mark.parametrize("function", [both_changing, Static(both)], ids=("in place", "same memory"))
def test_classifier_free_guidance(function):
    expected, found = (
        df.Denoiser(guided(n), df.schedule.VP(), "epsilon").eps(X, TIMES, label=0.7)
        for n in (both, function)
    )
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
