"""torch.library.opcheck on every op and sample: schema, fake, autograd registration, AOT dispatch
with dynamic shapes.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import table

from dfkernels._torch import check
from dfkernels.ops.common.moments import KINDS
from tools.op_table import DATA_OPS, OPS, TABLE

CHECKS = {
    "test_schema": "SUCCESS",
    "test_autograd_registration": "SUCCESS",
    "test_faketensor": "SUCCESS",
    "test_aot_dispatch_dynamic": "SUCCESS",
}
SCHEMAS = {name: spec.schema for name, spec in TABLE.items()} | {
    "covariance_matvec": TABLE["fisher_matvec"].schema,
    "pair_gradient": "(str kind, int[] wanted, int[] lengths, Tensor?[] tensors, float scale, "
    "float offset, Tensor? atoms, Tensor? counts) -> Tensor[]",
    "sums_about_mean": "(Tensor x, Tensor y, Tensor[] own, Tensor alpha, Tensor sigma, "
    "Tensor? log_pi, str kind, float scale, float offset, Tensor? atoms, Tensor? counts)"
    " -> Tensor[]",
}


def op(name):
    return getattr(torch.ops.dfkernels, name).default


def calls():
    """(name, args) of the inner ops: flat tensors, [B] levels, a vector axis; with without
    gradients."""
    for name in (*OPS, "covariance_matvec"):
        for case in table("fisher_matvec" if name == "covariance_matvec" else name):
            # no other shapes, dtypes or options than "plain": only other numbers
            if case.name == "identical atoms":
                continue
            t = case.tensors
            like = t.get("x0", t.get("eps", t.get("x")))
            like = t["x"] if name in (*DATA_OPS, "covariance_matvec") else like
            B, d = like.shape[0], like[:1].numel() if like.shape[0] else like.shape[-1]
            flat = {
                k: a.reshape(a.shape[0], d)
                for k, a in t.items()
                if k in ("x", "y", "x0", "mean", "eps")
            }
            flat |= {
                k: torch.as_tensor(t[k], dtype=like.dtype).expand(B) for k in ("alpha", "sigma")
            }
            if "variance" in t:
                flat["variance"] = check.variance(t["variance"], t["x"], t["y"])
            if "values" in t:
                flat["values"] = t["values"].reshape(len(t["y"]), -1)
            if "v" in t:
                flat["v"] = t["v"].reshape(
                    B, t["v"].shape[1] if t["v"].dim() > like.dim() else 1, d
                )
            if "m" in t:
                flat["m"] = t["m"]
            options = (
                {"scale": 1.0, "offset": 0.0, "log_prior": t.get("log_prior"), "x": None}
                | {"atoms": None, "counts": None}
                | case.options
                | flat
            )
            if case.masked:
                options["log_prior"] = options["log_prior"].clone()
                options["log_prior"][list(case.masked)] = -torch.inf
            args = tuple(options[a.name] for a in op(name)._schema.arguments)
            yield pytest.param(name, args, id=f"{name}-{case.name}")


@pytest.mark.parametrize("name", SCHEMAS)
def test_schema(name):
    assert str(op(name)._schema) == f"dfkernels::{name}{SCHEMAS[name]}"


@pytest.mark.slow
@pytest.mark.parametrize("name, args", list(calls()))
def test_opcheck(name, args):
    args = tuple(
        a.clone().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a
        for a in args
    )
    assert torch.library.opcheck(op(name), args) == CHECKS


def _inputs(kind):
    """x, y, alpha, sigma, log_pi, and the kind's own tensors."""
    normal = lambda *shape: torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape)
    level = torch.tensor([0.7, 0.9], dtype=torch.float64)
    own = [normal(2, 2, 3)] if kind == "matvec" else []
    return [normal(2, 3), normal(4, 3), level, level + 0.1, normal(4)], own


LISTS = torch.tensor([0, 3, 1, 2, 3]), torch.tensor([2, 3])


@pytest.mark.parametrize("lists", [(None, None), LISTS], ids=["all", "lists"])
@pytest.mark.parametrize(
    "kind, sets",
    [
        ("posterior", []),
        ("posterior", [[0, 1, 2, 3, 4]]),
        ("matvec", [[0, 7], [1, 8]]),
        ("diagonal", [[1, 4]]),
        ("dense", [[0, 1], [2, 9]]),
    ],
)
def test_opcheck_pair_gradient(kind, sets, lists):
    """Sums, and gradients of first and second order, of each kind."""
    inputs, own = _inputs(kind)
    tensors = [*inputs, torch.zeros(2, dtype=torch.float64), 0.1 * inputs[0], *own]
    if sets:
        shapes = KINDS[kind].shapes_for(tensors)
        tensors += [torch.ones(s, dtype=torch.float64) for s in shapes]
    for order in sets[:-1]:
        tensors += [torch.cos(tensors[j]) for j in order]
    tensors = [t.clone().requires_grad_() for t in tensors]
    args = (kind, [j for s in sets for j in s], list(map(len, sets)), tensors, 0.5, 0.1, *lists)
    assert torch.library.opcheck(op("pair_gradient"), args) == CHECKS


@pytest.mark.parametrize("lists", [(None, None), LISTS], ids=["all", "lists"])
@pytest.mark.parametrize("kind", ["posterior", "matvec"])
def test_opcheck_sums_about_mean(kind, lists):
    inputs, own = _inputs(kind)
    x, y, alpha, sigma, prior = (t.clone().requires_grad_() for t in inputs)
    own = [t.clone().requires_grad_() for t in own]
    prior = prior if own else None
    args = (x, y, own, alpha, sigma, prior, kind, 0.5, 0.1, *lists)
    assert torch.library.opcheck(op("sums_about_mean"), args) == CHECKS


def test_inner_ops_differentiate_by_themselves():
    """A caller of torch.ops.dfkernels gets the same derivatives as one of the public functions;
    forward mode included.
    """
    from torch.func import grad, jvp

    x, y = (
        torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3),
        torch.eye(3, dtype=torch.float64),
    )
    level = torch.ones(2, dtype=torch.float64)
    log_q = lambda x: torch.ops.dfkernels.posterior(x, y, level, level, None, 1.0, 0.0)[0].sum()
    mean = torch.ops.dfkernels.posterior(x, y, level, level, None, 1.0, 0.0)[1]
    assert float((grad(log_q)(x) - (mean - x)).abs().max()) <= 1e-14
    assert abs(float(jvp(log_q, (x,), (torch.ones_like(x),))[1] - (mean - x).sum())) <= 1e-13
