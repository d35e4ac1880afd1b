"""Clouds in many files: one pass over the files is one pass over all atoms, in bounded memory; the
manifest, and every way in which files can be wrong."""

from __future__ import annotations

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tensors import rng
from test_global_state import STATES

import dfkernels as df
from dfkernels import ShardedCloud, cli
from dfkernels._io import rows
from dfkernels.methods.sharded import write_manifest

SIZES = (7, 1, 30, 12)


def data(dtype=torch.float32, event=(2, 3)):
    y = torch.randn(sum(SIZES), *event, generator=rng(0))
    return (60 * y + 128).clamp(1, 255).to(dtype) if dtype == torch.uint8 else y.to(dtype)


X = torch.randn(3, 2, 3, generator=rng(1))
V = torch.randn(3, 2, 2, 3, generator=rng(2))


def write(folder, y, kind="npy"):
    """Shards 8, 9, 10 and 11, whose names are not in the order of the alphabet."""
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(y.split(SIZES)):
        if kind == "npy":
            np.save(folder / f"part{8 + i}.npy", part.numpy())
        else:
            held = {"labels": torch.arange(len(part)), "latents": part.contiguous()}
            save_file(held, folder / f"latents_rank00_shard{i:03d}.safetensors", {"a": "b" * i})
    return folder


@pytest.fixture
def folder(tmp_path):
    made = write(tmp_path / "shards", data())
    write_manifest(made)
    return made


def by_ops(y, **stored):
    p = df.ops.posterior(X, y, 1.0, 0.7, **stored)
    F = df.ops.fisher_matvec(X, y, V, 1.0, 0.7, **stored)
    return {**p._asdict(), "F": F, "d": df.ops.fisher_diagonal(X, y, 1.0, 0.7, **stored)}


def by_files(cloud):
    p = cloud.partial(X, 1.0, 0.7, v=V, diagonal=True)
    return {**p.posterior()._asdict(), "F": p.fisher_matvec(), "d": p.fisher_diagonal()}


def close(found, want):
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-5)


NARROW = (torch.float32, torch.float16, torch.uint8)
KINDS = [*(("npy", t) for t in NARROW), *(("safetensors", t) for t in (*NARROW, torch.bfloat16))]


@pytest.mark.parametrize("kind, dtype", KINDS, ids=str)
@pytest.mark.parametrize("memory", [48, 300, 1 << 20])
def test_it_is_the_whole_cloud(tmp_path, kind, dtype, memory):
    y = data(dtype)
    stored = {"scale": 2 / 255, "offset": -1.0} if dtype == torch.uint8 else {}
    folder = write(tmp_path, y, kind)
    write_manifest(folder, key=None if kind == "npy" else "latents", **stored)
    cloud = ShardedCloud(folder, memory=max(memory, 12 * dtype.itemsize))
    assert len(cloud) == 50 and cloud.event_shape == (2, 3) and cloud.dtype == dtype
    close(by_files(cloud), by_ops(y, **stored))
    assert torch.equal(cloud.posterior(X, 1.0, 0.7).mean, by_files(cloud)["mean"])
    assert torch.equal(cloud.log_prob(X, 1.0, 0.7), by_files(cloud)["log_prob"])
    assert torch.equal(cloud.fisher_matvec(X, V, 1.0, 0.7), by_files(cloud)["F"])


def test_files_shared_out_and_merged_are_the_same_bits(folder):
    cloud = ShardedCloud(folder, memory=200)
    whole = cloud.partial(X, 1.0, 0.7, v=V)
    by_file = df.merge(cloud.partial(X, 1.0, 0.7, v=V, files=[i]) for i in range(4))
    two = df.merge(
        [cloud.partial(X, 1.0, 0.7, v=V, files=range(2))]
        + [ShardedCloud(folder, memory=200).partial(X, 1.0, 0.7, v=V, files=[i]) for i in (2, 3)]
    )
    for other in (by_file, two):
        for name in ("log_mass", "log_weight", "mean", "variance", "covariance_product"):
            assert torch.equal(getattr(other, name), getattr(whole, name)), name
    assert float(cloud.partial(X, 1.0, 0.7, files=[]).log_weight) == -torch.inf


def test_no_more_than_the_memory_is_read_at_once_and_progress_is_said(folder, monkeypatch):
    sizes, said, read = [], [], rows.read

    def spied(at, first, last, into):
        sizes.append((last - first) * at.row_bytes)
        assert into.nbytes <= 100
        return read(at, first, last, into)

    monkeypatch.setattr(rows, "read", spied)
    ShardedCloud(folder, memory=200).partial(X, 1.0, 0.7, callback=lambda *at: said.append(at))
    assert sum(sizes) == 50 * 24 and max(sizes) == 96  # four rows of 24 bytes
    assert said[0] == (4, 50) and said[-1] == (50, 50) and len(said) == len(sizes) == 2 + 1 + 8 + 3


def test_the_manifest(folder):
    held = json.loads((folder / "manifest.json").read_text())
    assert held["event_shape"] == [2, 3] and held["dtype"] == "float32"
    assert [shard["file"] for shard in held["shards"]] == [f"part{i}.npy" for i in range(8, 12)]
    assert [shard["rows"] for shard in held["shards"]] == list(SIZES)
    cloud = ShardedCloud(folder)
    assert repr(cloud) == "ShardedCloud(N=50, event_shape=(2, 3), torch.float32, files=4)"
    moved = folder.with_name("moved")
    shutil.move(folder, moved)
    assert len(ShardedCloud(moved)) == 50


def rewrite(folder, change):
    path = folder / "manifest.json"
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))


def replaced(folder, file, array, keep_time=False):
    """Writes another array to a file; its time is that of before, or not."""
    path = folder / file
    times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
    np.save(path, array)
    os.utime(path, ns=times if keep_time else (times[0], times[1] + 10**9))


def refused(call, message):
    with pytest.raises(ValueError) as raised:
        call()
    assert str(raised.value) == message


def test_files_that_are_not_those_of_the_manifest(folder):
    bad = lambda message: refused(lambda: ShardedCloud(folder), message)
    copy, name = folder.with_name("copy"), folder / "part10.npy"
    shutil.copytree(folder, copy)
    size = name.stat().st_size
    os.truncate(name, size - 4)
    bad(f"{name}: truncated: {size - 4} bytes, and {size} when manifest.json was written")
    name.unlink()
    bad(f"{name}: no such file, but manifest.json lists it")
    np.save(name, np.zeros((31, 2, 3), np.float32))
    bad(f"{name}: has changed: {size + 24} bytes, and {size} when manifest.json was written")
    np.save(name, np.zeros((30, 3, 2), np.float32))
    bad(f"{name}: expected rows [2, 3] in float32 as in manifest.json, got rows [3, 2] in float32")
    np.save(name, np.zeros((60, 2, 3), np.float16))
    bad(f"{name}: expected rows [2, 3] in float32 as in manifest.json, got rows [2, 3] in float16")
    shutil.copy2(copy / "part10.npy", name)
    assert len(ShardedCloud(folder)) == 50
    rewrite(folder, lambda held: held["shards"].append(held["shards"][0]))
    bad(f"{folder / 'manifest.json'}: lists part8.npy twice")
    rewrite(folder, lambda held: held.update(shards=held["shards"][1:2]))
    rewrite(folder, lambda held: held["shards"][0].update(rows=2))
    bad(f"{folder / 'part9.npy'}: expected 2 rows as in manifest.json, got 1")


def test_a_file_of_another_content_is_found_by_its_checksum(folder):
    """In the pass that reads it if its time is another one; by `verify` in any case."""
    name = folder / "part10.npy"
    same = np.load(name)
    for memory in (100, 1 << 20):
        replaced(folder, "part10.npy", same)
        assert len(ShardedCloud(folder, memory=memory).posterior(X, 1.0, 0.7).ess) == 3
        replaced(folder, "part10.npy", same + 1)
        cloud = ShardedCloud(folder, memory=memory)
        assert cloud.partial(X, 1.0, 0.7, files=[0, 1, 3]).mean.shape == X.shape
        for call, args in ((cloud.posterior, (X, 1.0, 0.7)), (cloud.verify, ())):
            with pytest.raises(ValueError) as raised:
                call(*args)
            start = f"{name}: has changed since manifest.json was written: its checksum is "
            assert str(raised.value).startswith(start)
    write_manifest(folder, force=True)
    replaced(folder, "part10.npy", same, keep_time=True)
    cloud = ShardedCloud(folder)
    cloud.posterior(X, 1.0, 0.7)  # nothing shows
    with pytest.raises(ValueError, match="part10.npy: has changed .*: its checksum is "):
        cloud.verify()


def test_a_file_that_changes_while_the_cloud_is_open(folder):
    cloud, name = ShardedCloud(folder, memory=100), folder / "part11.npy"
    replaced(folder, "part11.npy", np.load(name))
    refused(
        lambda: cloud.posterior(X, 1.0, 0.7),
        f"{name}: has changed since the cloud was opened: open it anew",
    )
    at = rows.locate(name, None)
    os.truncate(name, name.stat().st_size - 10)
    buffer = np.empty(12 * 24, np.uint8)
    refused(lambda: rows.read(at, 0, 12, buffer), f"{name}: truncated: it ends before row 11 does")


def test_folders_that_get_no_manifest(tmp_path):
    folder = write(tmp_path / "a", data())
    bad = lambda message, **how: refused(lambda: write_manifest(folder, **how), message)
    last = folder / "part11.npy"
    np.save(last, np.zeros((3, 2, 3), np.float32))
    bad(
        f"{last}: row 2, the last, holds nothing but zeros, as where a writer died: write the file "
        "anew, or cut it off"
    )
    np.save(last, np.full((3, 2, 3), np.nan, np.float32))
    bad(f"{last}: expected finite numbers, got others in row 0")
    np.save(last, np.ones((3, 2, 2), np.float32))
    first = folder / "part8.npy"
    bad(f"{last}: expected rows [2, 3] in float32 as in {first}, got rows [2, 2] in float32")
    np.save(last, np.ones((3, 2, 3), np.int64))
    bad(
        f"{last}: expected rows one after the other in float64, float32, float16 or uint8 of this "
        "machine's byte order, got int64"
    )
    np.save(last, np.asfortranarray(np.ones((3, 2, 3), np.float32)))
    bad(
        f"{last}: expected rows one after the other in float64, float32, float16 or uint8 of this "
        "machine's byte order, got float32 in Fortran's order"
    )
    np.save(last, np.ones((0, 2, 3), np.float32))
    bad(f"{last}: expected rows [n, *E] with n >= 1, got shape [0, 2, 3]")
    last.write_bytes(b"no array")
    with pytest.raises(ValueError, match="part11.npy: truncated or unreadable: "):
        write_manifest(folder)
    folder = write(tmp_path / "b", data(), "safetensors")
    shard = folder / "latents_rank00_shard000.safetensors"
    bad(f"{shard}: holds 2 arrays (labels, latents): name one as key")
    bad(f"{shard}: holds 2 arrays (labels, latents): none of them named z", key="z")
    bad(
        f"{shard}:labels: expected float64, float32, float16, bfloat16 or uint8, got int64",
        key="labels",
    )
    path = write_manifest(folder, key="latents")
    bad(f"{path}: is there already: force replaces it", key="latents")
    shard.unlink()
    bad(
        f"{folder}: expected shards without gaps in their numbers, got no {shard.name}",
        key="latents",
        force=True,
    )
    folder = write(tmp_path / "c", data())
    (folder / "part12.npy").symlink_to("part11.npy")
    bad(f"{folder / 'manifest.json'}: lists part12.npy twice")
    folder = tmp_path / "none"
    bad(f"{folder}: expected a folder of .safetensors or .npy files")
    folder = write(tmp_path / "named", data())
    first = folder / "part8.npy"
    bad(f"{first}: holds one array without a name: expected no key, got 'z'", key="z")
    with pytest.raises(ValueError, match="scale: expected a finite value, got nan"):
        write_manifest(folder, scale=float("nan"))


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda held: held.update(format="other"), "format 'other', not 'dfkernels rows 1'"),
        (lambda held: held.update(shards=[]), "no shards"),
        (lambda held: held["shards"][0].pop("rows"), "Shard.__init__() missing 1 required"),
        (lambda held: held["shards"][0].update(rows="3"), "rows: expected an integer, got str"),
        (lambda held: held["shards"][0].update(file=3), "file and key are no texts"),
        (lambda held: held.update(scale="x"), "scale: expected a number, got str"),
        (lambda held: held.pop("dtype"), "'dtype'"),
    ],
)
def test_a_damaged_manifest(folder, change, why):
    rewrite(folder, change)
    with pytest.raises(ValueError) as raised:
        ShardedCloud(folder)
    start = f"{folder / 'manifest.json'}: truncated, or no manifest of dfkernels: {why}"
    assert str(raised.value).startswith(start)


def test_no_manifest_and_bad_arguments(folder, tmp_path):
    refused(
        lambda: ShardedCloud(tmp_path),
        f"{tmp_path / 'manifest.json'}: no such file: `dfkernels manifest {tmp_path}` writes it",
    )
    for name in (tmp_path / "none", folder / "manifest.json"):
        refused(
            lambda name=name: ShardedCloud(name), f"{name}: expected a folder with a manifest.json"
        )
    (tmp_path / "manifest.json").write_text('{"format": "dfk')
    with pytest.raises(ValueError, match="truncated, or no manifest of dfkernels: "):
        ShardedCloud(tmp_path)
    refused(
        lambda: ShardedCloud(folder, memory=47),
        "memory: expected at least two rows, 48 bytes, got 47",
    )
    cloud = ShardedCloud(folder)
    refused(
        lambda: cloud.posterior(X[..., :2], 1.0, 0.7),
        "y: expected shape [N, 2, 2] to go with x of shape [3, 2, 2], got [1, 2, 3]",
    )
    refused(
        lambda: cloud.partial(X, 1.0, 0.7, files=[4]),
        "files: expected an integer from 0 to 3, got 4",
    )
    with pytest.raises(TypeError) as raised:
        cloud.partial(X, 1.0, 0.7, files=slice(1))
    assert str(raised.value) == "files: expected numbers of files, got slice"
    refused(
        lambda: cloud.partial(X, 1.0, 0.7, files=[1, 1]),
        "files: expected each file once, got [1, 1]",
    )


def test_global_state_changes_nothing(folder):
    expected = by_files(ShardedCloud(folder, memory=200))
    with contextlib.ExitStack() as states:
        names = "default dtype float64", "default device meta", "autocast bfloat16"
        for name in (*names, "inference mode"):
            states.enter_context(STATES[name]())
        write_manifest(folder, force=True)
        found = by_files(ShardedCloud(folder, memory=200))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a", data(torch.uint8), "safetensors")
    argv = ["manifest", "a", "--key", "latents", "--scale", "0.5", "--offset", "-1"]
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == (
        "ShardedCloud(N=50, event_shape=(2, 3), torch.uint8, files=4, scale=0.5, offset=-1)\n"
        "written: a/manifest.json\n"
    )
    close(by_files(ShardedCloud("a")), by_ops(data(torch.uint8), scale=0.5, offset=-1.0))
    assert cli.main(argv) == 2
    assert capsys.readouterr().err == (
        "dfkernels manifest: error: a/manifest.json: is there already: force replaces it\n"
    )
    assert cli.main([*argv, "--force"]) == 0
    assert cli.main(["manifest", "a", "--check"]) == 0
    assert capsys.readouterr().out.endswith("\n4 files are as in a/manifest.json\n")
