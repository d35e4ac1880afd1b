"""What a first derivative costs: which kernels run, how often, and what these are asked for."""

from __future__ import annotations

import pytest
import torch
from torch.func import jacfwd, jacrev, jvp, vjp
from torch.utils._python_dispatch import TorchDispatchMode

from dfkernels import ops
from dfkernels._torch import library
from dfkernels.ops.common import pair_kernels

ALL = ("moments_about_mean", "pair_vjp_queries", "pair_vjp_atoms", "pair_jvp")
MOMENTS, QUERIES, ATOMS, FORWARD = ALL
pytestmark = pytest.mark.skipif(
    not all(library.can_run(getattr(pair_kernels, k), torch.device("cpu")) for k in ALL),
    reason="no kernels of derivatives",
)


class Counted:
    """A kernel that writes down its calls, with the optional arguments that are given."""

    def __init__(self, kernel, calls):
        self.kernel, self.calls, self._schema = kernel, calls, kernel._schema

    def __call__(self, *args):
        given = [a.name for a, b in zip(self._schema.arguments, args, strict=True) if b is not None]
        self.calls.append((self._schema.name.partition("::")[2], given))
        return self.kernel(*args)


@pytest.fixture
def calls(monkeypatch):
    found = []
    for name in ALL:
        monkeypatch.setattr(pair_kernels, name, Counted(getattr(pair_kernels, name), found))
    return found


def problem():
    normal = lambda *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    return {
        "x": normal(3, 5),
        "y": normal(40, 5),
        "alpha": torch.full((3,), 0.9),
        "sigma": torch.full((3,), 0.7),
        "log_prior": normal(40),
        "v": normal(3, 2, 5),
    }


LISTS = {"atoms": torch.arange(40).repeat(3), "counts": torch.full((3,), 40)}


def function(output, wanted, options=None):
    """An output as a function of the tensors in `wanted`, and these."""
    p = problem()

    def f(*tensors):
        t = p | dict(zip(wanted, tensors, strict=True))
        rest = (t["alpha"], t["sigma"], t["log_prior"])
        if output == "fisher_matvec":
            return ops.fisher_matvec(t["x"], t["y"], t["v"], *rest, **(options or {}))
        if output == "fisher_diagonal":
            return ops.fisher_diagonal(t["x"], t["y"], *rest, **(options or {}))
        return getattr(ops.posterior(t["x"], t["y"], *rest, **(options or {})), output)

    return f, [p[name] for name in wanted]


@pytest.mark.parametrize("options", [None, LISTS], ids=["all", "lists"])
@pytest.mark.parametrize(
    "output, wanted, kernels",
    [
        ("log_prob", "x alpha sigma", []),
        ("fisher_trace", "x", [QUERIES]),
        ("ess", "alpha sigma", [QUERIES]),
        ("mean", "x", [MOMENTS]),
        ("mean", "y", [ATOMS]),
        ("log_prob", "log_prior", [ATOMS]),
        ("mean", "x y", [QUERIES, ATOMS]),
        ("fisher_matvec", "x v", [QUERIES]),
        ("fisher_matvec", "v", [MOMENTS]),
        ("fisher_diagonal", "y", [ATOMS]),
    ],
)
def test_reverse_mode_takes_one_pass_beside_the_one_of_the_values(
    output, wanted, kernels, options, calls
):
    """Which leaves the moments."""
    f, tensors = function(output, wanted.split(), options)
    out, pull = vjp(f, *tensors)
    assert [name for name, _ in calls] == [MOMENTS]
    pull(torch.cos(out))
    assert [name for name, _ in calls[1:]] == kernels


@pytest.mark.parametrize("options", [None, LISTS], ids=["all", "lists"])
@pytest.mark.parametrize("output", ["mean", "fisher_matvec", "fisher_diagonal"])
def test_forward_mode_takes_one_pass_for_the_values_and_one_for_the_tangents(
    output, options, calls
):
    f, tensors = function(output, ("x", "y", "alpha"), options)
    jvp(f, tuple(tensors), tuple(map(torch.cos, tensors)))
    assert [name for name, _ in calls] == [MOMENTS, FORWARD]


@pytest.mark.parametrize("output", ["log_prob", "ess", "fisher_matvec", "fisher_diagonal"])
def test_forward_mode_went_through_tensors_of_zeros(output):
    """PyTorch makes one for every operation of a tensor with a tangent and one without, in Python,
    which took longer than the kernels."""
    names = []

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._opname)
            return func(*args, **(kwargs or {}))

    f, tensors = function(output, ["x"])
    with Operations():
        jvp(f, tuple(tensors), tuple(map(torch.cos, tensors)))
    assert names and "_efficientzerotensor" not in names


@pytest.mark.parametrize(
    "output, given",
    [
        ("log_prob", {"h_weight"}),
        ("mean", {"h_weight", "h_first"}),
        ("ess", {"h_weight", "h_weight_square"}),
    ],
)
def test_products_of_what_an_output_does_not_need_are_left_out(output, given, calls):
    f, tensors = function(output, ["log_prior"])
    out, pull = vjp(f, *tensors)
    pull(torch.cos(out))
    _, arguments = calls[-1]
    assert {a for a in arguments if a.startswith("h_")} == given


def test_tangents_that_nobody_has_are_left_out(calls):
    f, tensors = function("mean", ["sigma"])
    jvp(f, tuple(tensors), tuple(map(torch.cos, tensors)))
    _, arguments = calls[-1]
    assert [a for a in arguments if a.startswith("d")] == ["dsigma"]


def test_a_uniform_prior_is_not_written_out(calls):
    p = problem()
    f = lambda y: ops.posterior(p["x"], y, 0.9, 0.7).mean
    out, pull = vjp(f, p["y"])
    pull(torch.cos(out))
    assert all("log_pi" not in arguments for _, arguments in calls)


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobians_take_one_call_for_all_rows(transform, calls):
    """vmap folds into the batch."""
    f, tensors = function("ess", ["alpha"])
    transform(f)(*tensors)
    assert [name for name, _ in calls] == [MOMENTS, QUERIES if transform is jacrev else FORWARD]
