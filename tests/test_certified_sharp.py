"""The bounds of certified results where they bite: what is left out is nearly what the tolerance
allows, and errors come within a few times of their bounds, which are asserted from both sides.
"""

from __future__ import annotations

import pytest
import torch
from test_certified import no_cloud_is_small, normal  # noqa: F401

import dfkernels as df
from dfkernels._torch import native
from dfkernels.certified.pytorch import search_in_pytorch

PATHS = ["PyTorch"] + ["compiled"] * native.available
N, D, EPS = 700, 512, 1e-3


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    if request.param == "PyTorch":
        monkeypatch.setattr("dfkernels.cloud.select_atoms", search_in_pytorch)


def shells(alpha, sigma, seed=0):
    """(cloud, x): an atom at the middle, and others around it at distances at which weights fall by
    a third of a tenth from one to the next; those that will be selected on one side, the others
    on the other.
    """
    logit = torch.cat([torch.zeros(1), -3 - 0.03 * torch.arange(N - 1)]).double()
    r = (-2 * logit).sqrt() * sigma / alpha
    u = normal(N, D, seed=seed, dtype=torch.float64)
    side = torch.where(torch.arange(N) < 250, -0.95, 0.6).double()
    u[:, 7] = 0
    u = u / u.norm(dim=1, keepdim=True) * (1 - side**2).sqrt()[:, None]
    u[:, 7] = side
    middle = sigma * normal(1, D, seed=seed + 1, dtype=torch.float64)
    y = middle + r[:, None] * u
    cloud = df.PointCloud(y)
    cloud.index(seed=seed)
    return cloud, alpha * middle


@pytest.mark.parametrize("alpha, sigma", [(0.9, 0.02), (0.9, 30.0), (-1.3, 1.0), (0.01, 0.5)])
def test_errors_come_near_their_bounds(alpha, sigma, path):
    cloud, x = shells(alpha, sigma)
    F = df.DiffusionFisher(x, cloud, alpha, sigma, tolerance=EPS)
    exact = df.DiffusionFisher(x, cloud, alpha, sigma)
    assert 0.1 * N <= int(F.atoms_read) <= 0.9 * N
    assert EPS / 3 <= float(F.dropped_mass) <= EPS
    v = torch.eye(D, dtype=torch.float64)[7:8]
    off = {
        "log_prob": (exact.log_prob - F.log_prob, F.log_prob_error),
        "mean": ((exact.denoised - F.denoised).norm(dim=1), F.mean_error),
        "F v": ((exact @ v - F @ v).norm(dim=1), F.fisher_error),
        "trace": ((exact.trace() - F.trace()).abs(), F.fisher_error),
    }
    ratio = {name: float(error / bound) for name, (error, bound) in off.items()}
    assert all(0.02 <= r <= 1 for r in ratio.values()), ratio


@pytest.mark.parametrize("alpha, sigma", [(0.9, 0.02), (0.9, 30.0), (-1.3, 1.0)])
def test_bounds_are_those_of_the_documents(alpha, sigma, path):
    """From dropped_mass and the furthest atom, found by looking at all: no less, and no more than
    R's triangle inequality costs.
    """
    cloud, x = shells(alpha, sigma, seed=2)
    F = df.DiffusionFisher(x, cloud, alpha, sigma, tolerance=EPS)
    R, ratio = (cloud.y - F.denoised).norm(dim=1).max(), alpha**2 / sigma**4
    assert torch.equal(F.log_prob_error, F.dropped_mass.log1p())
    assert 1 <= float(F.mean_error / (F.dropped_mass * R)) <= 2
    assert 1 <= float(F.fisher_error / (ratio * F.dropped_mass * R**2)) <= 4
