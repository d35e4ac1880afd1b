"""Atoms of no weight, masked or far away: whatever they hold, no value of a data-set op sees
them."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DATA_OPS, ORDER, _normal
from data_ops import inputs, run

# One shape for every way through the launchers: B, d, sigma and ops.
WAYS = {
    "one query": (1, 20, 1.0, DATA_OPS),
    "few, by differences": (3, 20, 0.3, DATA_OPS),
    "few, by products": (3, 20, 9.0, DATA_OPS),
    "many, by differences": (17, 20, 0.3, DATA_OPS[:1]),
    "many, by products": (17, 20, 9.0, DATA_OPS[:1]),
    "a target per thread": (64, 3, 1.0, DATA_OPS[:1]),
}


@pytest.mark.parametrize("way", WAYS)
def test_atoms_of_no_weight_are_not_seen(way):
    """Masked atoms that hold nan, inf and 1e38: they were multiplied by 0, which leaves nan. And
    atoms of log weight -200, too little to change the others' in float32, so far away that their
    squares overflow. All of them, against a cloud in which all are masked and none is odd.
    """
    B, d, sigma, ops = WAYS[way]
    p = inputs(B, 12, d, sigma, 0.0)
    p["x"] = p["alpha"][:, None] * p["y"][1] + p["sigma"][:, None] * _normal(7)(B, d).float()
    odd = {"y": p["y"].clone(), "log_prior": p["log_prior"].clone()}
    odd["y"][::5] = torch.tensor([[math.nan], [math.inf], [1e38]])  # masked by `inputs`
    if sigma < 9:  # one far atom, and no query takes products
        odd["y"][2::5] = torch.tensor([[1e20], [-1e38]])
    odd["log_prior"][2::5], p["log_prior"][2::5] = -200.0, -math.inf
    for op in ops:
        want, got = (run(op, *[q[k] for k in ORDER["posterior"]], q["v"]) for q in (p, p | odd))
        for w, g in zip(want, got, strict=True):
            assert float((g - w).abs().max()) <= 1e-5 * float(w.abs().max()), op
