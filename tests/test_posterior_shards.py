"""`dfkernels posterior` on folders of shards: results, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from posterior_files import FIELDS, make_inputs, refused, run

import dfkernels as df
from dfkernels import cli
from dfkernels.methods.sharded import write_manifest


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the inputs, in which the command runs."""
    monkeypatch.chdir(tmp_path)
    make_inputs()


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
    assert refused(capsys, "latent x.npy --sigma 1") == "latent: no such file or folder"
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
