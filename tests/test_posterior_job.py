"""`dfkernels posterior` on folders of shards and in pieces: results, what is refused, and runs that
were killed."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import dfkernels as df
from dfkernels import cli
from dfkernels._io import unfinished
from dfkernels.methods import _posterior_sums
from dfkernels.methods.sharded import write_manifest

SIZES = (7, 1, 12)
EVENT = (2, 3)
FIELDS = ("ess", "fisher_trace", "log_prob", "mean", "score")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with shards latents/part*.npy [20, 2, 3], the same in y.npy, and x.npy [5, 2, 3]."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    y = draw.standard_normal((sum(SIZES), *EVENT)).astype(np.float32)
    Path("latents").mkdir()
    for i, part in enumerate(np.split(y, np.cumsum(SIZES)[:-1])):
        np.save(f"latents/part{8 + i}.npy", part)
    write_manifest("latents", scale=2.0, offset=0.5)
    np.save("y.npy", y)
    np.save("x.npy", draw.standard_normal((5, *EVENT)))
    return tmp_path


def run(argv, code=0):
    assert cli.main(["posterior", *argv.split()]) == code


def refused(capsys, argv):
    """The error, one line, of a run that ends with exit code 2."""
    capsys.readouterr()
    run(argv, 2)
    error = capsys.readouterr().err
    assert error.startswith("dfkernels posterior: error: ") and error.count("\n") == 1
    return error.removeprefix("dfkernels posterior: error: ").strip()


# ---- folders of shards


@pytest.mark.parametrize("data", ["latents", "latents/", "latents/manifest.json"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_folder_of_shards(here, capsys, data, dtype):
    run(f"{data} x.npy --sigma 0.7 --alpha 0.8 --chunk 2 --memory 96 --dtype {dtype}")
    x, y = (
        torch.from_numpy(np.load(name)).to(getattr(torch, dtype)) for name in ("x.npy", "y.npy")
    )
    p = df.ops.posterior(x, y, 0.8, 0.7, scale=2.0, offset=0.5)
    expected = {**p._asdict(), "score": p.score(x, 0.8, 0.7)}
    close = 2e-5 if dtype == "float32" else 1e-12
    with np.load("out.npz") as found:
        assert tuple(sorted(found.files)) == FIELDS
        for name in FIELDS:
            want = expected[name].numpy()
            np.testing.assert_allclose(found[name], want, rtol=close, atol=close)
            assert found[name].dtype == want.dtype
    assert capsys.readouterr().out.endswith("written: out.npz\n")


def test_options_that_a_manifest_decides_are_refused(here, capsys):
    for options, message in (
        ("--scale 1", "--scale: expected none, since latents has its own scale"),
        ("--offset 0", "--offset: expected none, since latents has its own offset"),
        ("--log-prior y.npy", "--log-prior: expected none, since latents has no log_prior"),
        ("--memory 47", "--memory: expected at least two rows, 48 bytes, got 47"),
    ):
        assert refused(capsys, f"latents x.npy --sigma 1 {options}") == message
    assert refused(capsys, "y.npy x.npy --sigma 1 --memory 1M") == (
        "--memory: expected it with a folder of shards only, and DATA is a file"
    )
    assert not Path("out.npz").exists()


@pytest.mark.parametrize(
    "text, size", [("4096", 4096), ("512M", 512 << 20), ("1.5g", 3 << 29), ("2T", 2 << 40)]
)
def test_sizes(text, size):
    assert cli.arguments.size(text) == size


@pytest.mark.parametrize("text", ["", "G", "0", "-1M", "1e400", "nan", "12X", "0.5"])
def test_what_is_no_size(here, capsys, text):
    with pytest.raises(SystemExit):
        cli.main(["posterior", "latents", "x.npy", "--sigma", "1", f"--memory={text}"])
    assert f"--memory: expected bytes, such as 512M or 4G, got {text!r}" in capsys.readouterr().err


def rewrite_manifest(change):
    path = Path("latents/manifest.json")
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))


def bad_shard(name):
    """Makes latents/part10.npy wrong in one way."""
    path = Path("latents/part10.npy")
    if name == "missing":
        path.unlink()
    elif name == "truncated":
        os.truncate(path, path.stat().st_size - 4)
    elif name == "dtype":
        np.save(path, np.load(path).astype(np.float16).repeat(2, 0))
    elif name == "shape":
        np.save(path, np.load(path).reshape(12, 3, 2))
    elif name == "changed":
        np.save(path, np.load(path) + 1)
        os.utime(path, ns=(0, 0))
    elif name == "twice":
        rewrite_manifest(lambda held: held["shards"].append(held["shards"][2]))
    elif name == "rows":
        rewrite_manifest(lambda held: held["shards"][2].update(rows=11))
    elif name == "damaged":
        Path("latents/manifest.json").write_text('{"format": "dfk')
    elif name == "none":
        Path("latents/manifest.json").unlink()


BAD = [
    ("missing", "latents/part10.npy: no such file, but manifest.json lists it"),
    ("truncated", "latents/part10.npy: truncated: 412 bytes, and 416 when manifest.json was"),
    ("dtype", "latents/part10.npy: expected rows [2, 3] in float32 as in manifest.json, got rows"),
    ("shape", "latents/part10.npy: expected rows [2, 3] in float32 as in manifest.json, got rows"),
    ("changed", "latents/part10.npy: has changed since manifest.json was written: its checksum is"),
    ("twice", "latents/manifest.json: lists part10.npy twice"),
    ("rows", "latents/part10.npy: expected 11 rows as in manifest.json, got 12"),
    ("damaged", "latents/manifest.json: truncated, or no manifest of dfkernels: "),
    ("none", "latents/manifest.json: no such file: `dfkernels manifest latents` writes it"),
]


@pytest.mark.parametrize(("name", "message"), BAD, ids=[name for name, _ in BAD])
def test_bad_shards_are_named(here, capsys, name, message):
    bad_shard(name)
    assert refused(capsys, "latents x.npy --sigma 1").startswith(message)
    assert not Path("out.npz").exists()


def test_queries_and_dtypes_that_do_not_go_with_the_shards(here, capsys):
    np.save("wrong.npy", np.zeros((5, 3, 2)))
    assert refused(capsys, "latents wrong.npy --sigma 1") == (
        "wrong.npy: expected shape [B, 2, 3] with B >= 1 to match latents, got [5, 3, 2]"
    )
    Path("double").mkdir()
    np.save("double/y.npy", np.load("y.npy").astype(np.float64))
    write_manifest("double")
    assert refused(capsys, "double x.npy --sigma 1") == (
        "double: holds float64: expected --dtype float64, got float32"
    )
    run("double x.npy --sigma 1 --dtype float64")


# ---- runs that end early

JOB = "latents x.npy --sigma 0.7 --chunk 2 --memory 96"
OUTS = ["out.npz", "out/"]


@pytest.fixture
def eager(here, monkeypatch):
    """Everything that may be kept is kept at once."""
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    monkeypatch.setattr(_posterior_sums, "SECONDS", 0.0)
    return here


def content(out):
    """The bytes of a result."""
    path = Path(out)
    if path.is_file():
        return path.read_bytes()
    assert sorted(p.name for p in path.iterdir()) == sorted(
        ["job.json", *(f"{name}.npy" for name in FIELDS)]
    )
    return {p.name: p.read_bytes() for p in path.iterdir()}


def expected(out):
    """The bytes that an uninterrupted run writes."""
    run(f"{JOB} -o whole{out.removeprefix('out')}")
    return content(f"whole{out.removeprefix('out')}")


def others():
    """What is in the folder beside inputs and results."""
    known = {"latents", "x.npy", "y.npy", "out", "out.npz", "whole", "whole.npz"}
    return sorted({p.name for p in Path().iterdir()} - known)


POINTS = ("pwrite", "fsync", "replace", "rename", "unlink", "mkdir", "posix_fallocate")


class Points:
    """Calls `at` in place of the n-th of all calls that change a disk, counted from 0. `patch` is
    pytest's monkeypatch."""

    def __init__(self, patch, n, at):
        self.count = 0
        for name in POINTS:
            patch.setattr(os, name, self.counted(name, getattr(os, name), n, at))

    def counted(self, name, call, n, at):
        def wrapped(*args, **kwargs):
            self.count += 1
            return at(name, call, args) if self.count == n + 1 else call(*args, **kwargs)

        return wrapped


def count_points(out):
    with pytest.MonkeyPatch.context() as patch:
        points = Points(patch, -1, None)
        run(f"{JOB} -o {out}")
    remove(out)
    return points.count


def remove(out):
    shutil.rmtree(out) if Path(out).is_dir() else Path(out).unlink()


def killed(name, call, args):
    """Half of what is to be written is, and then the process is no more."""
    if name == "pwrite":
        call(args[0], args[1][: len(args[1]) // 2], args[2])
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(work):
    """Runs `work` in a forked process; returns its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a forked process has none of its parent's threads
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            work()
            os._exit(0)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
@pytest.mark.parametrize("out", OUTS)
def test_killed_at_every_change_of_the_disk(eager, out):
    """The same command again ends in the same bytes, and leaves nothing else."""
    whole, n = expected(out), count_points(out)
    assert n > 60
    for point in range(n):

        def work(point=point):
            Points(pytest.MonkeyPatch(), point, killed)
            run(f"{JOB} -o {out}")

        assert in_child(work) == -signal.SIGKILL, point
        if Path(out).exists():  # it is whole, or not there
            assert content(out) == whole, point
        run(f"{JOB} -o {out}")
        assert content(out) == whole and not others(), point
        remove(out)


def full(name, call, args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_is_full_at_any_moment(eager, capsys, monkeypatch):
    """An error of one line; what is done is kept, and the same command goes on."""
    whole, n = expected("out.npz"), count_points("out.npz")
    kept = 0
    for point in range(n):
        with monkeypatch.context() as patch:
            Points(patch, point, full)
            error = refused(capsys, f"{JOB} -o out.npz")
        assert ": cannot write" in error and "No space left on device" in error, error
        if ": what is done is kept, and the same run goes on from there" in error:
            kept += 1
        run(f"{JOB} -o out.npz")
        assert content("out.npz") == whole and not others(), point
        remove("out.npz")
    assert kept > 0.7 * n
