"""select_atoms' launcher on CPU tensors: its bounds, and what follows from them, against all logits
in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from test_certified import CLOUDS, gaussian, normal, queries
from torch.utils._python_dispatch import TorchDispatchMode

from dfkernels.certified import select_atoms
from dfkernels.certified import triton as kernels
from dfkernels.certified.bounds import Queries, Sought
from dfkernels.certified.build import build_index
from dfkernels.certified.index import CloudIndex
from dfkernels.certified.pytorch import search_in_pytorch
from dfkernels.certified.reference import logits

EPS = 1e-6
LEVELS = pytest.mark.parametrize(
    "N, d", [(70, 40), (130, 150)]
)  # without the fine level, and with it


def arguments(x, y, alpha=1.0, sigma=1.0, prior=None, scale=1.0, offset=0.0, gap=None, k=1):
    level = lambda a: torch.as_tensor(a, dtype=x.dtype).expand(len(x))
    gap = math.log(len(y) / EPS) if gap is None else gap
    built = build_index(y, scale, offset)
    return (x, y, level(alpha), level(sigma), prior, scale, offset, *built, gap, k)


def selected(args, launch=kernels.launch):
    """[B, N], counts [B], dropped [B]."""
    atoms, counts, dropped = launch(*args)
    assert atoms.dtype == counts.dtype == torch.int64 and dropped.dtype == torch.float64
    out = torch.zeros(len(counts), len(args[1]), dtype=torch.bool)
    for row, n, some in zip(
        out, counts.tolist(), atoms.split(counts.clamp_min(0).tolist()), strict=True
    ):
        assert bool((some.diff() > 0).all())
        row[some if n >= 0 else slice(None)] = True
    return out, counts, dropped


def check(args):
    """What is left out weighs no more than it says, and less than EPS of all."""
    found, counts, dropped = selected(args)
    weight = logits(*args[:7]).softmax(1)
    left_out = weight.masked_fill(found, 0).sum(1)
    assert bool((left_out <= dropped * (1 + 1e-9) + 1e-15).all()) and bool((dropped <= EPS).all())
    assert bool((dropped[counts < 0] == 0).all())
    return counts


@LEVELS
@pytest.mark.parametrize("make", CLOUDS, ids=lambda f: f.__name__)
def test_what_is_left_out_weighs_less_than_it_says(make, N, d):
    """Two blocks of queries, of all levels of noise and kinds at once."""
    y, sigma = make(N, d), torch.tensor([1e-3, 0.3, 5.0]).repeat(6)
    x = [
        queries(y, s, kind, B=3, seed=i)
        for i, kind in enumerate(("noisy", "outside"))
        for s in sigma[:9]
    ]
    x = torch.cat([one[i % 3 : i % 3 + 1] for i, one in enumerate(x)])
    check(arguments(x, y, 0.9, sigma))


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("make", CLOUDS, ids=lambda f: f.__name__)
def test_every_level_bounds_every_logit(make, level, monkeypatch):
    """The bounds themselves, where all atoms are left of all queries: no lower than the truth, and
    no higher than in float64, but for the roundings of float32.
    """
    monkeypatch.setattr(
        kernels,
        "_threshold",
        lambda q, k, estimate, upper: torch.full_like(upper[:, :1], -math.inf),
    )
    monkeypatch.setattr(
        kernels,
        "_all_is_cheaper",
        lambda q, upper, least: torch.zeros_like(least, dtype=torch.bool),
    )
    y, prior = make(130, 200), normal(130, seed=3)
    for alpha, x in ((0.9, queries(y, 0.3, "noisy", B=5)), (-0.7, queries(y, 0.3, "outside", B=5))):
        args = arguments(x, y, alpha, 0.3, prior)
        found = CloudIndex(*args[7:-2])
        if level == 0:
            found = found._replace(fine_codes=found.fine_codes[:0])
        s = Queries(Sought(*args[:7]), found, 0.0)
        up, _, _ = kernels.search(s, args[-1])
        error = (s.fine_error if level else s.coarse_error)(s.z @ found.basis.double().T)
        size = found.atom_norm.double()
        width = error.bound(
            size, found.remainder_norm[level].double(), found.axis_error[level].double()
        )
        width = s.alpha.abs() * width
        true = s.variance * logits(*args[:4], s.log_prior, 1.0, 0.0) + s.z_norm**2 / 2
        sizes = (
            s.alpha.abs() * s.z_norm * size
            + s.alpha**2 / 2 * size**2
            + (s.variance * s.log_prior).abs()
        )
        assert bool((up + s.coordinate_error >= true).all())
        high = up > true + 2.001 * width + 2.0**-16 * sizes + 16 * s.coordinate_error
        assert not bool((high & s.coded).any())  # remote atoms are at -inf


@pytest.mark.parametrize("d", [32, 160])
def test_sums_in_float_are_part_of_the_bounds(d, monkeypatch):
    """Codes that are exact, so that nothing else is left of the widths, and products that almost
    cancel; alpha so small that norms do not count.
    """
    monkeypatch.setattr(
        kernels,
        "_all_is_cheaper",
        lambda q, upper, least: torch.zeros_like(least, dtype=torch.bool),
    )
    N, K, T = 640, 32, kernels.CODE_TILE
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (N, d), generator=generator)
    x, y, no = normal(8, d), codes.float(), torch.zeros
    fine = (
        codes.to(torch.int8).index_fill(1, torch.arange(K), 0)
        if d > K
        else no(0, 0, dtype=torch.int8)
    )
    levels, remainder_norm = 1 + (d > K), codes[:, K:].double().norm(dim=1).float()
    coarse = codes[:, :K].to(torch.int16).view(-1, T, K).mT.contiguous()
    size, remainder_norm = (
        y.double().norm(dim=1).float(),
        torch.stack([remainder_norm, 0 * remainder_norm])[:levels],
    )
    limits = torch.zeros(5, dtype=torch.float64)
    made = (
        no(d),
        torch.eye(d)[:K],
        torch.ones(K),
        coarse,
        fine,
        size,
        torch.ones(levels, N),
        remainder_norm,
    )
    found = CloudIndex(*made, no(levels, N), limits)
    args = (x, y, torch.full((8,), 1e-9), torch.ones(8), None, 1.0, 0.0)
    s = Queries(Sought(*args), found, math.inf)
    up, _, _ = kernels.search(s, 1)
    true = 1e-9 * (x.double() @ y.double().T) - 0.5e-18 * y.double().square().sum(1)
    assert (
        bool((up >= true).all())
        and float(((up - true) / (s.alpha * s.z_norm * size)).max()) <= 1e-4
    )


def test_thresholds_are_rounded_down():
    least = normal(100, 1).double()
    s = SimpleNamespace(threshold=least, raise_kth_logit=lambda atoms: None)
    below = kernels._threshold(s, 1, least.float(), least.float())
    assert below.dtype == torch.float32 and bool(
        (below < least).all() and (below > least - 1e-6).all()
    )


@LEVELS
def test_little_is_kept_in_little_noise(N, d):
    """About as little as by the same bounds in float64; else the tests above would hold for any
    kernel."""
    y = gaussian(3 * N, d)
    for sigma, most in ((0.002, 2), (0.05, 20)):
        args = arguments(queries(y, sigma, "noisy"), y, 1.0, sigma)
        counts, plain = check(args), selected(args, search_in_pytorch)[1]
        assert int(counts.min()) >= 1 and float(counts.double().mean()) <= most
        assert bool((counts <= plain + 2).all())


def test_the_lightest_go_as_far_as_the_tolerance_allows(monkeypatch):
    """The gap alone, from exact logits, would keep twice as many at least."""
    monkeypatch.setattr(
        kernels,
        "_all_is_cheaper",
        lambda q, upper, least: torch.zeros_like(least, dtype=torch.bool),
    )
    y = gaussian(400, 150)
    args = arguments(queries(y, 0.3, "noisy", B=8), y, 1.0, 0.3)
    assert int(check(args).min()) >= 1
    assert 2 * int(selected(args)[0].sum()) <= int(
        select_atoms.reference(*args[:7], args[-2], 1).sum()
    )


@pytest.mark.parametrize("storage", [torch.float64, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_storage_and_dtype(storage, dtype):
    y = (30 * gaussian(130, 520) + 128).clamp(0, 255).to(storage)
    x = queries(y.to(dtype) * (2 / 255) - 1, 0.05, "noisy", B=3)
    counts = check(arguments(x, y, 1.0, 0.05, scale=2 / 255, offset=-1.0))
    assert 1 <= int(counts.min()) <= int(counts.max()) <= 20


def test_masks_and_levels_of_noise_side_by_side():
    y, prior = gaussian(130, 150), 5 * normal(130)
    prior[::3], prior[7] = -math.inf, 300.0
    alpha = torch.tensor([0.0, -0.7, 1.0, 0.3, 1e-3, 1.0, 1.0, 2.0, 1.0, 0.5, 1.0])
    x = alpha[:, None] * queries(y, 0.1, "noisy")
    for p in (None, prior):
        check(arguments(x, y, alpha, torch.logspace(-2, 2, 11), p))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 4, 400])
def test_the_k_heaviest_are_selected(k, masked):
    y, prior = gaussian(400, 150), None
    if masked:
        prior = normal(400)
        prior[::2] = -math.inf
    for sigma in (0.01, 0.05):
        args = arguments(queries(y, sigma, "noisy", B=8), y, 1.0, sigma, prior, gap=0.0, k=k)
        found = selected(args)[0]
        assert bool((found | ~select_atoms.reference(*args[:7], 0.0, k)).all())
        assert k > 4 or float(found.double().mean()) < 0.5


def test_queries_that_need_most_atoms_take_all():
    """Each by itself: one that has much noise does not make the queries beside it take all
    atoms."""
    y = gaussian(200, 150)
    sigma = torch.tensor([0.01, 30.0] * 8 + [0.01, 0.05])
    args = arguments(queries(y, 0.01, "noisy", B=18), y, 1.0, sigma)
    counts = check(args)
    assert [n < 0 for n in counts.tolist()] == [s > 1 for s in sigma.tolist()]


@pytest.mark.parametrize(
    "name, value", [("x", math.nan), ("x", 1e20), ("alpha", math.inf), ("sigma", 1e-13)]
)
def test_numbers_that_float_cannot_hold_take_all(name, value):
    y = gaussian(200, 150)
    given = arguments(queries(y, 0.01, "noisy"), y, 1.0, 0.01)
    args = dict(zip(("x", "y", "alpha", "sigma"), given[:4], strict=True))
    changed = args[name].clone()
    changed.view(len(changed), -1)[9, 0] = value
    given = args | {name: changed}
    _, counts, dropped = selected((*given.values(), *arguments(args["x"], y)[4:]))
    assert int(counts[9]) == -1 and float(dropped[9]) == 0.0
    assert int(counts[torch.arange(11) != 9].min()) >= 1  # each query by itself


@pytest.mark.parametrize("name, value", [("PAIRS", 1), ("SPAN", 128)])
def test_the_same_in_blocks(name, value, monkeypatch):
    """A few queries at a time; sums of digits that are emptied often."""
    y = gaussian(130, 300)
    args = arguments(queries(y, 0.1, "noisy", B=19), y, 1.0, 0.1)
    first = kernels.launch(*args)
    monkeypatch.setattr(kernels, name, value)
    assert all(torch.equal(a, b) for a, b in zip(first, kernels.launch(*args), strict=True))


def test_digits_hold_a_query():
    """Four digits to base 256, the largest numbers among them."""
    v = torch.cat([torch.tensor([[1.0, -1.0, 0.0]]), normal(1, 3).double()]) * 1e-3
    digits, unit, lost = kernels._digits(v)
    back = (digits.double() * 256.0 ** torch.arange(4)[:, None]).sum(1) * unit
    assert digits.dtype == torch.int8 and digits.shape == (2, 4, 3)
    assert float((v - back - lost).abs().max()) <= 1e-18 and bool((lost.abs() <= 0.51 * unit).all())


def test_what_the_dropped_weigh():
    """Three blocks of atoms; an atom without a code, one without a bound, a query that takes
    all."""
    upper = 30 * normal(3, 5000)
    upper[0, :2] = torch.tensor([-math.inf, math.nan])
    q = SimpleNamespace(
        kth_logit=torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64),
        coordinate_error=torch.full((3, 1), 0.25, dtype=torch.float64),
        variance=torch.tensor([[1.0], [4.0], [9.0]], dtype=torch.float64),
    )
    threshold, takes_all = torch.tensor([[-5.0], [1.0], [0.0]]), torch.tensor([[0], [1], [0]]) > 0
    stays, dropped = kernels.weighed(q, upper, threshold, takes_all)
    gone = upper < threshold
    weight = ((upper.double() - q.kth_logit + 0.25) / q.variance).exp()
    assert torch.equal(stays, ~gone & ~takes_all) and bool(stays[0, 1]) and not bool(stays[0, 0])
    torch.testing.assert_close(dropped, weight.masked_fill(~gone, 0).sum(1), rtol=1e-13, atol=0)


def test_the_default_dtype_changes_no_choice():
    """101 of 400 atoms are left, which bfloat16 would count as a quarter."""
    y = gaussian(400, 40)
    args = arguments(queries(y, 30.0, "noisy", B=8), y, 1.0, 30.0)
    q = Queries(Sought(*args[:7]), CloudIndex(*args[7:-2]), args[-2])
    q.raise_kth_logit(torch.zeros(8, 1, 1, dtype=torch.int64))
    upper, threshold = torch.ones(8, 400), torch.zeros(8, 1)
    upper[:, :299] = -1.0
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = kernels._all_is_cheaper(q, upper, threshold)
    finally:
        torch.set_default_dtype(default)
    assert bool(found.all())


def test_what_each_bucket_and_those_after_it_weigh():
    weight = torch.rand(3, kernels.BUCKETS, generator=torch.Generator().manual_seed(0)).double()
    got = kernels._from_each_on(weight)
    want = torch.stack([weight[:, i:].sum(1) for i in range(kernels.BUCKETS + 1)], 1)
    assert got.shape == want.shape and float((got - want).abs().max()) <= 1e-13


class Deterministic(TorchDispatchMode):
    """Refuses what PyTorch does on CUDA where it is told to be deterministic."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        floats = args and isinstance(args[0], torch.Tensor) and args[0].is_floating_point()
        assert not (name == "cumsum" and floats), name
        assert name not in ("histc", "kthvalue", "median", "put_"), name
        return operator(*args, **(kwargs or {}))


def test_pytorch_may_be_told_to_be_deterministic():
    y = gaussian(70, 40)
    args = arguments(queries(y, 0.3, "noisy", B=3), y, 0.9, 0.3)
    with Deterministic():
        found = kernels.launch(*args)
    assert all(torch.equal(a, b) for a, b in zip(found, kernels.launch(*args), strict=True))
