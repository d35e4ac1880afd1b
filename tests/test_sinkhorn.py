"""Entropic optimal transport against a dense float64 Sinkhorn, closed forms between Gaussians, and
permutations; marginal errors, gradients, starts, and what it says to bad input.
"""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import rng

import dfkernels as df
from bench import sinkhorn as bench
from dfkernels.methods.sinkhorn import Coupling, NotConverged, divergence, solve
from dfkernels.methods.sinkhorn._anderson import Anderson
from dfkernels.methods.sinkhorn.solve import problem_of

f64 = torch.float64


def points(n, d, seed, dtype=f64, scale=1.0, shift=0.0):
    return (scale * torch.randn(n, d, dtype=f64, generator=rng(seed)) + shift).to(dtype)


def weights(n, seed, dtype=f64):
    return torch.rand(n, dtype=f64, generator=rng(seed)).add(0.1).to(dtype)


def costs(x, y):
    """By differences, in float64."""
    x, y = (t.double().reshape(len(t), -1) for t in (x, y))
    return (x[:, None] - y[None]).square().sum(2) / 2


def dense(x, y, blur, a=None, b=None, steps=20_000, tol=1e-13):
    """Sinkhorn's algorithm in float64 with all costs: f, g, plan and cost. Differentiable."""
    c, eps = costs(x, y), float(blur) ** 2
    a = torch.ones(len(x), dtype=f64) if a is None else a.double()
    b = torch.ones(len(y), dtype=f64) if b is None else b.double()
    a, b = a / a.sum(), b / b.sum()
    g = torch.zeros(len(y), dtype=f64)
    for _ in range(steps):
        f = -eps * torch.logsumexp(b.log() + (g - c) / eps, 1)
        new = -eps * torch.logsumexp(a.log()[:, None] + (f[:, None] - c) / eps, 0)
        done = float((b * ((g - new) / eps).expm1().abs()).detach().sum()) < tol
        g = new
        if done:
            break
    f = -eps * torch.logsumexp(b.log() + (g - c) / eps, 1)
    plan = a[:, None] * b * torch.exp((f[:, None] + g - c) / eps)
    return f, g, plan, a @ torch.nan_to_num(f) + b @ torch.nan_to_num(g)


def plan_of(coupling, n_columns):
    return coupling.plan_matmul(torch.eye(n_columns, dtype=coupling.f.dtype)).double()


def close(found, want, tol):
    assert found.shape == want.shape
    assert float((found.double() - want.double()).abs().max()) <= tol


SHAPES = [(1, 1, 2), (1, 5, 3), (6, 1, 1), (7, 5, 2), (40, 30, 1), (30, 41, 8), (25, 25, 100)]


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("n, m, d", SHAPES)
def test_it_is_the_dense_solution(n, m, d, dtype, tol):
    """Potentials up to their constant, plan, cost, products and map, with unequal weights."""
    x, y = points(n, d, 0, dtype), points(m, d, 1, dtype, 0.7, 0.5)
    a, b, blur = weights(n, 2, dtype), weights(m, 3, dtype), 0.4 * math.sqrt(d)
    c = solve(x, y, blur, a, b, tol=tol)
    assert c.converged and c.marginal_error <= tol
    f, g, plan, cost = dense(x, y, c.blur, a, b)
    size = 1 + float(cost)
    close(c.f[:, None] + c.g, f[:, None] + g, 100 * tol * size)
    a1, b1 = a.double() / a.double().sum(), b.double() / b.double().sum()
    assert abs(float(a1 @ c.f.double() - b1 @ c.g.double())) <= 1e-6 * size
    assert abs(c.cost - float(cost)) <= (1e-12 if dtype == f64 else 1e-6) * size
    assert float((plan_of(c, m) - plan).abs().sum()) <= 20 * tol
    values = points(m, 3, 4, dtype)
    close(c.plan_matmul(values), plan @ values.double(), 20 * tol)
    close(c.T.plan_matmul(x), plan.T @ x.double(), 20 * tol)
    close(c.barycentric_map(), (plan @ y.double()) / a1[:, None], 200 * tol * math.sqrt(d))
    close(c.T.barycentric_map(), (plan.T @ x.double()) / b1[:, None], 200 * tol * math.sqrt(d))


def gaussian_cost(A, B, shift, blur):
    """W(N(p, A), N(q, B)), p - q = shift, in closed form (Janati, Muzellec, Peyre, Cuturi 2020),
    with half their cost."""
    s, d = blur**2, len(A)
    root = lambda M: (lambda e: e[1] @ torch.diag(e[0].sqrt()) @ e[1].T)(torch.linalg.eigh(M))
    one = torch.eye(d, dtype=f64)
    D = root(4 * root(A) @ B @ root(A) + s * s * one)
    out = torch.trace(A) + torch.trace(B) - torch.trace(D) + d * s * (1 - math.log(2 * s))
    return float(out + s * torch.logdet(D + s * one) + shift.square().sum()) / 2


def gaussian_grid(mean, covariance, half, step):
    """A normal law as weighted points of a grid, which sums up smooth functions to many digits."""
    axis = torch.arange(-half, half + step / 2, step, dtype=f64)
    z = torch.cartesian_prod(*[axis] * len(mean)).reshape(-1, len(mean))
    L = torch.linalg.cholesky(covariance)
    return mean + z @ L.T, torch.exp(-z.square().sum(1) / 2)


@pytest.mark.parametrize("blur", [0.4, 1.0, 5.0])
def test_gaussians_on_a_line(blur):
    A, B = torch.tensor([[1.7]], dtype=f64), torch.tensor([[0.4]], dtype=f64)
    shift = torch.tensor([0.8], dtype=f64)
    x, a = gaussian_grid(shift, A, 8, 0.1)
    y, b = gaussian_grid(torch.zeros(1, dtype=f64), B, 8, 0.1)
    want = gaussian_cost(A, B, shift, blur)
    assert abs(solve(x, y, blur, a, b, tol=1e-8).cost - want) <= 1e-9
    zero = torch.zeros(1, dtype=f64)
    want -= (gaussian_cost(A, A, zero, blur) + gaussian_cost(B, B, zero, blur)) / 2
    found = divergence(x, y, blur, a, b, tol=1e-8).value
    assert abs(float(found) - want) <= 1e-9


def test_gaussians_in_the_plane():
    A = torch.tensor([[1.0, 0.5], [0.5, 0.8]], dtype=f64)
    B = torch.tensor([[0.5, -0.2], [-0.2, 1.2]], dtype=f64)
    shift = torch.tensor([-1.0, 2.0], dtype=f64)
    x, a = gaussian_grid(shift, A, 7, 0.4)
    y, b = gaussian_grid(torch.zeros(2, dtype=f64), B, 7, 0.4)
    found = solve(x, y, 1.0, a, b, tol=1e-8).cost
    assert abs(found - gaussian_cost(A, B, shift, 1.0)) <= 1e-8


def test_at_small_blur_it_is_the_best_permutation():
    x, y = points(6, 2, 0), points(6, 2, 1)
    c = costs(x, y)
    best = min(itertools.permutations(range(6)), key=lambda p: float(c[range(6), p].sum()))
    found = solve(x, y, 0.02, max_iter=10_000)
    assert found.converged
    assert found.draw(seed=0).tolist() == list(best)
    close(found.barycentric_map(), y[list(best)], 1e-3)
    # eps KL of a permutation from uniform weights is eps log n
    want = float(c[range(6), best].mean()) + 0.02**2 * math.log(6)
    assert abs(found.cost - want) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_at_huge_blur_the_plan_is_the_product(dtype):
    x, y, a = points(9, 2, 0, dtype), points(7, 2, 1, dtype), weights(9, 2, dtype)
    c = solve(x, y, 1e4, a)
    close(plan_of(c, 7), (a / a.sum())[:, None].expand(9, 7) / 7, 1e-7)
    want = float(((a / a.sum()).double() @ costs(x, y)).mean())
    assert abs(c.cost - want) <= 1e-5
    gap = (a.double() / a.double().sum()) @ x.double() - y.double().mean(0)
    assert abs(float(divergence(x, y, 1e4, a).value) - float(gap.square().sum()) / 2) <= 1e-6


problems = st.tuples(
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 5), st.integers(0, 999),
    st.sampled_from([0.2, 1.0, 30.0]), st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(problems)
def test_what_holds_of_any_problem(problem):
    """Marginals as certified, exchange of x and y, the order of rows, weights of zero, duplicates,
    shifts of either set, scales, and the bounds of a divergence."""
    n, m, d, seed, blur, dtype = problem
    x, y = points(n, d, seed, dtype), points(m, d, seed + 1, dtype, 0.6, 0.3)
    a, b, tol = weights(n, seed + 2, dtype), weights(m, seed + 3, dtype), 2e-5
    c = solve(x, y, blur, a, b, tol=tol, max_iter=5000)
    plan, a1, b1 = plan_of(c, m), a.double() / a.double().sum(), b.double() / b.double().sum()
    noise = 300 * torch.finfo(dtype).eps * (1 + float(costs(x, y).max()) / blur**2)
    assert c.converged and c.marginal_error <= tol
    assert float((plan.sum(1) - a1).abs().sum()) <= noise
    assert abs(float((plan.sum(0) - b1).abs().sum()) - c.marginal_error) <= noise
    size, loose = 1 + abs(c.cost), 50 * tol + noise

    swapped = solve(y, x, blur, b, a, tol=tol, max_iter=5000)
    assert float((plan_of(swapped, n) - plan.T).abs().sum()) <= loose
    assert float((plan_of(c.T, n) - plan.T).abs().sum()) <= noise

    order = torch.randperm(m, generator=rng(seed))
    more = torch.cat([y[order], y[:1], y.new_full((1, d), 7.0)])
    split = torch.cat([b[order], b[:1] / 3, b.new_zeros(1)])
    split[(order == 0).nonzero()[0]] *= 2 / 3
    other = plan_of(solve(x, more, blur, a, split, tol=tol, max_iter=5000), m + 2)
    folded = torch.zeros_like(plan)
    folded[:, order] = other[:, :m]
    folded[:, 0] += other[:, m]
    assert float(other[:, m + 1].abs().max()) == 0
    assert float((folded - plan).abs().sum()) <= loose

    larger = solve(4 * x, 4 * y, 4 * blur, a, b, tol=tol, max_iter=5000)
    assert torch.equal(plan_of(larger, m), plan) and larger.cost == 16 * c.cost

    value = float(divergence(x, y, blur, a, b, tol=tol, max_iter=5000).value)
    assert value >= -1e-6 * size
    assert abs(float(divergence(x, x, blur, a, a, tol=tol, max_iter=5000).value)) <= 1e-6 * size


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 3e-5), (torch.float64, 1e-9)], ids=str)
def test_sets_far_from_the_origin_and_from_each_other(dtype, tol):
    """The shift of 1024 and -4096 is exact in these numbers; so is what comes out."""
    grid = lambda n, seed: (points(n, 3, seed) * 64).round().div(64).to(dtype)
    x, y, far = grid(40, 0), grid(30, 1), torch.tensor([1024.0, -4096.0, 0.0], dtype=dtype)
    near, away = solve(x, y, 0.5, tol=tol), solve(x + far, y, 0.5, tol=tol)
    assert float((plan_of(near, 30) - plan_of(away, 30)).abs().sum()) <= 10 * tol
    close(near.barycentric_map(), away.barycentric_map(), 100 * tol)
    gap = x.double().mean(0) - y.double().mean(0)
    want = near.cost + float(far.double().square().sum() / 2 + gap @ far.double())
    assert abs(away.cost - want) <= 1e-7 * tol * want / 1e-9 * 1e-2
    with_far = divergence(x + far, y, 0.5, tol=tol).value
    assert with_far.dtype == dtype and abs(float(with_far) / want - 1) <= 1e-4


def dense_divergence(x, y, blur, a, b):
    xy, xx, yy = dense(x, y, blur, a, b), dense(x, x, blur, a, a), dense(y, y, blur, b, b)
    return xy[3] - (xx[3] + yy[3]) / 2


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-4), (torch.float64, 1e-8)], ids=str)
def test_gradients_are_those_of_the_dense_form(dtype, tol):
    """In points and weights, by autograd through the iterations in float64."""
    given = [points(9, 3, 0, dtype), points(7, 3, 1, dtype, 0.7, 0.5)]
    given += [weights(9, 2, dtype), weights(7, 3, dtype)]
    ours = [t.clone().requires_grad_() for t in given]
    theirs = [t.double().requires_grad_() for t in given]
    result = divergence(*ours[:2], 0.8, *ours[2:], tol=tol / 10)
    want = dense_divergence(*theirs[:2], 0.8, *theirs[2:])
    assert abs(float(result.value.detach()) - float(want.detach())) <= tol / 10
    found = torch.autograd.grad(2 * result.value, ours)
    for one, other in zip(found, torch.autograd.grad(2 * want, theirs), strict=True):
        assert one.dtype == dtype
        close(one, other, tol)


def test_gradcheck():
    x, y = points(6, 2, 0).view(6, 1, 2).requires_grad_(), points(5, 2, 1).view(5, 1, 2)
    y.requires_grad_()
    a, b = weights(6, 2).requires_grad_(), weights(5, 3).requires_grad_()
    value = lambda *t: divergence(t[0], t[1], 0.5, t[2], t[3], tol=1e-12).value
    assert torch.autograd.gradcheck(value, (x, y, a, b))
    assert torch.autograd.gradcheck(lambda t: divergence(t, t * t, 0.5, tol=1e-12).value, (x,))
    # of a set with itself, where both arguments are one tensor
    (zero,) = torch.autograd.grad(divergence(x, x, 0.5, tol=1e-10).value, x)
    close(zero, torch.zeros_like(zero), 1e-9)


def test_there_is_no_second_derivative():
    x, y = points(6, 2, 0).requires_grad_(), points(5, 2, 1)
    (g,) = torch.autograd.grad(divergence(x, y, 0.5).value, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="divergence: expected one derivative, got two"):
        torch.autograd.grad(g.sum(), x)


def test_a_flow_along_the_gradient_reaches_the_target():
    """Warm starts as the points move: n times the gradient, at step 1, from restarts each."""
    x, y = points(60, 2, 0, torch.float32), points(80, 2, 1, torch.float32, 0.5, 2.0)
    before, cold, warm = None, 0, 0
    first = float(divergence(x, y, 0.3).value)
    for _ in range(8):
        x.requires_grad_()
        cold += divergence(x.detach(), y, 0.3).xy.iterations
        before = divergence(x, y, 0.3, start=before)
        warm += before.xy.iterations
        (g,) = torch.autograd.grad(before.value, x)
        x = x.detach() - len(x) * g
    assert float(divergence(x, y, 0.3).value) <= 0.003 * first
    assert warm < cold


def test_starts():
    """From the solution none is left to do; from a part of the points, another blur, and a set that
    has moved as a whole there is less."""
    x, y = points(300, 2, 0), points(280, 2, 1, scale=0.5)
    cold = solve(x, y, 0.2, tol=1e-6)
    assert solve(x, y, 0.2, tol=1e-5, start=cold).iterations == 1
    assert solve(x + 5, y - 3, 0.2, tol=1e-5, start=cold).iterations == 1
    part = solve(x[::2], y[::2], 0.2)
    halfway = solve(x, y, 0.2, tol=1e-3, start=part)
    assert halfway.iterations < solve(x, y, 0.2, tol=1e-3, max_iter=1000).iterations + 3
    finer = solve(x, y, 0.19, tol=1e-6, start=cold)
    assert finer.iterations < cold.iterations and abs(finer.blur - 0.19) < 1e-15
    back = pickle.loads(pickle.dumps(cold))
    assert solve(x, y, 0.2, tol=1e-5, start=back).iterations == 1
    assert torch.equal(copy.deepcopy(cold).f, cold.f)


def test_large_sets_start_from_thinned_ones():
    """The path from 2,048 points on; weights of zero and a cluster that holds half the weight."""
    x, y = points(2100, 2, 0, torch.float32), points(2500, 2, 1, torch.float32, 0.6, 1.0)
    b = torch.ones(2500)
    b[::3], b[1] = 0, 800
    c = solve(x, y, 1.0, b=b)
    wide = solve(x.double(), y.double(), 1.0, b=b.double(), tol=1e-9)
    assert c.iterations <= 6 and wide.converged
    assert abs(c.cost - wide.cost) <= 1e-5
    close(c.barycentric_map(), wide.barycentric_map(), 1e-3)
    itself = solve(x, x, 1.0)
    assert itself.converged and abs(itself.cost - solve(x, x.clone(), 1.0).cost) <= 1e-5


def test_few_iterations_do_what_many_plain_ones_would():
    """Anderson's steps: five times fewer at least than Sinkhorn's own here, without a parameter."""
    x, y = points(150, 2, 0), points(150, 2, 1, scale=0.6, shift=0.5)
    eps, g, c = 0.15**2, torch.zeros(150, dtype=f64), costs(x, y)
    plain, error = 0, 1.0
    while error > 1e-4:
        f = -eps * torch.logsumexp((g - c) / eps - math.log(150), 1)
        new = -eps * torch.logsumexp((f[:, None] - c) / eps - math.log(150), 0)
        error = float(((g - new) / eps).expm1().abs().mean())
        g, plain = new, plain + 1
    assert solve(x, y, 0.15).iterations * 5 <= plain


def test_anderson_solves_a_linear_iteration_in_as_many_steps_as_it_has_dimensions():
    A = torch.diag(torch.tensor([0.9, 0.5, -0.3], dtype=f64))
    want = torch.tensor([1.0, 2.0, 3.0], dtype=f64)
    mixer, g = Anderson(torch.tensor([[1.0, 2.0, 0.5]], dtype=f64)), torch.zeros(1, 3, dtype=f64)
    for _ in range(5):
        g = mixer.next(g, want + (g - want) @ A)
    close(g[0], want, 1e-5)  # the ridge leaves the rest
    assert mixer.next(want[None], want[None]).isfinite().all()
    mixer.forget(torch.tensor([True]))
    assert torch.equal(mixer.next(g, want[None]), want[None])


def test_the_benchmark_follows_peers_by_their_own_rule():
    """Alternate half-steps from zero, for points as given."""
    x, y, _ = bench.sets(40, 2)
    x, y = x.double(), y.double() + 3
    c = costs(x, y) + math.log(40)
    g = -torch.logsumexp(-c, 0)
    for _, error in bench.errors_of_pot(problem_of(x, y, 1.0), 3):
        f = -torch.logsumexp(g - c, 1)
        new = -torch.logsumexp(f[:, None] - c, 0)
        assert abs(float((g - new).expm1().abs().mean()) - error) <= 1e-9
        g = new


def test_draws_follow_the_plan():
    x, y, b = points(3, 2, 0), points(4, 2, 1), torch.tensor([1.0, 2.0, 0.0, 1.0], dtype=f64)
    c = solve(x, y, 0.7, b=b, tol=1e-8)
    found = torch.stack([c.draw(seed=seed) for seed in range(4000)])
    share = torch.stack([(found == j).double().mean(0) for j in range(4)], 1)
    rows = plan_of(c, 4) * 3
    close(share, rows, 0.04)  # five standard deviations
    assert float(share[:, 2].max()) == 0
    assert torch.equal(c.draw(seed=3), c.draw(x, seed=3))
    other = points(500, 2, 5)
    log = c.g / 0.7**2 + b.log() - costs(other, y) / 0.7**2
    close(c.barycentric_map(other), torch.softmax(log, 1) @ y, 1e-12)
    drawn = c.draw(other, seed=0)
    share = torch.bincount(drawn, minlength=4) / 500
    close(share, torch.softmax(log, 1).mean(0), 0.1)


def test_products_have_a_gradient_in_the_matrix():
    c = solve(points(6, 2, 0), points(5, 2, 1), 0.7, tol=1e-9)
    matrix = points(5, 6, 3).view(5, 2, 3).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", df.ops.SlowDerivativeWarning)
        (g,) = torch.autograd.grad(c.plan_matmul(matrix).sum(), matrix)
    close(g, plan_of(c, 5).sum(0).view(5, 1, 1).expand(5, 2, 3), 1e-12)


def test_arguments_need_no_particular_state_of_torch():
    x, y = points(6, 2, 0, torch.float32).requires_grad_(), points(5, 2, 1, torch.float32)
    want = solve(x, y, 0.5)
    assert not want.f.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(solve(x, y, 0.5).f, want.f)
    with torch.inference_mode():
        kept = solve(x, y, 0.5)
    assert torch.equal(kept.f, want.f) and not kept.f.is_inference()
    odd = torch.randn(5, 4, generator=rng(0))[:, ::2]
    assert torch.equal(solve(x, odd, 0.5).f, solve(x, odd.contiguous(), 0.5).f)
    seen = []
    solve(x, y, 0.5, callback=lambda done, total: seen.append((done, total)))
    assert seen == [(k + 1, 1000) for k in range(want.iterations)]
    assert repr(want).startswith("Coupling(n=6, m=5, blur=0.5, marginal_error=")


def test_what_does_not_converge_says_where_it_stopped():
    x, y = points(60, 2, 0), points(50, 2, 1)
    with pytest.warns(
        NotConverged, match=r"at a marginal error of .*, tol = 1\.0e-04, after 3 iter"
    ):
        c = solve(x, y, 0.05, max_iter=3)
    assert not c.converged and c.iterations == 3 and c.marginal_error > 1e-3
    assert "not converged" in repr(c)
    with pytest.warns(
        NotConverged, match="where rounding in float32 hides the rest; give x and y in"
    ):
        c = solve(x.float(), y.float(), 0.5, tol=1e-9)
    assert 0 < c.marginal_error < 1e-5
    with pytest.warns(
        NotConverged, match="where rounding in float64 hides the rest; raise blur or t"
    ):
        c = solve(x, y, 0.1, tol=1e-17)
    assert c.marginal_error < 1e-12
    with pytest.warns(NotConverged) as seen:
        divergence(x, y, 0.05, max_iter=3)
    assert all(w.filename == __file__ for w in seen)


x0, y0 = points(4, 2, 0), points(3, 2, 1)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=[1.0]), TypeError, "x: expected a tensor, got list"),
        (
            dict(x=x0.half()),
            TypeError,
            r"x: expected float32 or float64, got float16: .float\(\) converts it",
        ),
        (dict(x=x0[:0]), ValueError, r"x: expected shape \[n, \*E\] with n >= 1 .*got \[0, 2\]"),
        (dict(x=x0 / 0), ValueError, r"x: expected finite values, got .* at index \[0, 0\]"),
        (
            dict(y=y0 * math.nan),
            ValueError,
            r"y: expected finite values, got nan at index \[0, 0\]",
        ),
        (dict(y=y0.float()), TypeError, "y: expected float64 like x, got float32"),
        (dict(y=y0[:, :1]), ValueError, r"y: expected shape \[m, 2\] to go with x .* got \[3, 1\]"),
        (dict(blur=0.0), ValueError, "blur: expected a finite value > 0, got 0.0"),
        (dict(blur="a"), TypeError, "blur: expected a number"),
        (
            dict(blur=1e-160),
            ValueError,
            "blur: expected at least .* for points so far apart, got 1e",
        ),
        (
            dict(a=x0[:3, 0]),
            ValueError,
            r"a: expected shape \[4\], one weight per row of x, got \[3\]",
        ),
        (
            dict(b=torch.tensor([1.0, -1.0, 0.0])),
            ValueError,
            r"b: expected finite weights >= 0, got -1\.0 at index \[1\]",
        ),
        (dict(b=torch.zeros(3)), ValueError, "b: expected a positive sum, got 0.0"),
        (
            dict(b=torch.ones(3, dtype=torch.int64)),
            TypeError,
            "b: expected a floating dtype, got torch.int64",
        ),
        (dict(tol=-1.0), ValueError, "tol: expected a finite value > 0"),
        (dict(max_iter=0), ValueError, "max_iter: expected an integer of at least 1, got 0"),
        (dict(start=1), TypeError, "start: expected a (Coupling|Divergence), got int"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_input(change, error, message):
    arguments = dict(x=x0, y=y0, blur=0.5) | change
    for function in (solve, divergence):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_bad_input_of_a_coupling():
    c = solve(x0, y0, 0.5)
    assert isinstance(c, Coupling)
    with pytest.raises(ValueError, match=r"start: expected points of shape \[1\], got \[2\]"):
        solve(x0[:, :1], y0[:, :1], 0.5, start=c)
    with pytest.raises(
        ValueError, match="start: expected points of torch.float32 on cpu, got points of torch.fl"
    ):
        solve(x0.float(), y0.float(), 0.5, start=c)
    with pytest.raises(
        ValueError, match=r"matrix: expected shape \[3, \*K\], a row for each y, got \[4, 2\]"
    ):
        c.plan_matmul(x0)
    with pytest.raises(TypeError, match="matrix: expected a tensor, got list"):
        c.plan_matmul([1.0])
    with pytest.raises(TypeError, match="matrix: expected float64, float32, .*, got int64"):
        c.plan_matmul(torch.ones(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 2\], got \[4, 1\]"):
        c.draw(x0[:, :1], seed=0)
    with pytest.raises(
        ValueError, match="x: expected torch.float64 on cpu, as the points solved for, got"
    ):
        c.barycentric_map(x0.float())
    with pytest.raises(ValueError, match="seed: expected an integer from 0"):
        c.draw(seed=-1)
