"""One warning per op where a derivative takes the slow, tiled way, and none where it is fused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.func import grad, jvp

from dfkernels import ops
from dfkernels._torch import autograd


@pytest.fixture(autouse=True)
def nothing_has_warned(monkeypatch):
    monkeypatch.setattr(autograd, "_warned", set())


def data():
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    return x, torch.eye(3, dtype=torch.float64)


def caught(f):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        f()
    return [str(w.message) for w in found if w.category is ops.SlowDerivativeWarning]


SLOW = {
    "backward of another output": lambda x, y: grad(
        lambda x: ops.posterior(x, y, 0.9, 0.5)[2].sum()
    )(x),
    "backward in an atom": lambda x, y: grad(lambda y: ops.posterior(x, y, 0.9, 0.5)[0].sum())(y),
    "forward mode": lambda x, y: jvp(lambda x: ops.posterior(x, y, 0.9, 0.5)[1], (x,), (x,)),
}
FUSED = {
    "log_prob and mean": lambda x, y: grad(
        lambda x: sum(o.sum() for o in ops.posterior(x, y, 0.9, 0.5)[:2])
    )(x),
    "F v in v": lambda x, y: grad(lambda v: ops.fisher_matvec(x, y, v, 0.9, 0.5).sum())(x),
    "an endpoint": lambda x, y: grad(lambda v: ops.endpoint_matvec(v, x, x, 0.9, 0.5).sum())(x),
    "no derivative": lambda x, y: ops.posterior(x, y, 0.9, 0.5),
}


@pytest.mark.parametrize("way", SLOW)
def test_a_slow_derivative_warns_once(way):
    run = lambda: SLOW[way](*data())
    (said,) = caught(run)
    argument = "y" if "atom" in way else "x"
    assert said.startswith(f"posterior: this derivative, with respect to {argument}, is summed")
    assert "Fast: in reverse mode, those of log_prob and mean with respect to x alone." in said
    assert caught(run) == []
    (other,) = caught(
        lambda: grad(lambda x: ops.fisher_diagonal(x, data()[1], 0.9, 0.5).sum())(data()[0])
    )
    assert other.startswith("fisher_diagonal: ")


def test_the_ops_that_a_slow_derivative_is_made_of_do_not_warn():
    x, y = data()
    f = lambda x: ops.fisher_matvec(x, y, x.detach(), 0.9, 0.5).sum()
    (backward,) = caught(lambda: grad(f)(x))
    assert backward.startswith("fisher_matvec: ")
    autograd._warned.clear()
    (forward,) = caught(lambda: jvp(f, (x,), (x,)))
    assert forward.startswith("fisher_matvec: ")


@pytest.mark.parametrize("way", FUSED)
def test_a_fused_derivative_does_not(way):
    assert caught(lambda: FUSED[way](*data())) == []


def test_a_compiled_slow_derivative_warns_and_is_right():
    x, y = data()
    f = lambda x: ops.posterior(x, y, 0.9, 0.5).fisher_trace.sum()
    compiled = torch.compile(grad(f), fullgraph=True, backend="aot_eager")
    results = []
    assert len(caught(lambda: results.append(compiled(x)))) == 1
    assert torch.allclose(results[0], grad(f)(x), rtol=1e-12)
    torch._dynamo.reset()
