"""What the NSGF experiment measures by: distances against their definitions, the scales of its
sets, and the loop that it re-enacts."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("sklearn", reason="needs the extra: pip install dfkernels[demo]")
pytest.importorskip("matplotlib", reason="needs the extra: pip install dfkernels[demo]")

from experiments.reproduce import nsgf_errata as errata
from experiments.reproduce.nsgf_metrics import energy_distance, planar_energy_distance, wasserstein
from experiments.reproduce.nsgf_sets import SETS


def rng(seed):
    return torch.Generator().manual_seed(seed)


def test_the_assignment_of_a_set_to_itself_moved_is_the_move():
    x = torch.randn(40, 3, generator=rng(0), dtype=torch.float64)
    move = torch.tensor([3.0, -4.0, 0.0], dtype=torch.float64)
    assert wasserstein(x, x[torch.randperm(40, generator=rng(1))] + move) == pytest.approx(5)


def test_energy_distances_are_their_definition():
    """By sorting and directions as by all pairs; and a closed form: two points, one apart."""
    x = torch.randn(300, 2, generator=rng(0), dtype=torch.float64)
    y = torch.randn(200, 2, generator=rng(1), dtype=torch.float64) * 0.6 + 1
    direct = energy_distance(x, y)
    mean = lambda a, b: (a[:, None] - b).norm(dim=2).mean()
    assert direct == pytest.approx(float(2 * mean(x, y) - mean(x, x) - mean(y, y)), rel=1e-9)
    assert planar_energy_distance(x, y) == pytest.approx(direct, rel=2e-3)
    one, other = torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])
    assert energy_distance(one, other) == 2
    assert planar_energy_distance(one, other) == pytest.approx(2, rel=2e-3)


@pytest.mark.parametrize("name", SETS)
def test_sets_have_the_spread_that_sets_their_blur(name):
    y = SETS[name].target(20_000, rng(0))
    assert y.shape == (20_000, 2) and y.dtype == torch.float32
    std = (y - y.mean(0)).square().mean().sqrt().item()
    assert std == pytest.approx(SETS[name].std, rel=0.02) and SETS[name].blur == SETS[name].std / 4


def test_a_long_schedule_converges_to_the_velocity():
    """The re-enacted loop is Sinkhorn's: the finer its schedule, the smaller its error, which ours
    is told from."""
    levels = errata.schedule(8.0, 0.5, 0.5)
    assert levels == [64, 64, 16, 4, 1, 0.25]
    assert errata.schedule(8.0, 0.5, 0.9)[-2] > 0.25
    rows = errata.unconverged(48)
    errors = [r.velocity_error for r in rows]
    assert errors[:-1] == sorted(errors[:-1], reverse=True) and errors[0] > 0.1
    assert 10 * errors[-1] < errors[-2] and rows[-1].marginal_error <= 1e-4


@pytest.mark.slow
def test_particles_arrive_at_step_one_and_not_at_two():
    rows = {(r.blur, r.eta): r.distance for r in errata.step_sizes(48)}
    assert rows[0.5, 1.0][-1] < 0.2 * rows[0.5, 1.0][0]
    assert rows[0.5, 2.0][-1] > 0.7 * rows[0.5, 2.0][0]
    assert math.isclose(rows[0.5, 1.0][0], rows[2.0, 1.0][0])
    signs = errata.signs(48, 0.4, 5)
    assert signs.along < signs.start < signs.against
