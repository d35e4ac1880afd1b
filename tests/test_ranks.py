"""Clouds whose files several processes share out: the same bits for any number of them, and every
failure one clear error on every rank. The processes run tests/ranks.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from documents import ROOT

import dfkernels as df
from dfkernels import cli
from dfkernels.methods import _ranks
from dfkernels.methods.sharded import write_manifest

SIZES = (7, 1, 30, 12)  # of part8.npy to part11.npy
SCENARIOS = (
    *("results:2", "results:3", "results:5", "using:2", "disagreeing:3", "raising:3", "subgroup:3"),
    *("killed:3", "hanging:3", "commands:2", "command_killed:3"),
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each rank got, by scenario, and what one process alone does."""
    folder = tmp_path_factory.mktemp("ranks")
    data = folder / "data"
    data.mkdir()
    y = ranks.normal(sum(SIZES), *ranks.E, seed=0)
    for i, part in enumerate(y.split(SIZES)):
        np.save(data / f"part{8 + i}.npy", part.numpy())
    write_manifest(data)
    np.save(folder / "x.npy", ranks.X.numpy())
    script = str(ROOT / "tests" / "ranks.py")
    run = subprocess.run(
        [sys.executable, script, str(folder), *SCENARIOS], timeout=300, check=False, text=True,
        stderr=subprocess.PIPE, env={**ranks.os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    by_name = {
        n: json.loads((folder / f"{n.replace(':', '.')}.json").read_text()) for n in SCENARIOS
    }
    cloud = df.ShardedCloud(data, memory=200)
    return {
        **by_name,
        "alone": ranks.whole(cloud),
        "uses": ranks.uses(cloud),
        "folder": folder,
        "log": run.stderr,
    }


def everyone(found, scenario, name):
    """What all ranks got, where it is the same."""
    (same,) = {json.dumps(rank[name]) for rank in found[scenario]}
    return json.loads(same)


@pytest.mark.slow
@pytest.mark.parametrize(
    "size, own",
    [
        (2, [["part10.npy"], ["part8.npy", "part9.npy", "part11.npy"]]),
        (3, [["part10.npy"], ["part11.npy"], ["part8.npy", "part9.npy"]]),
        (5, [["part10.npy"], ["part11.npy"], ["part8.npy"], ["part9.npy"], []]),
    ],
)
def test_the_same_bits_for_any_number_of_ranks(found, size, own):
    scenario = f"results:{size}"
    assert everyone(found, scenario, "whole") == found["alone"]
    assert [rank["own"] for rank in found[scenario]] == own
    assert everyone(found, scenario, "repr") == (
        f"ShardedCloud(N=50, event_shape=(2, 3), torch.float32, files=4, ranks={size})"
    )


@pytest.mark.slow
def test_derivatives_rows_and_samplers_too(found):
    assert everyone(found, "using:2", "uses") == found["uses"]


def of_ranks(usual, other):
    return f"ranks 0, 2 of 3: {usual}, rank 1 of 3: {other}"


def checksum(t):
    return ranks.files.checksum(t.contiguous())


def described(t):
    dtype = str(t.dtype).removeprefix("torch.")
    return f"{dtype} {list(t.shape)} on cpu (checksum {checksum(t)})"


X, V = ranks.X, ranks.V
DISAGREE = {
    "x": f"x: {of_ranks(described(X), described(X + 1e-7))}",
    "alpha": f"alpha: {of_ranks(*(described(torch.full((3,), a)) for a in (0.9, 0.8)))}",
    "sigma": f"sigma: {of_ranks(*(described(torch.full((3,), s)) for s in (0.7, 1.0)))}",
    "v": f"v: {of_ranks(described(V), described(V[:, :1]))}",
    "diagonal": f"diagonal: {of_ranks('False', 'True')}",
    "files": f"numbers: {of_ranks('[0, 2]', '[0, 1]')}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DISAGREE)
def test_ranks_that_are_asked_for_different_things(found, name):
    assert everyone(found, "disagreeing:3", name) == (
        f"RankError: expected the same on all ranks, got {DISAGREE[name]}"
    )


@pytest.mark.slow
def test_ranks_whose_arguments_differ_in_more_than_their_values(found):
    for name, other in (("shape", X[:2]), ("dtype", X.double())):
        start = f"x: {of_ranks(described(X), described(other))}; alpha: "
        assert everyone(found, "disagreeing:3", name).startswith(
            f"RankError: expected the same on all ranks, got {start}"
        )
    got = everyone(found, "disagreeing:3", "gradient")
    start = "RankError: expected the same on all ranks, got gradient in variance: ranks 0, 2 of 3: "
    assert got.startswith(start)
    one, two = (described(torch.full(X.shape, g)) for g in (1.0, 2.0))
    assert everyone(found, "disagreeing:3", "mean") == (
        f"RankError: expected the same on all ranks, got v: {of_ranks(one, two)}"
    )
    one, two = (described(torch.tensor([i])) for i in (0, 1))
    assert everyone(found, "disagreeing:3", "rows") == (
        f"RankError: expected the same on all ranks, got numbers: {of_ranks(one, two)}"
    )


@pytest.mark.slow
def test_ranks_that_hold_different_things(found):
    got = lambda name: everyone(found, "disagreeing:3", name)
    start = "RankError: expected the same on all ranks, got "
    assert got("memory") == f"{start}memory: {of_ranks(200, 300)}"
    head = "Manifest(event_shape=(2, 3), dtype='float32', scale=1.0, off... (checksum "
    assert got("manifest").startswith(f"{start}manifest: ranks 0, 2 of 3: {head}")
    assert got("cloud").startswith(f"{start}manifest: ranks 0, 2 of 3: ")
    assert got("mapped") == f"{start}scale: {of_ranks(1.0, 2.0)}"
    versions = of_ranks(_ranks._versions(), "dfkernels 0")
    assert got("versions") == f"{start}versions: {versions}"
    assert got("method") == (
        "RankError: expected all ranks to do the same, got "
        f"{of_ranks('a pass for atoms', 'verify')}"
    )


@pytest.mark.slow
def test_files_that_a_rank_lacks(found):
    """Its own are missed when the cloud is opened, on every rank; others it does not need."""
    missing = lambda rank, name: (
        f"rank {rank} of 3: FileError: {found['folder']}/lacking{rank}/{name}: no such file, but "
        "manifest.json lists it"
    )
    assert everyone(found, "disagreeing:3", "missing") == (
        f"RankError: {missing(1, 'part11.npy')}, {missing(2, 'part8.npy')}"
    )
    assert everyone(found, "disagreeing:3", "local") == found["alone"]
    assert everyone(found, "disagreeing:3", "argument") == (
        "RankError: rank 1 of 3: TypeError: x: expected a tensor, got str"
    )


@pytest.mark.slow
def test_a_rank_that_raises(found):
    got = lambda name: everyone(found, "raising:3", name)
    assert got("one") == "RankError: rank 1 of 3: OSError: no space on 1"
    assert got("two") == "RankError: ranks 0, 2 of 3: OSError: no space on 2"
    assert got("all") == "OSError: no space on 9"
    assert got("shape") == (
        "ValueError: y: expected shape [N, 2, 2] to go with x of shape [3, 2, 2], got [1, 2, 3]"
    )
    assert got("nan") == "ValueError: x: expected finite values, got nan at index [1, 0, 2]"
    assert got("long").startswith("RankError: rank 0 of 3: KeyError: '\\x00ß\\x00ß")
    assert got("long").endswith("..., ranks 1, 2 of 3: ZeroDivisionError: division by zero")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["disagreeing:3", "raising:3"])
def test_ranks_go_on_after_errors(found, scenario):
    assert everyone(found, scenario, "after") == found["alone"]


@pytest.mark.slow
def test_a_group_of_some_of_the_processes(found):
    first, outside, second = found["subgroup:3"]
    assert first["inside"] == [
        found["alone"],
        "ShardedCloud(N=50, event_shape=(2, 3), torch.float32, files=4, ranks=2)",
        ["part10.npy"],
    ]
    assert second["inside"][0] == found["alone"]
    assert outside["inside"] == (
        "ValueError: group: expected a process group with this process in it, got one of other "
        "ranks: only its ranks can open a cloud with it"
    )
    assert everyone(found, "subgroup:3", "destroyed") == (
        "ValueError: group: expected a process group that is initialised, got one that was "
        "destroyed, or none: call torch.distributed.init_process_group first"
    )


@pytest.mark.slow
def test_a_rank_that_is_killed(found):
    assert found["killed:3"][1] is None
    for rank in (0, 2):
        start = f"RankError: rank {rank} of 3: lost another rank in the exchange of results: "
        assert found["killed:3"][rank]["killed"].startswith(f"{start}it has ended or was killed: ")


@pytest.mark.slow
def test_a_rank_that_takes_longer_than_the_timeout(found):
    for rank in (0, 2):
        text = found["hanging:3"][rank]["late"]
        start = f"RankError: rank {rank} of 3: no answer of the other ranks to the exchange of "
        assert text.startswith(f"{start}results in 1.")
        assert " s, the timeout of the process group (init_process_group(timeout=...)): " in text


@pytest.mark.slow
def test_the_command(found, monkeypatch, capsys):
    monkeypatch.chdir(found["folder"])
    first, other = found["commands:2"]
    assert cli.main(["posterior", *ranks.JOB.split(), "-o", "one.npz"]) == 0
    said = capsys.readouterr().out
    for name, out in (("archive", "two.npz"), ("folder", "two")):
        assert first[name] == [0, said.replace("one.npz", out), ""] and other[name] == [0, "", ""]
    last = "is the result of this command: two"
    assert first["again"][1].splitlines()[-1] == last and other["again"] == [0, "", ""]
    assert Path("two.npz").read_bytes() == Path("one.npz").read_bytes()
    one = np.load("one.npz")
    for name in one.files:
        assert one[name].tobytes() == np.load(f"two/{name}.npy").tobytes()
    assert not list(Path().glob("three*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, message",
    [
        (
            "file",
            "x.npy: expected a folder of shards, whose files several processes can share out, got "
            "a file: run it without torchrun",
        ),
        (
            "input",
            "x.npy: is the input x.npy: name another result, or --force to replace it",
        ),
        ("queries", "rank 1 of 2: FileError: none.npy: no such file"),
        (
            "sigma",
            "expected the same on all ranks, got sigma: rank 0 of 2: 1.0, rank 1 of 2: 2.0",
        ),
    ],
)
def test_the_command_ends_with_one_error(found, name, message):
    text = f"dfkernels posterior: error: {message}\n"
    first, other = (rank[name] for rank in found["commands:2"])
    if name == "input":  # which the first rank finds
        assert first == other
        text = text.replace("error: ", "error: rank 0 of 2: FileError: ")
    assert first == other == [2, "", text]


@pytest.mark.slow
def test_the_command_goes_on_where_a_rank_was_killed(found, monkeypatch, capsys):
    monkeypatch.chdir(found["folder"])
    first, killed, other = found["command_killed:3"]
    assert killed is None
    for rank, got in ((0, first), (2, other)):
        code, out, err = got["killed"]
        assert code == 2 and not out
        assert f"dfkernels posterior: error: rank {rank} of 3: lost another rank in " in err
    assert cli.main(["posterior", *ranks.JOB.split(), "-o", "kept.npz"]) == 0
    said = capsys.readouterr().err
    assert said.startswith("goes on: ") and "of 3 queries are in kept.npz.unfinished" in said
    assert cli.main(["posterior", *ranks.JOB.split(), "-o", "once.npz"]) == 0
    assert Path("kept.npz").read_bytes() == Path("once.npz").read_bytes()


def test_shares_are_balanced_by_rows():
    assert _ranks.owners([5, 5, 5, 5, 5], 2) == [0, 1, 0, 1, 0]
    assert _ranks.owners([1, 2, 3, 9], 2) == [1, 1, 1, 0]
    assert _ranks.owners([4], 3) == [0] and _ranks.owners([4, 4], 1) == [0, 0]


def test_what_is_no_group():
    for group, message in (
        ("gloo", "group: expected a torch.distributed.ProcessGroup, got str"),
        (2, "group: expected a torch.distributed.ProcessGroup, got int"),
    ):
        with pytest.raises(TypeError) as raised:
            _ranks.Ranks(group)
        assert str(raised.value) == message
