"""kept=(atoms, counts): every query counts its own atoms, whatever the others count. Derivatives,
transforms and compilation are with those of all ops (cases.py).
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkernels import ops
from dfkernels._torch import native
from dfkernels.ops.posterior.reference import posterior as reference


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


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
    st.sampled_from(["posterior", "fisher_matvec", "fisher_diagonal", "fisher_dense"]),
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
    kept = lists(B, N, seed, share)
    if masked:
        prior = 5 * normal(N, seed=seed + 3)
        prior[normal(N, seed=seed + 4) > 1] = -math.inf
        prior[torch.arange(B) * 7919 % N] = 0.0  # something is left of every query's
        tensors["log_prior"] = prior
    close(Case(op, "kept", tensors, {"kept": kept}), tensors, 1e-9 * (1 + sigma**-2))


@pytest.mark.parametrize("d", [784, 3072, 3001])
@pytest.mark.parametrize("sigma", [0.01, 1.0, 30.0])
def test_no_less_exact_than_plain_float32(d, sigma):
    """At most twice its error; several splits and blocks of queries."""
    tensors = problem(11, 600, d, sigma, dtype=torch.float32)
    everything = torch.arange(600).repeat(11), torch.full((11,), 600)
    exact = ops.posterior(*(tensors[k].double() for k in "xy"), 1.0, sigma)
    error = lambda found: [
        float(((a - b).abs() / (1 + b.abs())).max()) for a, b in zip(found, exact, strict=True)
    ]
    plain, kept = (
        error(reference(*tensors.values())),
        error(ops.posterior(*tensors.values(), kept=everything)),
    )
    assert all(k <= 2 * p + 1e-6 for k, p in zip(kept, plain, strict=True)), (kept, plain)


@pytest.mark.skipif(not native.available, reason="no compiled part")
def test_distances_were_rounded_to_float_in_much_noise():
    """A unit in the last place of |x - alpha y|^2 / 2 sigma^2 is 1e-4 nats here; in the mean it was
    5e-5."""
    tensors = problem(11, 600, 3072, 30.0, dtype=torch.float32)
    everything = torch.arange(600).repeat(11), torch.full((11,), 600)
    exact = ops.posterior(*(tensors[k].double() for k in "xy"), 1.0, 30.0).mean
    assert (
        float((ops.posterior(*tensors.values(), kept=everything).mean - exact).abs().max()) <= 2e-5
    )


@pytest.mark.parametrize("storage", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_storage(storage, dtype):
    y = (30 * normal(80, 48) + 128).clamp(0, 255).to(storage)
    x = 2 / 255 * y[:9].to(dtype) - 1 + 0.1 * normal(9, 48).to(dtype)
    tensors = {"x": x, "y": y, "alpha": 1.0, "sigma": 0.5}
    options = {"kept": lists(9, 80), "scale": 2 / 255, "offset": -1.0}
    close(
        Case("posterior", "kept", tensors, options),
        tensors,
        1e-5 if dtype == torch.float32 else 1e-12,
    )


def test_what_is_not_counted_is_not_read():
    tensors = problem(3, 40, 33, 0.5)
    atoms, counts = lists(3, 40)
    clean = ops.posterior(*tensors.values(), kept=(atoms, counts))
    others = torch.ones(40, dtype=torch.bool)
    others[atoms] = False
    assert bool(others.any())
    tensors["y"][others] = math.nan
    if native.available:
        found = ops.posterior(*tensors.values(), kept=(atoms, counts))
        assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))
    tensors["y"][atoms[0], 5] = math.nan
    with pytest.raises(ValueError, match="y: expected finite values"):
        ops.posterior(*tensors.values(), kept=(atoms, counts))


def test_other_queries_do_not_matter():
    """A query's results are those of a call of its own, however its rows are shared and cut."""
    tensors = problem(19, 900, 64, 0.4)
    atoms, counts = lists(19, 900, share=0.5)
    together = ops.posterior(*tensors.values(), kept=(atoms, counts))
    for b, rows in enumerate(atoms.split(counts.tolist())):
        alone = ops.posterior(
            tensors["x"][b : b + 1], tensors["y"], 1.0, 0.4, kept=(rows, counts[b : b + 1])
        )
        for a, t in zip(alone, together, strict=True):
            assert torch.allclose(a[0], t[b], rtol=1e-12, atol=1e-12)


def test_the_same_bits_for_any_number_of_threads():
    tensors = problem(10, 1500, 200, 0.3, dtype=torch.float32)
    kept, threads, found = lists(10, 1500), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(ops.posterior(*tensors.values(), kept=kept))
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
    kept = torch.tensor([0, 9, 0, 1, 2]), torch.tensor([2, 3])
    with pytest.raises(
        ValueError, match="^atoms: expected one with a log_prior above -inf .* at index 1$"
    ):
        ops.posterior(*tensors.values(), kept=kept)
    tensors["log_prior"][0] = 0.0
    tensors["x"] = tensors["x"] + 1e200
    with pytest.raises(
        ValueError, match="^x: expected distances to the atoms that can be represented"
    ):
        ops.posterior(*tensors.values(), kept=kept)


A, C = torch.tensor, lambda *n: torch.tensor(n)


@pytest.mark.parametrize(
    "kept, error, message",
    [
        (
            [A([0, 1]), C(1, 1)],
            TypeError,
            r"kept: expected a tuple \(atoms, counts\) of tensors, got list",
        ),
        ((A([0, 1]),), TypeError, "kept: expected a tuple"),
        ((A([0, 1]), (1, 1)), TypeError, "kept: counts: expected a tensor, got tuple"),
        ((A([0, 1]).int(), C(1, 1)), TypeError, "kept: atoms: expected int64, got int32"),
        ((A([[0, 1]]), C(1, 1)), ValueError, r"kept: atoms: expected shape \[M\], got \[1, 2\]"),
        ((A([0, 1]), C(2)), ValueError, r"kept: counts: expected shape \[2\], got \[1\]"),
        ((A([0, 1]), C(2, 0)), ValueError, "counts: expected at least one atom per query"),
        ((A([0, 1]), C(3, -1)), ValueError, "counts: expected at least one atom per query"),
        ((A([0, 1]), C(1, 2)), ValueError, "counts: expected at least one atom per query"),
        ((A([0, 1, 2]), C(1, 1)), ValueError, "expected"),
        (
            (A([0, 9]), C(1, 1)),
            ValueError,
            "atoms: expected numbers of 4 rows, each query's ascending",
        ),
        (
            (A([-1, 2]), C(1, 1)),
            ValueError,
            "atoms: expected numbers of 4 rows, each query's ascending",
        ),
        (
            (A([2, 1, 0]), C(2, 1)),
            ValueError,
            "atoms: expected numbers of 4 rows, each query's ascending",
        ),
        (
            (A([1, 1, 0]), C(2, 1)),
            ValueError,
            "atoms: expected numbers of 4 rows, each query's ascending",
        ),
    ],
)
def test_errors(kept, error, message):
    with pytest.raises(error, match=message):
        ops.posterior(*problem(2, 4, 3, 0.5).values(), kept=kept)
