"""What the experiment and the benchmark of particle flows rest on."""

from __future__ import annotations

import math

import pytest
import torch
from tensors import normal
from test_particles import some

from dfkernels.methods.particles import KL, Flow

f64 = torch.float64


def test_the_dual_bound_of_a_distance_is_the_exact_one():
    """Against a linear program over all pairs; never above it."""
    optimize = pytest.importorskip("scipy.optimize", reason="needs the extra: demo")
    pytest.importorskip("matplotlib", reason="needs the extra: demo")
    from experiments.reproduce.particles_laws import wasserstein

    x, y = normal(6, 2, seed=0), normal(30, 2, seed=1) + 0.5
    w = normal(6, seed=2).softmax(0)
    costs = torch.cdist(x, y).square()
    rows = torch.kron(torch.eye(6, dtype=f64), torch.ones(1, 30, dtype=f64))
    columns = torch.kron(torch.ones(1, 6, dtype=f64), torch.eye(30, dtype=f64))
    marginals = torch.cat([w, torch.full((30,), 1 / 30, dtype=f64)])
    exact = optimize.linprog(
        costs.flatten().numpy(), A_eq=torch.cat([rows, columns]).numpy(), b_eq=marginals.numpy()
    ).fun
    found = wasserstein(x, w, y) ** 2
    assert exact - 2e-3 <= found <= exact + 1e-9
    assert wasserstein(y, torch.full((30,), 1 / 30), y) <= 1e-5
    line = torch.tensor([[0.0], [4.0]], dtype=f64)
    found = wasserstein(line, torch.tensor([0.25, 0.75]), torch.tensor([[0.0], [1.0]], dtype=f64))
    assert found**2 == pytest.approx(0.25 * 16 + 0.5 * 9, rel=1e-3)


def test_what_the_experiment_checks_would_fail():
    pytest.importorskip("sklearn", reason="needs the extra: demo")
    from experiments.reproduce import particles_checks as checks

    found = checks.run()
    assert all(claim.holds and claim.check for claim in checks.claims(found))
    assert found.gfsd > 0.05 and found.linear < -0.1 and math.isinf(found.far[0])
    law = checks.modes_in_ten()
    x = torch.full((1, 10), 30.0, dtype=f64)
    want = (30 - 1.2) ** 2 * 10 / 2 - math.log(2 / 3)
    assert -float(law.log_density(x)) == pytest.approx(want) == pytest.approx(found.far[1])


def test_the_benchmarks_peer_takes_the_same_step():
    from bench import particles as bench

    p = some(30, 4)
    flow = Flow(KL(bench.log_target), bench.TAU, None, weight_rate=bench.RATE)
    x, log_w = bench.pairs_step(p.x, p.log_w)
    found = flow.step(p)
    assert torch.allclose(found.x, x, rtol=0, atol=1e-13)
    assert torch.allclose(found.log_w, log_w, rtol=0, atol=1e-13)
