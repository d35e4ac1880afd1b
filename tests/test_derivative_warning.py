"""One warning per op where a derivative takes the slow, tiled way, which says why; none where it is
fused."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.func import grad, jvp

from dfkernels import ops
from dfkernels._torch import autograd, backend, library
from dfkernels.ops.common.pair_kernels import pair_vjp_atoms

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_has_warned(monkeypatch):
    monkeypatch.setattr(autograd, "_warned", set())


def data():
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    return x, torch.eye(3, dtype=torch.float64), x.cos()


def caught(f):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        f()
    return [str(w.message) for w in found if w.category is ops.SlowDerivativeWarning]


def scalar(op, output=0):
    """One output of an op, or the only one, summed up; of x, y and v."""
    name = op.__name__
    if name == "fisher_matvec":
        return lambda x, y, v: op(x, y, v, 0.9, 0.5).sum()
    if name == "posterior":
        return lambda x, y, v: op(x, y, 0.9, 0.5)[output].sum()
    return lambda x, y, v: op(x, y, 0.9, 0.5).sum()


SECOND = "only first derivatives have kernels, and the second ones of log_prob and mean in x"
SLOW = {
    "dense, reverse": (lambda f: grad(f), scalar(ops.fisher_dense), "this op has no kernels"),
    "dense, forward": (lambda f: along(f), scalar(ops.fisher_dense), "this op has no kernels"),
    "second, of a trace": (lambda f: along(grad(f)), scalar(ops.posterior, 2), SECOND),
    "second, of F v": (
        lambda f: grad(lambda *a: grad(f)(*a).sum()),
        scalar(ops.fisher_matvec),
        SECOND,
    ),
}
FUSED = {
    "log_prob in x": (lambda f: grad(f), scalar(ops.posterior)),
    "log_prob in x, twice": (lambda f: twice(f), scalar(ops.posterior)),
    "mean in x": (lambda f: grad(f), scalar(ops.posterior, 1)),
    "mean in x, twice": (lambda f: twice(f), scalar(ops.posterior, 1)),
    "trace in x": (lambda f: grad(f), scalar(ops.posterior, 2)),
    "ess, forward": (lambda f: along(f), scalar(ops.posterior, 3)),
    "mean in y": (lambda f: grad(f, 1), scalar(ops.posterior, 1)),
    "F v in x, y and v": (lambda f: grad(f, (0, 1, 2)), scalar(ops.fisher_matvec)),
    "diagonal in x": (lambda f: grad(f), scalar(ops.fisher_diagonal)),
    "no derivative": (lambda f: f, scalar(ops.fisher_dense)),
}


def twice(f):
    """The gradient in x of the sum of the gradient in x."""
    return grad(lambda *a: grad(f)(*a).sum())


def along(f):
    """The derivative in x along x, forward mode."""
    return lambda x, *others: jvp(lambda x: f(x, *others), (x,), (x,))


@pytest.mark.parametrize("way", SLOW)
def test_a_slow_derivative_warns_once_and_says_why(way):
    transform, f, why = SLOW[way]
    run = lambda: transform(f)(*data())
    (said,) = caught(run)
    op = "posterior" if "trace" in way else "fisher_matvec" if "F v" in way else "fisher_dense"
    assert said.startswith(f"{op}: this derivative is summed tile by tile in PyTorch")
    # without kernels there is one reason for all, which the test below this one is about
    assert why in said or not library.can_run(pair_vjp_atoms, CPU)
    assert caught(run) == []


@pytest.mark.skipif(not library.can_run(pair_vjp_atoms, CPU), reason="no kernels of derivatives")
@pytest.mark.parametrize("way", FUSED)
def test_a_fused_derivative_does_not_warn(way):
    transform, f = FUSED[way]
    assert caught(lambda: transform(f)(*data())) == []


def test_where_no_kernel_can_run_every_derivative_is_slow(monkeypatch):
    monkeypatch.setattr(library, "can_run", lambda kernel, device: False)
    monkeypatch.setattr(backend, "why_not", lambda device: "it rains")
    (said,) = caught(lambda: grad(scalar(ops.posterior, 2))(*data()))
    assert said.endswith("passes over the atoms: it rains.")


def test_the_warning_is_of_the_line_that_calls_the_package():
    f = scalar(ops.fisher_dense)
    with pytest.warns(ops.SlowDerivativeWarning) as found:
        f(*(t.requires_grad_() for t in data())).backward()
    assert found[0].filename == __file__


def test_a_compiled_slow_derivative_warns_and_is_right():
    x, y, v = data()
    f = lambda x: scalar(ops.fisher_dense)(x, y, v)
    compiled = torch.compile(grad(f), fullgraph=True, backend="aot_eager")
    results = []
    assert len(caught(lambda: results.append(compiled(x)))) == 1
    assert torch.allclose(results[0], grad(f)(x), rtol=1e-12)
    torch._dynamo.reset()
