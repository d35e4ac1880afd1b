"""Unbalanced transport against a dense float64 Sinkhorn, two Diracs in closed form, its primal, and
the limits of a large and a small reach."""

from __future__ import annotations

import math

import pytest
import torch
from test_sinkhorn import close, costs, plan_of, points, rng, weights

from dfkernels.methods.sinkhorn import NotConverged, divergence, solve

f64 = torch.float64


def primal(plan, c, a, b, eps, rho):
    kl = lambda p, q: (torch.xlogy(p, p / q) - p + q).sum()
    relaxed = kl(plan.sum(1), a) + kl(plan.sum(0), b)
    return (plan * c).sum() + eps * kl(plan, a[:, None] * b) + rho * relaxed


def dense(x, y, blur, a, b, reach, steps=2000):
    """Damped Sinkhorn in float64 with all costs, and the best constant to move from f to g after
    each step: plan and optimum. Differentiable."""
    c, eps, rho = costs(x, y), blur**2, reach**2
    damping, g = rho / (rho + eps), torch.zeros(len(y), dtype=f64)
    for _ in range(steps):
        f = -eps * damping * torch.logsumexp(b.log() + (g - c) / eps, 1)
        old, g = g, -eps * damping * torch.logsumexp(a.log()[:, None] + (f[:, None] - c) / eps, 0)
        left = torch.logsumexp(b.log() - g / rho, 0) - torch.logsumexp(a.log() - f / rho, 0)
        g = g + rho / 2 * left
        if float((old - g).detach().abs().max()) < 1e-14:
            break
    plan = a[:, None] * b * torch.exp((f[:, None] + g - c) / eps)
    return plan, primal(plan, c, a, b, eps, rho)


def dense_divergence(x, y, blur, a, b, reach):
    xy, xx, yy = (
        dense(*p, blur, *w, reach)[1]
        for p, w in (((x, y), (a, b)), ((x, x), (a, a)), ((y, y), (b, b)))
    )
    return xy - (xx + yy) / 2 + blur**2 * (a.sum() - b.sum()) ** 2 / 2


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-11), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("reach, size", [(0.1, 1.0), (0.8, 1.7), (5.0, 0.2)])
@pytest.mark.parametrize("n, m, d", [(1, 1, 2), (30, 21, 2), (15, 15, 40)])
def test_it_is_the_dense_solution(n, m, d, reach, size, dtype, tol):
    """Plan, objective, potentials and their meaning, with masses that differ, and sets apart."""
    x, y, blur = points(n, d, 0, dtype), points(m, d, 1, dtype, 0.7, 0.5), 0.3 * math.sqrt(d)
    a, b = weights(n, 2, dtype) / n, weights(m, 3, dtype) * size / m
    c = solve(x, y, blur, a, b, reach=reach * math.sqrt(d), tol=tol)
    wide = (x.double(), y.double(), c.blur, a.double(), b.double(), c.reach)
    plan, optimum = dense(*wide)
    mass, cost = float(plan.sum()), float(optimum)
    assert c.converged and c.marginal_error <= tol
    assert float((plan_of(c, m) - plan).abs().sum()) <= 20 * tol * mass
    assert abs(c.cost - cost) <= 1e-2 * tol * (1 + cost) and abs(c.mass - mass) <= 20 * tol * mass
    assert 0 <= c.gap <= tol * tol * mass * c.reach**2 + 1e-15
    rows = a.double() * (-c.f.double() / c.reach**2).exp()
    close(rows, plan.sum(1), 100 * tol * mass)
    close(b.double() * (-c.g.double() / c.reach**2).exp(), plan.sum(0), 100 * tol * mass)
    close(c.T.plan_matmul(x), plan.T @ x.double(), 100 * tol * mass)


@pytest.mark.parametrize("m, n", [(1.0, 1.0), (0.3, 2.5)])
def test_two_diracs(m, n):
    """log P = ((eps + rho) log mn - c)/(eps + 2 rho); the optimum is what no mass costs, less
    (eps + 2 rho) P."""
    x, y = torch.zeros(1, 2, dtype=f64), torch.tensor([[3.0, 4.0]], dtype=f64)
    a, b = torch.tensor([m], dtype=f64), torch.tensor([n], dtype=f64)
    for blur, reach in ((0.5, 2.0), (2.0, 0.7), (0.1, 10.0)):
        eps, rho, c = blur**2, reach**2, 12.5

        def of(s, t, c, eps=eps, rho=rho):
            return math.exp(((eps + rho) * math.log(s * t) - c) / (eps + 2 * rho))

        found = solve(x, y, blur, a, b, reach=reach, tol=1e-12)
        P = of(m, n, c)
        assert found.mass == pytest.approx(P, rel=1e-10)
        want = eps * m * n + rho * (m + n) - (eps + 2 * rho) * P
        assert found.cost == pytest.approx(want, rel=1e-12)
        own = (of(m, m, 0) + of(n, n, 0)) / 2
        want = (eps + 2 * rho) * (own - P)
        value = float(divergence(x, y, blur, a, b, reach=reach, tol=1e-12).value)
        assert value == pytest.approx(want, rel=1e-10)


def test_the_gap_is_the_primal_less_the_dual():
    """Far from converged, and the optimum is in between."""
    x, y, a, b = points(20, 2, 0), points(15, 2, 1, shift=1.0), weights(20, 2), weights(15, 3)
    best = solve(x, y, 0.2, a, b, reach=1.0, tol=1e-12, max_iter=10_000).cost
    for steps in (1, 2, 5):
        with pytest.warns(NotConverged):
            c = solve(x, y, 0.2, a, b, reach=1.0, tol=1e-12, max_iter=steps)
        above = float(primal(plan_of(c, 15), costs(x, y), a, b, 0.04, 1.0))
        assert above - c.cost == pytest.approx(c.gap, rel=1e-9) and c.gap > 1e-6
        assert c.cost < best < above
        left = b * (-c.g).exp()
        error = (plan_of(c, 15).sum(0) - left).abs().sum() / left.sum()
        assert c.marginal_error == pytest.approx(float(error), rel=1e-9)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 3e-4), (torch.float64, 1e-8)], ids=str)
def test_gradients_are_those_of_the_dense_form(dtype, tol):
    """In points and weights, by autograd through the iterations in float64."""
    given = [points(9, 3, 0, dtype), points(7, 3, 1, dtype, 0.7, 0.5)]
    given += [weights(9, 2, dtype) / 9, weights(7, 3, dtype) / 5]
    ours = [t.clone().requires_grad_() for t in given]
    theirs = [t.double().requires_grad_() for t in given]
    result = divergence(*ours[:2], 0.8, *ours[2:], reach=1.3, tol=tol / 10)
    want = dense_divergence(*theirs[:2], 0.8, *theirs[2:], 1.3)
    assert abs(float(result.value.detach()) - float(want.detach())) <= tol / 10
    found = torch.autograd.grad(2 * result.value, ours)
    for one, other in zip(found, torch.autograd.grad(2 * want, theirs), strict=True):
        assert one.dtype == dtype
        close(one, other, tol)


def test_a_large_reach_keeps_the_marginals():
    """Where the masses are the same; the objective is then below by what is of order 1/rho."""
    x, y, a, b = points(20, 2, 0), points(15, 2, 1, shift=1.0), weights(20, 2), weights(15, 3)
    a, b = a / a.sum(), b / b.sum()
    kept, far = (solve(x, y, 0.3, a, b, reach=r, tol=1e-10) for r in (None, 1e5))
    assert kept.reach is None and kept.gap == math.inf and abs(kept.mass - 1) <= 1e-12
    assert float((plan_of(kept, 15) - plan_of(far, 15)).abs().sum()) <= 1e-8
    assert abs(kept.cost - far.cost) <= 1e-8
    values = [float(divergence(x, y, 0.3, a, b, reach=r, tol=1e-10).value) for r in (None, 1e5)]
    assert abs(values[0] - values[1]) <= 1e-8
    # masses m, n: sqrt(mn) goes, and the rest is paid for at rho (sqrt m - sqrt n)^2
    more = solve(x, y, 0.3, a, 4 * b, reach=1e3, tol=1e-10)
    assert abs(more.mass - 2) <= 1e-4 and abs(more.cost / 1e6 - 1) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_goes_beyond_the_reach(dtype):
    """Sets 1,000 reaches apart; and where half of the mass is that far, the other half moves as it
    does alone."""
    x, y = points(20, 2, 0, dtype), points(15, 2, 1, dtype)
    alone = solve(x, y + 1000, 0.3, reach=1.0)
    assert alone.converged and alone.mass == 0 and abs(alone.cost - (2 + 0.09)) <= 1e-6
    s = divergence(x, y + 1000, 0.3, reach=1.0).value
    own = [solve(p, p, 0.3, reach=1.0, tol=1e-6).mass for p in (x, y)]
    assert abs(float(s) - (1 + 0.045) * sum(own)) <= 1e-5
    both, half = torch.cat([y, y + 1000]), torch.full((30,), 1 / 15, dtype=f64)
    together, near = solve(x, both, 0.3, b=half, reach=1.0), solve(x, y, 0.3, reach=1.0)
    close(together.barycentric_map(), near.barycentric_map(), 2e-3)
    assert abs(together.mass - near.mass) <= 1e-3


def test_shifts_order_zeros_and_starts():
    x, y, a, b = points(40, 2, 0), points(30, 2, 1), weights(40, 2), weights(30, 3)
    b[::4] = 0
    options = dict(reach=1.5, tol=1e-10)
    c = solve(x, y, 0.2, a, b, **options)
    away = solve(x + 4096, y + 4096, 0.2, a, b, **options)
    close(c.f, away.f, 1e-8)
    turned = solve(y.flip(0), x, 0.2, b.flip(0), a, **options)
    assert abs(turned.cost - c.cost) <= 1e-10
    close(turned.T.f, c.f, 1e-8)
    kept = b > 0
    close(solve(x, y[kept], 0.2, a, b[kept], **options).f, c.f, 1e-8)
    larger = solve(4 * x, 4 * y, 0.8, a, b, reach=6.0, tol=1e-10)
    close(larger.f, 16 * c.f, 1e-9)
    assert solve(x, y, 0.2, a, b, reach=1.5, tol=1e-9, start=c).iterations == 1
    nearer = solve(x, y, 0.2, a, b, reach=1.6, tol=1e-10, start=c)
    assert nearer.iterations <= c.iterations and abs(nearer.reach - 1.6) <= 1e-15
    itself = solve(x, x, 0.2, a, **options)
    assert abs(itself.cost - solve(x, x.clone(), 0.2, a, a, **options).cost) <= 1e-9
    value = float(divergence(x, x, 0.2, a, a, **options).value)
    assert abs(value) <= 1e-12
    assert "reach=1.5, " in repr(c)


def test_large_sets(monkeypatch):
    """The thinned start keeps the mass; what is found does not depend on the start."""
    x, y = points(2100, 2, 0, torch.float32), points(2500, 2, 1, torch.float32, 0.6, 1.0)
    b = torch.rand(2500, generator=rng(3)) / 700
    c = solve(x, y, 1.0, b=b, reach=2.0)
    assert c.converged and c.iterations <= 6
    monkeypatch.setattr("dfkernels.methods.sinkhorn._start._COARSE", 10_000)
    other = solve(x, y, 1.0, b=b, reach=2.0)
    assert abs(c.cost - other.cost) <= 1e-5 and other.iterations >= c.iterations
    close(c.barycentric_map(), other.barycentric_map(), 1e-3)


@pytest.mark.parametrize("reach", [0.0, -1.0, math.inf, math.nan])
def test_bad_reach(reach):
    for function in (solve, divergence):
        with pytest.raises(ValueError, match="reach: expected a finite value"):
            function(points(3, 2, 0), points(3, 2, 1), 0.5, reach=reach)
