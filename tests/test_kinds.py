"""A new kind of sum brings all of its derivatives: nothing outside of its entry knows how many sums
there are."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from dfkernels.ops.common import derivatives, moments
from dfkernels.ops.common.moments import Kind, X


def _number(z):
    return z[X].shape[:1]


def _vector(z):
    return z[X].shape


def _two(*z):
    e, t = moments._weights(*z)
    return e.sum(1), torch.einsum("bn,bnd->bd", e, t)


def _five(*z):
    e, t = moments._weights(*z)
    square = (t * t).sum(-1)
    return (
        e.sum(1),
        (e * square).sum(1),
        (e * square**2).sum(1),
        (e**3).sum(1),
        torch.einsum("bn,bnd->bd", e, t**3),
    )


TOYS = {
    "two": Kind(_two, "qaqqaqq", (_number, _vector)),
    "five": Kind(_five, "qaqqaqq", (_number, _number, _number, _number, _vector)),
}


@pytest.mark.parametrize("name", TOYS)
def test_a_kind_needed_three_or_four_sums(name, monkeypatch):
    monkeypatch.setitem(moments.KINDS, name, TOYS[name])
    monkeypatch.setattr(derivatives, "TILE", 4)  # several tiles
    normal = lambda *shape, seed: torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    x, y, prior = normal(2, 2, seed=1), normal(3, 2, seed=2), normal(3, seed=3)
    level = torch.tensor([0.8, 1.1], dtype=torch.float64)
    tensors = [x, y, level, level + 0.2, prior, 0.1 * level, 0.1 * x]
    direct = TOYS[name].sums(*tensors)
    for got, want in zip(derivatives.pair_sums(name, tensors, 1.0, 0.0), direct, strict=True):
        assert torch.allclose(got, want, rtol=1e-12)
    inputs = tuple(t.clone().requires_grad_(i < 5) for i, t in enumerate(tensors))
    f = lambda *z: tuple(derivatives.pair_sums(name, z, 1.0, 0.0))
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(
        f, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True
    )
