"""Levels, scales and log weights of any library and any type of number."""

from __future__ import annotations

import decimal
import fractions
import math

import numpy as np
import pytest
import torch
from torch.func import grad, jvp, vmap

from dfkernels import PointCloud, ops, top_k
from dfkernels._torch import check

x, y = torch.linspace(-1, 1, 6).reshape(2, 3), torch.linspace(-2, 1, 15).reshape(5, 3)


def posterior(alpha=1.0, sigma=2.0, dtype=torch.float32, **rest):
    return ops.posterior(x.to(dtype), y.to(dtype), alpha, sigma, **rest)


TWOS = {
    "int": 2,
    "fraction": fractions.Fraction(4, 2),
    "decimal": decimal.Decimal(2),
    **{f"numpy {t}": np.dtype(t).type(2) for t in ("f2", "f4", "f8", "g", "i1", "u2", "i8", "u8")},
    "0-d array": np.array(2.0),
    "0-d integers": np.array(2),
    **{f"[B] array {t}": np.full(2, 2, t) for t in ("f2", "f4", ">f8", "g", "i4", ">i8", "u8")},
    "reversed array": np.full(2, 2.0)[::-1],
    "read-only array": np.broadcast_to(np.array(2.0), 2),
    **{
        f"0-d {t}": torch.tensor(2, dtype=t)
        for t in (torch.float64, torch.bfloat16, torch.int64, torch.uint8)
    },
    **{
        f"[B] {t}": torch.full((2,), 2, dtype=t)
        for t in (torch.float64, torch.float16, torch.int64, torch.int8)
    },
    "parameter": torch.nn.Parameter(torch.full((2,), 2.0, dtype=torch.float64)),
}


@pytest.mark.parametrize("name", TWOS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels(name, dtype):
    """The same number, the same result, in x's dtype."""
    two = TWOS[name]
    like = torch.full((2,), 2.0, dtype=torch.float64, requires_grad=name == "parameter")
    right, p = posterior(like, like, dtype), posterior(two, two, dtype)
    for got, want in zip(p, right, strict=True):
        assert got.dtype == dtype and torch.equal(got, want)
    for got in (p.score(x.to(dtype), two, two), p.eps(x.to(dtype), two, two)):
        assert got.dtype == dtype
    assert torch.equal(p.eps(x.to(dtype), two, two), right.eps(x.to(dtype), 2.0, 2.0))


def test_levels_of_a_chain():
    right = ops.transport_chain(x, y, torch.ones(3), torch.tensor([3.0, 2.0, 1.0]))
    for sigma in (
        np.arange(3, 0, -1),
        np.array([3, 2, 1], "f4"),
        torch.tensor([3, 2, 1]),
        torch.arange(3, 0, -1).half(),
    ):
        for got, want in zip(
            ops.transport_chain(x, y, np.ones(3, ">f8"), sigma), right, strict=True
        ):
            assert got.dtype == torch.float32 and torch.equal(got, want)
    for bad in (
        np.ma.masked_equal([3.0, 2.0, 1.0], 2.0),
        torch.ones(3) * 1j,
        [3.0, 2.0, 1.0],
        np.ones(3, bool),
    ):
        with pytest.raises((TypeError, ValueError), match="^sigma: expected"):
            ops.transport_chain(x, y, torch.ones(3), bad)


def test_scale_and_offset():
    right = posterior(scale=0.5, offset=2.0)
    for half, two in (
        (np.float32(0.5), np.int64(2)),
        (torch.tensor(0.5), np.array(2)),
        (fractions.Fraction(1, 2), 2),
    ):
        assert torch.equal(posterior(scale=half, offset=two).mean, right.mean)
    for one in (1, np.float32(1), torch.tensor(1.0)):
        assert torch.equal(posterior(scale=one).mean, posterior().mean)


HUGE = 2**53 + 1
NOT_LEVELS = {
    "huge integer": (10**400, "a finite value"),
    "huge negative": (-(10**400), "a finite value"),
    "decimal": (decimal.Decimal("1e999"), "a finite value"),
    "beyond float32": (1e39, "in float32"),
    "string": ("1", "a number"),
    "list": ([1.0, 1.0], "a number"),
    "none": (None, "a number"),
    "complex": (1j, "a number"),
    "numpy bool": (np.bool_(True), "a real number"),
    "numpy complex": (np.complex64(1), "number"),
    "bool array": (np.ones(2, bool), "a real number"),
    "complex array": (np.ones(2, "c8"), "a real number"),
    "object array": (np.array([1, 2], object), "a real number"),
    "0-d text": (np.array("2"), "a real number"),
    "0-d bytes": (np.array(b"2"), "a real number"),
    "date": (np.datetime64("2020"), "a real number"),
    "duration": (np.timedelta64(2, "s"), "a real number"),
    "0-d array of none": (np.array(None), "a number"),
    "integers beyond float64": (np.array([1, HUGE]), "float64"),
    "array's shape": (np.ones(3), "shape"),
    "array of one": (np.ones((1, 1)), "shape"),
    "masked array": (np.ma.masked_equal([1.0, 2.0], 2.0), "masked"),
    "masked": (np.ma.masked, "masked"),
    "0-d masked": (np.ma.array(1.0, mask=True), "masked"),
    "bool tensor": (torch.ones(2, dtype=torch.bool), "a real number"),
    "meta": (torch.ones(2, device="meta"), "device"),
    "0-d meta": (torch.ones((), device="meta"), "device"),
    "nested": (
        torch.nested.nested_tensor([torch.ones(1)] * 2, layout=torch.strided),
        "a dense tensor",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOT_LEVELS)
@pytest.mark.parametrize("argument", ["alpha", "sigma"])
def test_not_levels(argument, name):
    value, expected = NOT_LEVELS[name]
    with pytest.raises((TypeError, ValueError), match=f"^{argument}: expected .*{expected}"):
        posterior(**{argument: value})


@pytest.mark.parametrize(
    "tiny", [1e-50, decimal.Decimal("1e-60"), torch.tensor(1e-50).double() * 0 + 1e-50]
)
def test_a_sigma_that_float32_rounds_to_zero(tiny):
    tiny = (
        torch.tensor([1.0, 1e-50], dtype=torch.float64) if isinstance(tiny, torch.Tensor) else tiny
    )
    with pytest.raises(ValueError, match="^sigma: expected (a )?finite values? > 0"):
        posterior(sigma=tiny)
    assert posterior(1e-50, 1.0).mean.isfinite().all()  # an alpha may


def test_numbers_in_a_compiled_graph():
    """Constants of NumPy, and numbers that the graph takes as symbols."""
    levels = lambda a: ops.posterior(a, y, np.float32(0.5), np.array([1.0, 2.0])).mean
    assert torch.allclose(torch.compile(levels, backend="eager", fullgraph=True)(x), levels(x))
    symbols = lambda a, s: ops.posterior(a, y, 1.0, s, scale=s, offset=0.25).mean
    compiled = torch.compile(symbols, backend="eager", fullgraph=True, dynamic=True)
    for s in (0.7, 0.9):
        assert torch.allclose(compiled(x, s), symbols(x, s))


def test_a_number_hidden_by_vmap():
    with pytest.raises(
        TypeError, match="^scale: expected a number, got Tensor whose value cannot be read here"
    ):
        vmap(lambda s: posterior(scale=s).mean)(torch.ones(2))
    with pytest.raises(TypeError, match="^scale: expected a number, got Tensor whose value"):
        posterior(scale=torch.ones((), device="meta"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["0-d text", "date", "duration", "0-d array of none", "nested"])
def test_not_a_scale(name):
    with pytest.raises(TypeError, match="^scale: expected a (real )?number, got "):
        posterior(scale=NOT_LEVELS[name][0])


def test_a_scale_that_is_differentiated():
    """It has no derivative: its number alone would give zeros, without a word."""
    half = torch.tensor(0.5)
    log_prob = lambda s: posterior(scale=s).log_prob.sum()
    for wanted in (
        lambda: log_prob(half.clone().requires_grad_()),
        lambda: grad(log_prob)(half),
        lambda: jvp(log_prob, (half,), (half,)),
        lambda: vmap(grad(log_prob))(half.expand(2)),
        lambda: grad(
            lambda s: grad(lambda a: ops.posterior(a, y, 1.0, 2.0, offset=s).log_prob.sum())(
                x
            ).sum()
        )(half),
    ):
        with pytest.raises(
            TypeError, match="^(scale|offset): expected a number, got a tensor whose derivative"
        ):
            wanted()
    with torch.no_grad():
        assert torch.equal(log_prob(half.clone().requires_grad_()), log_prob(0.5))
    assert torch.equal(
        grad(lambda a: ops.posterior(a, y, 1.0, 2.0, scale=half).log_prob.sum())(x),
        grad(lambda a: ops.posterior(a, y, 1.0, 2.0, scale=0.5).log_prob.sum())(x),
    )


PRIOR = torch.tensor([0.5, -1.25, 0.0, -math.inf, 0.75], dtype=torch.float64)


@pytest.mark.parametrize("constant", [1e8, -1e12])
def test_a_constant_in_a_clouds_log_prior_cost_digits(constant):
    """Of float64, in the weights of top_k: they added up to more than 1."""
    prior = PRIOR + constant
    shifted, plain = PointCloud(y, prior), PointCloud(y, prior - constant)
    for queries in (x, x.double()):
        found, right = (top_k(queries, cloud, 1.0, 2.0, 3) for cloud in (shifted, plain))
        assert torch.equal(found.index, right.index)
        assert torch.allclose(
            found.weight, right.weight, rtol=4 * torch.finfo(queries.dtype).eps, atol=0
        )


@pytest.mark.parametrize("constant", [0.0, 1e2, -1e4, 1e8, -1e12, 1e39, -1e200])
def test_a_constant_in_log_prior_cost_the_digits_of_float32(constant):
    """Up to what float64 keeps of it: beyond 1e16 all weights are the same, but nothing
    overflows."""
    prior = (PRIOR + constant).requires_grad_()
    kept = (prior.detach() - prior.detach().max()).requires_grad_()
    for op in (ops.posterior, ops.fisher_diagonal, ops.fisher_dense):
        found, right = (op(x, y, 1.0, 0.5, p) for p in (prior, kept))
        found, right = (o if isinstance(o, tuple) else (o,) for o in (found, right))
        for got, want in zip(found, right, strict=True):
            assert torch.equal(got, want)
        gradients = [
            torch.autograd.grad(o[-1].sum(), p)[0] for o, p in ((found, prior), (right, kept))
        ]
        assert gradients[0].dtype == torch.float64 and torch.equal(*gradients)


def test_a_constant_in_log_prior_under_transforms():
    f = lambda prior: ops.posterior(x, y, 1.0, 0.5, prior).log_prob.sum()
    many = torch.stack([PRIOR + 1e6, PRIOR - 1e9])
    assert torch.allclose(vmap(f)(many), f(PRIOR).expand(2), rtol=1e-6)
    assert torch.allclose(vmap(grad(f))(many), grad(f)(PRIOR).expand(2, 5), atol=1e-6)
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(PRIOR + 1e6), f(PRIOR), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_log_priors_are_taken_exactly(dtype):
    prior = PRIOR.to(dtype) * 4 + 100
    for wide in (torch.float32, torch.float64):
        found = ops.posterior(x.to(wide), y.to(wide), 1.0, 0.5, prior).log_prob
        assert torch.equal(
            found, ops.posterior(x.to(wide), y.to(wide), 1.0, 0.5, prior.to(wide)).log_prob
        )


@pytest.mark.parametrize(
    "bad, words",
    [(math.nan, "got nan at index"), (math.inf, "got inf at index"), (-math.inf, "all -inf")],
)
def test_a_log_prior_that_is_none(bad, words):
    prior = torch.full((5,), bad, dtype=torch.float64) if bad == -math.inf else PRIOR.clone()
    prior[2] = bad
    with pytest.raises(ValueError, match=f"^log_prior: expected .*{words}"):
        ops.posterior(x, y, 1.0, 0.5, prior)


def test_constant_of_a_masked_number():
    with pytest.raises(TypeError, match="^damping: expected no masked array"):
        check.constant("damping", np.ma.masked)
