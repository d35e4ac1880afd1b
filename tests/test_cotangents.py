"""Gradients that overflow, as they do on purpose under a gradient scaler, are handed on as nan."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ALL, floats

import dfkernels as df


@pytest.mark.parametrize("case", [c for c in ALL if "no query" not in c.name], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_cotangent_of_nan_or_inf_was_refused_as_an_argument_v(case, value):
    """For each input alone, whose gradients have ways of their own, and for all together."""
    names = [name for name in floats(case) if name not in case.unused]
    for wanted in [[name] for name in names] + [names]:
        own = {name: case.tensors[name].detach().clone().requires_grad_() for name in wanted}
        for out in case.run(own):
            if not out.requires_grad:
                continue
            cotangent = torch.ones_like(out)
            cotangent[0] = value
            found = torch.autograd.grad(
                out, list(own.values()), cotangent, retain_graph=True, allow_unused=True
            )
            for name, grad in zip(wanted, found, strict=True):
                if grad is not None and name == "x":
                    assert bool(grad[1:].isfinite().all()) and not bool(grad[0].isfinite().any())


def test_a_step_whose_gradient_overflows_is_skipped_by_the_scaler():
    y = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Linear(4, 4)
    before = [p.detach().clone() for p in layer.parameters()]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    mean = df.ops.posterior(layer(y[:3]), y, 1.0, 0.5).mean
    scaler.scale(8 * mean.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))
