"""Launch heuristics are plain functions of shapes and a device: which configuration for which
shape."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")

from dfkernels._constants import CHAIN_MOST_D
from dfkernels.ops.common.triton import device as _triton
from dfkernels.ops.endpoint_matvec import triton as endpoint
from dfkernels.ops.matched_trace import triton as matched
from dfkernels.ops.transport_chain import triton as chains

H200 = _triton.DEVICES[90]
DEVICES = pytest.mark.parametrize("device", _triton.DEVICES.values(), ids=lambda d: f"cc{d.cc}")
BATCHES = (1, 3, 64, 256, 4096, 100_000)
SIZES = (1, 2, 31, 784, 3072, 12288, 16384, 16385, 65536, 100_000, 196_608, 10**7)


@pytest.mark.parametrize(
    "shape, clusters, plan",
    [
        ((64, 1, 65536), False, (1, 4096, 16, 1, 8, 1)),  # two launches, 1024 programs each
        ((64, 1, 65536), True, (1, 65536, 1, 1, 8, 8)),  # eight CTAs to a row
        ((256, 1, 12288), False, (1, 16384, 1, 1, 8, 1)),
        ((256, 1, 12288), True, (1, 16384, 1, 1, 8, 4)),
        ((4096, 4, 3072), False, (1, 4096, 1, 4, 8, 1)),  # x0 and mean read once for all K
        ((1, 1000, 3072), False, (1, 4096, 1, 1, 8, 1)),  # K makes the programs
        ((65536, 1, 2), False, (128, 2, 1, 1, 2, 1)),  # many rows to a program
    ],
)
def test_endpoint_matvec(shape, clusters, plan):
    assert endpoint.plan(*shape, 4, H200, clusters) == plan


@DEVICES
@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("itemsize", [4, 8])
def test_endpoint_matvec_covers_every_shape(device, clusters, itemsize):
    for B, K, d in itertools.product(BATCHES, (1, 5, 200_000), SIZES):
        p = endpoint.plan(B, K, d, itemsize, device, clusters)
        assert p.block * p.pieces >= d and (p.pieces - 1) * p.block < d
        assert p.rows == 1 or p.pieces == p.ctas == 1
        # a thread's share of three arrays, in registers of 4 bytes, leaves room below 255
        assert 3 * p.rows * p.block * itemsize <= 4 * 192 * 32 * p.warps * p.ctas
        assert -(-K // p.vectors) <= 65535 and 1 <= p.vectors <= K
        assert p.ctas == 1 or (clusters and device.cc >= 90 and p.ctas <= 8)
        assert p.warps * 32 <= max(32, p.rows * p.block // p.ctas)


@pytest.mark.parametrize(
    "shape, clusters, plan",
    [
        ((64, 65536), False, (1, 4096, 8, 8192, 8, 1)),
        ((64, 65536), True, (1, 32768, 1, 65536, 8, 8)),
        ((256, 12288), False, (1, 4096, 1, 12288, 8, 1)),
        ((2, 65536), True, (1, 4096, 16, 4096, 8, 1)),  # too few rows: pieces, not clusters
        ((65536, 2), False, (128, 2, 1, 2, 2, 1)),
    ],
)
def test_matched_trace(shape, clusters, plan):
    assert matched.plan(*shape, 4, H200, clusters) == plan


@DEVICES
@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize("itemsize", [4, 8])
def test_matched_trace_covers_every_shape(device, clusters, itemsize):
    for B, d in itertools.product(BATCHES, SIZES):
        p = matched.plan(B, d, itemsize, device, clusters)
        assert p.length * p.pieces >= d > (p.pieces - 1) * p.length and p.length % p.block == 0
        assert p.rows == 1 or p.pieces == p.ctas == 1
        assert 3 * p.rows * p.block * itemsize <= 4 * 96 * 32 * p.warps * p.ctas
        assert p.ctas == 1 or (clusters and device.cc >= 90 and p.ctas <= 8)


def test_chains():
    """A column of a chain to a thread, or a chain; as many columns of atoms as of A."""
    assert chains.sizes(2) == {"D": 2, "WIDTH": 1, "ATOMS": 4, "CHAINS": 32, "num_warps": 1}
    assert chains.sizes(13) == {"D": 16, "WIDTH": 16, "ATOMS": 16, "CHAINS": 8, "num_warps": 4}
    for d in range(1, CHAIN_MOST_D + 1):
        s = chains.sizes(d)
        assert d <= s["D"] < 2 * d and s["ATOMS"] == max(4, s["D"])
        assert s["WIDTH"] * s["CHAINS"] == 32 * s["num_warps"] and s["WIDTH"] in (1, s["D"])


@DEVICES
def test_few_long_rows_fill_the_device(device):
    """Programs times CTAs, at least one and a half for every multiprocessor."""
    for clusters in (False, True):
        p = endpoint.plan(64, 1, 65536, 4, device, clusters)
        assert 64 * p.pieces * p.ctas >= 1.5 * device.multiprocessors
        q = matched.plan(64, 65536, 4, device, clusters)
        assert 64 * q.pieces * q.ctas >= 1.5 * device.multiprocessors
