"""The fused kernels of first derivatives, against autograd in float64 through the plain sums."""

from __future__ import annotations

import itertools

import pytest
import torch

from dfkernels._torch import native
from dfkernels.ops.common import pair_kernels
from dfkernels.ops.common.moments import KINDS, load

pytestmark = pytest.mark.skipif(not native.available, reason=f"no compiled part: {native.reason}")

F32, F64 = torch.float32, torch.float64
NAMES = ("x", "y", "alpha", "sigma", "log_pi", "shift", "reference", "v")
KIND_NAMES = ("posterior", "matvec", "diagonal")


def problem(kind, B, N, d, *, K=2, sigma=1.0, dtype=F64, offset=0.0, alpha=0.9, seed=0, spread=1.0):
    """Inputs of a kind's sums, all exact in `dtype`, with shift and reference as a fused pass
    gives them."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *s: torch.randn(*s, generator=g, dtype=F64).to(dtype).to(F64)
    y = (spread * normal(N, d) + offset).to(dtype).to(F64)
    levels = sigma * (1 + 0.2 * torch.rand(B, generator=g, dtype=F64))
    alphas = torch.full((B,), alpha, dtype=F64)
    p = {
        "x": alphas[:, None] * y[torch.arange(B) % N] + levels[:, None] * normal(B, d),
        "y": y,
        "alpha": alphas,
        "sigma": levels,
        "log_pi": torch.log_softmax(normal(N), 0),
        "v": normal(B, K, d) if kind == "matvec" else None,
    }
    p = {n: None if t is None else t.to(dtype) for n, t in p.items()}
    return p | about_mean(p)


def about_mean(p, scale=1.0, offset=0.0):
    x, alpha, sigma, log_pi = (p[n].double() for n in ("x", "alpha", "sigma", "log_pi"))
    y = load(p["y"].nan_to_num(), F64, scale, offset)
    logits = log_pi - (
        (x[:, None] - alpha[:, None, None] * y).square().sum(-1) / (2 * sigma[:, None] ** 2)
    )
    return {
        "shift": torch.logsumexp(logits, 1),
        "reference": (torch.softmax(logits, 1) @ y).to(p["x"].dtype),
    }


def sums(kind, p, scale=1.0, offset=0.0):
    """The sums of a kind, differentiable, without the factor of the reference."""
    x, alpha, sigma, reference = p["x"], p["alpha"], p["sigma"], p["reference"]
    t = load(p["y"], x.dtype, scale, offset) - reference[:, None]
    r = (x - alpha[:, None] * reference) / sigma[:, None]
    a = alpha / sigma
    constant = p["shift"] + r.double().square().sum(-1).detach() / 2
    inner, square = (t @ r[..., None])[..., 0], t.square().sum(-1)
    log_pi = p["log_pi"]
    logits = log_pi + a[:, None] * inner - a[:, None].square() * square / 2
    e = torch.exp((logits - constant[:, None]).to(x.dtype))
    return KINDS[kind].sums(e, t, *([p["v"]] if kind == "matvec" else []))


def double(p):
    return {n: None if t is None else t.double() for n, t in p.items()}


def cotangents(kind, p, seed=1):
    g = torch.Generator().manual_seed(seed)
    shapes = KINDS[kind].shapes(p["x"], *([p["v"]] if kind == "matvec" else []))
    return [torch.randn(s, generator=g, dtype=F64).to(p["x"].dtype) for s in shapes]


def tangents(p, names, seed=2):
    g = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(p[n].shape, generator=g, dtype=F64).to(p["x"].dtype)
        for n in names
        if p[n] is not None
    }


def call(op, kind, p, *more, scale=1.0, offset=0.0, lists=(None, None)):
    return op(
        p["x"], p["y"], p["v"], p["alpha"], p["sigma"], p["log_pi"], scale, offset, p["shift"],
        p["reference"], kind, *more, *lists,
    )  # fmt: skip


def vjp(kind, p, h, **options):
    h = [*h, None][:4] if kind != "posterior" else h
    out = call(pair_kernels.pair_vjp_queries, kind, p, *h, **options)
    return dict(zip(("x", "alpha", "sigma", "v"), out, strict=True))


def jvp(kind, p, dz, **options):
    order = ("x", "y", "v", "alpha", "sigma", "log_pi")
    out = call(pair_kernels.pair_jvp, kind, p, *(dz.get(n) for n in order), **options)
    names = ("weight", "first", "second", "weight_square")
    return {n: o for n, o in zip(names, out, strict=True) if o.numel()}


def plain_vjp(kind, p, h, scale=1.0, offset=0.0):
    names = [n for n in ("x", "alpha", "sigma", "v") if p[n] is not None]
    leaves = {n: p[n].clone().requires_grad_() for n in names}
    pairs = zip(h, sums(kind, p | leaves, scale, offset), strict=True)
    psi = sum((a * s).sum() for a, s in pairs if a is not None)
    return dict(
        zip(
            names,
            torch.autograd.grad(psi, list(leaves.values()), materialize_grads=True),
            strict=True,
        )
    )


def plain_jvp(kind, p, dz, scale=1.0, offset=0.0):
    names = list(dz)
    f = lambda *z: sums(kind, p | dict(zip(names, z, strict=True)), scale, offset)
    given = tuple(p[n].to(p["x"].dtype) for n in names)
    _, out = torch.func.jvp(f, given, tuple(dz.values()))
    return dict(zip(("weight", "first", "second", "weight_square"), out, strict=False))


def far(got, exact):
    """name -> relative error over everything; what is as good as zero may come out as zero."""
    return {n: float((got[n].double() - e).norm() / (e.norm() + 0.1)) for n, e in exact.items()}


@pytest.mark.parametrize("d", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("kind", KIND_NAMES)
@pytest.mark.parametrize("sigma", [0.3, 30.0])
def test_both_modes_in_float64(kind, d, sigma):
    p = problem(kind, 19, 150, d, sigma=sigma, offset=2.0)
    h = cotangents(kind, p)
    assert max(far(vjp(kind, p, h), plain_vjp(kind, p, h)).values()) < 1e-11
    dz = tangents(p, ("x", "y", "v", "alpha", "sigma", "log_pi"))
    assert max(far(jvp(kind, p, dz), plain_jvp(kind, p, dz)).values()) < 1e-11


def without_some(kind, p):
    """Cotangents and tangents, each alone."""
    h = cotangents(kind, p)
    for i in range(len(h)):
        yield plain_vjp, vjp, [a if j == i else None for j, a in enumerate(h)]
    names = [n for n in ("x", "y", "v", "alpha", "sigma", "log_pi") if p[n] is not None]
    for n in names:
        yield plain_jvp, jvp, tangents(p, [n])
    for pair in itertools.combinations(names, 2):
        yield plain_jvp, jvp, tangents(p, pair)


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_no_log_pi_is_uniform(kind):
    p = problem(kind, 4, 30, 20)
    p["log_pi"] = torch.full((30,), -30.0, dtype=F64).log_softmax(0)
    p |= about_mean(p)
    h, dz, without = cotangents(kind, p), tangents(p, ("x",)), p | {"log_pi": None}
    assert max(far(vjp(kind, without, h), plain_vjp(kind, p, h)).values()) < 1e-11
    assert max(far(jvp(kind, without, dz), plain_jvp(kind, p, dz)).values()) < 1e-11


@pytest.mark.parametrize("d", [3, 24])
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_what_is_none_is_zero(kind, d):
    p = problem(kind, 5, 40, d, sigma=2.0)
    for plain, fused, given in without_some(kind, p):
        try:
            exact = plain(kind, p, given)
        except RuntimeError:  # psi does not depend on some input
            continue
        assert max(far(fused(kind, p, given), exact).values()) < 1e-11, given
