"""The kernels of first derivatives on CPU tensors, against autograd through the sums that a kind
declares."""

from __future__ import annotations

import math

import pytest
import torch
from cases import _normal

from dfkernels.ops.common import moments
from dfkernels.ops.common.triton import about_mean, launch, pair

KINDS = ("posterior", "matvec", "diagonal")
# One shape for every way through the launchers: B, N, d, K
SHAPES = {
    "one query": (1, 7, 3, 1),
    "few, whole": (3, 40, 20, 2),
    "few, in blocks": (2, 6, 260, 1),
    "a query per thread": (65, 9, 2, 1),
    "no query": (0, 3, 2, 1),
}


@pytest.fixture(autouse=True)
def many_splits(monkeypatch):
    """Splits of three tiles already where there are few atoms."""
    monkeypatch.setattr(launch, "MAX_TILES", 3)


def problem(kind, B, N, d, K, *, sigma=1.0, offset=0.0, seed=0):
    """The inputs of a kind's sums in float64, with shift and reference about the mean, every fifth
    atom masked and holding NaN; alpha may be 0 or negative."""
    normal = _normal(seed + d + N)
    y = normal(N, d) + offset
    alpha = torch.tensor([1.0, 0.6, -0.8, 0.0], dtype=torch.float64).repeat(B)[:B]
    level = torch.full((B,), sigma, dtype=torch.float64)
    picked = y[(5 * torch.arange(B) + 1) % N]
    x = alpha[:, None] * picked + level[:, None] * normal(B, d)
    log_prior = normal(N)
    log_prior[4::5] = -math.inf
    log_pi = torch.log_softmax(log_prior, 0)
    logit = moments.logits(x, y, alpha, level, log_pi)
    shift, reference = logit.logsumexp(1), torch.softmax(logit, 1) @ y
    # a reference near the mean, as one rounded to float32 would be
    reference = reference + 1e-3 * normal(B, d)
    v = normal(B, K, d) if kind == "matvec" else None
    return dict(x=x, y=y, v=v, alpha=alpha, sigma=level, log_pi=log_pi, shift=shift,
                reference=reference)  # fmt: skip


def sums(kind, p, scale=1.0, offset=0.0):
    """As derivatives see them; `shift` there is without the factor of the reference."""
    about = moments.half_square(*(p[k] for k in ("x", "alpha", "sigma", "reference")))
    p = p | {"shift": (p["shift"] + about).detach()}
    own = () if p["v"] is None else (p["v"],)
    inputs = (*(p[k] for k in ("x", "y", "alpha", "sigma", "log_pi", "shift", "reference")), *own)
    return moments.KINDS[kind].on_tile(inputs, scale, offset)


def arguments(kind, p, dtype=torch.float64, scale=1.0, offset=0.0, storage=None):
    """The kernels' first arguments; masked atoms hold NaN."""
    to = lambda t: None if t is None else t.to(dtype)
    y = p["y"].to(storage or dtype, copy=True)
    if y.dtype.is_floating_point:
        y[4::5] = math.nan
    return (to(p["x"]), y, to(p["v"]), to(p["alpha"]), to(p["sigma"]), to(p["log_pi"]),
            scale, offset, p["shift"], to(p["reference"]), kind)  # fmt: skip


def by_autograd(kind, p, cotangents, scale=1.0, offset=0.0):
    names = [k for k in ("x", "y", "v", "alpha", "sigma", "log_pi") if p[k] is not None]
    leaves = {k: p[k].clone().requires_grad_() for k in names}
    out = sums(kind, p | leaves, scale, offset)
    psi = sum((h * s).sum() for h, s in zip(cotangents, out, strict=True) if h is not None)
    grads = torch.autograd.grad(psi, [leaves[k] for k in names], materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def close(got, want, tolerance=1e-11):
    size = float(want.abs().max()) if want.numel() else 0.0
    assert got.shape == want.shape
    assert want.numel() == 0 or float((got - want).abs().max()) <= tolerance * (1 + size)


def random_cotangents(kind, p, seed=5):
    normal = _normal(seed)
    return [normal(*s.shape) for s in sums(kind, p)]


def check_vjp(kind, p, cotangents, want_y=True, tolerance=1e-11, **options):
    stored = {k: options.get(k, d) for k, d in (("scale", 1.0), ("offset", 0.0))}
    want = by_autograd(kind, p, cotangents, **stored)
    dtype = options.get("dtype", torch.float64)
    given = [None if h is None else h.to(dtype) for h in (*cotangents, None)[:4]]
    args = (*arguments(kind, p, **options), *given, None, None)
    x, alpha, sigma, v = pair.vjp_queries(*args)
    y, log_pi = pair.vjp_atoms(*args, want_y)
    got = {"x": x, "alpha": alpha, "sigma": sigma, "log_pi": log_pi}
    if want_y:
        got["y"] = y
    else:
        assert y.shape == (0, x.shape[1])
    if kind == "matvec":
        got["v"] = v
    for name, g in got.items():
        assert g.dtype == dtype
        want_it = want[name] / stored["scale"] if name == "y" else want[name]
        close(g, want_it, tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_reverse(kind, shape):
    p = problem(kind, *SHAPES[shape])
    check_vjp(kind, p, random_cotangents(kind, p))


@pytest.mark.parametrize("kind", KINDS)
def test_cotangents_may_be_missing(kind):
    p = problem(kind, 2, 6, 3, 1)
    every = random_cotangents(kind, p)
    for i in range(len(every)):
        check_vjp(kind, p, [h if i == j else None for j, h in enumerate(every)], want_y=i > 0)


def by_forward_ad(kind, p, tangents):
    names = list(tangents)
    f = lambda *leaves: sums(kind, p | dict(zip(names, leaves, strict=True)))
    return torch.func.jvp(f, tuple(p[k] for k in names), tuple(tangents.values()))[1]


def check_jvp(kind, p, names, tolerance=1e-11, **options):
    normal = _normal(6)
    tangents = {k: normal(*p[k].shape) for k in names if p[k] is not None}
    want = by_forward_ad(kind, p, tangents)
    dtype = options.get("dtype", torch.float64)
    given = {k: t.to(dtype) for k, t in tangents.items()}
    if "y" in given:
        given["y"][4::5] = math.nan  # a masked atom's tangent is not seen
    order = ("x", "y", "v", "alpha", "sigma", "log_pi")
    got = pair.jvp(*arguments(kind, p, **options), *(given.get(k) for k in order), None, None)
    for g, w in zip(got, want, strict=False):
        close(g, w, tolerance)
    assert kind == "posterior" or got[3].numel() == 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind, shape):
    p = problem(kind, *SHAPES[shape])
    check_jvp(kind, p, ("x", "y", "v", "alpha", "sigma", "log_pi"))


@pytest.mark.parametrize(
    "kind, name",
    [(kind, n) for kind in KINDS for n in ("x", "y", "alpha", "sigma", "log_pi")]
    + [("matvec", "v")],
)
def test_tangents_may_be_missing(kind, name):
    check_jvp(kind, problem(kind, 2, 6, 3, 1), (name,))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_storage(storage):
    """Narrow atoms with scale and offset; in float64 and in float32."""
    p = problem("posterior", 3, 12, 5, 1)
    p["y"] = (40 * p["y"] + 100).clamp(0, 255).to(storage).double()
    scale, offset = 0.02, -2.0
    values = scale * p["y"] + offset
    p["x"] = p["alpha"][:, None] * values[:3] + p["sigma"][:, None] * p["x"]
    logit = moments.logits(p["x"], values, p["alpha"], p["sigma"], p["log_pi"])
    p["shift"], p["reference"] = logit.logsumexp(1), torch.softmax(logit, 1) @ values
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        check_vjp("posterior", p, random_cotangents("posterior", p), tolerance=tolerance,
                  dtype=dtype, storage=storage, scale=scale, offset=offset)  # fmt: skip


def test_without_a_prior_every_atom_has_the_same():
    p = problem("posterior", 2, 6, 3, 1)
    p["log_pi"] = torch.full((6,), -math.log(6), dtype=torch.float64)
    dy, given = _normal(7)(6, 3), arguments("posterior", p)
    given[1][4::5] = p["y"][4::5]
    alone = (*given[:5], None, *given[6:])
    for g, w in zip(*(pair.jvp(*a, None, dy, *[None] * 6) for a in (alone, given)), strict=True):
        close(g, w)


def test_a_tangent_of_the_values_goes_with_narrow_atoms():
    """scale and offset are the atoms' alone."""
    p = problem("matvec", 2, 8, 3, 1)
    dy, scale = _normal(7)(8, 3), 0.25
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        want = pair.jvp(*arguments("matvec", p, dtype), None, dy.to(dtype), *[None] * 6)
        stored = p | {"y": (p["y"] - 0.5) / scale}
        head = arguments("matvec", stored, dtype, scale=scale, offset=0.5)
        for g, w in zip(pair.jvp(*head, None, dy.to(dtype), *[None] * 6), want, strict=True):
            close(g, w, tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma, offset", [(1e-2, 0.0), (0.5, 10.0), (30.0, 10.0)])
def test_float32_error(kind, sigma, offset):
    """At most twice that of autograd in float32 through the difference form, with the same shift
    and reference, and eight roundings: where alpha is 0, forty terms cancel but for a fortieth."""
    p = problem(kind, 4, 40, 40, 1, sigma=sigma, offset=offset)
    p = {k: t if t is None or k == "shift" else t.float().double() for k, t in p.items()}
    cotangents = [h.float().double() for h in random_cotangents(kind, p)]
    args = (*arguments(kind, p, torch.float32), *[h.float() for h in cotangents])
    args = (*args, *[None] * (4 - len(cotangents)), None, None)
    x, alpha, level, v = pair.vjp_queries(*args)
    y, log_pi = pair.vjp_atoms(*args, True)
    got = {"x": x, "y": y, "alpha": alpha, "sigma": level, "log_pi": log_pi, "v": v}
    exact = by_autograd(kind, p, cotangents)
    single = {k: None if t is None else t.float() for k, t in p.items()}
    plain = by_autograd(kind, single, [h.float() for h in cotangents])
    for name, e in exact.items():
        error = lambda t, e=e: float((t.double() - e).norm() / e.norm())
        assert error(got[name]) <= 2 * error(plain[name]) + 8 * 2**-23, name


def test_groups_of_queries_and_lists(monkeypatch):
    """The same from a few queries at a time, and with every atom on every query's list."""
    for kind in KINDS:
        p = problem(kind, 3, 8, 4, 2)
        h = [*random_cotangents(kind, p), None][:4]
        given = (*arguments(kind, p), *h)
        dx = _normal(8)(3, 4)
        every = torch.arange(8).repeat(3), torch.full((3,), 8)

        def results(lists, given=given, dx=dx):
            tangents = (dx, None, None, None, None, None)
            return [
                *pair.vjp_queries(*given, *lists),
                *pair.vjp_atoms(*given, *lists, True),
                *pair.jvp(*given[:11], *tangents, *lists),
            ]

        want = results((None, None))
        for got in (results(every), results((None, None))):
            for g, w in zip(got, want, strict=True):
                close(g, w)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "SCRATCH", 1)
            for g, w in zip(results((None, None)), want, strict=True):
                close(g, w)


def test_an_outlier_without_weight_is_not_seen():
    """Its square overflows; in blocks of coordinates and whole."""
    for d in (3, 260):
        p = problem("posterior", 2, 6, d, 1)
        p["alpha"] = torch.full_like(p["alpha"], 0.7)
        h = random_cotangents("posterior", p)
        far = p | {"y": p["y"].index_fill(0, torch.tensor([1]), 1e30)}
        gone = p | {"log_pi": p["log_pi"].index_fill(0, torch.tensor([1]), -math.inf)}
        results = []
        for q in (far, gone):
            args = (*arguments("posterior", q, torch.float32), *[t.float() for t in h], None, None)
            results.append([*pair.vjp_queries(*args), *pair.vjp_atoms(*args, True)])
        for got, want in zip(*results, strict=True):
            assert torch.equal(got, want)


def test_nan_stays_in_its_query():
    for kind in KINDS:
        p = problem(kind, 3, 6, 3, 1)
        p["x"][1, 0] = math.nan
        h = random_cotangents(kind, p)
        x, *_ = pair.vjp_queries(*arguments(kind, p), *[*h, None][:4], None, None)
        assert x.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("B, N, d", [(2, 9, 3), (3, 20, 20)])
@pytest.mark.parametrize("kind", [*KINDS, "dense"])
def test_moments_about_the_mean(kind, B, N, d):
    """In float64 by differences, in float32 behind the filter: one's shift and reference in the
    other's sums."""
    p = problem(kind, B, N, d, 2)
    logit = moments.logits(*(p[k] for k in ("x", "y", "alpha", "sigma", "log_pi")))
    mean = torch.softmax(logit, 1) @ p["y"]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        args = [a for i, a in enumerate(arguments(kind, p, dtype)) if i not in (8, 9)]
        shift, reference, *got = about_mean.moments_about_mean(*args, None, None)
        assert shift.dtype == torch.float64 and reference.dtype == dtype
        close(shift, logit.logsumexp(1), tolerance)
        close(reference.double(), mean, tolerance)
        p["shift"], p["reference"] = shift, reference.double()
        want = sums(kind, p)
        for g, w in zip(got, want, strict=False):
            assert g.dtype == dtype
            close(g.double(), w, tolerance)
        assert kind == "posterior" or got[3].numel() == 0


def test_moments_about_the_mean_of_clouds():
    """Each with its own atoms, all with one prior; as calls of their own."""
    parts = [problem("matvec", 2, 9, 3, 1, seed=seed) for seed in (1, 2)]
    per_query = [torch.cat([p[k] for p in parts]) for k in ("x", "v", "alpha", "sigma")]
    y, prior = torch.stack([p["y"].nan_to_num() for p in parts]), parts[0]["log_pi"]
    call = lambda x, y, v, *levels: about_mean.moments_about_mean(
        x, y, v, *levels, prior, 1.0, 0.0, "matvec", None, None
    )
    together = call(per_query[0], y, *per_query[1:])
    for g in range(2):
        x, *others = (t[2 * g : 2 * g + 2] for t in per_query)
        for found, alone in zip(together, call(x, y[g], *others), strict=True):
            assert torch.equal(found[2 * g : 2 * g + 2], alone)


def test_moments_about_the_mean_of_lists():
    """log_pi is not normalised anew; None is that of all atoms."""
    p = problem("posterior", 2, 9, 3, 1)
    p["y"], p["log_pi"] = _normal(3)(9, 3), torch.full((9,), -math.log(9), dtype=torch.float64)
    lists = torch.tensor([0, 2, 3, 1, 5, 6, 8]), torch.tensor([3, 4])
    given = [p[k] for k in ("x", "y", "v", "alpha", "sigma")]
    for log_pi in (None, p["log_pi"]):
        shift, reference, *_ = about_mean.moments_about_mean(
            *given, log_pi, 1.0, 0.0, "posterior", *lists
        )
        for b, rows in enumerate(lists[0].split(lists[1].tolist())):
            some = [p["x"][b : b + 1], p["y"][rows], p["alpha"][b : b + 1], p["sigma"][b : b + 1]]
            logit = moments.logits(*some, p["log_pi"][rows])
            close(shift[b : b + 1], logit.logsumexp(1))
            close(reference[b : b + 1], torch.softmax(logit, 1) @ p["y"][rows])
