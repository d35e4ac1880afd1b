"""The op draw: the law of its atoms, and the same atoms whatever computes them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from needs import needs_native
from tensors import normal
from torch.autograd import forward_ad
from torch.func import grad, vmap

from dfkernels import ops
from dfkernels._torch import native
from dfkernels.ops.draw import _fallback, op, reference
from dfkernels.ops.draw.gumbel import philox
from dfkernels.ops.posterior.reference import weights


def problem(B, N, d, sigma, *, seed=0, dtype=torch.float64, masked=False):
    """Queries about the atoms; masked atoms hold NaN."""
    y, prior = normal(N, d, seed=seed), normal(N, seed=seed + 1)
    x = y[torch.arange(B) * 7919 % N] + sigma * normal(B, d, seed=seed + 2)
    if masked:
        off = torch.rand(N, generator=torch.Generator().manual_seed(seed)) < 0.4
        off[torch.arange(B) * 7919 % N] = False
        prior[off] = -math.inf
        y[off] = math.nan
    levels = torch.full((B,), 0.9, dtype=dtype), torch.full((B,), sigma, dtype=dtype)
    return (x.to(dtype), y.to(dtype), *levels, prior.to(dtype))


def lists(B, N, seed=0, share=0.3):
    wanted = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) < share
    wanted[torch.arange(B), torch.arange(B) * 7919 % N] = True
    return {"atoms": wanted.nonzero()[:, 1], "counts": wanted.sum(1)}


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, (2**32 - 1,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, words):
    """The known answers of Random123's tests."""
    found = philox([torch.tensor([c]) for c in counter], key)
    assert [int(w) for w in found] == words


# B, N, d, sigma: small d; rows by rows and transposed, in noise where all atoms count, where some
# do, and where one does
SHAPES = [
    (1, 1, 3, 1.0),
    (5, 63, 2, 0.3),
    (40, 3000, 2, 5.0),
    (9, 1000, 16, 0.5),
    (3, 700, 17, 0.2),
    (3, 700, 17, 20.0),
    (33, 2000, 40, 30.0),
    (33, 2000, 40, 1.5),
    (20, 500, 64, 1e-3),
    (2, 300, 784, 60.0),
    (17, 129, 1, 1e3),
]


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("B, N, d, sigma", SHAPES)
def test_the_same_atoms_as_the_reference(B, N, d, sigma, masked):
    args = problem(B, N, d, sigma, masked=masked)
    rows = lists(B, N)
    prior = torch.full((B, N), -math.inf, dtype=args[0].dtype)
    for b, some in enumerate(rows["atoms"].split(rows["counts"].tolist())):
        prior[b, some] = args[4][some]
    for seed in (0, 2**63 - 1):
        want = reference(*args, seed=seed)
        assert torch.equal(ops.draw(*args, seed=seed), want)
        assert torch.equal(ops.draw(*(a.float() for a in args), seed=seed), want)
        got = ops.draw(*args, seed=seed, **rows)
        for b in range(B):
            one = (
                *(a[b : b + 1] if a.shape[0] == B and i != 1 else a for i, a in enumerate(args)),
            )
            one = (args[0][b : b + 1], args[1], args[2][b : b + 1], args[3][b : b + 1], prior[b])
            alone = reference(*one, seed=seed, queries=torch.tensor([b]))
            assert torch.equal(got[b : b + 1], alone)


@pytest.mark.parametrize("with_lists", [False, True], ids=["", "lists"])
@pytest.mark.parametrize("B, N, d, sigma", SHAPES[1:8])
def test_pytorch_draws_the_same_atoms(B, N, d, sigma, with_lists):
    args = problem(B, N, d, sigma, masked=True)
    rows = lists(B, N) if with_lists else {}
    queries = torch.arange(B)
    found = _fallback(*args, 1.0, 0.0, 7, queries, B, *rows.values())
    assert torch.equal(found, ops.draw(*args, seed=7, **rows))


def p_value(found, w):
    """Of the chi-square test of draws against weights; atoms of which fewer than ten are expected
    count as one."""
    seen, expected = torch.bincount(found, minlength=len(w)).double(), len(found) * w.double()
    few = expected < 10
    gather = lambda t: torch.cat([t[~few], t[few].sum()[None]])
    seen, expected = gather(seen), gather(expected)
    seen, expected = seen[expected > 0], expected[expected > 0]
    chi = ((seen - expected) ** 2 / expected).sum()
    free = torch.tensor((len(seen) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(free, chi / 2)) if len(seen) > 1 else 1.0


@pytest.mark.parametrize("kind", ["plain", "prior", "lists"])
@pytest.mark.parametrize(
    "N, d, sigma", [(300, 2, 3.0), (300, 2, 0.1), (150, 40, 20.0), (150, 40, 4.0)]
)
def test_the_law_of_the_draws(N, d, sigma, kind):
    """20,000 draws of one query in one call, and 2,000 in as many calls; the seeds are fixed, so
    that a p-value above 1e-6 stays above it. And a wrong law is seen."""
    y, prior = normal(N, d, seed=3), 2 * normal(N, seed=4)
    y[N // 2 :] = y[: N - N // 2] + 0.3 * sigma * d**-0.5 * normal(N - N // 2, d, seed=5)
    x = y[:1] + sigma * normal(1, d, seed=6)
    prior[::7] = -math.inf
    log_prior = None if kind == "plain" else prior
    B, rows = 20_000, torch.arange(N)
    w = weights(x, y, 1.0, sigma, log_prior)[5][0]
    if kind == "lists":
        rows = torch.arange(5, N, 3)
        w = torch.where(torch.isin(torch.arange(N), rows), w, 0.0)
        w = w / w.sum()
    listed = lambda n: (
        {"atoms": rows.repeat(n), "counts": torch.full((n,), len(rows))} if kind == "lists" else {}
    )
    together = ops.draw(x.expand(B, d), y, 1.0, sigma, log_prior, seed=11, **listed(B))
    assert bool((w[together] > 0).all())
    assert p_value(together, w) > 1e-6
    apart = [ops.draw(x, y, 1.0, sigma, log_prior, seed=s, **listed(1)) for s in range(2000)]
    assert p_value(torch.cat(apart), w) > 1e-6
    if (w > 0.02).sum() > 2:
        assert p_value(together, torch.softmax(0.9 * torch.log(w), 0)) < 1e-6


def test_queries_and_seeds_are_independent():
    """Two queries, and two seeds, at the same place: pairs of atoms have the product law."""
    y = normal(6, 2, seed=1)
    x = torch.zeros(40_000, 2, dtype=y.dtype)
    w = weights(x[:1], y, 1.0, 2.0)[5][0]
    pairs = lambda a, b: p_value(6 * a + b, (w[:, None] * w).flatten())
    first, other = (ops.draw(x, y, 1.0, 2.0, seed=s) for s in (1, 2))
    assert pairs(first[::2], first[1::2]) > 1e-6
    assert pairs(first, other) > 1e-6
    assert pairs(first, first) == 0


def test_many_blocks():
    """The first of two stages alone decides here: 64 atoms at each of 50 places."""
    places = 3 * normal(50, 3, seed=2)
    y, x = places.repeat_interleave(64, 0), torch.zeros(20_000, 3, dtype=places.dtype)
    w = weights(x[:1], places, 1.0, 3.0)[5][0]
    assert p_value(ops.draw(x, y, 1.0, 3.0, seed=0) // 64, w) > 1e-6


@needs_native
@pytest.mark.parametrize("d", [2, 33])
def test_neither_threads_nor_the_cut_matter(d):
    """float32, more splits than one; alone, a query has another cut, and another path."""
    args = problem(300, 5000, d, 2.0, dtype=torch.float32)
    found, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(ops.draw(*args, seed=3))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(f, found[0]) for f in found)
    x, y, alpha, sigma, prior = args
    for b in range(0, 300, 37):
        one = op(x[b : b + 1], y, alpha[b : b + 1], sigma[b : b + 1], prior, 1.0, 0.0, 3,
                 torch.tensor([b]), 1)  # fmt: skip
        assert torch.equal(one, found[0][b : b + 1])
    rows = torch.arange(5000).repeat(300)
    counts = torch.full((300,), 5000)
    assert torch.equal(ops.draw(*args, seed=3, atoms=rows, counts=counts), found[0])


ISA = """
import torch
from test_draw import *
for B, N, d, sigma in SHAPES:
    args = problem(B, N, d, sigma, dtype=torch.float32, masked=True)
    print(ops.draw(*args, seed=9).tolist(), ops.draw(*args, seed=9, **lists(B, N)).tolist())
"""


@pytest.mark.slow
@needs_native
def test_every_instruction_set_and_pytorch_draw_the_same():
    here = Path(__file__).parent
    said = set()
    for more in [{"DFKERNELS_NATIVE": "0"}] + [
        {"DFKERNELS_ISA": isa} for isa in native.info()["isa_levels"]
    ]:
        path = os.pathsep.join([str(here), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", ISA], capture_output=True, text=True, cwd=here,
            env=os.environ | {"PYTHONPATH": path} | more,
        )  # fmt: skip
        if "that this CPU has" not in done.stderr:
            assert done.returncode == 0, done.stderr
            said.add(done.stdout)
    assert len(said) == 1


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.uint8, torch.float32])
def test_storage(storage):
    for d in (3, 40):
        y = (50 * normal(200, d) + 100).clamp(0, 255).to(storage)
        x = 0.02 * y[:7].double() - 2 + normal(7, d, seed=1)
        kwargs = {"scale": 0.02, "offset": -2.0, "seed": 4}
        assert torch.equal(ops.draw(x, y, 1.0, 1.0, **kwargs), reference(x, y, 1.0, 1.0, **kwargs))


def test_vmap_is_one_larger_batch():
    """Over the queries, over the atoms, in any nesting; every element has noise of its own."""
    x, y, *_, prior = problem(12, 90, 3, 2.0)
    whole = ops.draw(x, y, 0.9, 2.0, prior, seed=2)
    f = lambda x, y, prior: ops.draw(x, y, 0.9, 2.0, prior, seed=2)
    assert torch.equal(vmap(f, (0, None, None))(x.view(3, 4, 3), y, prior).flatten(), whole)
    nested = vmap(vmap(f, (0, None, None)), (0, None, None))(x.view(3, 2, 2, 3), y, prior)
    assert torch.equal(nested.flatten(), whole)
    clouds = torch.stack([y, y])
    for got in (
        vmap(f, (0, 0, None))(x.view(2, 6, 3), clouds, prior),
        vmap(f, (0, None, 0))(x.view(2, 6, 3), y, torch.stack([prior, prior])),
        vmap(vmap(f, (0, None, None)), (0, 0, None))(x.view(2, 3, 2, 3), clouds, prior),
    ):
        assert torch.equal(got.flatten(), whole)
    same = vmap(f, (None, 0, None))(x[:1].expand(400, 3), clouds, prior)
    assert not torch.equal(same[0], same[1])


def test_no_derivative_and_no_complaint():
    x, y, alpha, sigma, prior = (a.requires_grad_() for a in problem(3, 20, 2, 1.0))
    plain = ops.draw(*(a.detach() for a in (x, y, alpha, sigma, prior)), seed=1)
    found = ops.draw(x, y, alpha, sigma, prior, seed=1)
    assert torch.equal(found, plain) and not found.requires_grad
    f = lambda x: (ops.draw(x, y, alpha, sigma, prior, seed=1) + 0.0).sum() + x.sum()
    assert torch.equal(grad(f)(x.detach()), torch.ones_like(x))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        assert torch.equal(ops.draw(dual, y, alpha, sigma, prior, seed=1), plain)
    compiled = torch.compile(
        lambda x: ops.draw(x, y, alpha, sigma, prior, seed=1), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x.detach()), plain)


def test_opcheck():
    x, y, alpha, sigma, prior = problem(3, 20, 2, 1.0)
    rows = lists(3, 20)
    for more in ((), tuple(rows.values())):
        args = (x.requires_grad_(), y, alpha, sigma, prior, 1.0, 0.0, 5, torch.arange(3), 3, *more)
        assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


def test_extremes():
    y = normal(5, 3, seed=1)
    assert ops.draw(y[:0], y, 1.0, 1.0, seed=0).shape == (0,)
    image = ops.draw(torch.zeros(2, 1, 3, dtype=y.dtype), y[:, None], 1.0, 1.0, seed=0)
    assert image.dtype == torch.int64 and image.shape == (2,)
    only = torch.full((5,), -math.inf, dtype=y.dtype)
    only[3] = -1e3
    for sigma in (1e-3, 1e3):
        assert ops.draw(10 * y[:4], y, 0.0, sigma, only, seed=0).tolist() == [3] * 4
        assert ops.draw(-y, y, -1.0, 1e-3, seed=0).tolist() == list(range(5))


@pytest.mark.parametrize(
    "seed, error, message",
    [
        (-1, ValueError, "seed: expected an integer from 0 to 9223372036854775807, got -1"),
        (2**63, ValueError, "seed: expected an integer from 0 to"),
        (0.5, TypeError, "seed: expected an integer, got float"),
        (None, TypeError, "seed: expected an integer, got NoneType"),
    ],
)
def test_errors(seed, error, message):
    y = normal(5, 3)
    with pytest.raises(error, match=f"^{message}"):
        ops.draw(y, y, 1.0, 1.0, seed=seed)


def test_values_that_cannot_be_used_are_named():
    y = normal(5, 3)
    for name in ("x", "y"):
        bad = {"x": y.clone(), "y": y.clone()}
        bad[name][1, 2] = math.nan
        with pytest.raises(ValueError, match=f"^{name}: expected finite values, got nan at index"):
            ops.draw(bad["x"], bad["y"], 1.0, 1.0, seed=0)
    with pytest.raises(ValueError, match="^log_prior: expected at least one finite value"):
        ops.draw(y, y, 1.0, 1.0, torch.full((5,), -math.inf, dtype=y.dtype), seed=0)
