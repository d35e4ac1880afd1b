"""The data-set ops' launchers on CPU tensors: the table of cases, every kind of tile, hostile
values."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import DATA_OPS, ORDER, REFERENCES, _normal, table
from difference import difference_form, errors, far, in_batches

from dfkernels._torch import check
from dfkernels.ops.common.triton import launch
from dfkernels.ops.fisher_matvec import triton as matvec
from tools.op_table import TABLE

LAUNCH = {op: partial(TABLE[op].launch, **TABLE[op].launch_options[0]) for op in DATA_OPS}


def run(op, x, y, alpha, sigma, log_prior=None, v=None, *, scale=1.0, offset=0.0):
    """The launcher behind the public function's checks; outputs in their public shapes."""
    flat, atoms, *rest = check.points(x, y, alpha, sigma, log_prior, scale, offset)
    args = (flat, atoms, *rest)
    if "v" in ORDER[op]:
        args = (flat, atoms, check.vectors("v", v, "x", x, flat.shape[1]), *rest)
        return (LAUNCH[op](*args).reshape(v.shape),)
    out = LAUNCH[op](*args)
    outs = (out,) if isinstance(out, torch.Tensor) else tuple(out)
    return tuple(o.reshape(x.shape) if o.shape == flat.shape else o for o in outs)


def by_launchers(p, together, ops, *, y=None, **stored):
    """The outputs of ops for all queries, so many of them at a time; stored: y, scale and
    offset."""

    def call(op, p):
        args = [p[k] if k != "y" or y is None else y for k in ORDER["posterior"]]
        return run(op, *args, p["v"], **stored)

    return in_batches(p, together, ops, call)


@pytest.fixture(autouse=True)
def many_splits(monkeypatch):
    """Splits of three tiles already where there are few atoms."""
    monkeypatch.setattr(launch, "MAX_TILES", 3)


# lists are taken query by query, by these launchers again
CASES = [c for op in DATA_OPS for c in table(op) if "atoms" not in c.options]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case_in_float64(case):
    """Against the reference: 1e-12 of its size, for sums of a few terms of order one."""
    args = dict(case.inputs())
    if case.masked:
        args["log_prior"] = args["log_prior"].index_fill(0, torch.tensor(case.masked), -math.inf)
    got = run(
        case.op,
        *[args[k] for k in ("x", "y", "alpha", "sigma")],
        args.get("log_prior"),
        args.get("v"),
        **case.options,
    )
    for g, e in zip(got, case.run(reference=True), strict=True):
        assert g.shape == e.shape and g.dtype == e.dtype
        assert e.numel() == 0 or float((g - e).abs().max()) <= 1e-12 * (1 + float(e.abs().max()))


# Every kind of tile, in several splits: queries, how many of them go together, N, d, and (sigma,
# offset).
LOW, FAR, MIDDLE, HIGH, VAST = (1e-3, 0.0), (0.3, 10.0), (1.0, 0.0), (3.0, 10.0), (1e3, 0.0)
TILES = {
    "one target": (5, 1, 200, 40, [FAR, VAST]),
    "few, behind the filter": (12, 12, 40, 20, [LOW, FAR, HIGH]),
    "few and wide": (
        10,
        10,
        20,
        300,
        [HIGH],
    ),  # three blocks of coordinates; also with large logits, below
    "many, behind the filter": (17, 17, 30, 40, [MIDDLE, HIGH]),
    "few, small d": (12, 12, 1100, 2, [MIDDLE]),
    "a target per thread": (64, 64, 20, 3, [LOW, HIGH]),
}


def inputs(B, N, d, sigma, offset, seed=0):
    """Queries drawn from q_t, alpha 1 and 0.6; near-duplicates among the atoms; every fifth atom
    masked."""
    normal = lambda *shape: _normal(seed + d)(*shape).float()
    y = normal(N, d) + offset
    y[N // 2 : 2 * (N // 2)] = y[: N // 2] + 1e-3 * normal(N // 2, d)
    alpha = torch.ones(B)
    alpha[1::2] = 0.6
    sigma = torch.full((B,), sigma)
    picked = y[(5 * torch.arange(B) + 1) % (N // 5 * 5)]
    x = alpha[:, None] * picked + sigma[:, None] * _normal(seed + 1)(B, d).float()
    v = _normal(seed + 2)(B, 1, d).float()
    v[::2] = y.mean(0)
    log_prior = 2 * _normal(seed + 3)(N).float()
    log_prior[::5] = -math.inf
    return dict(x=x, y=y, alpha=alpha, sigma=sigma, log_prior=log_prior, v=v)


@pytest.mark.parametrize(
    "tile, sigma, offset", [(tile, *cell) for tile, (*_, cells) in TILES.items() for cell in cells]
)
def test_float32_error(tile, sigma, offset):
    B, together, N, d, _ = TILES[tile]
    p = inputs(B, N, d, sigma, offset)
    dense = (sigma, d) in ((0.3, 20), (3.0, 20))  # by differences, and by products
    assert far(p, by_launchers(p, together, DATA_OPS if dense else DATA_OPS[:3])) == {}


@pytest.mark.parametrize("together, d", [(12, 2000), (1, 4100)])
def test_float32_error_of_large_logits(together, d):
    """Of 1e4 and more, whose rounding goes into 1/sum w^2; sixteen blocks of coordinates, or,
    without the filter, a row that no program holds.
    """
    p = inputs(4, 6, d, 0.3, 10.0)
    assert far(p, by_launchers(p, together, ["posterior"])) == {}


@pytest.mark.parametrize("B, d, sigma", [(1, 20, 1e-6), (5, 30, 1e-12), (17, 20, 1e-17)])
def test_logits_beside_which_the_gap_is_nothing(B, d, sigma):
    """Of 1e13 and more, where less the gap is the same float32: the nearest atom, of which there
    are two in different tiles, has all the weight."""
    normal = lambda seed, *shape: _normal(seed + d)(*shape).float()
    y, x, level = normal(1, 100, d).repeat(2, 1), normal(2, B, d), torch.ones(B)
    log_prob, mean, _, ess = run("posterior", x, y, level, sigma * level)
    square = (x[:, None] - y).double().square().sum(2)
    assert torch.equal(mean, y[square.argmin(1)]) and torch.equal(ess, 2 * level)
    assert torch.allclose(log_prob.double(), -square.amin(1) / (2 * sigma**2), rtol=1e-6)


def test_a_row_that_no_program_holds_in_float64():
    p = {k: t.double() for k, t in inputs(2, 20, 1030, 30.0, 0.0).items()}
    got, exact = by_launchers(p, 2, DATA_OPS[:3]), difference_form(**p)
    assert float(got["ess"].min()) > 2
    assert {
        k: e for k, e in errors(got, {k: exact[k] for k in got}).items() if not e.max() <= 1e-12
    } == {}


@pytest.mark.parametrize("storage", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("B, together, N, d", [(4, 1, 50, 20), (10, 10, 50, 20)])
def test_storage(storage, B, together, N, d):
    p = inputs(B, N, d, 0.5, 0.0) | {"log_prior": None}
    y = (40 * p["y"] + 100).clamp(0, 255).to(storage)
    p["y"] = 0.02 * y.float() - 2
    assert far(p, by_launchers(p, together, ["posterior"], y=y, scale=0.02, offset=-2.0)) == {}


@pytest.mark.parametrize("B, d", [(2, 4), (3, 20)])
def test_covariance_matvec_is_the_jacobian_of_the_mean(B, d):
    p = {k: t.double() for k, t in inputs(B, 40, d, 0.8, 0.0).items()}
    x = p["x"].requires_grad_()
    mean = REFERENCES["posterior"](x, *[p[k] for k in ORDER["posterior"][1:]])[1]
    (expected,) = torch.autograd.grad(mean, x, p["v"][:, 0])
    args = [p[k].detach() for k in ORDER["fisher_matvec"]]
    got = matvec.launch(*args, 1.0, 0.0, fisher=False)[:, 0]
    assert float(
        (got * (p["alpha"] / p["sigma"] ** 2)[:, None] - expected).abs().max()
    ) <= 1e-12 * float(expected.abs().max())


@pytest.mark.parametrize("B, N, d", [(1, 70, 20), (3, 20, 20), (9, 20, 20), (33, 12, 3)])
def test_many_vectors_share_a_pass(B, N, d):
    p = inputs(B, N, d, 1.0, 0.0)
    v = _normal(9)(B, 2, d).float()
    together = run("fisher_matvec", *[p[k] for k in ORDER["posterior"]], v)[0]
    alone = [
        run("fisher_matvec", *[p[k] for k in ORDER["posterior"]], v[:, k])[0] for k in range(2)
    ]
    assert float((together - torch.stack(alone, 1)).abs().max()) <= 1e-5 * float(
        together.abs().max()
    )


@pytest.mark.parametrize("op", DATA_OPS[:3])
def test_the_same_bits_every_time_and_in_blocks(op, monkeypatch):
    p = inputs(3, 40, 20, 1.0, 0.0)
    call = lambda: run(op, *[p[k] for k in ORDER["posterior"]], p["v"])
    first = call()
    assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))
    monkeypatch.setattr(launch, "SCRATCH", 1)
    for a, b in zip(first, call(), strict=True):
        assert a.shape == b.shape and float((a - b).abs().max()) <= 1e-5 * float(a.abs().max())


# Levels and weights are read alike for every tile; x and y are not.
READ = [(1, 70, 20, None), (3, 20, 20, None), (17, 12, 20, ("x", "y")), (64, 12, 3, ("x", "y"))]
NAMES = ("x", "y", "alpha", "sigma", "log_prior")


@pytest.mark.parametrize(
    "B, N, d, name, value",
    [
        (*shape, name, value)
        for *shape, names in READ
        for name in names or NAMES
        for value in ([math.nan] if names else [math.nan, math.inf])
    ],
)
def test_nan_in_nan_out(B, N, d, name, value):
    """Nothing synchronises: what cannot be used is not raised but shows, in the first query at
    least."""
    p = inputs(B, N, d, 1.0, 0.0)
    p[name][0] = value
    p["log_prior"][0] = value if name == "log_prior" else 0.0
    got = run("posterior", *[p[k] for k in ORDER["posterior"]])
    assert bool(
        got[1][0].isnan().any() if name != "sigma" or value != math.inf else got[0][0].isinf()
    )


def test_rows_of_y_may_be_far_apart():
    p = inputs(3, 40, 20, 1.0, 0.0)
    wide = torch.zeros(40, 3, 20)
    wide[:, 1] = p["y"]
    args = [p[k] for k in ORDER["posterior"]]
    for a, b in zip(
        run("posterior", *args), run("posterior", args[0], wide[:, 1], *args[2:]), strict=True
    ):
        assert torch.equal(a, b)
