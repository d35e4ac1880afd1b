"""Which tile and how many splits the data-set ops take, for every shape and device: plain
functions."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")

from dfkernels.ops.common.triton import device as _triton
from dfkernels.ops.common.triton import launch, logits, pair, pair_problem

H200 = _triton.DEVICES[90]
DEVICES = pytest.mark.parametrize("device", _triton.DEVICES.values(), ids=lambda d: f"cc{d.cc}")
TARGETS = (1, 2, 16, 17, 63, 64, 4096, 10**6)
SIZES = (1, 2, 3, 16, 17, 64, 784, 1024, 1025, 3072, 4096, 4097, 100_000)


@pytest.mark.parametrize(
    "targets, d, itemsize, D, ATOMS, TARGETS, COORD_AXIS, warps, given",
    [
        (1, 4096, 4, 4096, 4, 1, 2, 16, False),  # memory bound: whole rows in registers
        (1, 5000, 4, 1024, 8, 1, 2, 8, True),  # too wide for that
        (16, 4096, 4, 128, 8, 4, 2, 4, True),  # behind the filter, targets share atoms
        (4096, 1024, 4, 1024, 8, 1, 2, 8, True),
        (65_536, 2, 4, 2, 16, 128, 0, 4, False),  # a target per thread
        (65_536, 16, 4, 16, 2, 128, 0, 4, False),
        (100, 64, 8, 64, 16, 1, 2, 4, False),  # float64: differences only
    ],
)
def test_tile(targets, d, itemsize, D, ATOMS, TARGETS, COORD_AXIS, warps, given):
    t = launch.tile_for(targets, d, itemsize, H200)
    assert (t.D, t.ATOMS, t.TARGETS, t.COORD_AXIS) == (D, ATOMS, TARGETS, COORD_AXIS)
    assert (t.warps, t.logits_given) == (warps, given)


@DEVICES
@pytest.mark.parametrize("itemsize", [4, 8])
def test_every_shape(device, itemsize):
    """Powers of two; d whole, or cut with logits given; what is prefetched fits shared memory."""
    for targets, d in itertools.product(TARGETS, SIZES):
        t = launch.tile_for(targets, d, itemsize, device)
        assert all(n > 0 and n & (n - 1) == 0 for n in (t.D, t.ATOMS, t.TARGETS, t.warps, t.strip))
        assert t.logits_given or d <= t.D
        assert t.strip * t.ATOMS <= 1024 and (t.strip == 1 or t.logits_given)
        assert (t.STAGES - 1) * t.ATOMS * t.D * itemsize + 2**15 <= device.shared or t.STAGES == 1
        assert t.ATOMS * t.TARGETS * t.D * itemsize <= 256 * 32 * t.warps  # 64 registers a thread


@DEVICES
@pytest.mark.parametrize("N", [1, 5, 1000, 10**6, 2**31 + 7])
def test_splits(device, N):
    """Short chains, no empty split, and the device is full where there are atoms enough."""
    for targets, d in itertools.product(TARGETS, SIZES):
        t = launch.tile_for(targets, d, 4, device)
        blocks, tiles = -(-targets // t.TARGETS), -(-N // t.ATOMS)
        splits = launch.splits_for(N, blocks, t, device)
        assert 1 <= splits <= tiles and tiles <= launch.MAX_TILES * splits
        assert blocks * splits >= 4 * device.multiprocessors or splits >= tiles // (4 * t.strip)


@DEVICES
def test_scratch_is_bounded(device):
    """Partial sums and given logits of the queries in flight: at most SCRATCH numbers, or of one
    query."""
    for B, K, N, d in itertools.product((1, 100, 10**5), (1, 7), (10, 10**6), SIZES):
        step = launch.queries_at_once(B, K, N, d, 4, device)
        t = launch.tile_for(B * K, d, 4, device)
        splits = launch.splits_for(N, -(-B * K // t.TARGETS), t, device)
        assert step == 1 or step * K * (3 * splits * d + 2 * N * t.logits_given) <= launch.SCRATCH


@DEVICES
def test_products_fit(device):
    for B, precise in itertools.product((2, 16, 17, 10**4), (False, True)):
        sizes = logits.filter_sizes(B, precise, device)
        assert sizes["QUERIES"] >= 16 and sizes["QUERIES"] <= 2 * max(B, 8)
        held = sizes["ATOMS"] * sizes["QUERIES"] // (32 * 8)
        assert held <= 64  # registers a thread for the product
        stages = sizes["STAGES"] - 1
        assert stages * 4 * sizes["D"] * (sizes["ATOMS"] + sizes["QUERIES"]) <= device.shared


@pytest.mark.parametrize(
    "B, d, itemsize, tangent, tile",
    [
        (1, 784, 4, False, (512, 8, 1, 2, 4, False)),
        (64, 784, 4, False, (128, 8, 4, 2, 4, False)),  # in blocks of coordinates
        (64, 100, 4, True, (128, 4, 4, 2, 4, True)),
        (4096, 64, 4, False, (64, 16, 4, 2, 4, True)),
        (65_536, 16, 4, False, (16, 2, 128, 0, 4, True)),  # a query per thread
        (65_536, 2, 4, False, (2, 16, 128, 0, 4, True)),
        (16, 64, 8, False, (64, 8, 2, 2, 4, True)),
    ],
)
def test_tile_of_derivatives(B, d, itemsize, tangent, tile):
    assert pair_problem.pair_tile(B, d, itemsize, tangent, H200) == tile


@DEVICES
@pytest.mark.parametrize("itemsize", [4, 8])
def test_derivatives_of_every_shape(device, itemsize):
    """Powers of two, d whole or cut, 32 numbers a thread at most, and short chains of sums."""
    power = lambda n: n > 0 and n & (n - 1) == 0
    for B, d, tangent in itertools.product(TARGETS, SIZES, (False, True)):
        t = pair_problem.pair_tile(B, d, itemsize, tangent, device)
        assert all(power(n) for n in (t.D, t.ATOMS, t.QUERIES, t.warps))
        assert t.whole == (d <= t.D)
        assert t.D * t.ATOMS * t.QUERIES * itemsize <= 32 * 4 * 32 * t.warps
        s = pair_problem.sum_tile(B, d, itemsize, tangent)
        assert all(map(power, s.values())) and s["STRIP"] * s["ATOMS"] <= 512
        a = pair_problem.atoms_tile(d, itemsize)
        assert all(map(power, a.values())) and a["D"] * a["ATOMS"] * itemsize <= 2**14
        for N in (1, 1000, 2**31 + 7):
            span, splits = launch.spans(N, -(-B // t.QUERIES), t.ATOMS, device)
            assert span * splits >= N > span * (splits - 1)
            assert span <= launch.MAX_TILES * t.ATOMS


@pytest.mark.parametrize("K", [0, 7])
def test_scratch_of_derivatives_is_bounded(K):
    """c, e, products and projections of the queries in flight."""
    for B, N, d in itertools.product((1, 100, 10**5), (10, 10**6), SIZES):
        groups = list(pair.query_groups(B, N, d, K))
        assert groups[0].start == 0 and groups[-1].stop == B
        most = max(g.stop - g.start for g in groups)
        assert most == 1 or most * N * (3 + 4 * K) <= launch.SCRATCH
