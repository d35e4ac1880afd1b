"""Objects give the same bits whatever torch's global state is when they are made and when they are
asked."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from test_object import DIFFERENTIABLE, RESULTS
from torch_state import default_dtype, deterministic

import dfkernels as df
from dfkernels import FisherOperator
from dfkernels import fisher as fisher_module

STATES = {
    "float64 is the default": lambda: default_dtype(torch.float64),
    "float16 is the default": lambda: default_dtype(torch.float16),
    "meta is the default device": lambda: torch.device("meta"),
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "deterministic": deterministic,
}


class Plain(FisherOperator):
    """diag(2, 1, ...) + x x^T by matrix products, which autocast would reach."""

    def parameters(self):
        return (self.x,)

    def rebuild(self, x):
        return Plain(x, self.alpha, self.sigma)

    def apply(self, v):
        x = self.x.flatten(1)[:, None]
        return v + (v @ x.mT) @ x


DRAW = torch.Generator().manual_seed(0)
Y = torch.randn(700, 600, generator=DRAW)
X = 0.9 * Y[:2] + torch.randn(2, 600, generator=DRAW)
SMALL = torch.randn(40, 5, generator=DRAW)
CLOUD, BATCH = df.PointCloud(Y), torch.ones(2, 5)
CLOUD.index()


def made(x, cloud, sigma=2.0, **more):
    return df.DiffusionFisher(x, cloud, 0.9, sigma, **more)


def small():
    return made(SMALL[:2] + 0.5, df.PointCloud(SMALL, np.linspace(0, 1, 40)))


def gradients(f):
    """Of a solve, by backward inside the state where it records a graph."""
    x = f.x.clone().requires_grad_()
    with torch.inference_mode(False), torch.enable_grad():
        solution = f.rebuild(x, *f.parameters()[1:]).solve(BATCH, 50.0)
        return torch.autograd.grad(solution.sum(), x)


# name: (how the object is made, what it is asked)
CALLS = {name: (small, RESULTS[name]) for name in [*DIFFERENTIABLE, "atoms_read", "fisher_error"]}
CALLS |= {
    "matmul": (small, lambda f: f @ BATCH),
    "solve": (small, lambda f: f.solve(BATCH, 50.0)),
    "solve with a damping each": (
        small,
        lambda f: f.solve(BATCH, torch.tensor([50, 60], device="cpu")),
    ),
    "backward of solve": (small, gradients),
    "eigsh, dense": (small, lambda f: f.eigsh(2)),
    "eigsh, Lanczos": (lambda: made(X, CLOUD, 8.0), lambda f: f.eigsh(2, tol=1e-2)),
    "of a product, trace": (lambda: Plain(BATCH, 1.0, 0.5), lambda f: f.trace()),
    "of a product, dense": (lambda: Plain(BATCH, 1.0, 0.5), lambda f: f.to_dense()),
    "of a product, solve": (lambda: Plain(BATCH, 1.0, 0.5), lambda f: f.solve(BATCH, 1.0)),
    "of a product, Lanczos": (lambda: Plain(X, 1.0, 0.5), lambda f: f.eigsh(1, tol=1e-3)),
    "tolerance": (
        lambda: made(X, CLOUD, 0.1, tolerance=1e-3),
        lambda f: (f.score, f.mean_error, f.atoms_read),
    ),
    "top_k": (lambda: CLOUD, lambda c: tuple(df.top_k(X, c, 0.9, 0.1, 3))),
    "top_k with a tolerance": (
        lambda: CLOUD,
        lambda c: tuple(df.top_k(X, c, 0.9, 0.1, 3, tolerance=0.1)),
    ),
    "cloud": (
        lambda: df.PointCloud(SMALL.numpy(), np.zeros(40)),
        lambda c: c.to(torch.float64)._log_pi(torch.float32),
    ),
    "copy of a cloud": (lambda: df.PointCloud(SMALL), lambda c: c.to(torch.float64).y),
}


@pytest.fixture(autouse=True)
def _search_small_clouds(monkeypatch):
    monkeypatch.setattr(fisher_module, "_is_small", lambda cloud: False)


@pytest.fixture(scope="module")
def expected():
    known = {}

    def of(name):
        if name not in known:
            make, ask = CALLS[name]
            known[name] = ask(make())
        return known[name]

    return of


@pytest.mark.parametrize("when", ["made", "asked", "made and asked"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", CALLS)
def test_same_bits(name, state, when, expected):
    make, ask = CALLS[name]
    outside = contextlib.nullcontext
    truth = expected(name)
    with (STATES[state] if "made" in when else outside)():
        thing = make()
    with (STATES[state] if "asked" in when else outside)():
        got = ask(thing)
    torch.testing.assert_close(got, truth, rtol=0, atol=0, check_device=True, check_dtype=True)
    again = ask(thing)  # what was kept inside the state is as good outside it
    torch.testing.assert_close(again, truth, rtol=0, atol=0)
