"""Atoms that are masked, whatever they hold, and atoms that are very far from all others: the
certificate holds, and the search stays as good as without them. Queries are searched for one by
one.
"""

from __future__ import annotations

import math

import pytest
import torch
from test_certified import EPS, gaussian, normal, queries

from dfkernels._torch import native
from dfkernels.certified import select_atoms
from dfkernels.certified.build import build_index
from dfkernels.certified.pytorch import search_in_pytorch
from dfkernels.certified.reference import logits

PATHS = {"PyTorch": search_in_pytorch} | ({"compiled": select_atoms.op} if native.available else {})
N, D = 600, 160
both_paths = pytest.mark.parametrize("path", PATHS)


def found(path, x, y, alpha, sigma, prior=None, of=None, gap=None, k=1):
    level = lambda a: torch.as_tensor(a, dtype=x.dtype).expand(len(x)).contiguous()
    masked = None if prior is None else prior == -math.inf
    of = build_index(y, 1.0, 0.0, 0, masked) if of is None else of
    gap = math.log(len(y) / EPS) if gap is None else gap
    return PATHS[path](x, y, level(alpha), level(sigma), prior, 1.0, 0.0, *of, gap, k)


def lists(found):
    atoms, counts, _ = found
    return atoms.split(counts.clamp_min(0).tolist())


def certified(out, x, y, alpha, sigma, prior=None):
    level = lambda a: torch.as_tensor(a, dtype=torch.float64).expand(len(x))
    w = logits(x.double(), y.double(), level(alpha), level(sigma), prior, 1.0, 0.0).softmax(1)
    for b, (rows, n) in enumerate(zip(lists(out), out[1].tolist(), strict=True)):
        if n >= 0:
            left = torch.ones(len(y), dtype=torch.bool).index_fill(0, rows, False)
            assert float(w[b, left].sum()) <= float(out[2][b]) * (1 + 1e-9) + 1e-15
            assert float(out[2][b]) <= EPS


@both_paths
@pytest.mark.parametrize("held", [math.nan, math.inf, -math.inf, 1e38, -3e38])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_masked_atoms_may_hold_anything(held, share, path):
    """The same lists and the same bounds as without them, up to their numbering."""
    y, prior = gaussian(N, D), normal(N, seed=2)
    masked = torch.rand(N, generator=torch.Generator().manual_seed(0)) < share
    masked[0], masked[-1] = True, False
    y[masked], prior[masked] = held, -math.inf
    few = (~masked).nonzero()[:, 0]
    x = queries(y[few], 0.05, "noisy", B=9)
    of = build_index(y, 1.0, 0.0, 0, masked)
    alone = build_index(y[few], 1.0, 0.0)
    assert torch.isfinite(of.limits).all() and torch.isfinite(of.atom_norm).all()
    for both in zip(of.named_limits[1:3], alone.named_limits[1:3], strict=True):
        assert float(both[0]) <= 1.01 * float(both[1])
    out = found(path, 0.9 * x, y, 0.9, 0.05, prior, of)
    assert int(out[1].min()) >= 1 and int(out[1].max()) <= len(few)
    assert not bool(masked[out[0]].any())
    clean = torch.where(masked[:, None], 0.0, y)
    certified(out, 0.9 * x, clean, 0.9, 0.05, prior.double())


@both_paths
def test_an_index_of_a_mask_serves_another_mask(path):
    """Of what it knows nothing it says so: all atoms are taken."""
    y, prior = gaussian(N, D), normal(N, seed=2)
    prior[::7] = -math.inf
    of, x = build_index(y, 1.0, 0.0, 0, prior == -math.inf), queries(y, 0.05, "noisy", B=9)
    assert found(path, x, y, 1.0, 0.05, None, of)[1].tolist() == [-1] * 9
    prior[3] = -math.inf  # one more
    out = found(path, x, y, 1.0, 0.05, prior, of)
    assert sorted(out[1].tolist())[1] >= 1  # one may be in a crowd
    certified(out, x, y, 1.0, 0.05, prior.double())


@both_paths
@pytest.mark.parametrize("far", [1e3, 1e6, 1e12, 1e20, 3e38])
@pytest.mark.parametrize("many", [1, 8])
def test_a_few_far_atoms_do_not_end_the_search(far, many, path):
    y = gaussian(N, D)
    x = queries(y, 0.05, "noisy", B=9)
    plain = [len(a) for a in lists(found(path, x, y, 1.0, 0.05))]
    y[5 : 5 + many] = far * normal(many, D, seed=4).sign()
    of = build_index(y, 1.0, 0.0)
    assert int(of.named_limits.remote_count) == many and float(of.named_limits.radius) <= 10.0
    out = found(path, x, y, 1.0, 0.05, None, of)
    counts = [len(a) for a in lists(out)]
    assert int(out[1].min()) >= 1 and sum(counts) <= 1.2 * sum(plain) + 9
    certified(out, x, y, 1.0, 0.05)


@both_paths
def test_a_query_near_a_far_atom_takes_all(path):
    y = gaussian(N, D)
    y[7] *= 1e6
    x = torch.cat([y[7:8] + 0.1 * normal(1, D), y[:1], y[7:8] / 2])
    out = found(path, x, y, 1.0, 0.1)
    assert (out[1] >= 0).tolist() == [False, True, False]
    much = found(path, x[1:2], y, 1.0, 1e6)  # so much noise that the far atom counts
    certified(much, x[1:2], y, 1.0, 1e6)
    nothing = found(path, x, y, 0.0, 0.1)  # all weigh the same
    assert nothing[1].tolist() == [-1] * 3


@both_paths
def test_far_atoms_count_by_their_size_in_what_is_dropped(path):
    """So that dropped_mass times the radius of the others bounds what they add to the mean and the
    covariance: one that is heavy, but for its distance, and that is just dropped.
    """
    y, ratio, prior = gaussian(N, D), [], torch.full((N,), -60.0)
    prior[:12] = 0.0
    y[9] = 64 * y.norm(dim=1).max() * torch.eye(D)[3]
    of, x, mask = build_index(y, 1.0, 0.0), torch.zeros(1, D), torch.arange(N) == 9
    assert int(of.named_limits.remote_count) == 1
    for sigma in torch.linspace(40, 80, 41).tolist():
        atoms, counts, dropped = found(path, x, y, 1.0, sigma, prior, of, math.log(N / 0.5))
        w = logits(x, y, torch.ones(1), torch.full((1,), sigma), prior, 1.0, 0.0).softmax(1)[0]
        if int(counts) >= 0 and 9 not in atoms.tolist():
            mean = (w[atoms, None] * y[atoms].double()).sum(0) / w[atoms].sum()
            R = float((mean - of.centre).norm() + of.named_limits.radius)
            ratio.append(float(w[mask] * (y[9] - mean).square().sum()) / float(dropped) / R**2)
    assert 0.02 <= max(ratio) <= 1


@both_paths
@pytest.mark.parametrize("order", ["one after another", "sorted", "shuffled"])
def test_each_query_is_searched_for_by_itself(order, path):
    """What is read for a query in little noise does not depend on how noisy the queries beside it
    are."""
    y = gaussian(N, D)
    noisy = torch.arange(24) % 8 == 7
    x, sigma = queries(y, 0.05, "noisy", B=24), torch.where(noisy, 60.0, 0.05)
    places = {
        "one after another": torch.arange(24),
        "sorted": sigma.argsort(stable=True),
        "shuffled": torch.randperm(24, generator=torch.Generator().manual_seed(0)),
    }[order]
    alone = found(path, x, y, 1.0, 0.05)
    mixed = found(path, x[places], y, 1.0, sigma[places])
    for at, place in enumerate(places.tolist()):
        if not noisy[place]:
            assert torch.equal(lists(mixed)[at], lists(alone)[place])
            assert float(mixed[2][at]) == pytest.approx(float(alone[2][place]), rel=1e-9)
        elif path == "compiled":
            assert int(mixed[1][at]) == -1


@both_paths
@pytest.mark.parametrize("held", [math.nan, math.inf])
def test_masked_atoms_are_not_among_the_heaviest_where_fewer_have_weight_than_are_asked_for(
    held, path
):
    y, prior = gaussian(N, D), torch.full((N,), -math.inf)
    few = torch.tensor([5, 400])
    prior[few] = torch.tensor([0.0, 1.0])
    y[prior == -math.inf] = held
    out = found(path, queries(y[few], 0.05, "noisy", B=4), y, 1.0, 0.05, prior, gap=0.0, k=5)
    for rows, n in zip(lists(out), out[1].tolist(), strict=True):
        assert n < 0 or set(few.tolist()) <= set(rows.tolist())
