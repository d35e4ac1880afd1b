"""torch.compile without graph breaks, forward and backward, without recompilation on a new batch
size; torch.export.
"""

from __future__ import annotations

import pytest
import torch
from cases import DATA_OPS, OPS, ORDER, floats, table
from test_transforms import close, scalar
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vmap


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _case(op):
    return table(op)[1 if op in DATA_OPS or "variance" in ORDER[op] else 0]


def _more_queries(case, tensors, size):
    """The same call on a larger batch."""
    atoms = ("y", "values", "variance", "log_prior")
    return [
        t if k in atoms else torch.cat([t, t * 0.9, t * 1.1])[:size] for k, t in tensors.items()
    ]


def _graphs(counter):
    """Compiled graphs that call something; dynamo also hands over an empty one now and then."""
    return sum(
        any(node.op == "call_function" for node in graph.graph.nodes) for graph in counter.graphs
    )


@pytest.mark.parametrize("op", OPS)
def test_forward_and_backward_compile_once_for_all_batch_sizes(op):
    case = _case(op)
    names = floats(case)
    tensors = {k: case.tensors[k] for k in names}
    counter = CompileCounterWithBackend("aot_eager")
    f = scalar(case, names, False)
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for size in (3, 5, 7):
        results = []
        for g in (f, compiled):
            inputs = [t.clone().requires_grad_() for t in _more_queries(case, tensors, size)]
            out = g(*inputs)
            out.backward()
            results.append((out.detach(), [t.grad for t in inputs if t.grad is not None]))
        close(*results)
    assert _graphs(counter) == 1


@pytest.mark.parametrize("op", OPS)
def test_batch_size_becomes_dynamic_by_itself(op):
    """Without dynamic=True: one recompilation at the second batch size, none after it."""
    case = _case(op)
    names = floats(case)
    counter = CompileCounterWithBackend("aot_eager")
    f = scalar(case, names, False)
    compiled = torch.compile(f, fullgraph=True, backend=counter)
    for size in (3, 5, 6, 7):
        inputs = _more_queries(case, {k: case.tensors[k] for k in names}, size)
        close(compiled(*inputs), f(*inputs))
    assert _graphs(counter) == 2


def test_float_levels_do_not_recompile():
    """alpha and sigma as Python floats that change with every call."""
    case = table("posterior")[0]
    counter = CompileCounterWithBackend("aot_eager")
    f = lambda x, y, a, s: case.run({"x": x, "y": y, "alpha": a, "sigma": s})
    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=counter)
    for alpha, sigma in ((0.9, 0.5), (0.8, 0.6), (0.7, 0.75)):
        close(
            compiled(case.tensors["x"], case.tensors["y"], alpha, sigma),
            f(case.tensors["x"], case.tensors["y"], alpha, sigma),
        )
    assert _graphs(counter) == 1


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "transform",
    [
        grad,
        hessian,
        lambda f: lambda x: jvp(f, (x,), (torch.cos(x),))[1],
        lambda f: lambda x: vmap(f)(torch.stack([x, 2 * x])),
    ],
    ids=["grad", "hessian", "jvp", "vmap"],
)
def test_torch_func_inside_compile(op, transform):
    case = _case(op)
    name = next(k for k in floats(case) if k not in case.unused)
    x = case.tensors[name].clone()
    compiled = torch.compile(
        transform(scalar(case, [name], False)), fullgraph=True, backend="aot_eager"
    )
    close(compiled(x), transform(scalar(case, [name], True))(x))


@pytest.mark.parametrize("op", OPS)
def test_dual_level_inside_compile(op):
    """torch.autograd.forward_ad below torch.compile: right, where most custom ops silently give
    zeros."""
    case = _case(op)
    name = next(k for k in floats(case) if k not in case.unused)
    x = case.tensors[name].clone()

    def tangent(x, reference=False):
        with forward_ad.dual_level():
            out = scalar(case, [name], reference)(forward_ad.make_dual(x, torch.cos(x)))
            return forward_ad.unpack_dual(out).tangent

    close(torch.compile(tangent, fullgraph=True, backend="aot_eager")(x), tangent(x, True))


@pytest.mark.slow
def test_inductor():
    """The default backend, once: forward and backward of posterior and fisher_matvec, float32."""
    y = torch.linspace(-1, 1, 15).reshape(5, 3)

    def f(x, v):
        from dfkernels import ops

        p = ops.posterior(x, y, 0.9, 0.5)
        return (
            p.log_prob
            + p.fisher_trace
            + p.mean.sum(-1)
            + ops.fisher_matvec(x, y, v, 0.9, 0.5).square().sum(-1)
        ).sum()

    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    results = []
    for g in (f, torch.compile(f, fullgraph=True)):
        a, b = x.clone().requires_grad_(), torch.cos(x).requires_grad_()
        out = g(a, b)
        out.backward()
        results.append((out.detach(), a.grad, b.grad))
    close(*results, 1e-5)


@pytest.mark.parametrize("op", OPS)
def test_export(op):
    case = _case(op)
    names = floats(case)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return case.run(dict(zip(names, tensors, strict=True)))

    inputs = tuple(case.tensors[k] for k in names)
    batch = torch.export.Dim("batch", min=2, max=64)
    atoms = ("y", "values", "variance", "log_prior")
    dims = tuple(None if k in atoms else {0: batch} for k in names)
    program = torch.export.export(Module(), inputs, dynamic_shapes=(dims,))
    larger = tuple(_more_queries(case, dict(zip(names, inputs, strict=True)), 5))
    close(program.module()(*larger), Module()(*larger))
    assert f"dfkernels.{op}.default" in program.graph_module.code
