"""The compiled gradients of a kind's sums in the atoms and in log_pi, against float64 autograd
through the same sums."""

from __future__ import annotations

import math

import pytest
import torch
from needs import needs_native

from dfkernels.ops.common import moments, pair_kernels

pytestmark = needs_native

KINDS = ("posterior", "matvec", "diagonal")
F32, F64 = torch.float32, torch.float64
PER_QUERY = ("x", "v", "alpha", "sigma", "reference")
COTANGENTS = ("h_weight", "h_first", "h_second", "h_weight_square")
EPS = {F32: 2.0**-23, F64: 2.0**-52}


def problem(kind, B, N, d, noise, seed, *, K=2, dtype=F32, storage=None, centre=0.0, masked=False):
    """Arguments of the kernel, by name: queries of much the same noise, `noise` times the spread
    of the atoms, with shift and reference from their posteriors."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=F64)
    scale, offset = (1.0, 0.0) if storage is None else (0.75, -0.5)
    storage = storage or dtype
    if storage == torch.uint8:
        y = torch.randint(0, 256, (N, d), generator=g).to(storage)
    else:
        y = (normal(N, d) + centre).to(storage)
    values = moments.load(y, F64, scale, offset)
    spread = float(values.std(0).mean()) if N > 1 else 1.0
    alpha = (0.7 + 0.6 * torch.rand(B, generator=g, dtype=F64)).to(dtype)
    sigma = (noise * spread * (0.8 + 0.4 * torch.rand(B, generator=g, dtype=F64))).to(dtype)
    own = torch.randint(N, (B,), generator=g)  # the atom of each query
    x = alpha[:, None] * values[own] + sigma[:, None] * normal(B, d)
    log_pi = normal(N)
    if masked:
        log_pi[torch.randperm(N, generator=g)[: N // 3]] = -math.inf
        log_pi[own] = 0
        y[log_pi == -math.inf] = math.nan
    second = {"posterior": (B,), "matvec": (B, K, d), "diagonal": (B, d)}[kind]
    p = {
        "x": x.to(dtype),
        "y": y,
        "v": normal(B, K, d).to(dtype) if kind == "matvec" else None,
        "alpha": alpha,
        "sigma": sigma,
        "log_pi": log_pi.log_softmax(0).to(dtype),
        "scale": scale,
        "offset": offset,
        "shift": None,
        "reference": None,
        "kind": kind,
        "h_weight": normal(B).to(dtype),
        "h_first": (normal(B, d) / spread).to(dtype),
        "h_second": (normal(*second) / spread**2).to(dtype),
        "h_weight_square": normal(B).to(dtype) if kind == "posterior" else None,
    }
    return about_mean(p)


def about_mean(p):
    """The same with the shift that makes the weights the posterior's, about its mean."""
    y = moments.load(p["y"], F64, p["scale"], p["offset"])
    logits = moments.logits(
        p["x"].double(), y, p["alpha"].double(), p["sigma"].double(), p["log_pi"].double()
    )
    mean = logits.softmax(1) @ torch.nan_to_num(y)
    return p | {"shift": logits.logsumexp(1), "reference": mean.to(p["x"].dtype)}


def kernel(p, want_y=True, atoms=None, counts=None):
    return pair_kernels.pair_vjp_atoms(*p.values(), atoms, counts, want_y)


def by_autograd(p, dtype, sums, mask=None):
    """grad y and grad log_pi of psi, a few queries at a time. sums: (Inputs, *own), the sums."""
    cast = lambda t: None if t is None else t.to(dtype)
    y = moments.load(cast(p["y"]), dtype, p["scale"], p["offset"]).requires_grad_()
    log_pi = cast(p["log_pi"]).detach().clone().requires_grad_()
    step = max(1, (1 << 22) // y.numel())
    for b in range(0, len(p["x"]), step):
        q = {name: t[b : b + step] if torch.is_tensor(t) else t for name, t in p.items()}
        x, v, alpha, sigma, reference = map(cast, (q[name] for name in PER_QUERY))
        prior = log_pi if mask is None else torch.where(mask[b : b + step], log_pi, -math.inf)
        shift = q["shift"] + moments.half_square(x, alpha, sigma, reference)
        z = moments.Inputs(x, y, alpha, sigma, prior, shift, reference)
        out = sums(z, *([] if v is None else [v]))
        pairs = zip((cast(q[name]) for name in COTANGENTS), out, strict=False)
        psi = sum((h * s).sum() for h, s in pairs if h is not None)
        psi.backward()
    return y.grad, log_pi.grad


def by_differences(p):
    kind = moments.KINDS[p["kind"]]
    return lambda z, *own: kind.sums(*moments.weights(z), *own)


def by_products(p):
    """The expanded (GEMM) form of the same sums."""

    def sums(z, *own):
        x, y, alpha, sigma, log_pi, shift, r = z
        norm, precision = (y * y).sum(1), 1 / (sigma * sigma)
        constant = alpha * precision * ((0.5 * alpha[:, None] * r - x) * r).sum(1) - shift
        logits = ((alpha * precision)[:, None] * x) @ y.T - (0.5 * alpha**2 * precision)[
            :, None
        ] * norm
        e = torch.exp((logits + log_pi + constant[:, None]).to(x.dtype))
        weight = e.sum(1)
        raw = e @ y
        first = raw - weight[:, None] * r
        if p["kind"] == "posterior":
            second = e @ norm - 2 * (r * raw).sum(1) + weight * (r * r).sum(1)
            return weight, first, second, (e * e).sum(1)
        if p["kind"] == "diagonal":
            return weight, first, e @ (y * y) - 2 * r * raw + weight[:, None] * r * r
        (v,) = own
        along = e[:, None] * (v @ y.T - (v * r[:, None]).sum(-1, keepdim=True))
        return weight, first, along @ y - along.sum(-1, keepdim=True) * r[:, None]

    return sums


def errors(got, exact):
    return [
        float((a.double() - e).detach().norm() / e.norm().clamp(min=1e-300))
        for a, e in zip(got, exact, strict=True)
    ]


def size_of_logits(p):
    """(alpha/sigma)^2 |y|^2 of the atoms from their middle: expanded logits, which are used where
    this is at most a few d, have roundings of that size."""
    y = moments.load(p["y"], F64, p["scale"], p["offset"])[p["log_pi"] > -math.inf]
    square = (y - y.mean(0)).square().sum(1).mean()
    z = float(((p["alpha"].double() / p["sigma"].double()) ** 2).mean().detach() * square)
    return z if z <= y.shape[1] else 0.0


def check(p, **lists):
    """At most twice the error of the better plain form in the same dtype, and some roundings."""
    dtype, mask = p["x"].dtype, None
    if lists:
        B, N = len(p["x"]), len(p["y"])
        mask = torch.zeros(B, N, dtype=torch.bool)
        mask[torch.arange(B).repeat_interleave(lists["counts"]), lists["atoms"]] = True
    exact = by_autograd(p, F64, by_differences(p), mask)
    plain = [
        errors(by_autograd(p, dtype, form(p), mask), exact)
        for form in (by_differences, by_products)
    ]
    roundings = 8 + size_of_logits(p) if dtype == F32 else 64  # in float64 plain is the reference
    allowed = [2 * min(e) + roundings * EPS[dtype] for e in zip(*plain, strict=True)]
    got = kernel(p, **lists)
    ours = errors(got, exact)
    assert all(a <= b for a, b in zip(ours, allowed, strict=True)), (ours, plain)
    assert torch.equal(kernel(p, want_y=False, **lists)[1], got[1])
    return got


@pytest.mark.parametrize("d", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_as_accurate_as_plain_pytorch_at_any_noise(kind, d):
    """Without and with a centre far from the origin."""
    for noise in (1e-3, 0.3, 1.5, 1000.0):
        for centre in (0.0, 10.0):
            check(problem(kind, 21, 150, d, noise * math.sqrt(d), seed=d, centre=centre))


@pytest.mark.parametrize("kind", KINDS)
def test_double_precision(kind):
    for noise in (0.3, 5.0):
        p = problem(kind, 19, 90, 20, noise, seed=3, dtype=F64)
        ours = errors(kernel(p), by_autograd(p, F64, by_differences(p)))
        assert max(ours) < 1e-13


@pytest.mark.parametrize("kind", KINDS)
def test_many_queries(kind):
    """More than are added up in float32, in blocks of any size."""
    for d, noise in ((20, 0.2), (20, 4.0), (3, 1.0)):
        check(problem(kind, 1100, 40, d, noise, seed=4))


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.uint8, F32])
def test_storage_and_strides(storage):
    for dtype in (F32, F64):
        p = problem("posterior", 18, 60, 24, 6.0, seed=5, storage=storage, dtype=dtype)
        wide = torch.zeros(60, 31).to(storage)
        wide[:, 3:27] = p["y"]
        got, same = check(p), kernel(p | {"y": wide[:, 3:27]})
        assert all(torch.equal(a, b) for a, b in zip(got, same, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_masked_atom_has_no_gradient_whatever_it_holds(kind):
    for d, noise in ((3, 0.5), (20, 0.2), (20, 5.0)):
        p = problem(kind, 20, 90, d, noise, seed=6, masked=True)
        grad_y, grad_log_pi = check(p)
        masked = p["log_pi"] == -math.inf
        assert (grad_y[masked] == 0).all()
        assert (grad_log_pi[masked] == 0).all()
        assert (grad_log_pi[~masked] != 0).any()


@pytest.mark.parametrize("kind", KINDS)
def test_lists(kind):
    """Among the atoms of some lists is a masked one; the last atom is in none."""
    for d in (5, 24):
        p = problem(kind, 21, 80, d, 2.0, seed=7, masked=True)
        g = torch.Generator().manual_seed(8)
        atoms, counts = [], []
        for _ in range(21):
            own = torch.randperm(79, generator=g)[: 30 + 40 * len(counts) % 40].sort().values
            atoms.append(own)
            counts.append(len(own))
        grad_y, _ = check(p, atoms=torch.cat(atoms), counts=torch.tensor(counts))
        assert (grad_y[-1] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_none_is_zero(kind):
    p = problem(kind, 20, 60, 20, 4.0, seed=9)
    names = [n for n in p if n.startswith("h_") and p[n] is not None]
    for kept in [(), *[(n,) for n in names], names[:2], names[1:]]:
        some = p | {n: None for n in names if n not in kept}
        zero = p | {n: torch.zeros_like(p[n]) for n in names if n not in kept}
        for got, want in zip(kernel(some), kernel(zero), strict=True):
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


def test_without_log_pi_it_is_uniform():
    p = problem("posterior", 20, 50, 20, 4.0, seed=10, dtype=F64)
    p = about_mean(p | {"log_pi": torch.full((50,), -math.log(50), dtype=F64)})
    for got, want in zip(kernel(p | {"log_pi": None}), kernel(p), strict=True):
        assert torch.allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_queries_no_vectors_one_atom(kind):
    none = problem(kind, 0, 7, 20, 1.0, seed=11)
    assert all((g == 0).all() for g in kernel(none))
    if kind == "matvec":
        check(problem(kind, 18, 40, 20, 4.0, seed=12, K=0))
    for d in (1, 20):
        p = problem(kind, 17, 1, d, 1.0, seed=13)
        ours = errors(kernel(p), by_autograd(p, F64, by_differences(p)))
        assert max(ours) < 4 * d * EPS[F32]  # roundings of a logit, which alone makes e


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_threads_as_there_are_give_the_same_bits(kind):
    threads = torch.get_num_threads()
    try:
        for d, noise in ((3, 1.0), (24, 0.2), (24, 4.0)):
            p = problem(kind, 40, 1500, d, noise, seed=14)
            torch.set_num_threads(1)
            alone = kernel(p)
            torch.set_num_threads(3)
            assert all(torch.equal(a, b) for a, b in zip(alone, kernel(p), strict=True))
    finally:
        torch.set_num_threads(threads)
