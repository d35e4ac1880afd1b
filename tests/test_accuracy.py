"""float32 kernels against float64 on the same float32 inputs: at most twice the error of plain
PyTorch in float32 (the difference form), over noise levels from 1e-3 to 1e3 times the data's
scale."""

from __future__ import annotations

import pytest
import torch
from difference import EPS, by_ops, difference_form, errors
from torch_state import one_thread  # noqa: F401

from dfkernels import ops

# d: (queries, atoms). Enough queries that the RMS of their rounding errors is not a matter of luck.
SIZES = {
    2: (44, 500),
    16: (44, 500),
    17: (44, 500),
    40: (44, 500),
    64: (44, 500),
    784: (40, 80),
    3072: (36, 24),
}
ALONE = (
    12  # queries that go in a batch of their own: fewer than 16 take another way through the kernel
)
SIGMAS = (1e-3, 1e-2, 0.1, 0.3, 0.7, 1.0, 1.5, 2.0, 5.0, 30.0, 1e3)
KINDS = ("normal", "near-duplicates", "low rank", "clusters")

# Beside twice the plain error: 4 roundings of the output, since the plain error is now and then
# zero by luck (one atom alone carries weight, or the result is I/sigma^2 rounded once).
FLOOR = 4 * EPS
# 1/sum w^2 doubles a logit's rounding, which at |u|^2/2 ~ d/2 is larger: one cell, low rank at d =
# 784, needs 9.3.
ESS_FLOOR = 10 * EPS


def atoms(kind, n, d, normal):
    if kind == "low rank":
        rank = min(d, 3)
        return normal(n, rank) @ normal(rank, d) / rank**0.5
    if kind == "clusters":  # one of the five about the origin
        return (normal(5, d) * (torch.arange(5) > 0)[:, None])[torch.arange(n) % 5] + 0.01 * normal(
            n, d
        )
    y = normal(n, d)
    if kind == "near-duplicates":
        y[n // 2 :] = y[: n - n // 2] * (1 + 1e-6 * normal(n - n // 2, d))
    return y


def cells(d, kind, offset):
    """(description, inputs) for every noise level, with and without log_prior: queries drawn from
    q_t, alpha 1 for half of them and 0.6 for the others; half of the vectors at random, half along
    the data."""
    b, n = SIZES[d]
    generator = torch.Generator().manual_seed(1000 * KINDS.index(kind) + d)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    y = atoms(kind, n, d, normal) + offset
    alpha = torch.ones(b)
    alpha[1::4] = alpha[2::4] = 0.6
    for log_prior in (None, 2 * normal(n)):
        for level in SIGMAS:
            sigma = torch.full((b,), level)
            picked = y[torch.randint(n, (b,), generator=generator)]
            x = alpha[:, None] * picked + sigma[:, None] * normal(b, d)
            v = normal(b, 1, d)
            v[::2] = y.mean(0) if offset else y[0]
            where = f"sigma {level:g}, {'uniform' if log_prior is None else 'log_prior'}"
            yield where, dict(x=x, y=y, alpha=alpha, sigma=sigma, log_prior=log_prior, v=v)


def by_batches(p, dense):
    per_query = ("x", "alpha", "sigma", "v")
    parts = [
        by_ops(**(p | {k: p[k][some] for k in per_query}), dense=dense)
        for some in (slice(0, ALONE), slice(ALONE, None))
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def one_rounding(p, exact, dense, unit):
    """name -> [B]: by how much exact results change where every input is off by one rounding, the
    larger change of two draws. Any float32 arithmetic rounds as much: alpha y without a fused
    multiply-add, say. Where two atoms of equal weight lie far apart, or F is nearly singular, that
    is a lot, and of a few queries which is the worst, and how bad, differs from one order of
    operations (so from one instruction set) to the next.
    """
    worst = {name: torch.zeros(len(p["x"]), dtype=torch.float64) for name in exact}
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        off = lambda t, generator=generator: (
            t.double()
            * (1 + EPS * (2 * torch.rand(t.shape, generator=generator).double() - 1).sign())
        )
        near = {k: off(p[k]) if k in ("x", "y", "alpha", "sigma") else p[k] for k in p}
        change = errors(difference_form(**near, dense=dense), exact, unit)
        worst = {name: torch.maximum(worst[name], change[name]) for name in exact}
    return worst


@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "d", [d if d in (17, 64) else pytest.param(d, marks=pytest.mark.slow) for d in SIZES]
)
def test_float32_error(d, kind, offset):
    """RMS over the queries at most twice plain PyTorch's plus FLOOR, or twice what one rounding of
    the inputs does, for every output. And where F is not
    nearly singular, |tr F| sigma^2 >= 0.01 d, every tr F and F v within 1e-5 (d <= 64) or 1e-4 of
    its own size, or, for a v that F nearly takes to 0, of |v|/(4 sigma^2); where plain float32
    cannot, because that many digits are not in the inputs' roundings, within twice its worst or
    twice what one rounding of the inputs does."""
    limit, dense, bad = 1e-5 if d <= 64 else 1e-4, d <= 64, []
    rms = lambda e: float(e.square().mean().sqrt())
    for where, p in cells(d, kind, offset):
        exact, plain = (
            difference_form(**p, dense=dense),
            difference_form(**p, dense=dense, dtype=torch.float32),
        )
        got = by_batches(p, dense)
        # The trace is a difference from d/sigma^2 and may vanish: an error in units of that.
        unit = {
            "log_prob": 1 + exact["log_prob"].abs(),
            "fisher_trace": d * p["sigma"].double() ** -2,
        }
        ours, theirs = errors(got, exact, unit), errors(plain, exact, unit)
        for name in exact:
            o, t = rms(ours[name]), rms(theirs[name])
            allowed = 2 * t + (ESS_FLOOR if name == "ess" else FLOOR)
            if not o <= allowed and not o <= 2 * rms(one_rounding(p, exact, dense, unit)[name]):
                bad.append(
                    f"{name}, {where}: {o:.1e}, plain {t:.1e}, needs 2 plain +"
                    f" {(o - 2 * t) / EPS:.1f} eps"
                )
        regular = exact["fisher_trace"].abs() >= 0.01 * unit["fisher_trace"]
        # F v is the difference of v/sigma^2 and what the covariance takes off it. Where little of v
        # is left, its own size says how ill-conditioned the question is, and one query's rounding
        # decides: 2e-5 of an F v of a twelfth of v/sigma^2 on one instruction set, 9e-6 on another.
        size = exact["matvec"].flatten(1).norm(dim=1)
        whole = p["v"].double().flatten(1).norm(dim=1) / p["sigma"].double() ** 2
        own = {"matvec": torch.maximum(size, whole / 4)}
        ours, theirs = errors(got, exact, own), errors(plain, exact, own)
        for name in ("fisher_trace", "matvec"):
            o, t = (float(e[name][regular].max()) if regular.any() else 0.0 for e in (ours, theirs))
            if not o <= max(limit, 2 * t) and not o <= 2 * float(
                one_rounding(p, exact, dense, own)[name][regular].max()
            ):
                bad.append(f"{name}, {where}: relative error {o:.1e}, plain {t:.1e}")
    assert bad == []


@pytest.mark.parametrize("d", [2, 17, 64])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_long_sums(d, sigma):
    """40,000 atoms about a mean that is not zero."""
    generator = torch.Generator().manual_seed(d)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    y = normal(40_000, d) + 0.3
    alpha, level = torch.ones(6), torch.full((6,), sigma)
    p = dict(x=y[:6] + sigma * normal(6, d), y=y, alpha=alpha, sigma=level, v=normal(6, 1, d))
    exact, plain = difference_form(**p), difference_form(**p, dtype=torch.float32)
    unit = {"log_prob": 1 + exact["log_prob"].abs(), "fisher_trace": d * level.double() ** -2}
    ours, theirs = errors(by_ops(**p), exact, unit), errors(plain, exact, unit)
    rms = lambda e: float(e.square().mean().sqrt())
    bad = {
        k: (rms(ours[k]), rms(theirs[k]))
        for k in exact
        if not rms(ours[k]) <= 2 * rms(theirs[k]) + FLOOR
    }
    assert bad == {}


@pytest.mark.parametrize("unit", [1.0, 1e-13])
def test_the_diagonal_of_a_cluster_far_out_along_one_axis(unit):
    """All that is far from the centre is in one coordinate, where much would cancel about it, and
    every atom of a tile carries weight; the fourth power of small units is 0."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    n, d, b = 1536, 64, 24
    y = 0.05 * normal(n, d)
    y[: n // 2, 0] += 4 * d**0.25
    y[n // 2 :, 0] -= 4 * d**0.25
    x = y[torch.randint(n, (b,), generator=generator)] + normal(b, d)
    p = dict(x=unit * x, y=unit * y, alpha=torch.ones(b), sigma=torch.full((b,), unit))
    exact = {"diagonal": difference_form(**p)["diagonal"]}
    plain = difference_form(**p, dtype=torch.float32)
    got = {"diagonal": ops.fisher_diagonal(**p)}
    ours, theirs = (
        float(errors(o, exact)["diagonal"].square().mean().sqrt()) for o in (got, plain)
    )
    assert ours <= 2 * theirs + FLOOR, (ours / EPS, theirs / EPS)
