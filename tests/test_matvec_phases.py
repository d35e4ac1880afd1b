"""fisher_matvec of many queries in high noise, which the CPU adds up in two phases
(csrc/simd/matvec_phases.h), against float64 on the same inputs: at most twice the error of plain
PyTorch in float32 by matrix products about the mean of the data, which is quicker than by
differences and as exact in high noise."""

from __future__ import annotations

import math

import pytest
import torch
from difference import EPS

from dfkernels import ops

B, N, D, K = 40, 4200, 195, 2  # the last tile, the last vector and the last block are not full


def problem(seed=0, *, sigma=12.0, offset=0.0, d=D, dtype=torch.float32):
    """Queries drawn from q_t of normal atoms in pairs that are close to each other; one vector of
    each is that of its atom to the other."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)
    y = normal(N, d)
    y[N // 2 :] = y[: N // 2] + 0.2 * normal(N // 2, d)
    y += offset
    sigma = torch.as_tensor(sigma, dtype=dtype).expand(B).clone()
    alpha = torch.tensor([1.0, 0.6, -0.8, 1.0], dtype=dtype).repeat(B // 4)
    atom = torch.randint(N // 2, (B,), generator=generator)
    v = normal(B, K, d)
    v[:, 1] = y[atom + N // 2] - y[atom]
    x = alpha[:, None] * y[atom] + sigma[:, None] * normal(B, d)
    return {"x": x, "y": y, "v": v, "alpha": alpha, "sigma": sigma, "log_prior": None}


def plain(x, y, v, alpha, sigma, log_prior, dtype=torch.float64):
    x, y, v, alpha, sigma = (t.to(dtype) for t in (x, y, v, alpha[:, None], sigma[:, None]))
    centre = y.mean(0)
    t, x = y - centre, x - alpha * centre
    logits = (alpha * (x @ t.mT) - alpha**2 * t.square().sum(1) / 2) / sigma**2
    w = torch.softmax(logits if log_prior is None else logits + log_prior.to(dtype), 1)
    along = v @ t.mT
    along = w[:, None] * (along - (w[:, None] * along).sum(2, keepdim=True))
    return (v - (alpha / sigma)[..., None] ** 2 * (along @ t)) / sigma[..., None] ** 2


def expect_exact(p, exact_of=None, **stored):
    """exact_of: the inputs of the reference, where they are others."""
    q = exact_of or p
    exact = plain(**q)
    far = lambda some: ((some.double() - exact).norm(dim=2) / exact.norm(dim=2)).square().mean(0)
    ours, theirs = far(ops.fisher_matvec(**p, **stored)), far(plain(**q, dtype=torch.float32))
    assert bool((ours.sqrt() <= 2 * theirs.sqrt() + 4 * EPS).all()), (ours.sqrt(), theirs.sqrt())


# At 1.7 the two atoms of a query's pair outweigh all others, at 2 to 4 a few do, at 12 none. In
# the last batch some queries are in low noise.
MIXED = torch.cat([torch.logspace(-3, 0, 7), torch.logspace(0.5, 3, B - 7)])


@pytest.mark.parametrize("sigma", [1.7, 2.0, 4.0, 12.0, 1e3, MIXED[torch.arange(B) * 7 % B]])
def test_error(sigma):
    expect_exact(problem(sigma=sigma))


def test_weights_that_are_kept_may_turn_out_to_be_negligible():
    """Rows this long make several tiles of a split, and the pair in a later one outweighs all that
    came before by more than exp(40)."""
    expect_exact(problem(sigma=4.5, d=1500))


def test_far_from_the_origin():
    expect_exact(problem(offset=30.0))


def test_masked_atoms_may_hold_nan():
    p = problem()
    p["log_prior"] = 2 * torch.randn(N, generator=torch.Generator().manual_seed(1))
    p["log_prior"][::9] = -math.inf
    exact_of = dict(p)
    p["y"] = p["y"].clone()
    p["y"][::9] = math.nan
    expect_exact(p, exact_of)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_storage(storage):
    p = problem()
    stored = ((p["y"] + 5) / 0.05).round().clamp(0, 250).to(storage)
    exact_of = p | {"y": 0.05 * stored.float() - 5}
    expect_exact(p | {"y": stored}, exact_of, scale=0.05, offset=-5.0)


def test_float64():
    p = problem(sigma=torch.tensor([2.0, 12.0]).repeat(B // 2), dtype=torch.float64)
    torch.testing.assert_close(ops.fisher_matvec(**p), plain(**p), rtol=1e-11, atol=1e-13)


def test_an_atom_far_out_takes_no_part():
    """Of one the square overflows: its tile, and so all queries, take the sweep in one phase. The
    logits of the other's tile are taken by differences."""
    p = problem()
    for far in (1e25, 300.0):
        y = p["y"].clone()
        y[N // 3] = far
        y[N - 1] = -far
        q = p | {"y": y}
        masked = torch.zeros(N)
        masked[[N // 3, N - 1]] = -math.inf
        torch.testing.assert_close(
            ops.fisher_matvec(**q),
            ops.fisher_matvec(**q | {"log_prior": masked}),
            rtol=1e-5,
            atol=1e-6,
        )


def test_an_atom_that_is_not_finite_is_named():
    p = problem()
    p["y"][N // 2] = math.nan
    with pytest.raises(
        ValueError, match=f"y: expected finite values, got nan at index .{N // 2}, 0"
    ):
        ops.fisher_matvec(**p)


def test_threads_change_no_bit():
    """Of 520 queries, more are taken at a time where there are more threads."""
    p = problem()
    many = {k: p[k].repeat(13, *[1] * (p[k].dim() - 1)) for k in ("x", "alpha", "sigma", "v")}
    threads, got = torch.get_num_threads(), []
    try:
        for n in (1, 2, 9):
            torch.set_num_threads(n)
            got.append(ops.fisher_matvec(**p | many))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])
