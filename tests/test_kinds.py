"""A new kind of sum brings all of its derivatives: nothing outside of its entry knows how many sums
there are."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from dfkernels.ops.common import derivatives, moments
from dfkernels.ops.common.moments import MomentKind


def _one(e, t):
    return (e.sum(1),)


def _two(e, t, v, a):
    return torch.einsum("bn,bnd->bd", e, t), a * torch.einsum("bn,bnd,bd->b", e, t, v)


def _five(e, t):
    square = (t * t).sum(-1)
    return (
        e.sum(1),
        (e * square).sum(1),
        (e * square**2).sum(1),
        (e**3).sum(1),
        torch.einsum("bn,bnd->bd", e, t**3),
    )


TOYS = {
    kind.name: kind
    for kind in (
        MomentKind("one", _one, lambda x: (x.shape[:1],)),
        MomentKind("two", _two, lambda x, v, a: (x.shape, a.shape), own=("v", "a")),
        MomentKind("five", _five, lambda x: (*[x.shape[:1]] * 4, x.shape)),
    )
}


@pytest.mark.parametrize("name", TOYS)
def test_a_kind_may_have_any_number_of_sums_and_tensors(name, monkeypatch):
    monkeypatch.setitem(moments.KINDS, name, TOYS[name])
    monkeypatch.setattr(derivatives, "TILE", 4)  # several tiles
    normal = lambda *shape, seed: torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    x, y, prior = normal(2, 2, seed=1), normal(3, 2, seed=2), normal(3, seed=3)
    level = torch.tensor([0.8, 1.1], dtype=torch.float64)
    kind = TOYS[name]
    tensors = [x, y, level, level + 0.2, prior, 0.1 * level, 0.1 * x]
    tensors += [0.5 * x, level][: len(kind.own)]
    direct = kind.on_tile(tensors, 1.0, 0.0)
    sums = derivatives.pair_sums(kind, tensors, derivatives.Stored())
    for got, want, shape in zip(sums, direct, kind.shapes_for(tensors), strict=True):
        assert got.shape == shape
        assert torch.allclose(got, want, rtol=1e-12)
    inputs = tuple(t.clone().requires_grad_(i not in (5, 6)) for i, t in enumerate(tensors))
    f = lambda *z: tuple(derivatives.pair_sums(kind, z, derivatives.Stored()))
    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(
        f, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True
    )
