"""The op average beyond the samples of all ops: its accuracy in float32, the rows that it reads,
the dtypes and shapes of values."""

from __future__ import annotations

import math

import pytest
import torch
from difference import EPS, difference_form
from needs import needs_native
from tensors import normal
from torch_state import one_thread  # noqa: F401

from dfkernels import ops
from dfkernels.ops.average import _differentiable, reference

NOISE = (1e-3, 0.1, 0.7, 1.5, 5.0, 1e3)


def problem(B, N, d, p, sigma, offset=0.0, seed=0, dtype=torch.float32):
    y = normal(N, d, seed=seed) + offset
    y[1::2] = y[: 2 * (N // 2) : 2] * (1 + 1e-3 * normal(N // 2, d, seed=seed + 5))
    x = y[torch.arange(B) * 7 % N] + sigma * normal(B, d, seed=seed + 1)
    given = {"x": x, "y": y, "values": normal(N, p, seed=seed + 2) + offset}
    given |= {"alpha": torch.ones(B), "sigma": torch.full((B,), sigma)}
    given["log_prior"] = 2 * normal(N, seed=seed + 3)
    return {k: t.to(dtype) for k, t in given.items()}


def size_of(given):
    """sum w |values|, beside which the average may be near zero."""
    return reference(**given | {"values": given["values"].abs()})[1].norm(dim=1)


# d, p: atoms in the lanes; few coordinates with many values; rows by rows and, from 16 queries on,
# transposed
@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize(
    "B, N, d, p",
    [(20, 700, 2, 3), (9, 300, 16, 16), (5, 300, 3, 33), (20, 300, 1, 130), (7, 400, 17, 1),
     (40, 400, 64, 10), (3, 200, 100, 513)],
)  # fmt: skip
def test_float32_error(B, N, d, p, offset):
    """RMS over the queries at most twice plain PyTorch's plus four roundings, or twice what one
    rounding of the distances does to the weights."""
    bad = []
    for sigma in NOISE:
        given = problem(B, N, d, p, sigma, offset)
        wide = {k: t.double() for k, t in given.items()}
        (_, exact), (_, plain) = reference(**wide), reference(**given)
        log_prob, got = ops.average(**given)
        want = difference_form(**{k: t for k, t in given.items() if k != "values"})["log_prob"]
        size = size_of(wide)
        rms = lambda a, e=exact, s=size: float(((a - e).norm(dim=1) / s).square().mean().sqrt())
        if not rms(got) <= 2 * rms(plain) + 4 * EPS:
            bad.append((sigma, rms(got) / EPS, rms(plain) / EPS))
        assert float(((log_prob - want) / (1 + want.abs())).abs().max()) <= 1e-5
    assert bad == []


@pytest.mark.parametrize("B, N, d", [(1, 3000, 5), (40, 2000, 20), (200, 700, 64)])
@pytest.mark.parametrize("sigma", [0.2, 30.0])
def test_with_the_atoms_as_values_it_is_the_mean(B, N, d, sigma):
    given = problem(B, N, d, 1, sigma, dtype=torch.float64)
    given["values"] = given["y"]
    log_prob, mean = ops.average(**given)
    del given["values"]
    want = ops.posterior(**given)
    assert torch.allclose(mean, want.mean, rtol=1e-12, atol=1e-12)
    assert torch.allclose(log_prob, want.log_prob, rtol=1e-13)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (4096,)])
def test_values_of_any_shape(shape):
    given = problem(3, 50, 2, 1, 0.5, dtype=torch.float64)
    given["values"] = normal(50, *shape, seed=8)
    (_, got), (_, want) = ops.average(**given), reference(**given)
    assert got.shape == want.shape == (3, *shape)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("d, p", [(3, 2), (3, 40), (40, 3)])
def test_stored_values(stored, d, p):
    given = problem(20, 90, d, p, 1.0, dtype=torch.float64)
    given["values"] = (50 * given["values"] + 100).clamp(0, 255).to(stored)
    spread = torch.stack([given["values"], given["values"] * 0], -1)[..., 0]
    want = reference(**given | {"values": given["values"].double()})
    for values in (given["values"], spread):
        got = ops.average(**given | {"values": values})
        assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("hole", [math.nan, math.inf])
@pytest.mark.parametrize("B, d, p", [(3, 2, 2), (3, 2, 40), (3, 40, 5), (33, 40, 48)])
def test_values_without_weight_are_not_seen(B, d, p, hole):
    """Masked, outside of the list, or of an atom so far away that its weight is 0; also where most
    of the others carry weight."""
    for sigma in (0.01, 3.0):
        given = problem(B, 300, d, p, sigma, dtype=torch.float64)
        given["x"] = given["y"][18 * (torch.arange(B) % 16)] + sigma * normal(B, d, seed=7)
        prior = given["log_prior"]
        prior[5::9] = -math.inf
        prior[4::9] = -1e3
        clean = ops.average(**given)
        rows = torch.arange(0, 300, 2)
        listed = {"atoms": rows.repeat(B), "counts": torch.full((B,), 150)}
        alone = ops.average(**given, **listed)
        given["values"][5::9] = given["values"][4::9] = hole
        calls = [(clean, {}), (alone, listed)]
        for want, more in calls:
            got = ops.average(**given, **more)
            plain = _differentiable(*given.values(), 1.0, 0.0, *more.values())
            for a, b, c in zip(got, want, plain, strict=True):
                assert torch.allclose(a, b, rtol=1e-12)
                assert torch.allclose(c, b, rtol=1e-9)
        given["values"][1::2] = hole
        got = ops.average(**given, **listed)
        assert torch.allclose(got.average, alone.average, rtol=1e-12)


@pytest.mark.parametrize("B, d, p", [(3, 40, 5), (40, 2, 48), (40, 40, 48)])
def test_at_low_noise_only_the_rows_that_count_are_seen(B, d, p):
    given = problem(B, 300, d, p, 1e-4, dtype=torch.float64)
    clean = ops.average(**given)
    w = reference(**given | {"values": torch.eye(300, dtype=torch.float64)})[1]
    given["values"][w.max(0).values == 0] = math.nan
    assert torch.equal(ops.average(**given).average, clean.average)


def test_gradients_do_not_see_values_without_weight():
    given = problem(2, 30, 2, 3, 1.0, dtype=torch.float64)
    given["log_prior"][::3] = -math.inf
    given["values"][::3] = math.nan
    leaves = {k: t.requires_grad_() for k, t in given.items()}
    out = ops.average(**leaves)
    grads = torch.autograd.grad(out.average.square().sum() + out.log_prob.sum(), leaves.values())
    assert all(bool(g.isfinite().all()) for g in grads)
    assert torch.equal(grads[2][::3], torch.zeros(10, 3, dtype=torch.float64))


@pytest.mark.parametrize("d, p", [(2, 3), (2, 40), (40, 20)])
def test_a_value_that_counts_and_is_not_finite_is_named(d, p):
    for B in (2, 20):
        given = problem(B, 60, d, p, 2.0, dtype=torch.float64)
        given["values"][7, 1] = math.nan
        with pytest.raises(ValueError, match=r"^values: expected .*got nan at index \[7, 1\]"):
            ops.average(**given)


@needs_native
@pytest.mark.parametrize("B, N, d, p", [(5, 3000, 2, 3), (5, 3000, 2, 40), (40, 3000, 33, 70)])
def test_the_number_of_threads_changes_no_bit(B, N, d, p):
    given, found = problem(B, N, d, p, 2.0), []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        found.append(ops.average(**given))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    "values, error, message",
    [
        ([1.0], TypeError, "values: expected a tensor, got list"),
        (
            torch.zeros(4, 2),
            ValueError,
            "values: expected shape [5, ...], a row for each atom, got",
        ),
        (
            torch.zeros(()),
            ValueError,
            "values: expected shape [5, ...], a row for each atom, got []",
        ),
        (torch.zeros(5, 2).double(), TypeError, "values: expected float32 or narrower to go with"),
        (
            torch.zeros(5, 2).long(),
            TypeError,
            "values: expected float64, float32, float16, bfloat16",
        ),
        (torch.zeros(5, 2, device="meta"), ValueError, "values: expected device cpu like x"),
    ],
)
def test_errors(values, error, message):
    with pytest.raises(error) as caught:
        ops.average(torch.zeros(2, 3), torch.zeros(5, 3), values, 1.0, 1.0)
    assert str(caught.value).startswith(message)
