"""torch.library.opcheck on every op and sample: schema, fake, autograd registration, AOT dispatch
with dynamic shapes.
"""

from __future__ import annotations

import pytest
import torch
from cases import table

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
    "pair_gradient": "(str kind, int[] wanted, int[] lengths, Tensor[] tensors, float scale, "
    "float offset) -> Tensor[]",
}


def op(name):
    return getattr(torch.ops.dfkernels, name).default


def calls():
    """(name, args) of the inner ops: flat tensors, [B] levels, a vector axis; with without
    gradients."""
    for name in (*OPS, "covariance_matvec"):
        for case in table("fisher_matvec" if name == "covariance_matvec" else name):
            if (
                case.name == "identical atoms"
            ):  # no other shapes, dtypes or options than "plain": only other numbers
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
def test_opcheck_pair_gradient(kind, sets):
    """Sums, and gradients of first and second order, of each kind."""
    normal = lambda *shape: torch.linspace(
        -1, 1, max(1, torch.Size(shape).numel()), dtype=torch.float64
    ).reshape(shape)
    x, y, level = normal(2, 3), normal(4, 3), torch.tensor([0.7, 0.9], dtype=torch.float64)
    tensors = [x, y, level, level + 0.1, normal(4), torch.zeros(2, dtype=torch.float64), 0.1 * x]
    if kind == "matvec":
        tensors.append(normal(2, 2, 3))
    if sets:
        shapes = KINDS[kind].shapes_for(tensors)
        tensors += [torch.ones(s, dtype=torch.float64) for s in shapes]
    for order in sets[:-1]:
        tensors += [torch.cos(tensors[j]) for j in order]
    tensors = [t.clone().requires_grad_() for t in tensors]
    args = (kind, [j for s in sets for j in s], list(map(len, sets)), tensors, 0.5, 0.1)
    assert torch.library.opcheck(op("pair_gradient"), args) == CHECKS


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
