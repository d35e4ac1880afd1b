"""Every method takes a batch of no samples: results of the right shape and dtype, and no
warning."""

from __future__ import annotations

import warnings

import pytest
import torch
from tensors import rng

from dfkernels import PointCloud, schedule
from dfkernels.methods import (
    adjoint,
    ancestral,
    endpoint,
    langevin,
    likelihood,
    reflow,
    samplers,
    trace_matching,
    training,
    transport,
)
from dfkernels.methods.denoiser import PREDICTION_TYPES, Denoiser
from dfkernels.methods.grid import time_grid
from dfkernels.ops import SlowDerivativeWarning

SCH = schedule.VP()
T = time_grid(SCH, 3, (0.1, 5.0))
FLOW = schedule.RectifiedFlow()
FROM_NOISE = torch.tensor([0.0, 0.1, 0.2])


def cloud(event):
    return PointCloud(torch.randn(6, *event, generator=torch.Generator().manual_seed(0)))


def trace(x, t):
    return x.reshape(len(x), x.shape[1:].numel()).sum(1)


def per_sample(x):
    return x.reshape(len(x), x.shape[1:].numel()).square().sum(1)


CALLS = {
    **{
        f"denoiser, {kind}": lambda x, c, kind=kind: [
            *Denoiser(lambda x, t: x, SCH, kind).both(x, 0.5),
            Denoiser(lambda x, t: x, SCH, kind).score(x, x.new_full((len(x),), 0.5)),
        ]
        for kind in PREDICTION_TYPES
    },
    **{
        f"sample, {method}": lambda x, c, method=method: (
            samplers.sample(Denoiser.exact(c, SCH), x, T, method).x
        )
        for method in samplers.METHODS
    },
    **{
        f"ancestral, {covariance}": lambda x, c, covariance=covariance: (
            ancestral.sample(Denoiser.exact(c, SCH), x, T, covariance, generator=rng()).x
        )
        for covariance in ancestral.COVARIANCES
    },
    **{
        f"langevin, {kind}, {metropolis}": lambda x, c, kind=kind, how=how, metropolis=metropolis: [
            langevin.langevin(
                *(Denoiser.exact(c, SCH), x, 0.5, 2, kind),
                generator=rng(),
                metropolis=metropolis,
                **how(x),
            ).x
        ]
        for kind, how in {
            "none": lambda x: {},
            "gibbs": lambda x: {},
            "damped": lambda x: {"damping": 0.3},
            "rank-one": lambda x: {"damping": 100.0, "x0": x},
            "paper": lambda x: {"damping": 0.3},
        }.items()
        for metropolis in (False, True)
    },
    "gibbs": lambda x, c: [langevin.gibbs(Denoiser.exact(c, SCH), x, 0.5, 2, generator=rng())],
    "reflow, pairs": lambda x, c: [reflow.pairs(Denoiser.exact(c, FLOW), x, FROM_NOISE).sample],
    **{
        f"reflow, reversed pairs, exact={exact}": lambda x, c, exact=exact: [
            reflow.reverse_pairs(
                *(Denoiser.exact(c, FLOW), x, FROM_NOISE, rng()), noise=0.7, exact=exact
            ).noise
        ]
        for exact in (False, True)
    },
    "reflow, loss": lambda x, c: [reflow.loss(Denoiser.exact(c, FLOW), reflow.Pairs(x, x), rng())],
    "invert": lambda x, c: samplers.invert(Denoiser.exact(c, SCH), x, T).x,
    **{
        f"fisher, {form}": lambda x, c, form=form: [
            (f := endpoint.fisher(form, x, 0.5, Denoiser.exact(c, SCH), x0=x, cloud=c, trace=trace))
            @ x,
            f.diagonal(),
            f.trace(),
        ]
        for form in endpoint.FORMS
    },
    **{
        f"adjoint, {form}": lambda x, c, form=form: (
            adjoint.adjoint(
                samplers.sample(d := Denoiser.exact(c, SCH), x, T),
                x,
                d,
                form,
                order=2,
                normalise=True,
                cloud=c,
                trace=trace,
            ).x
        )
        for form in endpoint.FORMS
    },
    "guide": lambda x, c: adjoint.guide(per_sample, x, T, Denoiser.exact(c, SCH), steps=2)[:3],
    **{
        f"log_prob, {method}, {name}": lambda x, c, method=method, steps=steps, make=make: (
            likelihood.log_prob(
                Denoiser.exact(c, SCH), x, (0.1, 5.0), make(c), method=method, steps=steps
            )[:4]
        )
        for method, steps in (("heun", 2), ("rk4", 2), ("dopri5", None))
        for name, make in {
            "exact": lambda c: likelihood.exact(c, SCH),
            "function": lambda c: trace,
            "divergence": lambda c: likelihood.Divergence(),
            "forward divergence": lambda c: likelihood.Divergence(mode="jvp"),
            "Hutchinson": lambda c: likelihood.Hutchinson(rng(), 2),
            "matched": lambda c: trace_matching.MatchedTrace(
                trace, Denoiser.exact(c, SCH), "paper"
            ),
        }.items()
    },
    "diffuse": lambda x, c: trace_matching.diffuse(SCH, x, rng(), (0.1, 5.0))[:1],
    **{
        f"matched trace, {form}": lambda x, c, form=form: [
            trace_matching.MatchedTrace(trace, Denoiser.exact(c, SCH), form)(x, 0.5)
        ]
        for form in trace_matching.FORMS
    },
    "denoising loss": lambda x, c: [
        trace_matching.denoising_loss(Denoiser.exact(c, SCH), x, rng(), noise=(0.1, 5.0), std=1.0)
    ],
    **{
        f"trace loss, {form}": lambda x, c, form=form: [
            trace_matching.trace_loss(
                trace, Denoiser.exact(c, SCH), x, rng(), noise=(0.1, 5.0), form=form, std=1.0
            )
        ]
        for form in trace_matching.FORMS
    },
    "transport": lambda x, c: transport.transport_test(c, SCH, T, x=x),
}


@pytest.mark.parametrize("event", [(3,), (2, 2)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_a_batch_of_no_samples(name, event):
    x = torch.zeros(0, *event)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # torch's own, when it loads forward mode; and the hint that a derivative is slow
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", SlowDerivativeWarning)
        results = CALLS[name](x, cloud(event))
    for result in results:
        assert result.dtype == x.dtype
        if "loss" in name:  # the mean over no samples: no gradient step, rather than NaN
            assert result.shape == () and result == 0
        else:
            assert 0 in result.shape


def test_a_training_step_on_no_samples_leaves_the_weights():
    module = torch.nn.Linear(3, 3)
    before = module.weight.detach().clone()

    def loss(module, generator):
        return trace_matching.denoising_loss(
            Denoiser(lambda x, t: module(x), SCH), torch.zeros(0, 3), generator, noise=(0.1, 5.0)
        )

    training.train(module, loss, steps=2, generator=rng())
    assert torch.equal(module.weight, before)
