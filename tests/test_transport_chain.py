"""The op transport_chain: against its reference, autograd through DDIM, closed forms and
symmetries; loud where it has no derivative.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_native
from tensors import normal
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vmap

from dfkernels import ops
from dfkernels._torch import native
from dfkernels.ops.transport_chain import op, reference, stepwise

f64 = torch.float64


def levels(M, sigma=(1.0, 0.3), alpha=(0.3, 1.0)):
    return torch.linspace(*alpha, M + 1, dtype=f64), torch.logspace(
        *map(math.log10, sigma), M + 1, dtype=f64
    )


def problem(B, N, d, M=6, seed=0, **kinds):
    alpha, sigma = levels(M, **kinds)
    return normal(B, d, seed=seed), 0.5 * normal(N, d, seed=seed + 1), alpha, sigma


def largest(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a - b).abs().max()) if a.numel() else 0.0


def worst(got, want):
    return max(largest(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("d", range(1, 17))
@pytest.mark.parametrize("B", [0, 1, 17, 70])
def test_values(B, d):
    """Every width of the kernel's blocks, whole and ragged groups of lanes, each way to carry A;
    more atoms than are summed in one chain of additions.
    """
    rates = 0.2 * normal(6, 2, seed=5)
    for N in (1, 3, 300) if d in (2, 7) else (1, 9):
        x, y, alpha, sigma = problem(B, N, d, seed=10 * d + N)
        prior = 3 * normal(N, seed=N)
        if N > 1:
            # a mask, and no overflow where one is far above
            prior[:2] = torch.tensor([-math.inf, 50.0])
            prior[2] += 50
        for options in ({}, {"rates": rates}, {"rates": rates, "transposed": True}):
            for log_prior in (None, prior):
                want = reference(x, y, alpha, sigma, log_prior, **options)
                got = ops.transport_chain(x, y, alpha, sigma, log_prior, **options)
                assert worst(got, want) <= 1e-12


@pytest.mark.parametrize("N, d", [(1, 2), (9, 5), (300, 3), (9, 16)])
def test_values_step_by_step(N, d):
    """The path of wide events and other devices."""
    rates = 0.2 * normal(6, 2, seed=5)
    x, y, alpha, sigma = problem(5, N, d, seed=N)
    for args in ((None, None, False), (normal(N, seed=N), rates, False), (None, rates, True)):
        want = reference(x, y, alpha, sigma, *args)
        assert worst(stepwise(x, y, alpha, sigma, *args), want) <= 4e-12  # all atoms in one sum


@pytest.mark.parametrize("B, N, d", [(40, 3, 2), (17, 64, 16), (9, 200, 5)])
def test_float32(B, N, d):
    """The error of float32 against float64 is at most twice that of plain PyTorch, plus sixteen
    roundings: fifty steps add up, and plain PyTorch may be lucky.
    """
    x, y, alpha, sigma = (a.float() for a in problem(B, N, d, M=50))
    exact = reference(*[a.double() for a in (x, y, alpha, sigma)])
    got, plain = ops.transport_chain(x, y, alpha, sigma), reference(x, y, alpha, sigma)
    for g, p, e in zip(got, plain, exact, strict=True):
        assert g.dtype == torch.float32
        error, its = float((g - e).abs().max()), float((p - e).abs().max())
        assert error <= 2 * its + 16 * 2**-24 * float(e.abs().max())


@pytest.mark.parametrize("d", [1, 2, 5])
def test_jacobian_is_autograds(d):
    """exp(log_norm) A against jacrev through the DDIM chain of the reference."""
    x, y, alpha, sigma = problem(3, 7, d, M=12, sigma=(1.0, 0.2))
    _, A, log_norm = ops.transport_chain(x, y, alpha, sigma)
    for b in range(3):
        want = jacrev(lambda x: reference(x[None], y, alpha, sigma)[0][0])(x[b])
        assert largest(log_norm[b].exp() * A[b], want) <= 1e-12
    assert largest(A.norm(dim=(1, 2)), torch.full((3,), d**0.5, dtype=f64)) <= 1e-14


@pytest.mark.parametrize(
    "dtype, least",
    [
        (torch.float64, 1e-150),
        (torch.float32, 1e-12),
        pytest.param(torch.float32, 1e-18, marks=needs_native),
    ],
)
@pytest.mark.parametrize("d", [1, 2, 16])
def test_one_atom(dtype, least, d):
    """x_0 = y + (sigma_0/sigma_M)(x_M - y) and M = (sigma_0/sigma_M) I, over most of the range."""
    alpha, sigma = levels(40, sigma=(1 / least, least), alpha=(1.0, 1.0))
    x, y = normal(5, d).to(dtype) * sigma[0].to(dtype), normal(1, d, seed=1).to(dtype)
    end, A, log_norm = ops.transport_chain(x, y, alpha, sigma)
    eye = torch.eye(d, dtype=dtype).expand(5, d, d)
    assert (
        torch.equal(A * (1 - eye), torch.zeros_like(A))
        and largest(A, eye) <= 4 * torch.finfo(dtype).eps
    )
    assert largest(
        log_norm, torch.full((5,), 2 * math.log(least), dtype=dtype)
    ) <= 1e-6 * -math.log(least)
    assert largest(end, y.expand(5, d)) <= 4 * torch.finfo(dtype).eps * float(y.abs().max())


def test_no_step_is_the_identity():
    x, y, alpha, sigma = problem(3, 2, 2, M=0)
    for run in (
        lambda *a: ops.transport_chain(*a),
        lambda *a: stepwise(*a, None, None, False),
        reference,
    ):
        end, A, log_norm = run(x, y, alpha, sigma)
        assert largest(end, x) <= 1e-15
        assert torch.equal(A, torch.eye(2, dtype=f64).expand(3, 2, 2)) and torch.equal(
            log_norm, torch.zeros(3).double()
        )


def test_pure_noise_is_legal():
    """alpha = 0: w = prior, and the step scales and shifts."""
    x, y = normal(4, 2), normal(3, 2, seed=1)
    alpha, sigma = torch.tensor([0.0, 0.5], dtype=f64), torch.tensor([2.0, 1.0], dtype=f64)
    end, A, log_norm = ops.transport_chain(x, y, alpha, sigma)
    assert largest(end, x / 2 + 0.5 * y.mean(0)) <= 1e-15
    assert largest(A, torch.eye(2, dtype=f64).expand(4, 2, 2)) <= 1e-15
    assert largest(log_norm, torch.full((4,), math.log(0.5), dtype=f64)) <= 1e-15


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(-100, 100), st.floats(0.01, 100))
def test_moving_scaling_and_turning_the_cloud(seed, d, shift, scale):
    """A does not see where the origin is nor the unit, and turns with the axes."""
    x, y, alpha, sigma = problem(4, 5, d, seed=seed)
    end, A, log_norm = ops.transport_chain(x, y, alpha, sigma)
    turn = torch.linalg.qr(normal(d, d, seed=seed)).Q
    shift *= scale
    moved = scale * x @ turn.T + alpha[0] * shift
    to, B, log_b = ops.transport_chain(moved, scale * y @ turn.T + shift, alpha, scale * sigma)
    assert largest(B, turn @ A @ turn.T) <= 1e-9
    assert largest(log_b, log_norm) <= 1e-9
    assert largest(to, scale * end @ turn.T + alpha[-1] * shift) <= 1e-9 * (1 + abs(shift) + scale)


@needs_native
def test_an_offset_costs_float32_no_digits():
    """Data 1000 away from the origin, in numbers that float32 holds: A as without the offset."""
    x, y, alpha, sigma = problem(20, 3, 2, M=50, alpha=(1.0, 1.0))
    x, y = ((1024 * a).round().float() / 1024 for a in (x, y))
    near, far = (ops.transport_chain(x + s, y + s, alpha, sigma) for s in (0.0, 1024.0))
    assert largest(near.A, far.A) <= 1e-4  # the error of a chain in float32
    assert largest(near.x, far.x - 1024) <= 1e-4


def test_threads_and_neighbours_change_no_bit():
    x, y, alpha, sigma = problem(203, 40, 3, M=20)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.transport_chain(x, y, alpha, sigma)
        for n in (2, 3):
            torch.set_num_threads(n)
            assert all(map(torch.equal, alone, ops.transport_chain(x, y, alpha, sigma)))
    finally:
        torch.set_num_threads(threads)
    if native.available:
        part = ops.transport_chain(x[101:140], y, alpha, sigma)
        assert all(torch.equal(a[101:140], b) for a, b in zip(alone, part, strict=True))


def test_events_of_any_rank_and_wide_ones():
    """[B, 2, 3] is [B, 6] flat; d = 24 goes step by step; a scalar event; narrow atoms."""
    alpha, sigma = levels(4)
    for event in ((2, 3), (2, 3, 4), ()):
        x, y = normal(3, *event), normal(5, *event, seed=1).half()
        d = math.prod(event)
        end, A, log_norm = ops.transport_chain(x, y, alpha, sigma)
        want = reference(x.reshape(3, d), y.reshape(5, d).double(), alpha, sigma)
        assert end.shape == x.shape
        assert worst((end.reshape(3, d), A, log_norm), want) <= 1e-12


@pytest.mark.parametrize("name", ["transport_chain", "transport_chain_stepwise"])
def test_registration(name):
    overload = getattr(torch.ops.dfkernels, name).default
    assert (
        str(overload._schema)
        == f"dfkernels::{name}(Tensor x, Tensor y, Tensor alpha, Tensor sigma, Tensor? log_prior, "
        "Tensor? rates, bool transposed) -> (Tensor, Tensor, Tensor)"
    )
    x, y, alpha, sigma = problem(3, 4, 2)
    for args in (
        (x, y, alpha, sigma, None, None, False),
        (x[:0], y, alpha, sigma, normal(4), 0.1 * normal(6, 2), True),
        (x.mT.contiguous().mT, y[:1].expand(4, 2), alpha, sigma, None, None, False),
    ):
        checks = torch.library.opcheck(overload, args)
        assert set(checks.values()) == {"SUCCESS"}, checks


@needs_native
def test_native_implements():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("dfkernels::transport_chain", "CPU")


def test_compiles():
    x, y, alpha, sigma = problem(3, 4, 2)
    got = torch.compile(ops.transport_chain, fullgraph=True, backend="aot_eager")(
        x, y, alpha, sigma
    )
    assert worst(got, ops.transport_chain(x, y, alpha, sigma)) == 0


NO_DERIVATIVE = re.escape(
    "transport_chain has no derivatives, but an argument requires grad or carries a tangent: detach"
    " it, or differentiate dfkernels.ops.transport_chain.reference"
)


@pytest.mark.parametrize("d", [2, 17])
def test_derivatives_are_loud(d):
    x, y, alpha, sigma = problem(2, 3, d)
    run = lambda x: ops.transport_chain(x, y, alpha, sigma).x.sum()
    leaf = x.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match=NO_DERIVATIVE):
        run(leaf)
    with pytest.raises(NotImplementedError, match=NO_DERIVATIVE):
        ops.transport_chain(x, y, alpha, sigma.clone().requires_grad_())
    with pytest.raises(NotImplementedError, match=NO_DERIVATIVE):
        grad(run)(x)
    with pytest.raises(NotImplementedError, match=NO_DERIVATIVE):
        jvp(run, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=NO_DERIVATIVE):
        run(forward_ad.make_dual(x, x))
    with torch.no_grad():
        assert torch.equal(run(leaf), run(x))
    overload = op if d <= 16 else stepwise  # and for callers of torch.ops
    with pytest.raises(NotImplementedError, match=NO_DERIVATIVE):
        overload(leaf, y, alpha, sigma, None, None, False)


def test_vmap():
    """Over the starts folded into the batch, over anything else a loop."""
    x, y, alpha, sigma = problem(6, 3, 2)
    want = ops.transport_chain(x, y, alpha, sigma)
    got = vmap(lambda x: tuple(ops.transport_chain(x, y, alpha, sigma)))(x.reshape(3, 2, 2))
    assert worst([g.flatten(0, 1) for g in got], want) == 0
    ends = torch.stack([sigma, 2 * sigma])
    got = vmap(lambda sigma: tuple(ops.transport_chain(x, y, alpha, sigma)))(ends)
    assert worst([g[1] for g in got], ops.transport_chain(x, y, alpha, 2 * sigma)) == 0
    clouds = torch.stack([y, 2 * y])
    got = vmap(lambda y: tuple(ops.transport_chain(x, y, alpha, sigma)))(clouds)
    assert worst([g[1] for g in got], ops.transport_chain(x, 2 * y, alpha, sigma)) == 0


x, y, alpha, sigma = problem(2, 3, 2, M=4)
BAD = {
    "x": (dict(x=[1.0]), TypeError, "x: expected a tensor, got list"),
    "x nan": (
        dict(x=torch.full((2, 2), math.nan)),
        ValueError,
        "x: expected finite values, got nan at index [0, 0]",
    ),
    "y shape": (
        dict(y=y[:, :1]),
        ValueError,
        "y: expected shape [N, 2] to go with x of shape [2, 2], got [3, 1]",
    ),
    "y inf": (
        dict(y=y.clone().index_fill_(0, torch.tensor([1]), math.inf)),
        ValueError,
        "y: expected finite values, got inf at index [1, 0]",
    ),
    "alpha number": (dict(alpha=1.0), TypeError, "alpha: expected a tensor, got float"),
    "alpha shape": (
        dict(alpha=alpha[:, None]),
        ValueError,
        "alpha: expected a tensor of real numbers, shape [M + 1], got torch.float64 [5, 1]",
    ),
    "alpha empty": (
        dict(alpha=alpha[:0]),
        ValueError,
        "alpha: expected a tensor of real numbers, shape [M + 1], got torch.float64 [0]",
    ),
    "sigma shape": (
        dict(sigma=sigma[1:]),
        ValueError,
        "sigma: expected shape [5] like alpha, got [4]",
    ),
    "sigma zero": (
        dict(sigma=torch.tensor([1.0, 0.5, 0.2, 0.1, 0.0])),
        ValueError,
        "sigma: expected finite values > 0, got 0.0 at index [4]",
    ),
    "sigma nan": (
        dict(sigma=sigma * torch.tensor([1, 1, math.nan, 1, 1])),
        ValueError,
        "sigma: expected finite values > 0, got nan at index [2]",
    ),
    "log_prior": (
        dict(log_prior=normal(2)),
        ValueError,
        "log_prior: expected shape [3], one entry per atom, got [2]",
    ),
    "log_prior masked": (
        dict(log_prior=torch.full((3,), -math.inf)),
        ValueError,
        "log_prior: expected at least one finite value, got all -inf",
    ),
    "rates shape": (
        dict(rates=normal(4)),
        ValueError,
        "rates: expected shape [4, 2], a row per step, got [4]",
    ),
    "rates inf": (
        dict(rates=torch.full((4, 2), math.inf)),
        ValueError,
        "rates: expected finite values, got inf at index [0, 0]",
    ),
    "transposed": (
        dict(transposed=True),
        ValueError,
        "rates: expected a tensor with transposed=True, got None",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    change, error, message = BAD[name]
    args = {"x": x, "y": y, "alpha": alpha, "sigma": sigma, **change}
    if isinstance(args["x"], torch.Tensor):
        args["x"] = args["x"].double()
    with pytest.raises(error, match=re.escape(message)):
        ops.transport_chain(**args)


def test_an_overflow_is_loud():
    rates = torch.full((4, 2), 1e300, dtype=f64)
    with pytest.raises(ValueError, match="^result: expected finite numbers, got .*overflow"):
        ops.transport_chain(x.float(), y.float(), alpha, sigma, rates=rates)
