"""The instruments of the Langevin experiment: angles, distances and divergences of known cases."""

from __future__ import annotations

import math

import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra: pip install dfkernels[demo]")

from dfkernels.methods import ancestral
from dfkernels.methods.grid import time_grid
from dfkernels.schedule import EDM
from experiments.reproduce import langevin, langevin_published, langevin_steps
from experiments.reproduce.langevin_chains import draws

f64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


def test_turned_vectors_have_the_sine_and_the_norm():
    n, sines = normal(5, 40), torch.tensor([0.0, 1e-6, 0.1, 0.9, 1.0], dtype=f64)
    other = langevin_published.turned(n, sines, torch.Generator().manual_seed(1))
    found, rest = langevin_published.sine(n, other)
    torch.testing.assert_close(found, sines, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rest, 1 - (1 - sines**2).sqrt(), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(other.norm(dim=1), n.norm(dim=1))


def test_kappa_is_an_extrapolation_that_jumps():
    found = langevin_published.extrapolation()
    for one in found:
        assert one.angle == pytest.approx(one.predicted, abs=1e-5)
    by = {one.kappa: one.angle for one in found}
    assert by[1e-9] < 1 < 60 < by[1e-6] and by[0.5] == pytest.approx(45, abs=5)


def test_divergences_of_one_atom_and_of_two():
    """Of one atom every step is Gaussian: none is lost. Of two, only the full covariance lacks
    nothing but what is not Gaussian."""
    t = time_grid(EDM(), 3, (0.5, 20.0))
    for value in langevin_steps.divergence(normal(1, 8), t, 50).values():
        assert value == pytest.approx(0, abs=1e-9)
    two = langevin_steps.divergence(2 * normal(2, 8), t, 2000)
    assert tuple(two) == ancestral.COVARIANCES
    assert 0 < two["full"] < two["diagonal"] < two["isotropic"] < two["none"]


def test_energy_distance_of_shifted_draws():
    """In units of the deviation, 2 E|a - b| - E|a - a'| - E|b - b'| is 0 for equal laws, and 2 |m|
    minus what is lost within for sets that are far apart."""
    turn = langevin_steps.turn()
    y = langevin_steps.STD * normal(200, 8) @ turn
    reference = langevin_steps.Reference.of(draws(y, 400, 0.3, 1), turn)
    near, far = draws(y, 400, 0.3, 2), draws(y, 400, 0.3, 2) + 1e6
    assert abs(reference.energy_distance(near)) < 0.05
    shift = (1e6 * torch.ones(8, dtype=f64) @ reference.back).norm().item()
    assert reference.energy_distance(far) == pytest.approx(2 * shift, rel=1e-4)


def test_slopes_and_steps_needed():
    rows = [
        langevin_steps.Steps(n, {"a": 1 / n, "b": abs(math.sin(n))}, {}, {"a": n**-2.0})
        for n in (1, 2, 4, 8)
    ]
    assert langevin.slope(rows, "a") == pytest.approx(-2)
    assert [langevin.needed(rows, "a", d) for d in (2, 0.3, 0.1)] == [1, 4, 0]
    assert langevin.needed(rows, "b", 0.8) == 4 or math.sin(8) > 0.8
