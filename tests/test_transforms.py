"""torch.func, forward AD, vmap, checkpoint and higher orders: what they make of an op equals what
they make of its reference.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ALL, DATA_OPS, OPS, ORDER, Case, floats, table
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dfkernels import ops


def close(got, expected, tolerance=1e-9):
    got, expected = torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(a).all()
        scale = 1 + float(b.abs().max()) if b.numel() else 1
        assert not a.numel() or float((a - b).abs().max()) <= tolerance * scale


def scalar(case, names, reference):
    """A nonlinear scalar of all outputs, as a function of the named tensors."""

    def f(*tensors):
        out = case.run(dict(zip(names, tensors, strict=True)), reference=reference)
        return sum((torch.sin(o) * (1 + i)).sum() for i, o in enumerate(out))

    return f


def both(case, transform, names):
    """transform(f)(*inputs) for the op and for its reference."""
    inputs = [case.tensors[k].clone() for k in names]
    return [transform(scalar(case, names, reference))(*inputs) for reference in (False, True)]


@pytest.mark.parametrize("case", ALL, ids=str)
def test_grad(case):
    names = floats(case)
    close(*both(case, lambda f: grad(f, argnums=tuple(range(len(names)))), names))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_vjp_and_jvp(case):
    names = floats(case)
    inputs = tuple(case.tensors[k].clone() for k in names)
    generator = torch.Generator().manual_seed(0)
    directions = tuple(torch.randn(t.shape, dtype=t.dtype, generator=generator) for t in inputs)
    pairs = []
    for reference in (False, True):

        def f(*tensors, reference=reference):
            return case.run(dict(zip(names, tensors, strict=True)), reference=reference)

        out, pull = vjp(f, *inputs)
        cotangents = tuple(
            torch.cos(torch.arange(o.numel(), dtype=o.dtype)).reshape(o.shape) for o in out
        )
        pairs.append((out, pull(cotangents), jvp(f, inputs, directions)[1]))
    close(*pairs)


def _small(case):
    """Two queries and four atoms, one of them masked: a second derivative is taken entry by
    entry."""
    most = {"x": 2, "alpha": 2, "sigma": 2, "v": 2, "y": 4, "variance": 4, "log_prior": 4}
    tensors = {
        k: t[: most[k]] if isinstance(t, torch.Tensor) else t for k, t in case.tensors.items()
    }
    masked = tuple(i for i in case.masked if i < 4)
    assert masked
    return replace(case, tensors=tensors, masked=masked)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "transform",
    [
        jacrev,
        jacfwd,
        hessian,
        lambda f, argnums: jacfwd(jacfwd(f, argnums), argnums),
        lambda f, argnums: jacrev(jacrev(f, argnums), argnums),
        lambda f, argnums: jacrev(jacfwd(f, argnums), argnums),
    ],
    ids=["jacrev", "jacfwd", "hessian", "fwd-fwd", "rev-rev", "rev-fwd"],
)
def test_nested(op, transform):
    masked = op in DATA_OPS or "variance" in ORDER[op]
    case = _small(table(op)[1]) if masked else table(op)[0]
    names = floats(case)
    close(*both(case, lambda f: transform(f, argnums=tuple(range(len(names)))), names))


@pytest.mark.parametrize("op", OPS)
def test_third_order(op):
    case = table(op)[-1 if op in DATA_OPS else 1]
    names = [k for k in floats(case) if k not in case.unused][:1]
    close(*both(case, lambda f: jacrev(hessian(f)), names))


@pytest.mark.parametrize("case", ALL, ids=str)
def test_forward_mode_level(case):
    """torch.autograd.forward_ad, outside torch.func."""
    names = floats(case)
    tangents = [torch.ones_like(case.tensors[k]) for k in names]
    results = []
    for reference in (False, True):
        with forward_ad.dual_level():
            duals = [
                forward_ad.make_dual(case.tensors[k].clone(), t)
                for k, t in zip(names, tangents, strict=True)
            ]
            out = scalar(case, names, reference)(*duals)
            results.append(forward_ad.unpack_dual(out).tangent)
    close(*results)


def _stacked(t, size):
    return torch.stack([t * (1 + 0.1 * i) for i in range(size)])


@pytest.mark.parametrize("case", ALL, ids=str)
def test_vmap_over_each_argument(case):
    """Each tensor alone, all of them, and the gradient inside and outside of the map."""
    names = floats(case)
    for mapped in [*([k] for k in names), names]:
        stacks = [_stacked(case.tensors[k], 3) for k in mapped]

        def f(*tensors, mapped=mapped):
            return case.run(dict(zip(mapped, tensors, strict=True)))

        got = vmap(f)(*stacks)
        close(
            got,
            tuple(
                map(torch.stack, zip(*[f(*[s[i] for s in stacks]) for i in range(3)], strict=True))
            ),
        )
        moved = [s.movedim(0, -1) for s in stacks]
        close(vmap(f, in_dims=-1, out_dims=-1)(*moved), tuple(o.movedim(0, -1) for o in got))
        g = grad(scalar(case, mapped, False), argnums=tuple(range(len(mapped))))
        inside = vmap(g)(*stacks)
        close(
            inside,
            tuple(
                map(torch.stack, zip(*[g(*[s[i] for s in stacks]) for i in range(3)], strict=True))
            ),
        )
        close(
            grad(
                lambda *s, mapped=mapped: vmap(scalar(case, mapped, False))(*s).sum(),
                argnums=tuple(range(len(mapped))),
            )(*stacks),
            inside,
        )


@pytest.mark.parametrize("case", [table(op)[1] for op in OPS], ids=str)
def test_nested_vmap(case):
    first, second = floats(case)[:2]
    f = lambda a, b: case.run({first: a, second: b})
    a, b = _stacked(case.tensors[first], 2), _stacked(case.tensors[second], 3)
    got = vmap(vmap(f, in_dims=(None, 0)), in_dims=(0, None))(a, b)
    expected = tuple(
        torch.stack(o).unflatten(0, (2, 3))
        for o in zip(*[f(a[i], b[j]) for i in range(2) for j in range(3)], strict=True)
    )
    close(got, expected)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_checkpoint(case):
    names = floats(case)
    results = []
    for wrap in (
        lambda f: f,
        lambda f: lambda *a: checkpoint(f, *a, use_reentrant=False),
        lambda f: lambda *a: checkpoint(f, *a, use_reentrant=True),
    ):
        inputs = [case.tensors[k].detach().clone().requires_grad_() for k in names]
        wrap(scalar(case, names, False))(*inputs).backward()
        results.append([t.grad for t in inputs if t.grad is not None])
    close(results[1], results[0], 0)
    close(results[2], results[0], 0)


@pytest.mark.parametrize("case", [table(op)[0] for op in OPS], ids=str)
def test_a_gradient_taken_while_saved_tensors_have_hooks(case):
    """Within a checkpoint, or under save_on_cpu: torch.func, by which most gradients are found,
    refuses to work there.
    """
    names = [k for k in floats(case) if k not in case.unused]

    def gradients(*inputs):
        grads = torch.autograd.grad(scalar(case, names, False)(*inputs), inputs, create_graph=True)
        return sum(torch.sin(g).sum() for g in grads)

    def under_hooks(*inputs):
        with torch.autograd.graph.save_on_cpu():
            return gradients(*inputs)

    results = []
    for f in (gradients, under_hooks, lambda *a: checkpoint(gradients, *a, use_reentrant=False)):
        inputs = [case.tensors[k].detach().clone().requires_grad_() for k in names]
        f(*inputs).backward()
        results.append([t.grad for t in inputs])
    close(results[1], results[0], 0)
    close(results[2], results[0], 0)


@pytest.mark.parametrize("case", [table(op)[0] for op in OPS], ids=str)
def test_batched_cotangents(case):
    """is_grads_batched, which uses an older vmap."""
    names = [k for k in floats(case) if k not in case.unused]
    inputs = [case.tensors[k].detach().clone().requires_grad_() for k in names]
    for out in case.run(dict(zip(names, inputs, strict=True))):
        cotangents = _stacked(torch.ones_like(out), 4)
        got = torch.autograd.grad(
            out,
            inputs,
            cotangents,
            is_grads_batched=True,
            retain_graph=True,
            materialize_grads=True,
        )
        close(
            got,
            [
                4 * g.unsqueeze(0) * w
                for g, w in zip(
                    torch.autograd.grad(
                        out, inputs, cotangents[0], retain_graph=True, materialize_grads=True
                    ),
                    [
                        (torch.linspace(1, 1.3, 4, dtype=torch.float64) / 4).reshape(
                            4, *[1] * t.dim()
                        )
                        for t in inputs
                    ],
                    strict=True,
                )
            ],
        )


@pytest.mark.parametrize("case", table("posterior"), ids=str)
def test_fast_backward_is_the_general_one(case):
    """d(log_prob, mean)/dx is fused; asking for another argument too takes the general path."""
    x, y = case.tensors["x"].clone().requires_grad_(), case.tensors["y"].clone()
    grads = []
    for also in ((), (y.requires_grad_(),)):
        log_prob, mean, _, _ = case.run({"x": x, "y": y if also else y.detach()})
        loss = torch.sin(log_prob).sum() + torch.sin(mean).sum()
        first, *_ = torch.autograd.grad(loss, (x, *also), create_graph=True)
        grads.append((first.detach(), torch.autograd.grad(first.square().sum(), x)[0]))
    close(*grads)


class Calls(TorchDispatchMode):
    """Names of the package's ops that reach their kernels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dfkernels":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", ["posterior", "log_prob"])
def test_log_prob_costs_no_pass_for_its_gradients_in_the_queries(op):
    """In x, alpha and sigma these are made of the sums that the forward pass left."""
    case = table("posterior")[0]
    names = ["x", "alpha", "sigma"]
    inputs = [case.tensors[k].clone().requires_grad_() for k in names]
    found = {}
    for reference in (False, True):
        of = Case(op, case.name, case.tensors, case.options)
        out = of.run(dict(zip(names, inputs, strict=True)), reference=reference)[0]
        with Calls() as calls:
            found[reference] = torch.autograd.grad(out.square().sum(), inputs)
        assert calls.names == []
    close(found[False], found[True])


@pytest.mark.parametrize("op", OPS)
def test_values_are_the_same_where_somebody_differentiates(op):
    """Up to rounding: they are made of the sums about the mean then."""
    for case in table(op):
        names = floats(case)
        with_graph = case.run({k: case.tensors[k].clone().requires_grad_() for k in names})
        close([o.detach() for o in with_graph], list(case.run()), 1e-13)


REVERSE = {
    "backward": lambda f, x: torch.autograd.grad(f(x.requires_grad_()).square().sum(), x),
    "grad": lambda f, x: grad(lambda a: f(a).square().sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.cos(x)),
    "jacrev": lambda f, x: jacrev(f)(x),
    "vmap(grad)": lambda f, x: vmap(grad(lambda a: f(a[None]).square().sum()))(x),
}
FORWARD = {
    "jvp": lambda f, x: jvp(f, (x,), (torch.cos(x),)),
    "jacfwd": lambda f, x: jacfwd(f)(x),
}


@pytest.mark.parametrize("transform", [*REVERSE, *FORWARD])
def test_what_derivatives_of_the_mean_in_x_cost(transform):
    """One fused pass in reverse, however many cotangents; in forward mode one for the values and
    one for the tangents of all outputs."""
    x, y = (table("posterior")[0].tensors[k].clone() for k in "xy")
    with Calls() as calls:
        (REVERSE | FORWARD)[transform](lambda x: ops.posterior(x, y, 0.9, 0.5).mean, x)
    derivative = "sums_about_mean" if transform in REVERSE else "pair_gradient"
    assert calls.names == ["sums_about_mean", derivative]


@pytest.mark.parametrize(
    "transform",
    [lambda f: jacrev(jacrev(f)), lambda f: lambda x: vjp(grad(f), x)[1](x)],
    ids=["jacrev", "vjp"],
)
def test_second_derivatives_of_log_prob_cost_one_fused_pass(transform):
    case = table("posterior")[0]
    with Calls() as calls:
        transform(lambda x: case.run({"x": x})[0].sum())(case.tensors["x"].clone())
    assert calls.names == ["sums_about_mean", "sums_about_mean"]


@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(op):
    """The compute dtype is x's, forward, backward and forward mode, inside autocast too."""
    case = Case(op, "float32", table(op)[0].inputs(torch.float32), table(op)[0].options)
    names = floats(case)
    tangents = tuple(torch.cos(case.tensors[k]) for k in names)
    results = []
    for on in (False, True):
        inputs = [case.tensors[k].clone().requires_grad_() for k in names]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            value = scalar(case, names, False)(*inputs)
            value.backward()
            along = jvp(scalar(case, names, False), tuple(i.detach() for i in inputs), tangents)[1]
        results.append([value.detach(), along, *[t.grad for t in inputs if t.grad is not None]])
    close(*results, 0)


@pytest.mark.parametrize("case", table("fisher_matvec"), ids=str)
def test_matvec_backward_in_v_is_the_op_itself(case):
    v = case.tensors["v"].clone().requires_grad_()
    (out,) = case.run({"v": v})
    g = torch.cos(out.detach())
    close(torch.autograd.grad(out, v, g)[0], case.run({"v": g})[0], 1e-12)


@pytest.mark.parametrize("op", DATA_OPS)
def test_masked_atom_has_no_gradient(op):
    """log_prior = -inf gives zeros, not NaN, in y, in log_prior and at second order."""
    case = next(c for c in table(op) if c.name == "prior")
    y = case.tensors["y"].clone().requires_grad_()
    prior = case.tensors["log_prior"].clone()
    prior[list(case.masked)] = -torch.inf
    prior.requires_grad_()
    case.masked = ()
    f = scalar(case, ["y", "log_prior"], False)
    gy, gp = torch.autograd.grad(f(y, prior), (y, prior), create_graph=True)
    assert torch.equal(gy[[1, 5]], torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(gp[[1, 5]], torch.zeros(2, dtype=torch.float64))
    hy, hp = torch.autograd.grad(gy.square().sum() + gp.square().sum(), (y, prior))
    assert torch.isfinite(hy).all() and torch.isfinite(hp).all()
    assert torch.equal(hy[[1, 5]], torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_atoms_get_gradients_in_their_dtype(dtype):
    case = table("posterior")[-1]
    y = case.tensors["y"].to(dtype).requires_grad_()
    scalar(case, ["y"], False)(y).backward()
    wide = y.detach().double().requires_grad_()
    scalar(case, ["y"], True)(wide).backward()
    assert y.grad.dtype == dtype
    assert float((y.grad.double() - wide.grad).abs().max()) <= torch.finfo(dtype).eps * float(
        wide.grad.abs().max()
    )


def test_mean_gradient_keeps_its_digits_at_large_sigma():
    """(alpha/sigma^2) C g is 1e-4 of g: taken out of F g = (g - ...)/sigma^2 it would have 3
    digits."""
    generator = torch.Generator().manual_seed(0)
    x, y = 100 * torch.randn(2, 8, generator=generator), torch.randn(50, 8, generator=generator)
    grads = []
    for dtype, reference in ((torch.float32, False), (torch.float64, True)):
        a = x.to(dtype).requires_grad_()
        case = Case(
            "posterior", "large sigma", {"x": a, "y": y.to(dtype), "alpha": 0.9, "sigma": 100.0}
        )
        grads.append(
            torch.autograd.grad(case.run(reference=reference)[1].square().sum(), a)[0].double()
        )
    assert float((grads[0] - grads[1]).abs().max()) <= 1e-5 * float(grads[1].abs().max())


def test_integer_atoms_are_constants():
    case = table("posterior")[-1]
    y = torch.arange(15, dtype=torch.uint8).reshape(5, 3)
    x = case.tensors["x"].clone().requires_grad_()
    got = torch.autograd.grad(scalar(case, ["x", "y"], False)(x, y), x)
    close(got, torch.autograd.grad(scalar(case, ["x", "y"], True)(x, y), x))
