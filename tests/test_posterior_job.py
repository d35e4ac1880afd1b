"""Runs of `dfkernels posterior` that end early, and how they go on; results in folders."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from posterior_files import FIELDS, make_inputs, refused, run

import dfkernels as df
from dfkernels._io import unfinished
from dfkernels.cli import posterior, progress
from dfkernels.methods import _posterior_sums
from dfkernels.methods.sharded import write_manifest

JOB = "latents x.npy --sigma 0.7 --chunk 2 --memory 1K"
OUTS = ["out.npz", "out/"]


pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the inputs, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    make_inputs()
    return tmp_path


@pytest.fixture
def eager(here, monkeypatch):
    """Everything that may be kept is kept at once; no test waits for the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(unfinished, "SECONDS", 0.0)
    monkeypatch.setattr(_posterior_sums, "SECONDS", 0.0)


def content(out):
    """The bytes of a result."""
    path = Path(out)
    if path.is_file():
        return path.read_bytes()
    assert sorted(p.name for p in path.iterdir()) == sorted(
        ["job.json", *(f"{name}.npy" for name in FIELDS)]
    )
    return {p.name: p.read_bytes() for p in path.iterdir()}


def expected(out, job=JOB):
    """The bytes that an uninterrupted run writes."""
    run(f"{job} -o whole{out.removeprefix('out')}")
    return content(f"whole{out.removeprefix('out')}")


def others():
    """What is in the folder beside inputs and results."""
    known = {"latents", "x.npy", "y.npy", "out", "out.npz", "whole", "whole.npz", "snapshots"}
    return sorted({p.name for p in Path().iterdir()} - known)


POINTS = ("pwrite", "fsync", "replace", "rename", "unlink", "mkdir", "posix_fallocate")


class Points:
    """Calls `at` in place of some of the calls that change a disk, numbered from 0. `patch` is
    pytest's monkeypatch."""

    def __init__(self, patch, numbers, at):
        self.count, self.inside = 0, False
        for name in POINTS:
            patch.setattr(os, name, self.counted(name, getattr(os, name), numbers, at))

    def counted(self, name, call, numbers, at):
        def wrapped(*args, **kwargs):
            there = name == "mkdir" and os.path.isdir(args[0])  # which changes nothing
            if self.inside or there:
                return call(*args, **kwargs)
            self.count += 1
            if self.count - 1 not in numbers:
                return call(*args, **kwargs)
            self.inside = True
            try:
                return at(name, call, args)
            finally:
                self.inside = False

        return wrapped


def count_points(job, out):
    with pytest.MonkeyPatch.context() as patch:
        points = Points(patch, (), None)
        run(f"{job} -o {out}")
    remove(out)
    return points.count


def remove(out):
    shutil.rmtree(out) if Path(out).is_dir() else Path(out).unlink()


def forked(work):
    """Runs `work` in a forked process, whose number is returned."""
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
    return child


def ended(child):
    """Waits for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def restored(snapshot):
    """Puts the results and the work into the state of a snapshot."""
    for path in Path().glob("out*"):
        remove(path)
    shutil.copytree(snapshot, ".", dirs_exist_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("out", OUTS)
def test_killed_at_every_change_of_the_disk(eager, out):
    """What a process leaves that is killed before one of them, or with half of its bytes written:
    the same command again ends in the same bytes, and leaves nothing else.
    """
    whole, n = expected(out), 0

    def snapshot(name, call, args):
        nonlocal n
        if name == "fsync":
            return call(*args)  # which leaves what was there
        if name == "pwrite":
            call(args[0], args[1][: len(args[1]) // 2], args[2])
        for path in Path().glob("out*"):
            to = Path(f"snapshots/{n}/{path}")
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(path, to) if path.is_dir() else shutil.copy(path, to)
        Path(f"snapshots/{n}").mkdir(parents=True, exist_ok=True)
        n += 1
        return call(*args)

    with pytest.MonkeyPatch.context() as patch:
        Points(patch, range(1000), snapshot)
        run(f"{JOB} -o {out}")
    assert n > 40
    for point in range(n):
        restored(f"snapshots/{point}")
        if Path(out).exists():  # it is whole, or not there
            assert content(out) == whole, point
        run(f"{JOB} -o {out}")
        assert content(out) == whole and not others(), point


def full(name, call, args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_moment(eager, capsys, monkeypatch):
    """An error of one line; what is done is kept, and the same command goes on."""
    job = JOB.replace("--chunk 2", "--chunk 3")
    whole, n, kept = expected("out.npz", job), count_points(job, "out.npz"), 0
    for point in range(n):
        with monkeypatch.context() as patch:
            Points(patch, [point], full)
            error = refused(capsys, f"{job} -o out.npz")
        assert ": cannot write" in error and "No space left on device" in error, error
        if ": what is done is kept, and the same run goes on from there" in error:
            kept += 1
        run(f"{job} -o out.npz")
        assert content("out.npz") == whole and not others(), point
        remove("out.npz")
    assert kept > 0.5 * n


def test_killed_at_random_moments(eager):
    """And again, until the result is there."""
    out = "out/"
    whole, draw, kills = expected(out), np.random.default_rng(0), 0
    while not Path(out).exists():
        child = forked(lambda: run(f"{JOB} -o {out}"))
        if kills < 10:
            time.sleep(draw.uniform(0, 0.1))
            os.kill(child, signal.SIGKILL)
        kills += ended(child) < 0
    assert content(out) == whole and not others()


class Interrupted:
    """`ShardedCloud.partial` that notes (queries, file), and ends in Ctrl-C at a call."""

    def __init__(self, monkeypatch, at):
        self.read, partial = [], df.ShardedCloud.partial

        def spied(cloud, x, *args, files, **how):
            self.read += [(len(x), i) for i in files]
            if len(self.read) == at and files:
                raise KeyboardInterrupt
            return partial(cloud, x, *args, files=files, **how)

        monkeypatch.setattr(df.ShardedCloud, "partial", spied)


@pytest.mark.parametrize("out", OUTS)
def test_ctrl_c_says_how_to_go_on_and_what_is_done_is_not_done_again(eager, capsys, out):
    whole, folder = expected(out), f"{out.rstrip('/')}.unfinished"
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:  # after one chunk and one file of the next
        read = Interrupted(patch, 5).read
        run(f"{JOB} -o {out}", 130)
    assert read == [(2, 0), (2, 1), (2, 2), (2, 0), (2, 1)]
    assert capsys.readouterr().err == (
        "\ndfkernels posterior: interrupted: 2 of 5 queries are done and kept in"
        f" {folder}; the same command goes on from there\n"
    )
    for name in FIELDS:  # nothing half-written is read as whole
        with pytest.raises(ValueError):
            np.load(f"{folder}/{name}.npy")
    assert not Path(out).exists()
    with pytest.MonkeyPatch.context() as patch:
        read = Interrupted(patch, -1).read
        run(f"{JOB} -o {out}")
    assert read == [(2, 1), (2, 2), (1, 0), (1, 1), (1, 2)]
    assert capsys.readouterr().err == f"goes on: 2 of 5 queries are in {folder}\n"
    assert content(out) == whole and not others()


def test_nothing_is_left_of_a_run_that_did_nothing(eager, capsys):
    with pytest.MonkeyPatch.context() as patch:
        Interrupted(patch, 1)
        run(JOB, 130)
    assert capsys.readouterr().err == "\ndfkernels posterior: interrupted\n" and not others()


def begun(out="out.npz", job=JOB):
    """Leaves a run after one chunk and one file of the next."""
    with pytest.MonkeyPatch.context() as patch:
        Interrupted(patch, 5)
        run(f"{job} -o {out}", 130)


@pytest.mark.parametrize(
    ("job", "why"),
    [
        (JOB.replace("0.7", "0.8"), "sigma: 0.7 there, 0.8 here"),
        (f"{JOB} --alpha 2", "alpha: 1.0 there, 2.0 here"),
        (f"{JOB} --dtype float64", "dtype: float32 there, float64 here"),
        (JOB.replace("--chunk 2", "--chunk 3"), "chunk: 2 there, 3 here"),
        (JOB.replace("1K", "2K"), "memory: 1024 there, 2048 here"),
        (JOB.replace("x.npy", "z.npy"), "queries: float64 [5, 2, 3], checksum "),
        (JOB.replace("latents", "other"), "data: "),
    ],
)
def test_work_of_another_command_is_refused(eager, capsys, job, why):
    np.save("z.npy", np.load("x.npy") + 1)
    shutil.copytree("latents", "other")
    begun()
    if "other" in job:
        run(job.replace("other", "latents"))  # goes on
        begun()
        write_manifest("other", scale=2.0, force=True)
    held = content_of_folder("out.npz.unfinished")
    error = refused(capsys, job)
    assert error.startswith(f"out.npz.unfinished: work of another configuration: {why}")
    assert error.endswith(" here: delete it, or name another file")
    assert content_of_folder("out.npz.unfinished") == held


def content_of_folder(name):
    return {path.name: path.read_bytes() for path in Path(name).iterdir()}


def test_work_of_another_version_is_refused(eager, capsys, monkeypatch):
    begun()
    monkeypatch.setattr(posterior, "__version__", "9")
    assert refused(capsys, JOB) == (
        f"out.npz.unfinished: work of another configuration: dfkernels: {df.__version__} there, 9"
        " here: delete it, or name another file"
    )


def test_shards_may_be_copied_meanwhile(eager):
    whole = expected("out.npz")
    begun()
    shutil.copytree("latents", "copy")  # with new times
    shutil.rmtree("latents")
    os.rename("copy", "latents")
    run(JOB)
    assert content("out.npz") == whole


def damage(name):
    """Flips a bit in the part of a file of unfinished work that counts, or cuts it off."""
    path = Path("out.npz.unfinished") / name
    held = bytearray(path.read_bytes())
    if name == "step.safetensors":
        held[-1] ^= 1
    elif name == "job.json":
        del held[len(held) // 2 :]
    elif name == "ess.npy":
        del held[-1]
    elif name == "score.npy":
        path.unlink()
        return
    else:
        held[-(5 * 24) + 3] ^= 1  # the first of five rows
    path.write_bytes(held)


DAMAGED = [
    ("mean.npy", "mean.npy: damaged: the checksum of the first 2 rows is "),
    ("ess.npy", "ess.npy: has 147 bytes, and should have 148"),
    ("score.npy", "score.npy: no such file"),
    ("job.json", "job.json: no work to go on from, or damaged ("),
    ("step.safetensors", "step.safetensors: damaged: the checksum of "),
]


@pytest.mark.parametrize(("name", "why"), DAMAGED, ids=[name for name, _ in DAMAGED])
def test_damaged_work_is_refused(eager, capsys, name, why):
    begun()
    damage(name)
    error = refused(capsys, JOB)
    assert error.startswith(f"out.npz.unfinished/{why}")
    assert error.endswith(": delete out.npz.unfinished to begin anew")


def test_rows_that_cannot_be_are_refused(eager, capsys):
    begun()
    path = Path("out.npz.unfinished/job.json")
    for change, why in (
        ({"rows": 6}, "6 of 5 rows"),
        ({"format": "x"}, "format 'x', not 'dfkernels job 1'"),
    ):
        held = path.read_text()
        path.write_text(json.dumps({**json.loads(held), **change}))
        assert f"or damaged ({why}): delete out.npz.unfinished to begin" in refused(capsys, JOB)
        path.write_text(held)


def test_two_processes_do_not_work_on_one_result(eager, capsys, monkeypatch):
    begun()
    held = os.open("out.npz.unfinished", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    assert refused(capsys, JOB) == "out.npz.unfinished: another process works on it"
    os.close(held)

    def without_locks(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    run(JOB)


@pytest.mark.parametrize("out", OUTS)
def test_too_little_space_is_found_before_any_work(eager, capsys, monkeypatch, out):
    """3 numbers and 2 vectors [2, 3] for each of 5 queries, 128 bytes for the header of each; for
    the archive the same once more; and what is kept of a chunk of 2, twice."""
    once, step = 5 * (3 + 2 * 6) * 4 + 5 * 128, 2 * (8 * 2 * (6 + 3) + 4096)
    needed = (2 if out == "out.npz" else 1) * once + step
    usage = shutil.disk_usage(".")
    free = needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    run(f"{JOB} -o {out}")
    remove(out)
    free = needed - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(df.ShardedCloud, "partial", lambda *args, **how: pytest.fail("worked first"))
        error = refused(capsys, f"{JOB} -o {out}")
    folder = f"{out.rstrip('/')}.unfinished"
    assert error == (
        f"{folder}: expected {needed:,} bytes of free space for the result, got {free:,}"
    )
    assert not others()


# ---- folders of results


def test_a_folder_of_results(here, capsys):
    """Mapped by NumPy, with the numbers of the archive; the second time it is verified."""
    run(JOB)
    run(f"{JOB} -o out/")
    with np.load("out.npz") as archive:
        for name in FIELDS:
            mapped = np.load(f"out/{name}.npy", mmap_mode="r")
            assert (mapped == archive[name]).all() and mapped.dtype == np.float32
    held = json.loads(Path("out/job.json").read_text())
    assert held["rows"] == 5 and held["configuration"]["sigma"] == 0.7
    assert capsys.readouterr().out.endswith("written: out\n")
    whole = content("out")
    run(f"{JOB} -o out/")
    assert capsys.readouterr().out.endswith("is the result of this command: out\n")
    assert content("out") == whole
    assert refused(capsys, f"{JOB} --alpha 2 -o out/") == (
        "out: work of another configuration: alpha: 1.0 there, 2.0 here: delete it, or name another"
        " file"
    )
    damaged = bytearray(Path("out/mean.npy").read_bytes())
    damaged[-1] ^= 1
    Path("out/mean.npy").write_bytes(damaged)
    assert refused(capsys, f"{JOB} -o out/").startswith("out/mean.npy: damaged: the checksum of")


def test_where_no_folder_of_results_can_be(here, capsys):
    Path("empty").mkdir()
    run(f"{JOB} -o empty/")
    Path("full").mkdir()
    Path("full/job.json").write_text('{"mine": 1}')
    os.symlink("empty", "link")
    Path("file").touch()
    for out, why in (
        ("full/", "full: is there already, with something else in it: name another folder"),
        ("latents/", "latents: is the input latents: name another result, or --force to replace"),
        ("link/", "link: is there already, and no folder: name another one"),
        ("file/", "file: is there already, and no folder: name another one"),
        ("./", ".: expected the name of a folder to make"),
        ("file/out/", f"{here}/file: cannot write there: "),
    ):
        assert refused(capsys, f"{JOB} -o {out}").startswith(why)
    run(f"{JOB} -o deep/er/")
    assert np.load("deep/er/ess.npy").shape == (5,)


def test_what_is_left_of_other_kills_is_cleared(eager):
    """A folder without job.json, temporary files in it, and a step of rows that are done."""
    whole = expected("out.npz")
    folder = Path("out.npz.unfinished")
    folder.mkdir()
    for name in ("mean.npy", "step.safetensors", ".dfkernels-0123.tmp", ".tmpqZS9Kw"):
        (folder / name).write_bytes(b"half")
    run(JOB)
    assert content("out.npz") == whole and not others()
    begun()
    step = (folder / "step.safetensors").read_bytes()
    (folder / "note").write_text("mine")
    with pytest.MonkeyPatch.context() as patch:
        Interrupted(patch, 4)
        run(JOB, 130)
    (folder / "step.safetensors").write_bytes(step)
    run(JOB)
    assert content("out.npz") == whole and [p.name for p in folder.iterdir()] == ["note"]


def test_queries_that_change_during_a_run(here, capsys, monkeypatch):
    """Also where they are of the same size."""
    sums = posterior.posterior_sums

    def changing(*args):
        found = sums(*args)
        os.utime("x.npy", ns=(0, 0))
        return found

    monkeypatch.setattr(posterior, "posterior_sums", changing)
    assert refused(capsys, JOB) == "x.npy: has changed since it was opened: begin anew"


def test_all_queries_are_looked_at_before_any_work(here, capsys, monkeypatch):
    x = np.load("x.npy")
    x[4, 1, 2] = np.nan
    np.save("nan.npy", x)
    monkeypatch.setattr(posterior, "posterior_sums", lambda *args: pytest.fail("worked first"))
    assert refused(capsys, "latents nan.npy --sigma 1 --chunk 1") == (
        "nan.npy, row 4: expected finite values, got nan at index [4, 1, 2]"
    )


# ---- progress


def test_a_log_gets_a_line_now_and_then(monkeypatch, capsys):
    """Of a run that goes on at 40 of 100, with 1 s for each 10."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(progress, "SECONDS", 2.0)
    with progress.progress("posterior", "queries") as step:
        for done in range(40, 101, 10):
            step(done, 100)
            now += 1.0
    assert capsys.readouterr().err == (
        "posterior: 60.0 % of 100 queries, 00:04 left\n"
        "posterior: 80.0 % of 100 queries, 00:02 left\n"
        "posterior: 100.0 % of 100 queries, 00:00 left\n"
    )
