"""transport_chain: the launcher on CPU tensors against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from cases import _normal
from difference import EPS

from dfkernels.ops.transport_chain import reference
from dfkernels.ops.transport_chain import triton as chains

f64 = torch.float64


def problem(B, N, d, M, sigma=(1.0, 0.3), alpha=(0.3, 1.0)):
    """x, y, alpha, sigma in float64: from noise to data in M steps."""
    normal = _normal(100 * d + N)
    levels = (
        torch.linspace(*alpha, M + 1, dtype=f64),
        torch.logspace(*map(math.log10, sigma), M + 1, dtype=f64),
    )
    return normal(B, d), 0.5 * normal(N, d), *levels


def largest(a, b):
    assert a.shape == b.shape and a.dtype == b.dtype
    return float((a - b).abs().max()) if a.numel() else 0.0


def worst(got, want):
    return max(largest(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("B, N, d", [(33, 1, 1), (33, 7, 2), (5, 9, 3), (9, 9, 5), (9, 20, 16)])
def test_values(B, N, d, monkeypatch):
    """In float64: 1e-12, as on the CPU. Every size of tile, a part of the last program's lanes,
    tiles and columns without atoms, several chains of additions, masked atoms, and each way to
    carry A.
    """
    monkeypatch.setattr(chains, "RUN", type(chains.RUN)(2))
    x, y, alpha, sigma = problem(B, N, d, M=3)
    rates, prior = 0.2 * _normal(5)(3, 2), 3 * _normal(6)(N)
    if N > 1:
        prior[:3] = torch.tensor(
            [-math.inf, 50.0, 49.0]
        )  # a mask, and no overflow where some are far above
    for args in (
        (None, None, False),
        (prior, None, False),
        (prior, rates, False),
        (None, rates, True),
    ):
        got = chains.launch(x, y, alpha, sigma, *args)
        assert worst(got, reference(x, y, alpha, sigma, *args)) <= 1e-12


@pytest.mark.parametrize("d", [2, 5])
def test_float32_error(d):
    """RMS over the chains at most twice plain PyTorch's and sixteen roundings, since twenty steps
    add up."""
    x, y, alpha, sigma = (a.float() for a in problem(24, 6, d, M=20))
    got, plain = chains.launch(x, y, alpha, sigma, None, None, False), reference(x, y, alpha, sigma)
    exact = reference(*[a.double() for a in (x, y, alpha, sigma)])
    for g, p, e in zip(got, plain, exact, strict=True):
        assert g.dtype == torch.float32
        rms = lambda t: float(t.double().square().mean().sqrt())
        assert rms(g - e) <= 2 * rms(p - e) + 16 * EPS * rms(e)


@pytest.mark.parametrize("dtype, least", [(torch.float64, 1e-150), (torch.float32, 1e-18)])
def test_one_atom(dtype, least):
    """M = (sigma_0/sigma_M) I over most of the range: A keeps its digits, its size goes to
    log_norm."""
    x, y, alpha, sigma = problem(5, 1, 2, M=20, sigma=(1 / least, least), alpha=(1.0, 1.0))
    x, y = (x * sigma[0]).to(dtype), y.to(dtype)
    end, A, log_norm = chains.launch(x, y, alpha, sigma, None, None, False)
    eps = torch.finfo(dtype).eps
    assert torch.equal(A * (1 - torch.eye(2, dtype=dtype)), torch.zeros_like(A))
    assert largest(A, torch.eye(2, dtype=dtype).expand(5, 2, 2)) <= 4 * eps
    assert float((log_norm - 2 * math.log(least)).abs().max()) <= 1e-6 * -math.log(least)
    assert largest(end, y.expand(5, 2)) <= 4 * eps * float(y.abs().max())


def test_one_step_is_symmetric_to_the_bit():
    """Or rounding would turn a cloud on a line, whose A stays symmetric, in many steps."""
    x, y, alpha, sigma = (a.float() for a in problem(40, 6, 5, M=1))
    A = chains.launch(x, y, alpha, sigma, None, None, False)[1]
    assert torch.equal(A, A.mT) and bool((A[:, 0, 1] != 0).all())


@pytest.mark.parametrize(
    "prior", [None, torch.tensor([0.0, 0.0, 0.0, -math.inf])], ids=["uniform", "masked"]
)
def test_an_offset_costs_float32_no_digits(prior):
    """Data 1024 away from the origin, but for a masked atom, in numbers that float32 holds."""
    x, y, alpha, sigma = problem(8, 4, 2, M=10, alpha=(1.0, 1.0))
    x, y = ((1024 * a).round().float() / 1024 for a in (x, y))
    near = chains.launch(x, y, alpha, sigma, prior, None, False)
    if prior is not None:
        y[3] += 1e6
    far = chains.launch(x + 1024, y + 1024, alpha, sigma, prior, None, False)
    assert largest(near[1], far[1]) <= 1e-5
    assert largest(near[0], far[0] - 1024) <= 2**-13  # half a rounding at 1024


def test_no_step_no_chain_and_strides():
    x, y, alpha, sigma = problem(3, 4, 2, M=0)
    end, A, log_norm = chains.launch(x, y, alpha, sigma, None, None, False)
    assert largest(end, x) <= 1e-15 and torch.equal(log_norm, torch.zeros_like(log_norm))
    assert torch.equal(A, torch.eye(2, dtype=f64).expand(3, 2, 2))
    x, y, alpha, sigma = problem(3, 4, 2, M=2)
    want = reference(x, y, alpha, sigma)
    strided = x.mT.contiguous().mT, y.mT.contiguous().mT
    assert worst(chains.launch(*strided, alpha, sigma, None, None, False), want) <= 1e-12
    none = chains.launch(x[:0], y, alpha, sigma, None, None, False)
    assert [t.shape for t in none] == [(0, 2), (0, 2, 2), (0,)]


@pytest.mark.parametrize("name", ["x", "y", "alpha", "sigma", "log_prior", "rates"])
def test_nan_in_nan_out(name):
    """Nothing synchronises: what cannot be used is not raised but shows, and a chain's own only in
    it."""
    tensors = dict(zip(("x", "y", "alpha", "sigma"), problem(3, 4, 2, M=2), strict=True))
    tensors |= {"log_prior": torch.zeros(4, dtype=f64), "rates": torch.zeros(2, 2, dtype=f64)}
    tensors[name].view(-1)[0] = math.nan
    A = chains.launch(**tensors, transposed=False)[1]
    assert A.isnan().flatten(1).all(1).tolist() == [True, name != "x", name != "x"]


@pytest.mark.parametrize("wrong", ["y", "sigma", "log_prior", "rates"])
def test_torch_ops_read_nothing_else(wrong):
    """The op itself, called without the public function's checks."""
    tensors = dict(zip(("x", "y", "alpha", "sigma"), problem(3, 4, 2, M=2), strict=True))
    tensors |= {"log_prior": torch.zeros(4, dtype=f64), "rates": torch.zeros(2, 2, dtype=f64)}
    tensors[wrong] = tensors[wrong][..., :1] if wrong == "y" else tensors[wrong][:-1]
    with pytest.raises(RuntimeError, match=f"^{wrong}: expected "):
        chains.launch(**tensors, transposed=False)


def test_wide_events_are_refused():
    with pytest.raises(
        RuntimeError, match=r"^x: expected shape \[B, d\] with d <= 16, got \[3, 17\]$"
    ):
        chains.launch(*problem(3, 4, 17, M=2), None, None, False)


def test_atoms_of_no_weight_are_not_seen():
    """A masked atom that holds nan, and in float32 one so far away that its square overflows."""
    x, y, alpha, sigma = (a.float() for a in problem(5, 4, 2, M=3, alpha=(0.5, 1.0)))
    prior = torch.tensor([0.0, 0.0, -math.inf, -math.inf])
    want = chains.launch(x, y, alpha, sigma, prior, None, False)
    y[2], y[3], prior[3] = math.nan, 1e20, 0.0
    for got, w in zip(chains.launch(x, y, alpha, sigma, prior, None, False), want, strict=True):
        assert largest(got, w) <= 1e-6
