"""The compiled kernels of a Gaussian mixture in each of their ways: whole tiles as products about
the centre, a filter with the survivors by differences, and from one to the other."""

from __future__ import annotations

import math

import pytest
import torch

from dfkernels import ops

EPS = 2.0**-23
SHAPES = ("[N]", "[1, *E]", "[N, *E]")


def _draw(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def _variance(shape, N, d, draw):
    size = {"[N]": (N,), "[1, *E]": (1, d)}.get(shape, (N, d))
    return 0.02 * (0.2 + draw(*size).square())


def _levels(kind, B, level, dtype):
    """alpha and sigma: one level for all, a few of them, or one for each."""
    alpha, sigma = torch.ones(B, dtype=dtype), torch.full((B,), level, dtype=dtype)
    if kind == "few":
        alpha[::3], sigma[1::3] = 0.8, 1.5 * level
    elif kind == "each":
        sigma *= torch.linspace(0.7, 1.5, B, dtype=dtype)
        alpha *= torch.linspace(-1, 0.5, B, dtype=dtype)
    return alpha, sigma


def _problem(shape, B, N, d, level, levels, offset, dtype=torch.float64):
    """x, v [B, 2, d], y, variance, alpha, sigma, log_prior."""
    draw = _draw(B + d, dtype)
    y = draw(N, d) + offset
    variance = _variance(shape, N, d, draw)
    alpha, sigma = _levels(levels, B, level, dtype)
    x = alpha[:, None] * y[:B] + level * draw(B, d)
    return x, draw(B, 2, d), y, variance, alpha, sigma, 0.5 * draw(N)


def _outputs(args, *, reference=False):
    """name -> every output of the three operators, or of their references."""
    x, v, *rest = args
    call = lambda op: op.reference if reference else op
    p = call(ops.mixture_posterior)(x, *rest)
    return dict(zip(ops.MixturePosterior._fields, p, strict=True)) | {
        "diagonal": call(ops.mixture_diagonal)(x, *rest),
        "matvec": call(ops.mixture_matvec)(x, v, *rest),
    }


CALLS = [
    (3, 200, "one", 0.0),
    (3, 90, "each", 10.0),
    (6, 150, "one", 10.0),
    (17, 500, "one", 0.0),
    (33, 120, "few", 10.0),
    (33, 70, "each", 0.0),
]


@pytest.mark.parametrize("level", [0.02, 0.7, 3.0, 1e3])
@pytest.mark.parametrize("B, N, levels, offset", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float64_at_every_noise(shape, B, N, levels, offset, level):
    """Every way computes the same sums: to 1e-11 of the textbook's."""
    args = _problem(shape, B, N, 37, level, levels, offset)
    expected = _outputs(args, reference=True)
    for name, got in _outputs(args).items():
        far = float((got - expected[name]).abs().max() / expected[name].abs().max())
        assert far <= 1e-11, (name, far)


@pytest.mark.parametrize("shape", SHAPES)
def test_noise_that_falls_between_tiles(shape):
    """Components far off, first the most of them, then the few that outweigh all before."""
    args = list(_problem(shape, 20, 700, 33, 1.0, "one", 0.0))
    args[2][:650] += 200.0
    args[0] = args[2][-20:] + _draw(3)(20, 33)
    expected = _outputs(args, reference=True)
    for name, got in _outputs(args).items():
        far = float((got - expected[name]).abs().max() / expected[name].abs().max())
        assert far <= 1e-11, (name, far)


@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_threads(shape):
    """The same bits."""
    threads = torch.get_num_threads()
    try:
        for level in (0.05, 5.0):
            args = _problem(shape, 70, 1500, 40, level, "few", 0.0, torch.float32)
            found = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                found.append(_outputs(args))
            for name, got in found[0].items():
                assert all(torch.equal(got, other[name]) for other in found[1:]), name
    finally:
        torch.set_num_threads(threads)


def _norm(t):
    return t.reshape(len(t), -1).norm(dim=1)


@pytest.mark.parametrize("level", [1e-3, 0.3, 1.0, 5.0, 1e3])
@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_error_of_many_components(shape, offset, level):
    """As test_float32_error in test_mixture.py, of so many components that tiles are whole."""
    B, N, d = 24, 200, 100
    args = _problem(shape, B, N, d, level, "few", offset, torch.float32)
    exact = _outputs([t.double() for t in args], reference=True)
    plain, got = _outputs(args, reference=True), _outputs(args)
    v, variance, alpha, sigma = (args[i].double() for i in (1, 3, 4, 5))
    tau2 = sigma**2 + alpha**2 * variance.min()
    unit = {name: _norm(e) for name, e in exact.items()}
    unit["log_prob"] = 1 + unit["log_prob"]
    unit["fisher_trace"] = d / tau2
    unit["score"] = torch.maximum(unit["score"], (d / tau2).sqrt())
    unit["matvec"] = torch.maximum(unit["matvec"], _norm(v) / tau2 / 4)
    bad = []
    for name, e in exact.items():
        ours, theirs = (
            float((_norm(t[name].double() - e) / unit[name]).square().mean().sqrt())
            for t in (got, plain)
        )
        if not ours <= 2 * theirs + (10 if name == "ess" else 4) * EPS:
            bad.append(f"{name}: {ours:.1e}, plain {theirs:.1e}")
    assert bad == []


@pytest.mark.parametrize("sigma", [1e-18, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("shape", SHAPES)
def test_extreme_noise(shape, sigma):
    """Beside widths of about 0.1: nothing overflows that the results do not."""
    args = list(_problem(shape, 20, 300, 24, 0.1, "one", 0.0, torch.float32))
    args[5] = torch.full((20,), sigma)
    exact = _outputs([t.double() for t in args], reference=True)
    for name, got in _outputs(args).items():
        far = float((got.double() - exact[name]).abs().max() / exact[name].abs().max())
        assert far <= 1e-4, (name, far)


@pytest.mark.parametrize("shape", SHAPES)
def test_masked_components_between_others(shape):
    """They are passed over, whatever they hold."""
    args = list(_problem(shape, 20, 400, 30, 2.0, "few", 0.0))
    keep = torch.arange(400) % 5 != 1
    rest = [t[keep] if len(t) == 400 else t for t in args]
    args[6][~keep] = -math.inf
    args[2][~keep] = math.nan
    if shape != "[1, *E]":
        args[3][~keep] = -1.0
    expected = _outputs(rest, reference=True)
    for name, got in _outputs(args).items():
        far = float((got - expected[name]).abs().max() / expected[name].abs().max())
        assert far <= 1e-11, (name, far)


@pytest.mark.parametrize("shape", SHAPES)
def test_strided_means_and_no_vectors(shape):
    args = list(_problem(shape, 18, 200, 32, 1.0, "one", 0.0))
    expected = _outputs(args)
    args[2] = torch.cat([args[2], args[2] + 1], 1)[:, :32]
    for name, got in _outputs(args).items():
        assert torch.equal(got, expected[name]), name
    assert ops.mixture_matvec(args[0], args[1][:, :0], *args[2:]).shape == (18, 0, 32)
