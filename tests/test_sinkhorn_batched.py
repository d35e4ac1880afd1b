"""Many transport problems in one call against one call each, and passes over points in the order of
a curve."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from test_sinkhorn import close, costs, points, rng, weights

from bench import sinkhorn as bench
from bench import sinkhorn_table
from dfkernels.methods.sinkhorn import NotConverged, divergence, solve

f64 = torch.float64
G = 5


def problems(dtype=f64, n=20, m=15, d=2):
    """Easy and hard ones: the spread grows."""
    size = torch.arange(1.0, G + 1, dtype=dtype)[:, None, None] / 2
    x = torch.stack([points(n, d, k, dtype) for k in range(G)]) * size
    y = torch.stack([points(m, d, 9 + k, dtype, 0.7, 0.3) for k in range(G)]) * size
    a = torch.stack([weights(n, k, dtype) for k in range(G)])
    b = torch.stack([weights(m, 9 + k, dtype) for k in range(G)])
    a[:, 3] = 0
    return x, y, a, b


@pytest.mark.parametrize("reach", [None, 1.5])
@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=str)
def test_each_is_what_it_is_alone(dtype, tol, reach):
    """With a stop test of its own: all results, weights, starts, gradients."""
    x, y, a, b = problems(dtype)
    c = solve(x, y, 0.3, a, b, reach=reach, tol=tol, batched=True)
    assert c.converged.all() and c.iterations.min() < c.iterations.max()
    assert c.marginal_error.shape == c.cost.shape == c.gap.shape == c.mass.shape == (G,)
    assert c.f.shape == (G, 20) and c.T.g.shape == (G, 20) and c.f.dtype == dtype
    matrix = torch.stack([points(15, 3, k, dtype) for k in range(G)])
    found = c.plan_matmul(matrix), c.barycentric_map(), c.T.barycentric_map()
    other = torch.stack([points(4, 2, k, dtype) for k in range(G)])
    for k in range(G):
        one = solve(x[k], y[k], 0.3, a[k], b[k], reach=reach, tol=tol)
        loose = 1000 * tol
        assert abs(int(c.iterations[k]) - one.iterations) <= 8
        assert abs(float(c.cost[k]) - one.cost) <= tol * (1 + abs(one.cost))
        assert abs(float(c.mass[k]) - one.mass) <= loose
        alone = one.plan_matmul(matrix[k]), one.barycentric_map(), one.T.barycentric_map()
        for together, single in zip(found, alone, strict=True):
            close(together[k], single, loose)
        close(c.barycentric_map(other)[k], one.barycentric_map(other[k]), loose)
    back = pickle.loads(pickle.dumps(c))
    again = solve(x, y, 0.3, a, b, reach=reach, tol=2 * tol, batched=True, start=back)
    assert again.iterations.tolist() == [1] * G


@pytest.mark.parametrize("reach", [None, 1.5])
def test_divergences(reach):
    x, y, a, b = (t.requires_grad_() for t in problems())
    given = dict(reach=reach, tol=1e-12)
    all_ = divergence(x, y, 0.3, a, b, batched=True, **given)
    assert all_.value.shape == (G,)
    cotangent = torch.linspace(1, 2, G, dtype=f64)
    together = torch.autograd.grad(all_.value @ cotangent, (x, y, a, b))
    for k in range(G):
        each = [t[k].detach().requires_grad_() for t in (x, y, a, b)]
        one = divergence(*each[:2], 0.3, *each[2:], **given)
        assert abs(float(all_.value[k].detach()) - float(one.value.detach())) <= 1e-9
        alone = torch.autograd.grad(one.value * cotangent[k], each)
        for found, want in zip(together, alone, strict=True):
            close(found[k], want, 1e-7)
    warm = divergence(x, y, 0.3, a, b, batched=True, start=all_, **given)
    assert warm.xy.iterations.max() <= 2


def test_draws_are_of_the_rows():
    x, y, a, b = problems()
    c = solve(x, y, 0.3, a, b, tol=1e-8, batched=True)
    drawn = torch.stack([c.draw(seed=seed) for seed in range(400)])
    assert drawn.shape == (400, G, 20)
    mean = torch.stack([y[k][drawn[:, k]].mean(0) for k in range(G)])
    spread = torch.stack([y[k][drawn[:, k]].std(0) for k in range(G)])
    assert ((mean - c.barycentric_map()).abs() <= 5 * (spread + 0.05) / 20).all()


def test_what_does_not_converge_is_counted():
    x, y, _, _ = problems()
    with pytest.warns(
        NotConverged,
        match=r"sinkhorn: \d of 5 problems stopped at a marginal error of up to .*, "
        r"tol = 1\.0e-04, after 4 iterations; raise",
    ):
        c = solve(x, y, 0.3, batched=True, max_iter=4)
    assert not c.converged.all() and c.iterations.max() == 4
    assert "Coupling(5 problems, n=20, m=15, " in repr(c) and "not converged" in repr(c)
    exact = solve(x[:, :1], y[:, :1], 0.3, batched=True)
    assert "marginal_error=0.0e+00, converged)" in repr(exact)
    # the others go on undisturbed by one that is hard
    x[0], y[0] = x[0] / 100, y[0] / 100
    assert solve(x, y, 0.3, batched=True).iterations[0] == 1


def test_bad_input():
    x, y, a, _ = problems()
    negative = a.clone()
    negative[2, 1] = -1
    for function in (solve, divergence):
        bad = {
            r"x: expected shape \[G, n, \*E\] with G, n >= 1 .* got \[0, 20, 2\]": (x[:0], y),
            r"y: expected shape \[5, m, 2\] to go with x .* got \[3, 15, 2\]": (x, y[:3]),
            r"a: expected shape \[5, 20\], one weight per row of x, got \[20\]": (x, y, a[0]),
            r"a: expected finite weights >= 0, got -1.0 at index \[2, 1\]": (x, y, negative),
        }
        for message, (first, second, *rest) in bad.items():
            with pytest.raises(ValueError, match=message):
                function(first, second, 0.3, *rest, batched=True)
    c = solve(x, y, 0.3, batched=True)
    with pytest.raises(ValueError, match="start: expected 4 problems, got 5 problems"):
        solve(x[:4], y[:4], 0.3, batched=True, start=c)
    with pytest.raises(
        ValueError, match=r"matrix: expected shape \[5, 15, \*K\], a row for each y"
    ):
        c.plan_matmul(y[0])
    with pytest.raises(ValueError, match=r"x: expected shape \[5, B, 2\], got \[4, 20, 2\]"):
        c.draw(x[:4], seed=0)


@pytest.mark.parametrize("reach", [None, 2.0])
def test_the_order_of_a_pass_does_not_show(reach):
    """From 2,048 points on, in few dimensions, atoms are gone over along a curve."""
    x, y = points(40, 2, 0), points(2100, 2, 1, scale=2.0)
    b = torch.rand(2100, dtype=f64, generator=rng(2))
    b = b / b.sum()
    c = solve(x, y, 0.5, b=b, reach=reach, tol=1e-8)
    assert c._problem.y.order is not None
    log = c.g / 0.25 + b.log() - costs(x, y) / 0.25
    close(c.barycentric_map(), log.softmax(1) @ y, 1e-10)
    rows = (c.f / 0.25 + log.logsumexp(1)).exp() / 40
    values = points(2100, 3, 4)
    close(c.plan_matmul(values), rows[:, None] * (log.softmax(1) @ values), 1e-10)
    drawn = torch.stack([c.draw(seed=seed) for seed in range(200)])
    assert ((y[drawn].mean(0) - log.softmax(1) @ y).abs().max()) <= 5 * 0.8 / math.sqrt(200)


def test_the_benchmark_keeps_the_rows_of_other_cases():
    row = lambda case, contender, n: dict(case=case, contender=contender, n=n)
    rows = []
    for one in (row("64-0.5", "b", 1), row("2-0.5", "a", 2), row("2-0.5", "b", 3)):
        rows = bench.replaced(rows, one)
    rows = bench.replaced(rows, row("64-0.5", "b", 4))
    assert [(r["case"], r["contender"], r["n"]) for r in rows] == [
        ("2-0.5", "a", 2), ("2-0.5", "b", 3), ("64-0.5", "b", 4),
    ]  # fmt: skip


def test_the_table_names_a_case_once():
    row = dict(
        case="2-0.5", d="2", blur_over_spread="0.5", contender="dfkernels", iterations="6",
        error="1e-05", seconds="1.00", ratio="1", megabytes="1", cpu="CPU", threads="2", isa="v4",
        cpu_isa="v4", torch="2", date="today", commit="abc",
    )  # fmt: skip
    peer = row | dict(contender="POT", iterations=">24", seconds="5.00", ratio=">5.0")
    text = sinkhorn_table.markdown({"v4": [row, peer]})
    assert "| 2 | 0.5 | dfkernels | 6 | 1e-05 | 1.00 | 1 | 1 |\n" in text
    assert "|  |  | POT | >24 | 1e-05 | >5.00 | >5.0 | 1 |\n" in text
    assert text.endswith("\nCPU, 2 threads (AVX-512), torch 2, today, commit abc.")
