"""Atoms without weight, masked by log_prior = -inf or too far away, are invisible: results and
derivatives of every order and mode are those of the cloud without them, whatever they hold and
however many they are.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import DATA_OPS, Case, floats
from torch.func import grad, jvp, vjp, vmap

from dfkernels import ops
from dfkernels.ops.transport_chain.reference import transport_chain as chain_reference

KEPT_ROWS = {"few": (0, 2, 3, 5), "most": (4,)}  # "few" and "most" are the weightless atoms' shares
CASES = [
    ("masked", "few", math.nan),
    ("masked", "most", -math.inf),
    ("masked", "most", 1.7e308),
    ("far", "few", 1e160),
    ("far", "most", -1.7e308),
]


def cloud(op, dtype=torch.float64, N=6, d=3):
    normal = lambda *shape, seed: torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    tensors = {
        "x": 0.6 * normal(2, d, seed=1),
        "y": normal(N, d, seed=2),
        "alpha": torch.tensor([0.9, 0.7], dtype=torch.float64),
        "sigma": torch.tensor([0.8, 1.1], dtype=torch.float64),
        "log_prior": normal(N, seed=3),
    }
    if op == "fisher_matvec":
        tensors["v"] = normal(2, 2, d, seed=4)
    return {k: t.to(dtype) for k, t in tensors.items()}


def pair_of_clouds(op, kind, share, fill, dtype=torch.float64):
    """The same atoms with and without others that have no weight. -> tensors, clean tensors, rows
    of the clean"""
    rows = list(KEPT_ROWS[share])
    tensors = cloud(op, dtype)
    clean = {k: t[rows] if k in ("y", "log_prior") else t for k, t in tensors.items()}
    bad = torch.ones(6, dtype=torch.bool)
    bad[rows] = False
    tensors["y"] = torch.where(bad[:, None], fill, tensors["y"])
    if kind == "masked":
        tensors["log_prior"] = torch.where(bad, -math.inf, tensors["log_prior"])
    return tensors, clean, rows


def scalar(outputs):
    """One number of all outputs, of which no derivative vanishes; log_prob without its
    normalisation."""
    return sum((torch.sin(o + i) * (i + 1)).sum() for i, o in enumerate(outputs))


def run(op, tensors, reference=False):
    outputs = Case(op, "weightless", tensors).run(reference=reference)
    if op in ("posterior", "log_prob"):
        # relative to no prior, so that clouds of another total can be compared
        outputs = (outputs[0] + tensors["log_prior"].logsumexp(0), *outputs[1:])
    return outputs


def backward(f, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(f(*leaves), leaves)


def double_backward(f, tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(
        sum(torch.sin(g).sum() for g in first), leaves, materialize_grads=True
    )


def forward_mode(f, tensors):
    return jvp(f, tuple(tensors), tuple(map(torch.ones_like, tensors)))[1:]


def jvp_of_vjp(f, tensors):
    everything = tuple(range(len(tensors)))
    return jvp(grad(f, everything), tuple(tensors), tuple(map(torch.ones_like, tensors)))[1]


def vmap_of_grad(f, tensors):
    """Over two copies of the queries."""
    return vmap(lambda x: grad(f)(x, *tensors[1:]))(torch.stack([tensors[0], tensors[0] + 0.1]))[
        None
    ]


MODES = (backward, double_backward, forward_mode, jvp_of_vjp, vmap_of_grad)


def derivatives(mode, op, tensors, names, reference=False):
    def f(*some):
        return scalar(run(op, {**tensors, **dict(zip(names, some, strict=True))}, reference))

    return mode(f, [tensors[name] for name in names])


def expect_same(found, right, rows, rtol):
    for got, want in zip(found, right, strict=True):
        if got.shape != want.shape:  # of the atoms
            rest = [i for i in range(len(got)) if i not in rows]
            assert torch.equal(got[rest], torch.zeros_like(got[rest]))
            got = got[rows]
        assert float((got - want).abs().max()) <= rtol * (1 + float(want.abs().max()))


@pytest.mark.parametrize("reference", [False, True], ids=["op", "reference"])
@pytest.mark.parametrize("op", DATA_OPS)
def test_weightless_atoms_made_results_nan(op, reference):
    for case in CASES:
        tensors, clean, rows = pair_of_clouds(op, *case)
        expect_same(run(op, tensors, reference), run(op, clean, reference), rows, 1e-12)


@pytest.mark.parametrize("reference", [False, True], ids=["op", "reference"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.__name__)
@pytest.mark.parametrize("op", DATA_OPS)
def test_weightless_atoms_made_derivatives_nan(op, mode, reference):
    for kind, share, fill in CASES:
        tensors, clean, rows = pair_of_clouds(op, kind, share, fill)
        names = floats(Case(op, "", tensors))
        if kind == "far":  # its share of the prior is real
            names.remove("log_prior")
        found, right = (derivatives(mode, op, t, names, reference) for t in (tensors, clean))
        if mode is jvp_of_vjp and kind == "masked":  # of the masked log_prior and y, too
            assert all(bool(torch.isfinite(g).all()) for g in found)
        expect_same(found, right, rows, 1e-10)


@pytest.mark.parametrize("fill", [1e20, 3e38, -3e38])
def test_one_far_atom_in_float32(fill):
    """As a fill value in a data set comes about: nothing masked, no error in the forward pass. The
    sines of large first derivatives make much of rounding: of either cloud's second derivatives
    by up to 1.1e-4, of plain PyTorch's 6e-5."""
    tensors, clean, rows = pair_of_clouds("posterior", "far", "few", fill, torch.float32)
    names = ["x", "y", "alpha", "sigma"]
    for mode in (backward, double_backward, forward_mode):
        expect_same(
            *(derivatives(mode, "posterior", t, names) for t in (tensors, clean)), rows, 2e-4
        )


@pytest.mark.parametrize(
    "dtype, fill", [(torch.float32, 3e38), (torch.float16, math.nan), (torch.bfloat16, 3e38)]
)
def test_narrow_atoms(dtype, fill):
    tensors, clean, rows = pair_of_clouds("posterior", "masked", "few", fill)
    tensors["y"], clean["y"] = tensors["y"].to(dtype), clean["y"].to(dtype)
    names = floats(Case("posterior", "", tensors))
    expect_same(
        *(derivatives(backward, "posterior", t, names) for t in (tensors, clean)), rows, 1e-2
    )


def test_lists_with_unlisted_and_masked_nan():
    """What a query does not list, and what is masked among what it lists, are alike invisible."""
    tensors, clean, rows = pair_of_clouds("posterior", "masked", "few", math.nan)
    tensors["y"][5] = math.inf  # unlisted, not masked; row 3 of the clean cloud
    lists = torch.tensor([0, 1, 2, 3, 0, 3, 4]), torch.tensor([4, 3])
    clean_lists = torch.tensor([0, 1, 2, 0, 2]), torch.tensor([3, 2])
    names = floats(Case("posterior", "", tensors))

    def gradients(tensors, lists, mode):
        def f(*some):
            case = Case(
                "posterior",
                "lists",
                {**tensors, **dict(zip(names, some, strict=True))},
                dict(zip(("atoms", "counts"), lists, strict=True)),
            )
            return scalar(case.run())

        return mode(f, [tensors[name] for name in names])

    for mode in (backward, double_backward, jvp_of_vjp):
        expect_same(
            gradients(tensors, lists, mode), gradients(clean, clean_lists, mode), rows, 1e-10
        )


def test_the_fast_backward_of_the_mean():
    tensors, clean, _ = pair_of_clouds("posterior", "masked", "most", math.nan)

    def product(tensors):
        args = [tensors[k] for k in ("y", "alpha", "sigma", "log_prior")]
        return vjp(lambda x: ops.posterior(x, *args).mean, tensors["x"])[1](
            torch.ones_like(tensors["x"])
        )[0]

    assert torch.allclose(product(tensors), product(clean), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fill", [math.nan, math.inf, 1e200])
@pytest.mark.parametrize("d", [3, 20])
def test_transport_chain(fill, d):
    """By a kernel, and step by step in many dimensions; and its reference."""
    tensors = cloud("posterior", d=d)
    keep = [0, 2, 3, 5]
    y, prior = tensors["y"].clone(), tensors["log_prior"].clone()
    y[[1, 4]], prior[[1, 4]] = fill, -math.inf
    levels = (
        torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64),
        torch.tensor([1.0, 0.7, 0.3], dtype=torch.float64),
    )
    clean = ops.transport_chain(
        tensors["x"], tensors["y"][keep], *levels, tensors["log_prior"][keep]
    )
    expect_same(ops.transport_chain(tensors["x"], y, *levels, prior), clean, [], 1e-12)
    expect_same(chain_reference(tensors["x"], y, *levels, prior), clean, [], 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("op", DATA_OPS)
def test_compiled(op):
    tensors, clean, rows = pair_of_clouds(op, "masked", "few", math.nan)
    names = floats(Case(op, "", tensors))

    def gradients(*some):
        leaves = dict(zip(names, some, strict=True))
        return torch.autograd.grad(scalar(run(op, leaves)), some)

    compiled = torch.compile(
        lambda *some: scalar(run(op, dict(zip(names, some, strict=True)))), backend="aot_eager"
    )
    leaves = [tensors[name].clone().requires_grad_() for name in names]
    found = torch.autograd.grad(compiled(*leaves), leaves)
    right = gradients(*[clean[name].clone().requires_grad_() for name in names])
    expect_same(found, right, rows, 1e-10)
