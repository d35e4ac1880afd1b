"""The fused kernels of first derivatives, against autograd in float64 through the plain sums."""

from __future__ import annotations

import itertools

import pytest
import torch
from needs import needs_native

from dfkernels import ops
from dfkernels.ops.common import pair_kernels
from dfkernels.ops.common.moments import KINDS, load

pytestmark = needs_native

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
    return dict(list(zip(names, out, strict=True))[: 4 if kind == "posterior" else 3])


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


MOVED = ("x", "y", "v", "alpha", "sigma", "log_pi")


def worst(kind, p, exact=None, **options):
    """The largest error of both modes, with all cotangents and all tangents; exact: what counts
    as the atoms in the reference, where that is not y."""
    stored = {n: options[n] for n in ("scale", "offset") if n in options}
    h, dz = cotangents(kind, p), tangents(p | {"y": (exact or p)["y"]}, MOVED)
    q = double(exact or p)
    if not exact:
        q["y"] = load(p["y"], F64, **stored) if stored else q["y"]
    given, given_z = [a.double() for a in h], {n: t.double() for n, t in dz.items()}
    one, other = vjp(kind, p, h, **options), jvp(kind, p, dz, **options)
    far_vjp, far_jvp = far(one, plain_vjp(kind, q, given)), far(other, plain_jvp(kind, q, given_z))
    return max(*far_vjp.values(), *far_jvp.values())


@pytest.mark.parametrize("d", [7, 40])
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_storage_strides_and_masked_atoms(kind, d):
    p = problem(kind, 6, 90, d, sigma=1.5, dtype=F32)
    wide = torch.zeros(90, d + 3)
    wide[:, :d] = p["y"]
    for y, stored, tolerance in (
        (p["y"].bfloat16(), {}, 2e-5),
        (p["y"].half(), {"scale": 0.5, "offset": 2.0}, 2e-5),
        ((p["y"] * 20 + 128).clamp(0, 255).byte(), {"scale": 0.05, "offset": -6.4}, 2e-5),
        (wide[:, :d], {}, 2e-5),
        (p["y"][:1].expand(90, d), {}, 2e-5),  # all the same
    ):
        q = p | {"y": y} | about_mean(p | {"y": y}, **stored)
        assert worst(kind, q, **stored) < tolerance, y.dtype
    masked = p | {"log_pi": p["log_pi"].clone(), "y": p["y"].clone()}
    masked["log_pi"][::3] = -torch.inf
    masked["y"][::3] = torch.nan
    masked |= about_mean(masked)
    kept = masked | {"y": masked["y"].nan_to_num()}
    assert worst(kind, masked, kept) < 2e-5


@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_lists(kind, d):
    B, N = 11, 80
    p = problem(kind, B, N, d, sigma=2.0)
    listed = torch.rand(B, N, generator=torch.Generator().manual_seed(3)) < 0.3
    listed[:, 0] = True
    atoms, counts = listed.nonzero()[:, 1].contiguous(), listed.sum(1)
    h, dz = cotangents(kind, p), tangents(p, MOVED)
    per_query = ("x", "alpha", "sigma", "v", "shift", "reference")
    ours = vjp(kind, p, h, lists=(atoms, counts)), jvp(kind, p, dz, lists=(atoms, counts))
    for b in range(B):
        rows = listed[b]
        one = lambda z, b=b, rows=rows: {
            n: None if t is None else t[b : b + 1] if n in per_query else t[rows]
            for n, t in z.items()
        }
        exact = plain_vjp(kind, one(p), [a[b : b + 1] for a in h])
        assert max(far({n: t[b : b + 1] for n, t in ours[0].items()}, exact).values()) < 1e-11
        exact = plain_jvp(kind, one(p), one(dz))
        assert max(far({n: t[b : b + 1] for n, t in ours[1].items()}, exact).values()) < 1e-11


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_small_and_odd_shapes(kind):
    for B, N, d, alpha in ((3, 1, 20, 0.9), (0, 5, 20, 0.9), (3, 9, 5, 0.0), (17, 9, 33, -1.5)):
        p = problem(kind, B, N, d, alpha=alpha, K=0 if N == 9 else 2)
        assert worst(kind, p) < 1e-11, (B, N, d, alpha)


@pytest.mark.parametrize("d", [2, 20, 100])
@pytest.mark.parametrize("sigma", [0.3, 20.0])
def test_the_number_of_threads_changes_no_bit(d, sigma):
    threads = torch.get_num_threads()
    for kind in KIND_NAMES:
        p = problem(kind, 37, 1500, d, sigma=sigma, dtype=F32)
        h, dz = cotangents(kind, p), tangents(p, MOVED)
        results = []
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                results.append([*vjp(kind, p, h).values(), *jvp(kind, p, dz).values()])
        finally:
            torch.set_num_threads(threads)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_a_tight_cluster_far_from_the_centre(kind):
    """All the weight is in half of the atoms, where much would cancel about the centre."""
    p = problem(kind, 16, 400, 40, dtype=F32)
    side = 2.0 * (torch.arange(400) >= 200)[:, None] - 1
    p["y"] = 0.05 * p["y"] + 2 * side
    p["x"] = 0.9 * p["y"][:16] + p["x"] / 2
    p |= about_mean(p)
    assert worst(kind, p) < 1e-5


@pytest.mark.parametrize("sigma", [1.2, 2.0])
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_a_crowd_beside_the_atoms_near_the_mean(kind, sigma):
    """A few atoms of each tile lie near the reference, where much would cancel about the centre,
    and the rest, which carries weight as well, does not."""
    p = problem(kind, 16, 400, 40, sigma=sigma, dtype=F32)
    p["y"][16:32] = p["y"][:16] + 0.1 * p["y"][32:48]
    p |= about_mean(p)
    assert worst(kind, p) < 3e-6


@pytest.mark.parametrize("d", [2, 40, 300])
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_no_less_exact_than_plain_float32(kind, d):
    """Over noise of 1e-3 to 1e3 times the spread of the data, which lie ten times that far out."""
    rms = lambda got, exact, unit: float(
        ((got.double() - exact).reshape(len(exact), -1).norm(dim=1) / unit).square().mean().sqrt()
    )
    for sigma in (1e-3, 0.3, 1.5, 5.0, 1e3):
        p = problem(kind, 16, 200, d, sigma=sigma, offset=10.0, dtype=F32)
        q, h, dz = double(p), cotangents(kind, p), tangents(p, MOVED)
        wide = [a.double() for a in h], {n: t.double() for n, t in dz.items()}
        for fused, plain, given, exact in (
            (vjp, plain_vjp, h, plain_vjp(kind, q, wide[0])),
            (jvp, plain_jvp, dz, plain_jvp(kind, q, wide[1])),
        ):
            got, peer = fused(kind, p, given), plain(kind, p, given)
            for n, e in exact.items():
                own = e.reshape(len(e), -1).norm(dim=1)
                # negligible atoms are left out
                unit = torch.maximum(own, own.median() * 0.3) + 1e-4
                assert rms(got[n], e, unit) <= 2 * rms(peer[n], e, unit) + 12 * 2.0**-23, (sigma, n)


@pytest.mark.parametrize("offset, sigma", [(3e3, 0.003), (1e4, 0.003), (1e3, 0.01)])
def test_the_filter_keeps_the_nearest_atom_of_a_cloud_far_from_the_origin(offset, sigma):
    p = problem("posterior", 40, 300, 112, sigma=sigma, offset=offset, alpha=0.7, dtype=F32)
    cotangents = (torch.ones(40), None, None, None)
    lists = (None, None)
    order = ("x", "y", "v", "alpha", "sigma", "log_pi")
    args = (*[p[n] for n in order], 1.0, 0.0, p["shift"], p["reference"], "posterior")
    weights = pair_kernels.pair_vjp_atoms(*args, *cotangents, *lists, False)[1]
    assert torch.allclose(weights[:40], torch.ones(40), atol=0.05)  # query b is near atom b


def test_atoms_far_from_the_origin_but_near_one_another_are_no_outliers():
    g = torch.Generator().manual_seed(0)
    y = 2.66e18 * (1 + 1e-2 * torch.randn(50, 3, generator=g))  # half have |y|^2 > 2^124
    x = y[:5].clone()
    log_prior = torch.zeros(50, requires_grad=True)
    ops.posterior(x, y, 1.0, 3e16, log_prior).log_prob.sum().backward()
    exact = torch.zeros(50, dtype=F64, requires_grad=True)
    ops.posterior(x.double(), y.double(), 1.0, 3e16, exact).log_prob.sum().backward()
    assert torch.allclose(log_prior.grad.double(), exact.grad, atol=1e-3)
    assert float(exact.grad.abs().max()) > 0.05


@pytest.mark.parametrize("kind", ["draw", "log_prob", "average", "nothing"])
def test_moments_about_the_mean_are_of_kinds_that_have_them(kind):
    x, ones = torch.zeros(1, 2), torch.ones(1)
    with pytest.raises(RuntimeError, match="kind: expected 'posterior', 'matvec', 'diagonal' or"):
        pair_kernels.moments_about_mean(x, x, None, ones, ones, None, 1.0, 0.0, kind, None, None)
