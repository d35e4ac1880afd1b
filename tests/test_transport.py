"""The optimal-transport test: the statistic, the numbers of Table 3 by each convention, the
schedule-free identity, the cases that are Monge maps, and what it says to bad input.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

import dfkernels as df
from dfkernels.methods.grid import time_grid
from dfkernels.methods.transport import CONVENTIONS, TransportTest, asymmetry, transport_test
from dfkernels.schedule import EDM, VE, VP, SubVP
from experiments.reproduce import table3

f64 = torch.float64
STARTS = torch.randn(4096, 2, dtype=f64, generator=torch.Generator().manual_seed(0))


def cloud(y):
    return df.PointCloud(torch.as_tensor(y, dtype=f64))


def largest(a, b):
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.mark.parametrize(
    "A, want",
    [
        ([[1.0, 2.0], [2.0, 5.0]], 0.0),
        ([[3.0, 0.0], [0.0, -1.0]], 0.0),
        ([[1.0, 4.0], [0.0, 1.0]], 1.0),
        ([[7.0, 2.0], [-2.0, 1.0]], math.sqrt(2)),
        ([[0.0, 3.0, 0.0], [3.0, 0.0, 2.0], [0.0, 0.0, 0.0]], math.sqrt(4 / 22)),
    ],
)
def test_asymmetry_by_hand(A, want):
    """|A0 - A0^T| / (sqrt(2) |A0|), blind to the diagonal and to scale, 0 where A0 = 0."""
    A = torch.tensor([A], dtype=f64)
    assert abs(asymmetry(A).item() - want) <= 1e-15
    assert abs(asymmetry(1e-200 * A).item() - want) <= 1e-15


def test_summary_by_hand():
    A = torch.eye(2, dtype=f64).expand(5, 2, 2)
    odd = torch.tensor([0.0, 1e-9, 0.3, 0.1, 0.0], dtype=f64)
    least = torch.tensor([1.0, 0.5, 1.0, -0.2, -0.1], dtype=f64)
    test = TransportTest(A[:, 0], A, odd, odd, least)
    assert test.monge().tolist() == [True, True, False, False, False]
    s = test.summary()
    assert (s.median, s.low, s.high, s.smallest, s.monge) == (1e-9, 0.0, 0.3, -0.2, 0.4)
    assert abs(s.mean - 0.08) <= 1e-9 and abs(s.error - math.sqrt(0.0136 / 5)) <= 1e-9
    assert test.summary(tolerance=0.0).monge == 0.2
    with pytest.raises(ValueError, match="summary: expected at least one chain, got 0"):
        TransportTest(*[a[:0] for a in test]).summary()


def published(convention):
    grid = table3.published_grid()
    return {
        name: 100 * table3.chains(table3.NON_AFFINE, name, convention, STARTS, grid).summary().mean
        for name in table3.PUBLISHED
    }


def test_authors_numbers():
    """Their code's numbers for M = 1000, averaged over chains; 4096 chains know the mean to 0.4."""
    want = {"VE": 25.1, "VP": 23.7, "sub-VP": 16.0, "EDM": 25.0}
    got = published("authors")
    assert max(abs(got[name] - want[name]) for name in want) <= 1.5
    # these chains' own, by either path
    here = {
        "VE": 24.60,
        "VP": 23.41,
        "sub-VP": 15.68,
        "EDM": 24.51,
    }
    assert max(abs(got[name] - here[name]) for name in here) <= 0.05


def test_slides_numbers():
    """Line 6 as printed: EDM passes as a Monge map by A + A^T."""
    want = {"VE": 2.5, "VP": 4.6, "sub-VP": 10.2, "EDM": 0.0}
    got = published("slide")
    assert max(abs(got[name] - want[name]) for name in want) <= 0.5
    assert got["EDM"] < 1e-3


def test_true_jacobian_is_the_same_for_every_schedule_at_equal_levels():
    """Everything depends on (x/alpha, sigma/alpha): not only in the limit, DDIM's own map too."""
    tests = []
    for schedule in (
        VE(),
        EDM(),
        VP(),
        SubVP(),
        table3.ScaledLinearVP(),
        table3.ScaledLinearSubVP(),
    ):
        t = time_grid(schedule, 300, (0.03, 10.0))
        alpha, _ = schedule(t)
        test = transport_test(cloud(table3.NON_AFFINE), schedule, t, x=10 * alpha[0] * STARTS[:200])
        tests.append((test, alpha[-1] / alpha[0]))
    first, _ = tests[0]
    assert 0.1 < first.summary().mean < 0.5
    for test, shrink in tests[1:]:
        # rounding, amplified near the borders between basins
        assert largest(test.A, first.A) <= 1e-6
        assert largest(test.log_norm - shrink.log(), first.log_norm) <= 1e-6


def test_fine_steps_agree_between_time_grids():
    """VE and EDM, uniform in their own t: the gap falls with the step."""
    gaps = []
    for steps in (500, 4000):
        ve, edm = (
            transport_test(
                cloud(table3.NON_AFFINE), s, time_grid(s, steps, (0.03, 1.0), "time"), x=STARTS
            )
            for s in (VE(), EDM())
        )
        gaps.append(abs(ve.summary().mean - edm.summary().mean))
    assert gaps[1] < 0.3 * gaps[0] and gaps[1] < 1e-3


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", table3.PUBLISHED)
def test_monge_maps_are_recognised(name, convention):
    """Atoms on a line, on the axes and turned; one atom; one Gaussian: symmetric; the true map
    positive."""
    grid = table3.published_grid()
    for y in table3.ON_LINES.values():
        test = table3.chains(y, name, convention, STARTS[:300], grid)
        assert float(test.asymmetry.max()) <= 1e-12
        if convention == "jacobian":
            assert bool(test.monge().all())
    assert table3.chains(table3.AFFINE, name, convention, STARTS[:300], grid).asymmetry.max() == 0
    assert table3.gaussian_asymmetry(name, convention) <= 1e-12


def test_a_turn_is_not_a_monge_map():
    test = table3.chains(table3.NON_AFFINE, "EDM", "jacobian", STARTS, table3.published_grid())
    symmetric = (test.A + test.A.mT) / 2
    assert largest(test.smallest, torch.linalg.eigvalsh(symmetric).amin(1)) == 0
    assert 0 < int((test.smallest < 0).sum()) < 100
    assert test.summary().monge < 0.01


def test_starts():
    """x_M ~ N(0, sigma_M^2 I), by the generator; events of any rank; float32 where x is."""
    y = torch.randn(5, 2, 3, dtype=f64, generator=torch.Generator().manual_seed(1))
    t = time_grid(EDM(), 4, (2.99, 3.0))
    draw = lambda: transport_test(
        cloud(y), EDM(), t, chains=2000, generator=torch.Generator().manual_seed(2)
    )
    first, second = draw(), draw()
    assert first.x.shape == (2000, 2, 3) and first.A.shape == (2000, 6, 6) and first.x.dtype == f64
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert abs(float(first.x.std()) - 3) < 0.1
    given = transport_test(cloud(y), EDM(), t, x=torch.zeros(3, 2, 3))
    assert given.A.dtype == torch.float32 and given.smallest.shape == (3,)
    assert [len(a) for a in transport_test(cloud(y), EDM(), t, chains=0)] == [0] * 5


def test_stored_atoms_and_weights_count():
    """uint8 atoms with scale and offset, and a log prior, are those of the cloud."""
    y = torch.tensor([[0, 255], [128, 10], [7, 99]], dtype=torch.uint8)
    prior = torch.tensor([0.0, -1.0, 2.0])
    t = time_grid(VP(), 20, (0.1, 5.0))
    stored = df.PointCloud(y, prior, scale=2 / 255, offset=-1)
    plain = df.PointCloud(y.double() * 2 / 255 - 1, prior)
    a, b = (transport_test(c, VP(), t, x=STARTS[:20]) for c in (stored, plain))
    assert largest(a.A, b.A) <= 1e-12
    uniform = transport_test(df.PointCloud(plain.y), VP(), t, x=STARTS[:20])
    assert largest(a.A, uniform.A) > 1e-3


BAD = {
    "cloud": (
        {"cloud": table3.AFFINE},
        TypeError,
        "cloud: expected a PointCloud, a ShardedCloud or a GaussianMixture, got Tensor",
    ),
    "convention": (
        {"convention": "eq22"},
        ValueError,
        "convention: expected 'jacobian' or 'authors' or 'slide', got 'eq22'",
    ),
    "sigma": (
        {"t": torch.tensor([1.0, 0.5, 0.0])},
        ValueError,
        "t: expected sigma > 0 at every node, got sigma = 0 at t = 0 of EDM()",
    ),
    "alpha": (
        {"schedule": df.schedule.RectifiedFlow(), "t": torch.tensor([0.0, 0.5])},
        ValueError,
        "t: expected alpha > 0 at every node, got alpha = 0 at t = 0 of RectifiedFlow()",
    ),
    "order": (
        {"t": torch.tensor([0.1, 1.0])},
        ValueError,
        (
            "t: expected noise sigma/alpha that strictly falls from node to node, got 0.1 at t ="
            " 0.1, then 1 at"
        ),
    ),
    "chains": ({"chains": -1}, ValueError, "chains: expected an integer of at least 0, got -1"),
    "chains beside x": (
        {"x": STARTS, "chains": 3},
        ValueError,
        "chains: expected None with x, which are the starts, got 3",
    ),
    "generator beside x": (
        {"x": STARTS, "generator": torch.Generator()},
        ValueError,
        "generator: expected None with x, which are the starts, got a Generator",
    ),
    "x list": ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
    "x shape": (
        {"x": torch.zeros(4, 3)},
        ValueError,
        "y: expected shape [N, 3] to go with x of shape [4, 3], got [3, 2]",
    ),
    "x nan": (
        {"x": torch.tensor([[0.0, math.nan]])},
        ValueError,
        "x: expected finite values, got nan at index [0, 1]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_errors(name):
    change, error, message = BAD[name]
    args = {
        "cloud": cloud(table3.AFFINE),
        "schedule": EDM(),
        "t": torch.tensor([1.0, 0.5]),
        **change,
    }
    with pytest.raises(error, match=re.escape(message)):
        transport_test(**args)


def test_an_x_that_requires_grad_is_loud():
    with pytest.raises(NotImplementedError, match="transport_chain has no derivatives"):
        transport_test(
            cloud(table3.AFFINE), EDM(), torch.tensor([1.0, 0.5]), x=STARTS.clone().requires_grad_()
        )


@pytest.mark.parametrize("schedule", [table3.ScaledLinearVP(), table3.ScaledLinearSubVP()])
def test_scaled_linear_schedules(schedule):
    """alpha^2 is diffusers' alphas_cumprod to a step's error; f and g2 belong to alpha and
    sigma."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=f64) ** 2
    t = torch.arange(1000, dtype=f64) / 1000
    assert largest(schedule.alpha(t) ** 2, torch.cumprod(1 - beta, 0)) <= 2e-3
    assert largest(schedule.t_of_log_snr(schedule.log_snr(t[1:])), t[1:]) <= 1e-9
    u = t[1:-1].clone().requires_grad_()
    f = torch.autograd.grad(schedule.alpha(u).log().sum(), u)[0]
    growth = torch.autograd.grad((schedule.sigma(u) ** 2).sum(), u)[0]
    u = u.detach()
    assert largest(schedule.f(u), f) <= 1e-9
    assert largest(schedule.g2(u), growth - 2 * f * schedule.sigma(u) ** 2) <= 1e-9


def test_the_published_sub_vp_is_inconsistent():
    """VP's sigma, and g2 = beta (1 - exp(-2 int)) with the first and the last linear beta
    swapped."""
    odd, vp = table3.PublishedSubVP(), table3.ScaledLinearVP()
    t = torch.tensor([0.25, 0.5], dtype=f64)
    assert torch.equal(odd.sigma(t), vp.sigma(t))
    root = math.sqrt(0.85) + (t + 0.001) * (math.sqrt(12) - math.sqrt(0.85))
    want = root**2 * (1 - torch.exp(-2 * 12 * t - (0.85 - 12) * t**2))
    assert largest(odd.g2(t), want) <= 1e-12


def test_published_grid():
    """diffusers' "linspace" spacing of its 1000 steps, over 1000; the last is 1e-6 for 0."""
    for M in (7, 20, 1000):
        steps = np.linspace(0, 999, M).round()[::-1].copy()
        assert (
            largest(1000 * table3.published_grid(M), torch.from_numpy(steps).clamp(min=1e-3))
            <= 1e-12
        )
