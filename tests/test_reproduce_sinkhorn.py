"""What the experiment on entropic transport re-enacts of others."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra: pip install dfkernels[demo]")

from dfkernels.methods.sinkhorn import divergence, solve
from experiments.reproduce import sinkhorn
from experiments.reproduce import sinkhorn_schedules as schedules


def test_levels_are_those_of_geomloss():
    """epsilon_schedule(2, 8, 0.5, 0.5) of geomloss 0.3.1."""
    assert schedules.levels(8.0, 0.5, 0.5) == pytest.approx([64.0, 64.0, 16.0, 4.0, 1.0, 0.25])


def test_a_fine_schedule_arrives():
    x, y = schedules.normal(20, 0), schedules.eight_gaussians(20, 1)
    problem, best = schedules.Dense(x, y, 1.0), solve(x, y, 1.0, tol=1e-10)
    f, g, passes = schedules.scheduled(problem, 0.99)
    assert passes > 300 and problem.column_error(f, g) < 0.01
    assert abs(problem.dual(f, g) - best.cost) < 1e-3
    assert abs(problem.primal(best.f, best.g) - best.cost) < 1e-9
    want = divergence(x, y, 1.0, tol=1e-10).value
    assert abs(schedules.scheduled_divergence(problem, 0.99) - float(want)) < 1e-3
    assert torch.allclose(problem.map(best.g), best.barycentric_map())


def test_the_cost_of_pairs_is_that_of_the_plan():
    x, y = schedules.normal(9, 0)[None], schedules.eight_gaussians(7, 1)[None]
    c = solve(x, y, 0.7, tol=1e-12, batched=True)
    plan = c.plan_matmul(torch.eye(7, dtype=x.dtype)[None])[0]
    want = (plan * (x[0, :, None] - y[0]).square().sum(2) / 2).sum()
    assert float(sinkhorn.transport_cost(c, x, y)) == pytest.approx(float(want), abs=1e-10)
