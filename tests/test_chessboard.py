"""The chessboard's closed form, against autograd, against its own density and against a large point
cloud."""

from __future__ import annotations

import math

import pytest
import torch
from tensors import rng

from dfkernels import DiffusionFisher, PointCloud
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.trace_matching import MatchedTrace
from experiments.reproduce import chessboard, table2
from experiments.reproduce.chessboard import sample, truth

LEVELS = [(1.0, 0.01), (1.0, 0.3), (1.0, 50.0), (0.3, 0.9)]


def noisy(n, alpha, sigma):
    x_0 = sample(n, rng(1), torch.float64)
    return alpha * x_0 + sigma * torch.randn(n, 2, dtype=torch.float64, generator=rng(2))


def test_samples_fill_the_eight_squares_evenly():
    x = sample(80_000, rng(), torch.float64)
    cell = ((x + 4) / 2).floor().long()
    assert bool(((cell >= 0) & (cell < 4)).all())
    assert bool(((cell[:, 0] + cell[:, 1]) % 2 == 0).all())
    counts = torch.bincount(4 * cell[:, 0] + cell[:, 1], minlength=16)
    assert int((counts > 0).sum()) == 8
    # five standard deviations
    assert (counts[counts > 0] - 10_000).abs().max() < 5 * math.sqrt(10_000)
    assert x.std(0).sub(chessboard.STD).abs().max() < 0.02
    assert torch.equal(x, sample(80_000, rng(), torch.float64))


@pytest.mark.parametrize("alpha, sigma", LEVELS)
def test_score_and_fisher_are_the_derivatives_of_the_density(alpha, sigma):
    x = noisy(200, alpha, sigma)

    def log_prob(x):
        return truth(x[None], alpha, sigma).log_prob[0]

    at = truth(x, alpha, sigma)
    score = torch.func.vmap(torch.func.grad(log_prob))(x)
    hessian = torch.func.vmap(torch.func.hessian(log_prob))(x)
    # autograd's own rounding: the derivatives cancel in numbers up to z^2 = 30 in units of 1/sigma
    assert (at.score - score).abs().max() * sigma < 1e-9
    assert (at.fisher + hessian).abs().max() * sigma**2 < 1e-8
    assert torch.equal(at.trace, at.fisher[:, 0, 0] + at.fisher[:, 1, 1])


def test_the_density_integrates_to_one():
    axis = torch.linspace(-8, 8, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    density = truth(grid, 1.0, 0.5).log_prob.exp()
    assert density.sum().item() * (axis[1] - axis[0]).item() ** 2 == pytest.approx(1, abs=1e-10)


def test_each_row_has_its_own_level():
    x = noisy(6, 0.4, 0.2)
    alpha, sigma = (
        torch.linspace(0.4, 1, 6, dtype=x.dtype),
        torch.linspace(0.2, 2, 6, dtype=x.dtype),
    )
    rows = [truth(x[i : i + 1], alpha[i].item(), sigma[i].item()).fisher for i in range(6)]
    assert torch.equal(truth(x, alpha, sigma).fisher, torch.cat(rows))


def test_a_large_point_cloud_agrees():
    """The op over atoms on a grid of the squares: the midpoint rule, exponentially accurate at this
    sigma."""
    side = (torch.arange(64, dtype=torch.float64) + 0.5) / 32
    square = torch.cartesian_prod(side, side)
    corners = [(2 * i - 4, 2 * j - 4) for i in range(4) for j in range(4) if (i + j) % 2 == 0]
    cloud = PointCloud(torch.cat([square + square.new_tensor(c) for c in corners]))
    x = noisy(50, 1.0, 0.4)
    at, atoms = truth(x, 1.0, 0.4), DiffusionFisher(x, cloud, 1.0, 0.4)
    # spacing h = 1/32: the rule's error at the edges is (h/sigma)^2/24 of the density's, 2.5e-4
    assert (at.log_prob - atoms.log_prob).abs().max() < 2e-3
    assert (at.score - atoms.score).abs().max() * 0.4 < 2e-3
    assert (at.trace - atoms.trace()).abs().max() * 0.4**2 < 5e-3


@pytest.mark.parametrize("sigma", [0.01, 0.3, 1.0, 50.0])
def test_table_2_measures_no_error_where_the_networks_are_exact(sigma):
    def at(x, t):
        return truth(x, 1.0, t.sqrt())

    def spread(x, t):
        return 2 - t * at(x, t).trace  # tr Cov_w(u)

    def eps(x, t):
        return -t.sqrt()[:, None] * at(x, t).score

    denoiser = Denoiser(eps, table2.SCHEDULE)
    exact = {
        "residual": lambda x, t: spread(x, t) / 2,
        "noise": lambda x, t: (spread(x, t) + eps(x, t).square().sum(1)) / 2,
        "paper": lambda x, t: (t * spread(x, t) + denoiser.denoised(x, t).square().sum(1)) / 2,
    }
    networks = table2.Networks(
        denoiser, {form: MatchedTrace(m, denoiser, form) for form, m in exact.items()}
    )
    row = table2.measured(networks, sigma, 300)
    assert row.off < 1e-12
    assert row.errors["vjp"] < 1e-9
    assert max(row.errors[form] for form in ("residual", "noise")) < 1e-9
    assert row.errors["paper"] < 1e-5  # |x|^2/sigma^4 against tr F: 1e-16 times 1e8 at sigma = 0.01
    # exact for a diagonal F: the edges are parallel to the axes, and far away F is isotropic
    assert (row.errors["hutchinson"] < 1e-3) == (sigma in (0.01, 50.0))
    off = Denoiser(lambda x, t: eps(x, t) + 0.1, table2.SCHEDULE)
    assert table2.measured(table2.Networks(off, networks.traces), sigma, 300).off == pytest.approx(
        0.1
    )


def test_table_2_checks_its_closed_form():
    assert table2.closed_form_gap() < 1e-12
