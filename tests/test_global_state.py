"""torch's global state (default dtype and device, autocast, inference mode, deterministic
algorithms, grad mode), set around a call, around only its backward pass, or before: the same
results, the same derivatives.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from cases import OPS, floats, table
from torch.func import grad, jvp, vjp, vmap
from torch_state import default_dtype, deterministic

from dfkernels import ops

CASES = {op: next(c for c in table(op) if c.name in ("affine", "paper plain")) for op in OPS}
KEPT = [
    next(c for c in table(op) if c.name == "lists prior") for op in ("posterior", "fisher_matvec")
]


STATES = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device meta": lambda: torch.device("meta"),
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "deterministic": deterministic,
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
}
WITHOUT_GRAPH = ("inference mode", "no grad")


def scalar(outputs):
    return sum(torch.sin(o).sum() for o in outputs)


def function(case, dtype):
    names = floats(case)
    tensors = [case.tensors[name].detach().to(dtype).clone() for name in names]
    return (lambda *some: case.run(dict(zip(names, some, strict=True)))), tensors


def values(f, tensors, state):
    with state():
        return f(*tensors)


def backward(f, tensors, state):
    """Forward and backward pass within."""
    leaves = [t.requires_grad_() for t in tensors]
    with state():
        return torch.autograd.grad(scalar(f(*leaves)), leaves, materialize_grads=True)


def backward_alone(f, tensors, state):
    """The forward pass before."""
    leaves = [t.requires_grad_() for t in tensors]
    loss = scalar(f(*leaves))
    with state():
        return torch.autograd.grad(loss, leaves, materialize_grads=True)


def double_backward(f, tensors, state):
    leaves = [t.requires_grad_() for t in tensors]
    with state():
        first = torch.autograd.grad(
            scalar(f(*leaves)), leaves, create_graph=True, materialize_grads=True
        )
        return torch.autograd.grad(
            sum(g.square().sum() for g in first), leaves, materialize_grads=True
        )


def forward_mode(f, tensors, state):
    with state():
        return jvp(f, tuple(tensors), tuple(map(torch.ones_like, tensors)))[1]


def func_vjp(f, tensors, state):
    with state():
        outputs, pull = vjp(f, *tensors)
        return pull(tuple(torch.ones_like(o) for o in outputs))


def forward_over_reverse(f, tensors, state):
    every = tuple(range(len(tensors)))
    with state():
        derivative = grad(lambda *some: scalar(f(*some)), every)
        return jvp(derivative, tuple(tensors), tuple(map(torch.ones_like, tensors)))[1]


def vmap_of_grad(f, tensors, state):
    with state():
        return vmap(grad(lambda a: scalar(f(a, *tensors[1:]))))(
            torch.stack([tensors[0], tensors[0] + 0.5])
        )[None]


MODES = (
    values,
    backward,
    backward_alone,
    double_backward,
    forward_mode,
    func_vjp,
    forward_over_reverse,
    vmap_of_grad,
)
NEEDS_GRAPH = (backward, double_backward)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize(
    "case", [*CASES.values(), *(pytest.param(c, marks=pytest.mark.slow) for c in KEPT)], ids=str
)
def test_global_state_changed_results(case, mode):
    for dtype in (torch.float32, torch.float64) if mode is values else (torch.float32,):
        right = mode(*function(case, dtype), contextlib.nullcontext)
        for name, state in STATES.items():
            if mode in NEEDS_GRAPH and name in WITHOUT_GRAPH:
                continue
            found = mode(*function(case, dtype), state)
            for got, want in zip(found, right, strict=True):
                assert got.dtype == want.dtype == dtype and got.device == want.device, name
                assert torch.equal(got.detach(), want.detach()), name


@pytest.mark.parametrize("name", STATES)
def test_transport_chain(name):
    levels = (
        torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64),
        torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64),
    )
    for d in (3, 20):  # by the kernel, and step by step
        x, y = (
            torch.linspace(-1, 1, 2 * d).reshape(2, d),
            torch.linspace(-2, 1, 5 * d).reshape(5, d),
        )
        right = ops.transport_chain(x, y, *levels)
        with STATES[name]():
            found = ops.transport_chain(x, y, *levels)
        for got, want in zip(found, right, strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_tensors_made_in_inference_mode(case):
    f, tensors = function(case, torch.float64)
    right = f(*tensors)
    with torch.inference_mode():
        made = [t.clone() for t in tensors]
    for got, want in zip(f(*made), right, strict=True):
        assert torch.equal(got, want)
    with torch.inference_mode():
        outputs = jvp(f, tuple(made), tuple(map(torch.ones_like, made)))[1]
    for got, want in zip(outputs, forward_mode(f, tensors, contextlib.nullcontext), strict=True):
        assert torch.equal(got, want)


def test_numbers_as_levels():
    """Python numbers become tensors somewhere."""
    x, y = torch.linspace(-1, 1, 6).reshape(2, 3), torch.linspace(-2, 1, 15).reshape(5, 3)
    prior = torch.linspace(-1, 0, 5, dtype=torch.float64)
    call = lambda: ops.posterior(x, y, 0.7, 0.3, prior, scale=0.5, offset=-0.25)
    for state in STATES.values():
        with state():
            found, score = call(), call().score(x, 0.7, 0.3)
        for got, want in zip((*found, score), (*call(), call().score(x, 0.7, 0.3)), strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, want)
