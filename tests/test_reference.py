"""Values: against the references, against autograd of the references' log_prob, against closed
forms and symmetries.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import ALL, DATA_OPS, REFERENCES, _data, _normal, table
from hypothesis import given, settings
from hypothesis import strategies as st

from dfkernels import ops

EVERY = dict(max_examples=25, deadline=None, derandomize=True)


def error(got, exact):
    return float((got.double() - exact.double()).abs().max()) if got.numel() else 0.0


def assert_close(got, expected, tolerance=1e-10):
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert error(got, expected) <= tolerance * (
        1 + (float(expected.abs().max()) if expected.numel() else 0)
    )


@pytest.mark.parametrize("case", ALL, ids=str)
def test_float64_equals_reference(case):
    for got, expected in zip(case.run(), case.run(reference=True), strict=True):
        assert_close(got, expected, 1e-12)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_float32_is_as_accurate_as_plain_pytorch(case):
    """Twice the error of the reference in float32, plus 8 roundings of the largest output where
    that error happens to be 0.
    """
    single = {k: t.float() if isinstance(t, torch.Tensor) else t for k, t in case.tensors.items()}
    double = {k: t.double() if isinstance(t, torch.Tensor) else t for k, t in single.items()}
    for got, plain, exact in zip(
        case.run(single),
        case.run(single, reference=True),
        case.run(double, reference=True),
        strict=True,
    ):
        assert got.dtype == torch.float32
        largest = float(exact.abs().max()) if exact.numel() else 0
        assert error(got, exact) <= 2 * error(plain, exact) + 8 * 2**-24 * (1 + largest)


@pytest.mark.parametrize("case", table("posterior"), ids=str)
def test_fisher_is_minus_the_hessian_of_log_q(case):
    x = case.tensors["x"]
    B, d = x.shape[0], math.prod(x.shape[1:])

    def log_q(flat):
        return case.run({"x": flat.reshape(x.shape)}, reference=True)[0].sum()

    F = x.new_zeros(0, d, d)
    if B:
        F = -torch.autograd.functional.hessian(log_q, x.reshape(B, d).clone())[
            range(B), :, range(B)
        ]
    args = [case.tensors[k] for k in ("x", "y", "alpha", "sigma")]
    prior = case.tensors.get("log_prior")
    if case.masked:
        prior = prior.clone()
        prior[list(case.masked)] = -math.inf
    v = _normal(30)(B, 2, *x.shape[1:])
    assert_close(ops.fisher_dense(*args, prior, **case.options), F)
    assert_close(
        ops.fisher_diagonal(*args, prior, **case.options).reshape(B, d), F.diagonal(dim1=1, dim2=2)
    )
    assert_close(
        ops.posterior(*args, prior, **case.options).fisher_trace, F.diagonal(dim1=1, dim2=2).sum(1)
    )
    got = ops.fisher_matvec(*args[:2], v, *args[2:], prior, **case.options)
    assert_close(got.reshape(B, 2, d), v.reshape(B, 2, d) @ F)


@pytest.mark.parametrize("case", table("posterior"), ids=str)
def test_score_and_eps_follow_from_the_mean(case):
    x = case.tensors["x"].detach().clone().requires_grad_()
    (score,) = torch.autograd.grad(case.run({"x": x}, reference=True)[0].sum(), x)
    p = ops.Posterior(*case.run())
    alpha, sigma = case.tensors["alpha"], case.tensors["sigma"]
    scaled = (
        sigma
        if not isinstance(sigma, torch.Tensor) or not sigma.dim()
        else sigma.reshape(-1, *[1] * (x.dim() - 1))
    )
    assert_close(p.score(x.detach(), alpha, sigma), score)
    assert_close(p.eps(x.detach(), alpha, sigma), -score * scaled)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("op", DATA_OPS)
def test_narrow_atoms(op, dtype, stored):
    """Atoms stored narrow mean the numbers they stand for: the reference gets those as float64."""
    normal = _normal(31)
    y = torch.randint(0, 256, (37, 5), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    y = y if stored == torch.uint8 else normal(37, 5).to(stored)
    scale, offset = (2 / 255, -1.0) if stored == torch.uint8 else (1.5, 0.25)
    x, v = normal(3, 5).to(dtype), normal(3, 2, 5).to(dtype)
    args = (x, y, v) if op == "fisher_matvec" else (x, y)
    wide = [a.double() for a in args]
    got = getattr(ops, op)(*args, 0.9, 0.8, scale=scale, offset=offset)
    exact = REFERENCES[op](*wide, 0.9, 0.8, scale=scale, offset=offset)
    plain = REFERENCES[op](*[a.to(dtype) for a in args], 0.9, 0.8, scale=scale, offset=offset)
    for g, e, p in zip(
        *([o] if isinstance(o, torch.Tensor) else o for o in (got, exact, plain)), strict=True
    ):
        assert g.dtype == dtype
        assert error(g, e) <= 2 * error(p, e) + 8 * torch.finfo(dtype).eps * (
            1 + float(e.abs().max())
        )


@pytest.mark.parametrize("op", DATA_OPS)
@pytest.mark.parametrize("B, N, d", [(1, 1000, 33), (17, 257, 5), (33, 300, 1), (3, 65, 129)])
def test_sizes_beyond_one_tile(op, B, N, d):
    """Odd sizes, more atoms and queries than one tile of any kernel takes in one direction."""
    normal = _normal(40 + d)
    x, y, prior = normal(B, d), normal(N, d), normal(N)
    prior[::7] = -math.inf
    alpha, sigma = torch.linspace(0, 1, B, dtype=x.dtype), torch.linspace(0.3, 3, B, dtype=x.dtype)
    args = (x, y, normal(B, 3, d)) if op == "fisher_matvec" else (x, y)
    got, expected = (
        getattr(ops, op)(*args, alpha, sigma, prior),
        REFERENCES[op](*args, alpha, sigma, prior),
    )
    for g, e in zip(
        *([o] if isinstance(o, torch.Tensor) else o for o in (got, expected)), strict=True
    ):
        assert_close(g, e, 1e-11)


def test_one_atom():
    """q is one Gaussian: log_prob its density, mean the atom, F = I/sigma^2, ess = 1."""
    x, y = _normal(50)(4, 3), _normal(51)(1, 3)
    p = ops.posterior(x, y, 0.5, 0.2)
    normal = torch.distributions.Normal(0.5 * y, torch.tensor(0.2, dtype=y.dtype))
    assert_close(p.log_prob, normal.log_prob(x).sum(1))
    assert_close(p.mean, y.expand(4, 3))
    assert_close(p.fisher_trace, torch.full((4,), 3 / 0.04, dtype=x.dtype))
    assert_close(p.ess, torch.ones(4, dtype=x.dtype))
    assert_close(
        ops.fisher_dense(x, y, 0.5, 0.2), torch.eye(3, dtype=x.dtype).expand(4, 3, 3) / 0.04
    )


def test_two_atoms():
    """Atoms +-a: mean = a tanh(alpha <a, x>/sigma^2), C = a a^T sech^2."""
    x, a = _normal(52)(5, 3), torch.tensor([0.7, -0.2, 0.4], dtype=torch.float64)
    alpha, sigma = 0.8, 0.6
    p = ops.posterior(x, torch.stack([a, -a]), alpha, sigma)
    th = torch.tanh(alpha * (x @ a) / sigma**2)
    assert_close(p.mean, th[:, None] * a)
    assert_close(p.ess, 2 / (1 + th**2))
    trace = 3 / sigma**2 - alpha**2 / sigma**4 * (a @ a) * (1 - th**2)
    assert_close(p.fisher_trace, trace)
    F = (
        torch.eye(3, dtype=a.dtype) / sigma**2
        - alpha**2 / sigma**4 * torch.outer(a, a) * (1 - th**2)[:, None, None]
    )
    assert_close(ops.fisher_dense(x, torch.stack([a, -a]), alpha, sigma), F)


def test_identical_atoms():
    """N copies of one atom are that atom, with ess = N."""
    x, y = _normal(53)(4, 3), _normal(54)(1, 3)
    p, one = ops.posterior(x, y.expand(7, 3), 0.5, 0.3), ops.posterior(x, y, 0.5, 0.3)
    assert_close(p.ess, torch.full((4,), 7.0, dtype=x.dtype))
    for got, expected in zip(p[:3], one[:3], strict=True):
        assert_close(got, expected)


def test_pure_noise():
    """alpha = 0: q = N(0, sigma^2), the weights are the prior's."""
    x, y, prior = _normal(55)(4, 3), _normal(56)(6, 3), _normal(57)(6)
    p = ops.posterior(x, y, 0.0, 1.5, prior)
    w = torch.softmax(prior, 0)
    assert_close(
        p.log_prob,
        torch.distributions.Normal(0.0, torch.tensor(1.5, dtype=x.dtype)).log_prob(x).sum(1),
    )
    assert_close(p.mean, (w @ y).expand(4, 3))
    assert_close(p.fisher_trace, torch.full((4,), 3 / 2.25, dtype=x.dtype))
    assert_close(p.ess, (1 / (w @ w)).expand(4))


def test_many_gaussian_atoms_approach_the_gaussian():
    """Atoms drawn from N(0, s^2 I): tr F -> d/(alpha^2 s^2 + sigma^2); with 20,000 atoms to 3 %,
    four standard errors.
    """
    y = 0.8 * _normal(58)(20000, 2)
    trace = ops.posterior(torch.zeros(1, 2, dtype=y.dtype), y, 0.9, 0.7).fisher_trace
    assert abs(float(trace) / (2 / (0.81 * 0.64 + 0.49)) - 1) <= 0.03


shapes = st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(0, 1000))


@settings(**EVERY)
@given(shapes, st.floats(-20, 20))
def test_translation(shape, c):
    """(x + alpha c, y + c) moves the mean by c and nothing else; the rest is rounding."""
    B, N, d, seed = shape
    t = _data(seed, B, N, (d,))
    p = ops.posterior(t["x"], t["y"], t["alpha"], t["sigma"])
    q = ops.posterior(t["x"] + t["alpha"][:, None] * c, t["y"] + c, t["alpha"], t["sigma"])
    for got, expected in zip(q, p._replace(mean=p.mean + c), strict=True):
        assert_close(got, expected)


@settings(**EVERY)
@given(shapes)
def test_permutation_of_atoms(shape):
    B, N, d, seed = shape
    t = _data(seed, B, N, (d,))
    prior, order = (
        _normal(seed)(N),
        torch.randperm(N, generator=torch.Generator().manual_seed(seed)),
    )
    p = ops.posterior(t["x"], t["y"], t["alpha"], t["sigma"], prior)
    for got, expected in zip(
        ops.posterior(t["x"], t["y"][order], t["alpha"], t["sigma"], prior[order]), p, strict=True
    ):
        assert_close(got, expected)


@settings(**EVERY)
@given(shapes, st.integers(2, 4))
def test_duplicates_are_weights(shape, copies):
    """An atom that stands there k times = once with log weight + log k."""
    B, N, d, seed = shape
    t = _data(seed, B, N, (d,))
    prior = torch.zeros(N, dtype=torch.float64)
    prior[0] = math.log(copies)
    weighted = ops.posterior(t["x"], t["y"], t["alpha"], t["sigma"], prior)
    repeated = torch.cat([t["y"][:1].expand(copies - 1, d), t["y"]])
    for got, expected in zip(
        ops.posterior(t["x"], repeated, t["alpha"], t["sigma"])[:3], weighted[:3], strict=True
    ):
        assert_close(got, expected)


@settings(**EVERY)
@given(shapes, st.floats(-300, 300))
def test_log_prior_need_not_be_normalised(shape, c):
    B, N, d, seed = shape
    t, prior = _data(seed, B, N, (d,)), _normal(seed)(N)
    p = ops.posterior(t["x"], t["y"], t["alpha"], t["sigma"], prior)
    for got, expected in zip(
        ops.posterior(t["x"], t["y"], t["alpha"], t["sigma"], prior + c), p, strict=True
    ):
        assert_close(got, expected)


@settings(**EVERY)
@given(shapes, st.floats(0.05, 3))
def test_only_the_ratio_matters(shape, a):
    """Identity 9: (x, alpha, sigma) -> (x/a, alpha/a, sigma/a) keeps mean and ess; tr F gets a^2,
    log q gets d ln a.
    """
    B, N, d, seed = shape
    t = _data(seed, B, N, (d,))
    p = ops.posterior(t["x"], t["y"], t["alpha"], t["sigma"])
    q = ops.posterior(t["x"] / a, t["y"], t["alpha"] / a, t["sigma"] / a)
    expected = ops.Posterior(p.log_prob + d * math.log(a), p.mean, p.fisher_trace * a * a, p.ess)
    for got, e in zip(q, expected, strict=True):
        assert_close(got, e)


def test_endpoint_forms():
    """r = x0 - mean: paper C = x0 x0^T - mean mean^T, centred C = r r^T, as matrices."""
    x0, mean, v = _normal(60)(2, 3), _normal(61)(2, 3), _normal(62)(2, 3)
    outer = lambda a: a[:, :, None] * a[:, None, :]
    for form, C in (("paper", outer(x0) - outer(mean)), ("centred", outer(x0 - mean))):
        F = torch.eye(3, dtype=v.dtype) / 0.25 - 0.64 / 0.0625 * C
        assert_close(ops.endpoint_matvec(v, x0, mean, 0.8, 0.5, form), (F @ v[..., None])[..., 0])


@pytest.mark.parametrize("form", ["residual", "paper"])
def test_matched_trace_is_exact_for_perfect_networks(form):
    """With eps = epsbar and m the exact conditional moment both forms give tr F."""
    t = table("posterior")[0].tensors
    p = ops.posterior(t["x"], t["y"], t["alpha"], t["sigma"])
    eps = p.eps(t["x"], t["alpha"], t["sigma"])
    u = (t["x"][:, None] - t["alpha"][:, None, None] * t["y"]) / t["sigma"][:, None, None]
    w = torch.softmax(-0.5 * (u * u).sum(-1), 1)
    atoms = (
        (t["y"] ** 2).sum(-1).expand(3, 5) if form == "paper" else ((u - eps[:, None]) ** 2).sum(-1)
    )
    m = (w * atoms).sum(1) / 4
    got = ops.matched_trace(
        m, eps, t["alpha"], t["sigma"], x=t["x"] if form == "paper" else None, form=form
    )
    assert_close(got, p.fisher_trace)
