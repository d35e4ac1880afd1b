"""The launchers with lists of atoms, on CPU tensors: all queries in one launch, each with its own
atoms."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, _normal
from difference import far

from dfkernels.ops.average import triton as average
from dfkernels.ops.common.triton import about_mean, launch, logits
from dfkernels.ops.fisher_dense.triton import takes_products
from tools.op_table import DATA_OPS, TABLE

# queries, atoms, d, vectors of each; a whole row at once, and as if no program held a row
SHAPES = {"small d": (3, 9, 2, 1), "whole rows": (3, 40, 17, 2), "in blocks": (2, 12, 20, 2)}
BLOCKS = launch.Tile(16, 4, 1, COORD_AXIS=2, STAGES=1, warps=4, logits_given=True, strip=2)


@pytest.fixture(autouse=True)
def many_splits(monkeypatch):
    """Splits of one tile already where there are few atoms."""
    monkeypatch.setattr(launch, "MAX_TILES", 1)


@pytest.fixture
def in_blocks(monkeypatch):
    few = {"D": 16, "ATOMS": 4, "STRIP": 1}
    monkeypatch.setattr(launch, "tile_for", lambda *shape: BLOCKS)
    monkeypatch.setattr(logits, "difference_sizes", lambda targets: {"TARGETS": targets, **few})


def problem(B, N, d, K, seed=0, dtype=torch.float64):
    """One list has all atoms, the first one a single atom; a fifth of the atoms are masked and hold
    NaN, in lists as well, and so do those of no list."""
    normal = _normal(seed + d)
    y, log_prior = normal(N, d), normal(N)
    wanted = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) < 0.4
    wanted[0], wanted[1], wanted[:, 1] = False, True, True
    wanted[:, 3] = False
    log_prior[4::5] = -math.inf
    x = y[torch.arange(B) * 5 % N] + normal(B, d)
    sigma = 0.8 + normal(B).abs() + 0.1 * d**0.5
    y[4::5], y[3] = math.nan, math.nan
    tensors = {"x": x, "y": y, "v": normal(B, K, d), "alpha": 0.9 + 0.1 * normal(B)}
    tensors |= {"sigma": sigma, "log_prior": log_prior}
    lists = wanted.nonzero()[:, 1].contiguous(), wanted.sum(1)
    return {k: t.to(dtype) for k, t in tensors.items()}, lists


def arguments(op, p):
    names = TABLE[op].arguments
    return [p[k] for k in names if k in p]


def run(op, p, lists):
    out = TABLE[op].launch(*arguments(op, p), 1.0, 0.0, *lists, **TABLE[op].launch_options[0])
    return out if isinstance(out, tuple) else (out,)


def wanted(op, p, lists):
    """By the reference, each query with its own atoms alone."""
    clean = {k: t.double() if k != "y" else t.double().nan_to_num() for k, t in p.items()}
    tensors = {k: clean[k] for k in TABLE[op].arguments}
    return Case(op, "lists", tensors, {"atoms": lists[0], "counts": lists[1]}).run(reference=True)


CASES = [
    (op, shape) for op in DATA_OPS for shape in SHAPES if op != "fisher_dense" or shape == "small d"
]


@pytest.mark.parametrize("op, shape", CASES)
def test_as_with_its_own_atoms_alone(op, shape, request):
    """1e-12 in float64."""
    if shape == "in blocks":
        request.getfixturevalue("in_blocks")
    p, lists = problem(*SHAPES[shape])
    for got, want in zip(run(op, p, lists), wanted(op, p, lists), strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        assert float((got - want).abs().max()) <= 1e-12 * (1 + float(want.abs().max()))


def test_the_dense_matrix_is_made_of_products_with_unit_vectors():
    x, atoms = torch.zeros(2, 17), torch.zeros(2, dtype=torch.int64)
    assert takes_products(x, None) and not takes_products(x, atoms)


def test_averages_of_values(monkeypatch):
    """With values of masked atoms that are no numbers, and none at all; a column at a time."""
    p, lists = problem(*SHAPES["whole rows"])
    p["values"] = _normal(7)(len(p["y"]), 3)
    want = wanted("average", p, lists)
    p["values"][4::5] = math.nan
    monkeypatch.setattr(average, "SCRATCH", 4 * len(lists[0]))
    for got, w in zip(run("average", p, lists), want, strict=True):
        assert got.shape == w.shape and float((got - w).abs().max()) <= 1e-12
    p["values"], p["y"], p["log_prior"] = p["values"][:, :0], p["y"].nan_to_num(), None
    got = run("average", p, lists)
    posterior = run("posterior", {k: t for k, t in p.items() if k != "values"}, lists)
    assert float((got[0] - posterior[0]).abs().max()) <= 1e-12 and got[1].shape == (3, 0)


def test_without_a_prior_and_in_groups(monkeypatch):
    """log q is of all atoms; queries one at a time."""
    p, lists = problem(*SHAPES["whole rows"])
    p["y"] = p["y"].nan_to_num()
    given = {k: t for k, t in p.items() if k != "log_prior"} | {"log_prior": None}
    together = run("posterior", given, lists)
    uniform = p | {"log_prior": torch.zeros(len(p["y"]), dtype=torch.float64)}
    for got, want in zip(together, wanted("posterior", uniform, lists), strict=True):
        assert float((got - want).abs().max()) <= 1e-12 * (1 + float(want.abs().max()))
    monkeypatch.setattr(launch, "SCRATCH", 1)
    for got, want in zip(run("posterior", given, lists), together, strict=True):
        assert float((got - want).abs().max()) <= 1e-12 * (1 + float(want.abs().max()))


@pytest.mark.parametrize("sigma", [0.3, 3.0, 1e3])
def test_float32_error(sigma):
    """At most twice that of plain float32: every query near an atom and far from the origin; all
    atoms in every list."""
    B, N, d, _ = SHAPES["whole rows"]
    normal = _normal(1)
    y = 10 + normal(N, d)
    p = {"x": y[torch.arange(B) * 7] + sigma * normal(B, d), "y": y, "v": normal(B, 1, d)}
    p |= {"alpha": torch.ones(B), "sigma": torch.full((B,), sigma), "log_prior": normal(N)}
    p = {k: t.float() for k, t in p.items()}
    lists = torch.arange(N).repeat(B), torch.full((B,), N)
    names = {op: TABLE[op].exact for op in ("posterior", "fisher_matvec", "fisher_diagonal")}
    got = {name: t for op in names for name, t in zip(names[op], run(op, p, lists), strict=True)}
    assert far(p, got) == {}


def test_stored_bytes():
    p, lists = problem(*SHAPES["whole rows"])
    stored = (30 * p["y"].nan_to_num() + 128).clamp(0, 255).byte()
    p["y"] = 0.05 * stored.double() - 6
    given = [t for k, t in p.items() if k != "v"]
    got = TABLE["posterior"].launch(given[0], stored, *given[2:], 0.05, -6.0, *lists)
    for g, want in zip(got, wanted("posterior", p, lists), strict=True):
        assert float((g - want).abs().max()) <= 1e-12 * (1 + float(want.abs().max()))


@pytest.mark.parametrize("kind", ["posterior", "matvec", "diagonal", "dense"])
def test_moments_about_the_mean(kind):
    """Those of a call without lists for every query."""
    p, (atoms, counts) = problem(*SHAPES["small d"])
    v = p["v"] if kind == "matvec" else None
    log_pi = torch.log_softmax(p["log_prior"], 0)
    levels = p["alpha"], p["sigma"]
    together = about_mean.moments_about_mean(
        p["x"], p["y"], v, *levels, log_pi, 1.0, 0.0, kind, atoms, counts
    )
    for b, rows in enumerate(atoms.split(counts.tolist())):
        one = [None if t is None else t[b : b + 1] for t in (p["x"], v, *levels)]
        alone = about_mean.moments_about_mean(
            one[0], p["y"][rows], *one[1:], log_pi[rows], 1.0, 0.0, kind, None, None
        )
        for got, want in zip(together, alone, strict=True):
            some = got[b : b + 1]
            assert some.shape == want.shape and got.dtype == want.dtype
            assert torch.allclose(some, want, rtol=1e-11, atol=1e-11)
