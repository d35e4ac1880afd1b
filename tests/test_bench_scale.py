"""bench.scale without its measurements: the cost model against what Partials hold and collectives
send, files that it makes, the same bits from files as from memory, and the tables."""

from __future__ import annotations

import math
import os
import sys
from collections import namedtuple
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensors import rng

import dfkernels as df

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.scale import constants, model, paper, passes, shards, tables  # noqa: E402

WORK = model.Pass(N=1000, d=50, itemsize=1, B=4)
FAST = model.Machine(memory=1e4, peak=1e6)


@pytest.mark.parametrize("K", [0, 1, 3])
def test_a_partial_has_the_bytes_of_the_model(K):
    x, y = torch.randn(4, 5, 10, generator=rng(0)), torch.randn(7, 5, 10, generator=rng(1))
    v = torch.randn(4, K, 5, 10, generator=rng(2)) if K else None
    part = df.Partial.of(x, y, 1.0, 0.5, v=v)
    asked = ("x", "alpha", "sigma", "v")
    held = [getattr(part, f.name) for f in fields(part) if f.name not in asked]
    size = sum(t.numel() * t.element_size() for t in held if t is not None)
    assert size == replace(WORK, K=K).partial_bytes == 8 * (1 + 4 * (50 * (1 + K) + 3))


def test_bytes_operations_and_messages():
    assert (WORK.bytes, WORK.flops) == (50_000, 800_000)
    assert replace(WORK, itemsize=4, K=2).bytes == 200_000
    assert replace(WORK, itemsize=4, K=2).flops == 3 * 800_000
    assert (WORK.messages, WORK.message_bytes) == (0, 0)
    shared = replace(WORK, ranks=3, files=7)  # 3 files on the rank with the most
    assert (shared.messages, shared.message_bytes) == (4, 2 * (8192 + 3 * 8 * (1 + 4 * 53)))


def test_what_each_rank_has_of_a_machine():
    known = constants.Constants(40.0, 100.0, 6.0, 1.5, 2.0, 0.0)
    alone = known.machine("memory", cores=2, threads=2)
    assert alone == model.Machine(40e9, 100e9, cores=2, threads=2, link=2e9)
    one = known.machine("page cache", cores=2, threads=1)  # one thread computes, another one reads
    assert (one.memory, one.peak, one.store, one.copy, one.cores) == (20e9, 50e9, 6e9, 6e9, 2)
    half = known.machine("page cache", cores=2, threads=1, count=2)
    assert (half.memory, half.peak, half.store, half.copy, half.cores) == (20e9, 50e9, 6e9, 6e9, 1)
    disk = known.machine("disk", cores=2, threads=1, count=2)
    assert (disk.store, disk.copy) == (0.75e9, 6e9)


def test_a_pass_takes_the_longest_of_its_parts():
    assert model.floor(WORK, FAST) == 50_000 / 1e4  # memory
    assert model.floor(replace(WORK, B=400), FAST) == 80_000_000 / 1e6  # multiply-adds
    assert model.floor(WORK, replace(FAST, store=1e3)) == 50.0  # the disk
    assert model.predicted(WORK, FAST, 1e-3) == 50.0  # the kernel
    # the page cache: 25 s of copying by one of two cores, both computing for 5 s
    copied = replace(FAST, store=2e3, copy=2e3, cores=2, threads=2)
    assert model.floor(WORK, copied) == 25.0
    assert model.floor(WORK, replace(copied, copy=1e3)) == (50 + 2 * 5) / 2
    # two ranks, and their messages
    linked = replace(FAST, link=1e3, latency=0.5)
    shared = replace(WORK, ranks=2, files=2)
    assert model.floor(shared, linked) == 2.5 + 2 * 0.5 + (8192 + WORK.partial_bytes) / 1e3


@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_from_how_many_queries_a_pass_is_bound_by_operations(itemsize):
    most = model.compute_bound_from(itemsize, rate=1e4, peak=8e6)
    assert most == 200 * itemsize
    work = model.Pass(1000, 50, itemsize, round(most))
    machine = model.Machine(memory=1e4, peak=8e6)
    assert model.floor(work, machine) == pytest.approx(work.bytes / 1e4)
    assert model.floor(replace(work, B=2 * work.B), machine) == pytest.approx(2 * work.bytes / 1e4)


def test_files_are_real_and_equal_to_what_is_in_memory(tmp_path):
    paths = shards.make(tmp_path / "a", 1003, 64, 3)
    cloud = df.ShardedCloud(tmp_path / "a")
    assert (len(cloud), cloud.event_shape, cloud.dtype) == (1003, (64,), torch.uint8)
    assert sorted(len(np.load(path)) for path in paths) == [334, 334, 335]
    whole = np.concatenate([np.load(path) for path in paths])
    assert (whole.min(), whole.max()) == (1, 255) and len(np.unique(whole, axis=0)) == 1003
    assert all(os.stat(path).st_blocks * 512 >= 334 * 64 for path in paths)
    assert passes.same_bits(paths, 3)
    float32 = shards.make(tmp_path / "b", 1003, 64, 3, "float32")
    assert np.array_equal(np.concatenate([np.load(path) for path in float32]), whole)
    assert passes.same_bits(float32, 3)


def test_other_bits_are_seen(tmp_path, monkeypatch):
    paths = shards.make(tmp_path / "a", 100, 64, 5)
    merge = passes.merge
    monkeypatch.setattr(passes, "merge", lambda parts: merge(list(parts)[::-1]))
    assert not passes.same_bits(paths, 3)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda folder: usage(6400 + (1 << 30) - 1))
    with pytest.raises(SystemExit, match="needs 1,073,748,224 bytes, and 1,073,748,223 are free"):
        shards.make(tmp_path / "a", 100, 64, 2)
    assert list((tmp_path / "a").iterdir()) == []


def test_a_pass_over_files_is_timed_beside_reading_them(tmp_path):
    paths = shards.make(tmp_path / "a", 1000, 64, 2)
    found = passes._from_files(tmp_path / "a", 2, False, 1 << 16, torch.get_num_threads(), rounds=3)
    assert len(found.reading) == len(found.passes) == 3 and min(found.reading + found.passes) > 0
    assert math.isnan(found.cached) or found.cached == shards.in_memory(paths) == 1.0
    assert 1 << 26 < found.peak < 1 << 34


def test_what_the_paper_estimate_stands_on():
    gpu, host, nvme = paper.STORES
    assert [paper.needed(store, 1) for store in paper.STORES] == [136, 80, 8]
    least, messages = paper.seconds(nvme, 1, 64, 1)
    assert least == pytest.approx(16_384e9 / 64 / 6.5e9)
    n = 8 * (1 + 16_384 + 3)
    assert messages == pytest.approx(126 * 1e-5 + 63 * (8192 + 15 * n) / 50e9, rel=1e-3)
    assert paper.seconds(gpu, 1, 136, 1)[0] == pytest.approx(16_384e9 / 136 / 4256e9)
    assert paper.free_queries(host, 2) == pytest.approx(2 * 724e12 / 3 / 4 / 63e9)
    # by then operations take over
    many = round(paper.free_queries(nvme, 1))
    assert paper.seconds(nvme, 1, 64, many)[0] == pytest.approx(least, rel=1e-3)
    assert paper.seconds(nvme, 1, 64, 2 * many)[0] == pytest.approx(2 * least, rel=1e-3)


def test_the_table_on_paper_says_what_does_not_fit():
    lines = tables.on_paper().splitlines()
    assert "| GPU memory | uint8 | 64 | holds 50 % |  |  |" in lines
    assert "| NVMe | uint8 | 64 | 39.4 s | 3.75 ms | 9,282 |" in lines
    assert [tables.seconds(t) for t in (7200, 315, 39.4, 0.004)] == [
        "2 h",
        "5.25 min",
        "39.4 s",
        "4 ms",
    ]


CASE = {
    "kind": "case", "store": "page cache", "N": "400000", "d": "784", "dtype": "float32", "B": "64",
    "files": "4", "ranks": "1", "threads_a_rank": "1", "bytes": "1254400000", "message_bytes": "0",
    "wire_bytes": "0", "floor_s": "0.5", "predicted_s": "0.8", "measured_s": "1",
    "over_predicted": "1.25", "load": "0.04", "cpu": "Some CPU", "cpu_isa": "v4", "isa": "v4",
    "threads": "2", "torch": "2.13.0", "date": "2026-01-02", "commit": "0123abc",
    "read_gbs": "39.2", "gemm_gflops": "186.7", "copy_gbs": "6.8", "disk_gbs": "1.2",
    "link_gbs": "1.1", "latency_us": "50.0",
}  # fmt: skip


def test_the_tables_of_what_was_measured(tmp_path):
    assert tables.markdown({}) == "No measured run is committed yet."
    shared = {"ranks": "2", "measured_s": "0.55", "message_bytes": "410000", "wire_bytes": "830000"}
    large = {"kind": "out of core", "store": "disk", "B": "1", "bytes": str(1 << 34), "files": "16"}
    large |= {"reading_s": "9", "measured_s": "10", "of_rate": "0.9", "peak_mb": "1500"}
    rows = [CASE, CASE | shared, CASE | large]
    text = tables.markdown({"v4": rows})
    lines = text.splitlines()
    assert (
        "page cache, one thread 6.8 GB/s; disk 1.2 GB/s; messages 1.1 GB/s; latency 50 µs" in text
    )
    case = "| page cache | float32 | 400,000 | 784 | 64 | 1 | 0.5 | 0.8 | 1 | **1.25** |"
    assert lines.count(case) == 1
    assert lines.count("| 64 | 1 | 0.55 | **1.82** | 820,000 | 830,000 |") == 1
    assert lines.count("| disk | 1 | 1.91 | 1.72 | **90 %** | 1,431 |") == 1
    assert "for more queries than 1 from memory, 7 from the page cache, 39 from disk;" in text
    assert "16 GiB of uint8 in 16 files (Some CPU, 2 threads (AVX-512), torch 2.13.0" in text
    figure = pytest.importorskip("bench.scale.figure", reason="needs matplotlib")
    figure.draw(rows, tmp_path)
    light, dark = ((tmp_path / f"scale-{name}.png").read_bytes() for name in ("light", "dark"))
    assert light[:4] == dark[:4] == b"\x89PNG" and len(light) > 20_000 and light != dark
