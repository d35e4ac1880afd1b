"""Every method under torch's global state: the same numbers, dtypes and devices as without."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from tensors import rng
from test_empty_batches import CALLS, cloud
from test_global_state import STATES

from dfkernels.methods import training

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
ALL = (
    "default dtype float64",
    "default device meta",
    "autocast bfloat16",
    "deterministic",
    "inference mode",
)


def results(name, data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(CALLS[name](X, data))


# of the likelihood's methods the cheapest: the others evaluate the same
NAMES = [name for name in CALLS if "dopri5" not in name and "rk4" not in name]


@pytest.mark.parametrize("name", NAMES)
def test_a_method_gives_the_same_under_all_states_at_once(name):
    data = cloud((3,))
    expected = results(name, data)
    with contextlib.ExitStack() as states:
        for state in ALL:
            states.enter_context(STATES[state]())
        found = results(name, data)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.clone(), b.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "state", ["inference mode", "no grad", "default dtype float64", "default device meta"]
)
def test_training_under_any_state_gives_weights_that_can_be_differentiated(state):
    first = torch.nn.Linear(3, 3)

    def trained(module):
        loss = lambda module, generator: (module(X) - X).square().mean()
        return training.train(module, loss, steps=3, generator=rng(), ema=0.5)

    expected, second = trained(copy.deepcopy(first)), copy.deepcopy(first)
    with STATES[state]():
        module = trained(second)
    torch.testing.assert_close(module.weight, expected.weight)
    x = X.clone().requires_grad_()
    module(x).square().sum().backward()
    assert x.grad.isfinite().all()
