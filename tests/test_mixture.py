"""The operators of a Gaussian mixture beyond what every operator's tests say: closed forms, the
shapes of `variance`, masked components, float32 at every ratio of noise and width, bad input."""

from __future__ import annotations

import math
import re

import pytest
import torch

from dfkernels import ops

EPS = 2.0**-23
SHAPES = ("number", "[1]", "[N]", "[1, *E]", "[N, *E]")


def _normal(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, dtype=dtype, generator=generator)


def _variance(shape, y, normal):
    """Variances of one of SHAPES, some of them 0."""
    N, event = y.shape[0], y.shape[1:]
    if shape == "number":
        return 0.3
    found = normal(*{"[1]": (1,), "[N]": (N,), "[1, *E]": (1, *event)}.get(shape, (N, *event)))
    return torch.where(found > 1, 0.0, found.square())


def _close(got, expected, tolerance=1e-12):
    assert got.shape == expected.shape
    far = float((got - expected).detach().abs().max())
    assert far <= tolerance * (1 + float(expected.abs().max())), far


def _all(x, v, y, variance, alpha, sigma, log_prior=None, *, reference=False, **stored):
    """name -> every output of the three operators, or of their references."""
    call = lambda op: op.reference if reference else op
    rest = (variance, alpha, sigma, log_prior)
    p = call(ops.mixture_posterior)(x, y, *rest, **stored)
    out = dict(zip(ops.MixturePosterior._fields, p, strict=True))
    out["diagonal"] = call(ops.mixture_diagonal)(x, y, *rest, **stored)
    out["matvec"] = call(ops.mixture_matvec)(x, v, y, *rest, **stored)
    return out


@pytest.mark.parametrize("event", [(5,), (2, 3), ()])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_variance(shape, event):
    normal = _normal(1)
    B, N = 4, 300
    x, y, prior = normal(B, *event), normal(N, *event), normal(N)
    v = normal(B, 2, *event)
    alpha, sigma = torch.linspace(0, 1, B).double(), torch.linspace(0.2, 1.5, B).double()
    args = (x, v, y, _variance(shape, y, normal), alpha, sigma, prior)
    expected = _all(*args, reference=True)
    for name, got in _all(*args).items():
        _close(got, expected[name])


@pytest.mark.parametrize("B, N, d", [(1, 1000, 33), (17, 257, 5), (33, 300, 1), (3, 65, 129)])
@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_beyond_one_tile(shape, B, N, d):
    normal = _normal(40 + d)
    x, y, prior = normal(B, d), normal(N, d), normal(N)
    prior[::7] = -math.inf
    alpha, sigma = torch.linspace(0, 1, B).double(), torch.linspace(0.3, 3, B).double()
    args = (x, normal(B, 3, d), y, _variance(shape, y, normal), alpha, sigma, prior)
    expected = _all(*args, reference=True)
    for name, got in _all(*args).items():
        _close(got, expected[name], 1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_score_and_fisher_are_derivatives_of_log_q(shape):
    normal = _normal(2)
    x, y, v = normal(3, 4), normal(6, 4), normal(3, 4)
    args = (y, _variance(shape, y, normal), 0.8, 0.5, normal(6))

    def log_q(x):
        return ops.mixture_posterior.reference(x[None], *args)[0][0]

    p = ops.mixture_posterior(x, *args)
    F = torch.stack([-torch.func.hessian(log_q)(row) for row in x])
    _close(p.score, torch.stack([torch.func.grad(log_q)(row) for row in x]))
    _close(p.fisher_trace, F.diagonal(dim1=1, dim2=2).sum(1))
    _close(p.mean, (x + 0.25 * p.score) / 0.8)  # Tweedie
    _close(ops.mixture_diagonal(x, *args), F.diagonal(dim1=1, dim2=2))
    _close(ops.mixture_matvec(x, v, *args), (F @ v[..., None])[..., 0])


def test_without_variance_it_is_the_atoms():
    normal = _normal(3)
    x, y, v, prior = normal(4, 5), normal(9, 5), normal(4, 2, 5), normal(9)
    for zero in (0, 0.0, torch.zeros(9).double(), torch.zeros(9, 5).double()):
        p = ops.mixture_posterior(x, y, zero, 0.9, 0.4, prior)
        q = ops.posterior(x, y, 0.9, 0.4, prior)
        for got, expected in zip(p, (*q, q.score(x, 0.9, 0.4)), strict=True):
            _close(got, expected)
        got = ops.mixture_matvec(x, v, y, zero, 0.9, 0.4, prior)
        _close(got, ops.fisher_matvec(x, y, v, 0.9, 0.4, prior))
        got = ops.mixture_diagonal(x, y, zero, 0.9, 0.4, prior)
        _close(got, ops.fisher_diagonal(x, y, 0.9, 0.4, prior))


@pytest.mark.parametrize("width", [1, 3])
def test_one_component_is_a_gaussian(width):
    """q_t = N(alpha y, sigma^2 + alpha^2 v), and x_0 given x_t is Gaussian too."""
    normal = _normal(4)
    x, y, v = normal(4, 3), normal(1, 3), normal(4, 3)
    variance = normal(1, width).square().expand(1, 3).contiguous() if width == 3 else normal(1) ** 2
    tau2 = 0.04 + 0.25 * variance.reshape(1, -1).expand(1, 3)
    p = ops.mixture_posterior(x, y, variance, 0.5, 0.2)
    gaussian = torch.distributions.Normal(0.5 * y, tau2.sqrt())
    _close(p.log_prob, gaussian.log_prob(x).sum(1))
    _close(p.score, -(x - 0.5 * y) / tau2)
    _close(p.mean, (0.04 * y + 0.5 * variance.reshape(1, -1) * x) / tau2)
    _close(p.fisher_trace, (1 / tau2).sum().expand(4))
    _close(p.ess, torch.ones(4).double())
    _close(ops.mixture_matvec(x, v, y, variance, 0.5, 0.2), v / tau2)
    _close(ops.mixture_diagonal(x, y, variance, 0.5, 0.2), (1 / tau2).expand(4, 3))


def test_pure_noise():
    """alpha = 0: the mean is the prior's, whatever the widths are."""
    normal = _normal(5)
    x, y, prior = normal(4, 3), normal(6, 3), normal(6)
    p = ops.mixture_posterior(x, y, normal(6, 3).square(), 0.0, 1.5, prior)
    w = torch.softmax(prior, 0)
    _close(p.mean, (w @ y).expand(4, 3))
    _close(p.score, -x / 2.25)
    _close(p.fisher_trace, torch.full((4,), 3 / 2.25, dtype=x.dtype))
    _close(p.ess, (1 / (w @ w)).expand(4))


@pytest.mark.parametrize("shape", ["[N]", "[N, *E]"])
def test_nobody_sees_what_a_masked_component_holds(shape):
    normal = _normal(6)
    x, y, v, prior = normal(3, 4), normal(8, 4), normal(3, 4), normal(8)
    variance = _variance(shape, y, normal)
    keep = torch.arange(8) != 2
    expected = _all(x, v, y[keep], variance[keep], 0.7, 0.4, prior[keep])
    prior[2] = -math.inf
    for bad in (math.nan, math.inf, -1.0):
        variance[2], y[2] = bad, math.nan
        args = [t.clone().requires_grad_() for t in (y, variance, prior)]
        got = _all(x, v, args[0], args[1], 0.7, 0.4, args[2])
        for name, g in got.items():
            _close(g, expected[name])
        for g in torch.autograd.grad(sum(t.sum() for t in got.values()), args):
            assert bool(torch.isfinite(g).all()) and not bool(g[2].any())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_narrow_means(dtype, stored):
    """They mean the numbers they stand for; variances are in units of those, squared."""
    normal = _normal(7)
    wide = torch.randint(0, 256, (37, 5), generator=torch.Generator().manual_seed(2))
    y = wide.to(torch.uint8) if stored == torch.uint8 else normal(37, 5).to(stored)
    scale, offset = (2 / 255, -1.0) if stored == torch.uint8 else (1.5, 0.25)
    x, v, variance = normal(3, 5).to(dtype), normal(3, 5).to(dtype), normal(37).square().to(dtype)
    got = _all(x, v, y, variance, 0.9, 0.8, scale=scale, offset=offset)
    values = y.double() * scale + offset
    exact = _all(x.double(), v.double(), values, variance.double(), 0.9, 0.8, reference=True)
    for name, g in got.items():
        assert g.dtype == dtype
        _close(g.double(), exact[name], 40 * torch.finfo(dtype).eps)


WIDTHS = ("none", "equal", "small", "large", "mixed")


def _widths(kind, shape, normal):
    if kind == "none":
        return torch.zeros(shape)
    if kind == "equal":
        return torch.full(shape, 0.1)
    if kind in ("small", "large"):
        return (1e-8 if kind == "small" else 1e4) * normal(*shape).square()
    found = 10 ** (3 * normal(*shape))  # of all sizes, and points among them
    found[::3] = 0
    return found


def _norm(t):
    return t.reshape(len(t), -1).norm(dim=1)


def _clouds(d, shape):
    """(description, arguments in float32) for noise from 1e-3 to 1e3 of the data's scale, and
    components from points to far wider than all the data."""
    b, n = 40, 60
    for i, width in enumerate(WIDTHS):
        normal = _normal(100 * d + i, torch.float32)
        generator = torch.Generator().manual_seed(i)
        y = normal(n, d) + (10.0 if i % 2 else 0.0)
        rows, columns = {"[1]": (1, 1), "[N]": (n, 1), "[1, *E]": (1, d)}.get(shape, (n, d))
        variance = _widths(width, (rows, columns), normal)
        for level in (1e-3, 0.03, 0.3, 1.0, 5.0, 1e3):
            picked = torch.randint(n, (b,), generator=generator)
            spread = variance.expand(n, d)[picked].sqrt()
            alpha, sigma = torch.ones(b), torch.full((b,), level)
            alpha[1::4] = 0.6
            x = alpha[:, None] * (y[picked] + spread * normal(b, d)) + level * normal(b, d)
            given = variance.flatten() if columns == 1 else variance
            args = (x, normal(b, d), y, given, alpha, sigma, 2 * normal(n))
            yield f"{width}, sigma {level:g}", args


@pytest.mark.parametrize("shape", ["[1]", "[N]", "[1, *E]", "[N, *E]"])
@pytest.mark.parametrize("d", [17, *(pytest.param(d, marks=pytest.mark.slow) for d in (2, 64))])
def test_float32_error(d, shape):
    """RMS over the queries at most twice plain PyTorch's by differences, plus 4 roundings (10 for
    the ESS, whose logits enter twice)."""
    bad = []
    for where, args in _clouds(d, shape):
        exact = _all(*[t.double() for t in args], reference=True)
        plain, got = _all(*args, reference=True), _all(*args)
        v = args[1].double()
        # Where terms of the size of 1/tau cancel, their roundings are left.
        tau2 = (
            args[5].double()[:, None] ** 2 + args[4].double()[:, None] ** 2 * args[3].double().min()
        )
        unit = {name: _norm(e) for name, e in exact.items()}
        unit["log_prob"] = 1 + unit["log_prob"]
        unit["fisher_trace"] = (d / tau2)[:, 0]
        unit["score"] = torch.maximum(unit["score"], (d / tau2)[:, 0].sqrt())
        unit["matvec"] = torch.maximum(unit["matvec"], _norm(v / tau2) / 4)
        for name, e in exact.items():
            ours, theirs = (
                float((_norm(t[name].double() - e) / unit[name]).square().mean().sqrt())
                for t in (got, plain)
            )
            if not ours <= 2 * theirs + (10 if name == "ess" else 4) * EPS:
                bad.append(f"{name}, {where}: {ours:.1e}, plain {theirs:.1e}")
    assert bad == []


x, y = torch.zeros(2, 3), torch.zeros(5, 3)
BAD = {
    "negative number in a tensor": (
        torch.tensor(-0.5),
        ValueError,
        "variance: expected finite values >= 0, got -0.5",
    ),
    "text": ("1", TypeError, "variance: expected a number, got str"),
    "number below 0": (-0.5, ValueError, "variance: expected a finite value >= 0, got -0.5"),
    "number nan": (math.nan, ValueError, "variance: expected a finite value, got nan"),
    "whole numbers": (
        torch.ones(5, dtype=torch.int64),
        TypeError,
        "variance: expected a floating dtype, got int64",
    ),
    "a covariance": (
        torch.ones(3, 3),
        ValueError,
        "variance: expected a number, shape [1], [5], [1, 3] or [5, 3] to go with y of shape "
        "[5, 3], got [3, 3]",
    ),
    "one per query": (
        torch.ones(2),
        ValueError,
        "variance: expected a number, shape [1], [5], [1, 3] or [5, 3] to go with y of shape "
        "[5, 3], got [2]",
    ),
    "below 0": (
        torch.tensor([1, 0, 1, -2.0, 1]),
        ValueError,
        "variance: expected finite values >= 0, got -2.0 at index [3]",
    ),
    "nan": (
        torch.tensor([[1.0, math.nan, 2.0]]),
        ValueError,
        "variance: expected finite values >= 0, got nan at index [0, 1]",
    ),
    "inf": (
        torch.full((5, 3), math.inf),
        ValueError,
        "variance: expected finite values >= 0, got inf at index [0, 0]",
    ),
    "meta": (
        torch.ones(5, device="meta"),
        ValueError,
        "variance: expected device cpu like x, got meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_variance(case):
    variance, kind, message = BAD[case]
    for call in (
        lambda: ops.mixture_posterior(x, y, variance, 1.0, 1.0),
        lambda: ops.mixture_matvec(x, x, y, variance, 1.0, 1.0),
        lambda: ops.mixture_diagonal(x, y, variance, 1.0, 1.0),
    ):
        with pytest.raises(kind, match=f"^{re.escape(message)}$"):
            call()


@pytest.mark.parametrize("shape", SHAPES)
def test_bad_levels_and_points_are_named(shape):
    variance = _variance(shape, y, _normal(8, torch.float32))
    some = torch.tensor([1.0, -0.5])
    with pytest.raises(ValueError, match=r"^sigma: expected finite values > 0, got -0.5 at index"):
        ops.mixture_posterior(x, y, variance, 1.0, some)
    with pytest.raises(ValueError, match=r"^alpha: expected finite values, got inf at index \[1\]"):
        ops.mixture_diagonal(x, y, variance, torch.tensor([1.0, math.inf]), 1.0)
    holed = y.clone()
    holed[4, 1] = math.nan
    with pytest.raises(ValueError, match=r"^y: expected finite values, got nan at index \[4, 1\]$"):
        ops.mixture_matvec(x, x, holed, variance, 1.0, 1.0)
    far = x.clone()
    far[1, 2] = math.inf
    with pytest.raises(ValueError, match=r"^x: expected finite values, got inf at index \[1, 2\]$"):
        ops.mixture_posterior(far, y, variance, 1.0, 1.0)
