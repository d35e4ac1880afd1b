"""Asking for a derivative of a network that computes under torch.no_grad, or from x.detach(), is an
error, and not a trace or a product that leaves the network out.
"""

from __future__ import annotations

import pytest
import torch

import dfkernels as df

SCHEDULES = {
    "epsilon": df.schedule.VP(),
    "sample": df.schedule.EDM(),
    "v_prediction": df.schedule.VP(),
    "flow": df.schedule.RectifiedFlow(),
    "score": df.schedule.VP(),
}
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 1, 2, 2, generator=GENERATOR)
V = torch.randn(X.shape, generator=GENERATOR)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1)

    def forward(self, x, t):
        return self.layer(x).tanh()


class Guarded(Network):
    @torch.no_grad()
    def forward(self, x, t):
        return super().forward(x, t)


class Inferring(Network):
    @torch.inference_mode()
    def forward(self, x, t):
        return super().forward(x, t)


class Detached(Network):
    def forward(self, x, t):
        return super().forward(x.detach(), t)


def likelihood(trace):
    return lambda denoiser: (
        df.log_prob(denoiser, X, (0.1, 20.0), trace, method="heun", steps=2).log_prob
    )


def product(denoiser, form="vjp"):
    return df.methods.endpoint.fisher(form, X, 0.5, denoiser) @ V


def mapped(denoiser):
    """One sample at a time, by vmap."""
    return torch.func.vmap(
        lambda x: df.log_prob(
            denoiser, x[None], (0.1, 20.0), "divergence", method="heun", steps=2
        ).log_prob[0]
    )(X)


def forward(trace):
    return (likelihood(trace), 'mode="jvp"')


def guided(denoiser):
    t = df.time_grid(denoiser.schedule, 2, (0.1, 20.0))
    return df.guide(lambda x: x.flatten(1).square().sum(1), X, t, denoiser, steps=1).losses


DERIVATIVES = {
    "hutchinson": (likelihood("hutchinson"), 'mode="vjp"'),
    "divergence": (likelihood("divergence"), 'mode="vjp"'),
    "product": (product, 'form="vjp"'),
    "guide": (guided, 'form="vjp"'),
    "divergence, mapped": (mapped, 'mode="vjp"'),
    "hutchinson, forward": forward(df.Hutchinson(GENERATOR, 2, mode="jvp")),
    "divergence, forward": forward(df.Divergence(mode="jvp")),
    "product, forward": (lambda denoiser: product(denoiser, "jvp"), 'form="jvp"'),
}
CUT = (
    ": the network depends on x, but its derivative is cut, as by torch.no_grad(), "
    "torch.inference_mode() or x.detach() in it: call it without"
)


@pytest.mark.parametrize("gradients", [True, False], ids=("gradients", "no gradients"))
@pytest.mark.parametrize(
    "derivative, kind",
    [
        (derivative, kind)
        for derivative in DERIVATIVES
        for kind in (Guarded, Inferring, Detached)
        if not (kind is Guarded and "forward" in derivative)  # see below
    ],
)
def test_a_derivative_that_is_cut_is_an_error(derivative, kind, gradients):
    ask, argument = DERIVATIVES[derivative]
    for prediction_type, schedule in SCHEDULES.items():
        denoiser = df.Denoiser(kind().eval(), schedule, prediction_type)
        with torch.set_grad_enabled(gradients), pytest.raises(NotImplementedError) as caught:
            ask(denoiser)
        assert str(caught.value) == argument + CUT


def test_a_network_that_is_constant_has_the_derivative_0():
    """As v = 0, the answer for N(0, I), whose F is I."""
    constant = df.Denoiser(lambda x, t: torch.zeros_like(x), df.schedule.VP(), "v_prediction")
    with torch.no_grad():
        assert torch.allclose(product(constant), V, atol=1e-6)
        F = df.methods.endpoint.fisher("vjp", X, 0.5, constant)
        assert torch.allclose(F.trace(), torch.full((3,), 4.0))
    assert constant.evaluations == 2


def test_what_is_no_prediction_is_said_first():
    for network, message in (
        (lambda x, t: x.long(), "network: expected output of a floating dtype, got torch.int64"),
        (
            lambda x, t: torch.full_like(x, torch.nan),
            "network: returned NaN or inf for 3 of 3 samples, first for sample 0 at t = ",
        ),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            likelihood("hutchinson")(df.Denoiser(network, df.schedule.VP(), "epsilon"))
        assert str(caught.value).startswith(message)


def test_outside_of_derivatives_a_guarded_network_is_welcome():
    """As where guidance leaves the network's Jacobian out on purpose."""
    network = Network()
    guarded = Guarded()
    guarded.load_state_dict(network.state_dict())
    x = X.clone().requires_grad_()
    found = df.Denoiser(guarded, df.schedule.EDM(), "sample").eps(x, 0.5)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(found, df.Denoiser(network, df.schedule.EDM(), "sample").eps(X, 0.5))
    assert torch.allclose(gradient, torch.full_like(x, 1 / 0.5))
    t = df.time_grid(df.schedule.EDM(), 2, (0.1, 20.0))
    assert df.sample(df.Denoiser(guarded, df.schedule.EDM(), "sample"), X, t).x[-1].isfinite().all()


@pytest.mark.parametrize("derivative", [d for d in DERIVATIVES if "forward" in d])
def test_forward_mode_passes_a_guard(derivative):
    """torch.no_grad is of reverse mode alone."""
    ask, _ = DERIVATIVES[derivative]
    network, guarded = Network(), Guarded()
    guarded.load_state_dict(network.state_dict())
    state = GENERATOR.get_state()
    found = []
    for n in (network, guarded):
        GENERATOR.set_state(state)
        found.append(ask(df.Denoiser(n, df.schedule.VP(), "epsilon")))
    assert torch.equal(*found)
    assert found[0].abs().max() > 0.01
