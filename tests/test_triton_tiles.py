"""Which tile and how many splits the data-set ops take, for every shape and device: plain
functions."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from dfkernels.ops.common.triton import device as _triton
from dfkernels.ops.common.triton import launch, logits, pair, pair_problem, products
from tools.op_table import DATA_OPS, TABLE

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
        most = launch.MAX_TILES * (4 if t.logits_given else 1)
        assert 1 <= splits <= tiles and tiles <= most * splits
        assert blocks * splits >= 4 * device.multiprocessors or splits >= tiles // (4 * t.strip)


@DEVICES
def test_scratch_is_bounded(device):
    """Partial sums and given logits of the queries in flight: at most SCRATCH numbers, or of one
    query."""
    cases = itertools.product((1, 100, 10**5), (1, 7), (10, 10**6), SIZES, (False, True))
    for B, K, N, d, matvec in cases:
        step = launch.queries_at_once(B, K, N, d, 4, matvec, device)
        t = launch.tile_for(B * K, d, 4, device)
        splits = launch.splits_for(N, -(-B * K // t.TARGETS), t, device)
        pairs = N * (1 + K * matvec) * t.logits_given
        assert step == 1 or step * (3 * K * splits * d + pairs) <= launch.SCRATCH


@pytest.mark.parametrize(
    "rows, row_parts, atom_bytes, in_registers, tile",
    [
        (4, 3, 2, False, (128, 4, 3, True)),  # bfloat16 atoms, one read: bandwidth
        (16, 3, 2, False, (128, 16, 3, True)),
        (64, 3, 4, True, (32, 64, 3, False)),  # float32 atoms, split in registers
        (4096, 2, 2, False, (64, 128, 3, False)),  # halves from memory
        (4096, 2, 4, False, (64, 128, 3, False)),
        (4096, 1, 2, False, (64, 128, 3, False)),  # the filter
    ],
)
def test_tile_of_the_expanded_form(rows, row_parts, atom_bytes, in_registers, tile):
    t = logits.tiling(rows, row_parts, atom_bytes, in_registers, H200)
    assert (t.sizes["D"], t.sizes["ROWS"], t.sizes["STAGES"], t.stacked) == tile


@DEVICES
def test_tiles_of_products_fit(device):
    """Shared memory for what is prefetched, and at most 64 registers a thread for the product."""
    stored, halves = ((4, True), (2, False), (1, False), (2, True)), ((2, False), (4, False))
    for rows in (2, 4, 5, 16, 17, 64, 65, 10**4):
        few = logits.few(rows)
        for size, in_registers in stored if few else halves:
            for row_parts in (3,) if few else (1, 2):
                t = logits.tiling(rows, row_parts, size, in_registers, device)
                s = t.sizes
                columns = s["ROWS"] * (4 if t.stacked else row_parts)
                assert s["ROWS"] >= min(rows, 128) and t.stacked == (rows <= 16)
                assert s["D"] >= 16 and s["ATOMS"] * s["ROWS"] <= 64 * 32 * t.warps
                moved = s["D"] * (s["ATOMS"] * size + 2 * columns)
                assert s["STAGES"] >= 2 and s["STAGES"] * moved <= device.shared
            t = products.sum_tiling(rows, size, in_registers, device)
            s = t.sizes
            columns = s["ROWS"] * (4 if t.stacked else 3 if few else 2)
            assert s["ROWS"] * (4 if t.stacked else 1) * s["D"] <= 64 * 32 * t.warps
            moved = s["ATOMS"] * (s["D"] * size + 2 * columns)
            assert s["D"] >= 32 and s["STAGES"] >= 2 and s["STAGES"] * moved <= device.shared
            assert products.BLOCK % s["ATOMS"] == 0  # a tile of weights has one scale


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


@pytest.mark.parametrize("op", DATA_OPS)
def test_lists_take_as_many_launches_for_any_number_of_queries(op):
    """In rows that a program holds: the sweep, the merges, and no more of them for 30 queries."""

    def launched(B: int) -> list[str]:
        found = []
        x, y, level = torch.zeros(B, 5), torch.zeros(100, 5), torch.ones(B)
        v = (torch.zeros(B, 1, 5),) if op == "fisher_matvec" else ()
        lists = torch.arange(100).repeat(B), torch.full((B,), 100)
        run = lambda kernel, *_, grid, warmup, **more: found.append(kernel.__name__)
        with mock.patch.object(JITFunction, "run", run):
            TABLE[op].launch(
                x, y, *v, level, level, None, 1.0, 0.0, *lists, **TABLE[op].launch_options[0]
            )
        return found

    few = {"log_prob": 2, "fisher_diagonal": 2, "posterior": 3}.get(op, 4)
    assert len(launched(1)) == few and launched(30) == launched(1)


def test_scratch_is_bounded_with_lists():
    """As if each of the targets were alone: its splits are those of the longest list."""
    for B, K, longest, d in itertools.product((1, 100, 10**5), (1, 7), (1, 10**6), SIZES):
        step = launch.queries_at_once(B, K, longest, d, 4, True, H200, listed=True)
        t = launch.tile_for(1, d, 4, H200)
        splits = launch.splits_for(longest, B * K, t, H200)
        pairs = longest * (1 + K) * t.logits_given
        assert t.TARGETS == 1 and (
            step == 1 or step * (3 * K * splits * d + pairs) <= launch.SCRATCH
        )
