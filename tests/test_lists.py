"""atoms=, counts=: every query counts its own atoms, whatever the others count. Derivatives,
transforms and compilation are with those of all ops (cases.py).
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import normal

from dfkernels import ops
from dfkernels._torch import library, native
from dfkernels.ops.common import lists as common
from dfkernels.ops.posterior.reference import posterior as reference
from tools.op_table import DATA_OPS


def lists(B, N, seed=0, share=0.3):
    """Of every query at least one atom."""
    wanted = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) < share
    wanted[torch.arange(B), torch.arange(B) * 7919 % N] = True
    return wanted.nonzero()[:, 1], wanted.sum(1)


def problem(B, N, d, sigma, seed=0, dtype=torch.float64):
    y = normal(N, d, seed=seed)
    x = y[torch.arange(B) * 31 % N] + sigma * normal(B, d, seed=seed + 1)
    return {"x": x.to(dtype), "y": y.to(dtype), "alpha": 1.0, "sigma": sigma}


def close(case, tensors, rtol):
    wide = {k: t.double() for k, t in tensors.items() if isinstance(t, torch.Tensor)}
    for got, want in zip(case.run(tensors), case.run(wide, reference=True), strict=True):
        assert got.dtype == tensors["x"].dtype
        assert float((got - want).abs().max()) <= rtol * (1 + float(want.abs().max())), case


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DATA_OPS),
    st.integers(1, 20),
    st.integers(1, 90),
    st.integers(1, 40),
    st.floats(0.2, 3),
    st.floats(0.01, 1),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_as_with_its_own_atoms_alone(op, B, N, d, sigma, share, masked, seed):
    tensors = problem(B, N, d, sigma, seed)
    if op == "fisher_matvec":
        tensors["v"] = normal(B, 2, d, seed=seed + 2)
    atoms, counts = lists(B, N, seed, share)
    if masked:
        prior = 5 * normal(N, seed=seed + 3)
        prior[normal(N, seed=seed + 4) > 1] = -math.inf
        prior[torch.arange(B) * 7919 % N] = 0.0  # something is left of every query's
        tensors["log_prior"] = prior
    close(
        Case(op, "lists", tensors, {"atoms": atoms, "counts": counts}),
        tensors,
        1e-9 * (1 + sigma**-2),
    )


@pytest.mark.parametrize("d", [784, 3072, 3001])
@pytest.mark.parametrize("sigma", [0.01, 1.0, 30.0])
def test_no_less_exact_than_plain_float32(d, sigma):
    """At most twice its error; several splits and blocks of queries."""
    tensors = problem(11, 600, d, sigma, dtype=torch.float32)
    everything = {"atoms": torch.arange(600).repeat(11), "counts": torch.full((11,), 600)}
    exact = ops.posterior(*(tensors[k].double() for k in "xy"), 1.0, sigma)
    error = lambda found: [
        float(((a - b).abs() / (1 + b.abs())).max()) for a, b in zip(found, exact, strict=True)
    ]
    plain, found = (
        error(reference(*tensors.values())),
        error(ops.posterior(*tensors.values(), **everything)),
    )
    assert all(k <= 2 * p + 1e-6 for k, p in zip(found, plain, strict=True)), (found, plain)


@pytest.mark.skipif(not native.available, reason="no compiled part")
def test_distances_were_rounded_to_float_in_much_noise():
    """A unit in the last place of |x - alpha y|^2 / 2 sigma^2 is 1e-4 nats here; in the mean it was
    5e-5."""
    tensors = problem(11, 600, 3072, 30.0, dtype=torch.float32)
    everything = {"atoms": torch.arange(600).repeat(11), "counts": torch.full((11,), 600)}
    exact = ops.posterior(*(tensors[k].double() for k in "xy"), 1.0, 30.0).mean
    assert float((ops.posterior(*tensors.values(), **everything).mean - exact).abs().max()) <= 2e-5


@pytest.mark.parametrize("storage", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_storage(storage, dtype):
    y = (30 * normal(80, 48) + 128).clamp(0, 255).to(storage)
    x = 2 / 255 * y[:9].to(dtype) - 1 + 0.1 * normal(9, 48).to(dtype)
    tensors = {"x": x, "y": y, "alpha": 1.0, "sigma": 0.5}
    atoms, counts = lists(9, 80)
    options = {"atoms": atoms, "counts": counts, "scale": 2 / 255, "offset": -1.0}
    close(
        Case("posterior", "lists", tensors, options),
        tensors,
        1e-5 if dtype == torch.float32 else 1e-12,
    )


def test_what_is_not_counted_is_not_read():
    tensors = problem(3, 40, 33, 0.5)
    atoms, counts = lists(3, 40)
    clean = ops.posterior(*tensors.values(), atoms=atoms, counts=counts)
    others = torch.ones(40, dtype=torch.bool)
    others[atoms] = False
    assert bool(others.any())
    tensors["y"][others] = math.nan
    if native.available:
        found = ops.posterior(*tensors.values(), atoms=atoms, counts=counts)
        assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))
    tensors["y"][atoms[0], 5] = math.nan
    with pytest.raises(ValueError, match="y: expected finite values"):
        ops.posterior(*tensors.values(), atoms=atoms, counts=counts)


def test_other_queries_do_not_matter():
    """A query's results are those of a call of its own, however its rows are shared and cut."""
    tensors = problem(19, 900, 64, 0.4)
    atoms, counts = lists(19, 900, share=0.5)
    together = ops.posterior(*tensors.values(), atoms=atoms, counts=counts)
    for b, rows in enumerate(atoms.split(counts.tolist())):
        alone = ops.posterior(
            tensors["x"][b : b + 1], tensors["y"], 1.0, 0.4, atoms=rows, counts=counts[b : b + 1]
        )
        for a, t in zip(alone, together, strict=True):
            assert torch.allclose(a[0], t[b], rtol=1e-12, atol=1e-12)


def test_the_same_bits_for_any_number_of_threads():
    tensors = problem(10, 1500, 200, 0.3, dtype=torch.float32)
    atoms, counts = lists(10, 1500)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(ops.posterior(*tensors.values(), atoms=atoms, counts=counts))
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True)
    )


@pytest.mark.skipif(not native.available, reason="the words are the kernel's")
def test_errors_of_values_name_what_is_wrong():
    tensors = problem(2, 40, 33, 0.5)
    tensors["log_prior"] = torch.zeros(40, dtype=torch.float64)
    tensors["log_prior"][:3] = -math.inf
    some = {"atoms": torch.tensor([0, 9, 0, 1, 2]), "counts": torch.tensor([2, 3])}
    with pytest.raises(
        ValueError, match="^atoms: expected one with a log_prior above -inf .* at index 1$"
    ):
        ops.posterior(*tensors.values(), **some)
    tensors["log_prior"][0] = 0.0
    tensors["x"] = tensors["x"] + 1e200
    with pytest.raises(
        ValueError, match="^x: expected distances to the atoms that can be represented"
    ):
        ops.posterior(*tensors.values(), **some)


ROWS = "atoms: expected numbers of 4 rows, each query's ascending"
A, C = torch.tensor, lambda *n: torch.tensor(n)


@pytest.mark.parametrize(
    "atoms, counts, error, message",
    [
        (A([0, 1]), None, ValueError, "counts: expected a tensor to go with atoms, got None"),
        (None, C(1, 1), ValueError, "atoms: expected a tensor to go with counts, got None"),
        (A([0, 1]), (1, 1), TypeError, "counts: expected a tensor, got tuple"),
        (A([0, 1]).int(), C(1, 1), TypeError, "atoms: expected int64, got int32"),
        (A([[0, 1]]), C(1, 1), ValueError, r"atoms: expected shape \[M\], got \[1, 2\]"),
        (A([0, 1]), C(2), ValueError, r"counts: expected shape \[2\], got \[1\]"),
        (A([0, 1]), C(2, 0), ValueError, "counts: expected at least one atom per query"),
        (A([0, 1]), C(3, -1), ValueError, "counts: expected at least one atom per query"),
        (A([0, 1]), C(1, 2), ValueError, "counts: expected at least one atom per query"),
        (A([0, 1, 2]), C(1, 1), ValueError, "expected"),
        (A([0, 9]), C(1, 1), ValueError, ROWS),
        (A([-1, 2]), C(1, 1), ValueError, ROWS),
        (A([2, 1, 0]), C(2, 1), ValueError, ROWS),
        (A([1, 1, 0]), C(2, 1), ValueError, ROWS),
    ],
)  # fmt: skip
def test_errors(atoms, counts, error, message):
    with pytest.raises(error, match=message):
        ops.posterior(*problem(2, 4, 3, 0.5).values(), atoms=atoms, counts=counts)


def test_a_kernel_for_lists_takes_those_of_all_queries_in_one_call(monkeypatch):
    """And never sees what is no list."""
    made, seen = {}, []
    define = lambda name, schema, **given: made.update(given) or library.overload("posterior")
    monkeypatch.setattr(common.library, "define", define)
    schema = "(Tensor x, Tensor y, Tensor? atoms=None, Tensor? counts=None) -> Tensor"
    none = {"fallback": None, "fake": None, "differentiable": None}
    common.define("other", schema, cuda=lambda *a: seen.append(a), lists_on_cuda=True, **none)
    x, y, atoms, counts = torch.zeros(2, 3), torch.zeros(4, 3), A([0, 2, 1]), C(2, 1)
    made["cuda"](x, y)
    made["cuda"](x, y, atoms, counts)
    assert [len(a) for a in seen] == [2, 4]
    assert all(a is b for a, b in zip(seen[1], (x, y, atoms, counts), strict=True))
    for wrong in ((A([0, 4, 1]), counts), (atoms, C(2, 2)), (atoms, None)):
        with pytest.raises(ValueError, match="expected"):
            made["cuda"](x, y, *wrong)
    assert len(seen) == 2


@pytest.mark.parametrize("op", [op for op in DATA_OPS if op != "log_prob"])  # younger than it
def test_the_old_keyword_still_works_and_says_what_to_write(op):
    tensors = problem(3, 40, 33, 0.5)
    if op == "fisher_matvec":
        tensors = {"x": tensors["x"], "y": tensors["y"], "v": normal(3, 33), **tensors}
    atoms, counts = lists(3, 40)
    call = lambda **more: getattr(ops, op)(*tensors.values(), **more)
    with pytest.warns(DeprecationWarning, match="write atoms=atoms, counts=counts") as warned:
        old = call(kept=(atoms, counts))
    assert warned[0].filename == __file__
    new = call(atoms=atoms, counts=counts)
    for a, b in zip(*(o if isinstance(o, tuple) else (o,) for o in (old, new)), strict=True):
        assert torch.equal(a, b)
    with (
        pytest.warns(DeprecationWarning, match="^kept="),
        pytest.raises(ValueError, match="^kept: expected None"),
    ):
        call(kept=(atoms, counts), atoms=atoms)
    for wrong in ([atoms, counts], (atoms,)):
        with (
            pytest.warns(DeprecationWarning, match="^kept="),
            pytest.raises(TypeError, match="^kept: expected a tuple"),
        ):
            call(kept=wrong)


def test_the_op_itself_takes_seven_arguments_or_lists_too():
    x, y = normal(2, 20), normal(9, 20, seed=1)
    ones, op = torch.ones(2, dtype=x.dtype), torch.ops.dfkernels.posterior
    atoms, counts = torch.arange(9).repeat(2), torch.tensor([9, 9])
    args = (x, y, ones, ones, None, 1.0, 0.0)
    plain = op(*args)
    for lists_too in ({}, {"atoms": None, "counts": None}, {"atoms": atoms, "counts": counts}):
        for a, b in zip(op(*args, **lists_too), plain, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    for name, one in (("counts", {"atoms": atoms}), ("atoms", {"counts": counts})):
        with pytest.raises(ValueError, match=f"{name}.*: expected .*, got None"):
            op(*args, **one)
