"""One pass over the atoms (ops/common/triton/fused.py): which calls take it, how it is cut, and
merges that fill a GPU; plain functions of shapes and a device. And the check by other versions of
Triton."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from dfkernels.ops.common.triton import device as _triton
from dfkernels.ops.common.triton import fused, launch

ROOT = Path(__file__).resolve().parent.parent
H200 = _triton.DEVICES[90]
DEVICES = pytest.mark.parametrize("device", _triton.DEVICES.values(), ids=lambda d: f"cc{d.cc}")
BATCHES = (32, 64, 1024, 65_536)
DIMENSIONS = (1, 2, 3, 8, 9, 16, 17, 64, 65, 128)
KINDS = pytest.mark.parametrize("kind", ["log_prob", "posterior", "matvec", "diagonal"])


@pytest.mark.parametrize(
    "B, d, kind, small, D, ATOMS, TARGETS, warps, strip, tile",
    [
        (65_536, 2, "posterior", True, 2, 8, 256, 4, 16, 16),  # two queries a thread
        (65_536, 8, "matvec", True, 8, 4, 128, 4, 16, 4),
        (65_536, 16, "diagonal", False, 16, 64, 128, 8, 16, 2),
        (1024, 64, "matvec", False, 64, 64, 128, 8, 64, 64),
        (40, 12, "log_prob", False, 16, 64, 128, 8, 64, 64),
        (1024, 100, "posterior", False, 128, 64, 128, 8, 64, 32),
    ],
)
def test_plan(B, d, kind, small, D, ATOMS, TARGETS, warps, strip, tile):
    plan = fused.plan(B, 1, 10_000, d, 4, kind, H200)
    sizes = {"D": D, "ATOMS": ATOMS, "TARGETS": TARGETS, "num_warps": warps}
    assert (plan.small, plan.strip, plan.sweep.ATOMS) == (small, strip, tile)
    assert {k: plan.sizes[k] for k in sizes} == sizes


def test_other_calls_have_none():
    """Few queries, many coordinates, float64, and atoms whose parts would take too much memory."""
    for B, N, d, itemsize in (
        (31, 100, 8, 4),
        (64, 100, 129, 4),
        (64, 100, 8, 8),
        (64, 10**8, 2, 4),
    ):
        assert fused.plan(B, 1, N, d, itemsize, "posterior", H200) is None
    for kind, device in (("matvec", H200), ("diagonal", H200), ("posterior", _triton.DEVICES[80])):
        assert fused.plan(64, 1, 100, 65, 4, kind, device) is None  # would spill
        assert fused.plan(64, 1, 100, 64, 4, kind, device)
    assert fused.plan(64, 1, 10**7, 64, 4, "posterior", H200)
    assert fused.plan(64, 1, 10**7, 64, 4, "diagonal", H200) is None  # twice as many parts


@DEVICES
@KINDS
def test_every_shape(device, kind):
    """Powers of two, whole rows, parts that fit shared memory; splits that cover the atoms, none of
    them empty, of whole strips and with short chains; scratch memory for many queries at once."""
    dimensions = [d for d in DIMENSIONS if d <= fused.most_d(kind, device)]
    for B, K, N, d in itertools.product(BATCHES, (1, 3), (1, 77, 65_536, 10**6), dimensions):
        plan = fused.plan(B, K, N, d, 4, kind, device)
        sizes, tile = plan.sizes, plan.sweep
        assert all(n > 0 and n & (n - 1) == 0 for n in sizes.values())
        assert d <= sizes["D"] < max(2 * d, 3, 17 * (d > 8)) and plan.D >= 16
        parts = (1 + (kind == "matvec")) * sizes["TARGETS"]
        parts += (1 + (kind == "diagonal")) * sizes["STAGES"] * sizes["ATOMS"]
        assert plan.small or 6 * sizes["D"] * parts <= device.shared - 2**13
        assert tile.strip * tile.ATOMS == plan.strip and fused.BOUND_ATOMS % plan.strip == 0
        span, splits = fused.product_splits(N, B * K, sizes, device)
        assert span * splits >= N > span * (splits - 1) and span % sizes["ATOMS"] == 0
        assert span <= fused.MOST_TILES * sizes["ATOMS"]
        span, splits = fused.sweep_splits(N, B * K, plan, device)
        assert span * splits >= N > span * (splits - 1) and span % plan.strip == 0
        room = fused.scratch(N, d, K, B * K, plan, device)
        assert launch.SCRATCH // room >= fused.LEAST_QUERIES


class Launches(TorchDispatchMode):
    """Counts PyTorch's operators that launch something, beside Triton's kernels."""

    SILENT = ("view", "slice", "select", "expand", "unsqueeze", "empty", "new_empty", "empty_like")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.overloadpacket.__name__ not in self.SILENT
        return operator(*args, **(kwargs or {}))

    def kernel(self):
        self.count += 1


@pytest.mark.parametrize(
    "op, most",
    [("posterior", 17), ("log_prob", 13), ("fisher_matvec", 17), ("fisher_diagonal", 13)],
)
def test_small_calls_make_few_launches(op, most):
    new = lambda *shape: torch.empty(shape, device="meta")
    x, level, v = new(1024, 64), new(1024), [new(1024, 1, 64)] * (op == "fisher_matvec")
    more = {"fisher": True} if v else {}
    launcher = importlib.import_module(f"dfkernels.ops.{op}.triton").launch
    run = lambda *values, **options: launches.kernel()
    with Launches() as launches, mock.patch.object(JITFunction, "run", run):
        launcher(x, new(10_000, 64), *v, level, level, None, 1.0, 0.0, **more)
    assert 10 < launches.count <= most


@DEVICES
def test_merges_use_the_whole_device(device):
    """For one target of 3,072 coordinates and more too: twice as many programs as multiprocessors,
    each with some numbers at once; and for many targets, whole rows."""
    for targets, d in itertools.product((1, 2, 16, 4096), (1, 2, 784, 3072, 4096, 100_000)):
        (programs,), sizes = launch.merge_grid(targets, d, device)
        assert programs == targets * -(-d // sizes["D"]) and sizes["D"] <= 128
        assert sizes["D"] <= 8 or programs >= 2 * device.multiprocessors or sizes["D"] == 1
        assert sizes["SPLITS"] >= 16 and sizes["SPLITS"] * sizes["D"] <= 2048
    assert launch.merge_grid(1, 4096, H200) == ((512,), {"SPLITS": 256, "D": 8, "num_warps": 4})
    assert launch.merge_grid(4096, 1024, H200)[1]["D"] == 128


def test_other_versions_of_triton(monkeypatch, capsys):
    """What spills or does not fit is named, as is a version that was not used."""
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import triton_versions as versions

    row = {"triton": "3.6.0", "file": "f", "kernel": "k", "loop_spills": 0, "shared": 100}
    found = {80: [row], 90: [{**row, "loop_spills": 2}], 100: "no module", 120: [row]}
    found[120] = [{**row, "triton": "3.7.1"}, {**row, "shared": 2**20}]
    installed = []
    monkeypatch.setattr(versions, "install", lambda v, folder: installed.append(v))
    monkeypatch.setattr(versions, "rows_of", lambda folder, cc: found[cc])
    monkeypatch.setattr(sys, "argv", ["bench.triton_versions", "3.6.0"])
    assert versions.main() == 1 and installed == ["3.6.0"]
    out = capsys.readouterr().out
    assert "cc 80, 1 kernels: nothing spills in a loop, and all fit the device\n" in out
    assert "cc 90, 1 kernels: f, k: 2 spills in a loop, 100 bytes of shared memory\n" in out
    assert "cc 100, none kernels: no module\n" in out
    assert "1048576 bytes of shared memory" in out and "was used" in out
    monkeypatch.setattr(versions, "rows_of", lambda folder, cc: [row])
    assert versions.main() == 0
