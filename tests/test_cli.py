"""The command line on real files: results, exit codes, messages; never a traceback."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dfkernels import __version__, _files, cli, ops
from dfkernels._progress import Progress


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with atoms y.npy [50, 2, 3], queries x.npy [7, 2, 3] and weights w.npy [50]."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    np.save("y.npy", draw.standard_normal((50, 2, 3)).astype(np.float32))
    np.save("x.npy", draw.standard_normal((7, 2, 3)))
    np.save("w.npy", draw.standard_normal(50))
    return tmp_path


def arrays(*names):
    return [torch.from_numpy(np.load(name)) for name in names]


def check(out, expected, x, alpha, sigma, rtol=1e-5):
    with np.load(out) as results:
        assert sorted(results.files) == ["ess", "fisher_trace", "log_prob", "mean", "score"]
        for name in ("log_prob", "mean", "fisher_trace", "ess"):
            np.testing.assert_allclose(results[name], getattr(expected, name).numpy(), rtol=rtol, atol=1e-5)
        np.testing.assert_allclose(
            results["score"], expected.score(x, alpha, sigma).numpy(), rtol=rtol, atol=1e-5
        )


def test_posterior_of_files(here, capsys):
    argv = "posterior y.npy x.npy --sigma 0.5 --alpha 0.8 --log-prior w.npy --chunk 3 --dtype float64"
    assert cli.main([*argv.split(), "-o", "r/out.npz"]) == 0
    y, x, w = arrays("y.npy", "x.npy", "w.npy")
    check("r/out.npz", ops.posterior(x, y.double(), 0.8, 0.5, w), x, 0.8, 0.5, rtol=1e-12)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:4] == [
        "log_prob",
        "[7]",
        "mean",
        f"{np.load('r/out.npz')['log_prob'].mean():.6g}",
    ]
    assert printed[-1] == "written: r/out.npz"
    assert os.listdir("r") == ["out.npz"]  # no temporary file is left


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_formats_and_storage_types(here, suffix, dtype):
    """What safetensors.torch and torch.save write is read back, in each storage type, alone or picked by
    name.
    """
    draw = torch.Generator().manual_seed(0)
    y = torch.randint(0, 5, (50, 3), generator=draw).to(dtype)
    x = torch.randn(4, 3, generator=draw)
    held = {"atoms": y, "other": torch.zeros(2)}
    if suffix == "pt":
        torch.save(held, "data.pt")
    else:
        pytest.importorskip("safetensors.torch").save_file(held, "data.safetensors")
    np.save("q.npy", x.numpy())
    assert cli.main(f"posterior data.{suffix}:atoms q.npy --sigma 0.7 --scale 0.5 --offset -1".split()) == 0
    check("out.npz", ops.posterior(x, y.float(), 1.0, 0.7, scale=0.5, offset=-1.0), x, 1.0, 0.7)


def write_safetensors(path, header, payload):
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + payload)


def test_safetensors_need_no_alignment(here):
    header = {"__metadata__": {"a": "b"}, "y": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]}}
    payload = b"\0" + np.array([1, 2, 3], "<f4").tobytes()
    for pad in range(8):
        other = {"p" * (pad + 1): {"dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}
        write_safetensors("odd.safetensors", header | other, payload)
        assert _files.load("odd.safetensors").tolist() == [1, 2, 3]


def test_npy_stays_in_its_file(here):
    assert isinstance(_files.load("y.npy"), np.memmap)
    torch.save(torch.ones(3), "alone.pt")
    assert _files.load("alone.pt").tolist() == [1, 1, 1]
    torch.save(torch.ones(2), "old.pt", _use_new_zipfile_serialization=False)
    assert _files.load("old.pt").tolist() == [1, 1]


class Evil:
    """Unpickling it would create the file `owned`."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def corrupt(name):
    """One bad file per kind."""
    if name == "short.npy":
        data = Path("y.npy").read_bytes()
        Path(name).write_bytes(data[:-10])
    elif name == "head.npy":
        Path(name).write_bytes(b"\x93NUMPY\x01")
    elif name == "text.npy":
        Path(name).write_text("not an array")
    elif name == "empty.npy":
        Path(name).touch()
    elif name == "object.npy":
        np.save(name, np.array([Evil()]), allow_pickle=True)
    elif name == "evil.pt":
        torch.save(Evil(), name)
    elif name == "list.pt":
        torch.save([1, 2], name)
    elif name == "two.pt":
        torch.save({"a": torch.ones(3), "b": torch.ones(3)}, name)
    elif name == "short.pt":
        torch.save(torch.ones(1000), name)
        data = Path(name).read_bytes()
        Path(name).write_bytes(data[: len(data) // 2])
    elif name == "short.safetensors":
        write_safetensors(
            name, {"y": {"dtype": "F32", "shape": [50, 2, 3], "data_offsets": [0, 1200]}}, b"\0" * 100
        )
    elif name == "lie.safetensors":
        write_safetensors(
            name, {"y": {"dtype": "F32", "shape": [50, 2, 3], "data_offsets": [0, 100]}}, b"\0" * 100
        )
    elif name == "head.safetensors":
        Path(name).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    elif name == "json.safetensors":
        Path(name).write_bytes(struct.pack("<Q", 2) + b"!!")
    elif name == "nan.npy":
        y = np.load("y.npy")
        y[4, 1, 2] = np.nan
        np.save(name, y)
    elif name == "integer.npy":
        np.save(name, np.zeros((50, 2, 3), np.int64))
    elif name == "complex.npy":
        np.save(name, np.zeros((50, 2, 3), np.complex64))


BAD = [
    ("missing.npy", "missing.npy: no such file"),
    ("data.csv", "data.csv: expected one of .npy, .safetensors, .pt, .pth, got .csv"),
    ("short.npy", "short.npy: truncated or unreadable: mmap length is greater than file size"),
    ("head.npy", "head.npy: truncated or unreadable: "),
    ("text.npy", "text.npy: truncated or unreadable: "),
    ("empty.npy", "empty.npy: truncated or unreadable: "),
    ("object.npy", "object.npy: truncated or unreadable: "),
    ("evil.pt", "evil.pt: truncated or unreadable: Weights only load failed"),
    ("list.pt", "list.pt: expected a tensor or a dict of tensors"),
    ("two.pt", "two.pt: holds 2 tensors (a, b): name one as two.pt:KEY"),
    ("two.pt:c", "two.pt: holds 2 tensors (a, b): name one as two.pt:KEY"),
    ("short.pt", "short.pt: truncated or unreadable: "),
    ("short.safetensors",
     "short.safetensors: truncated or unreadable: tensor y [50, 2, 3] needs bytes 0 to 1200, the file ends "
     "at 100"),
    ("lie.safetensors",
     "lie.safetensors: truncated or unreadable: tensor y [50, 2, 3] needs bytes 0 to 100, the file "
     "ends at 100"),
    ("head.safetensors",
     "head.safetensors: truncated or unreadable: the header needs 1099511627776 bytes, the file has 10"),
    ("json.safetensors",
     "json.safetensors: truncated or unreadable: Expecting value: line 1 column 1 (char 0)"),
    ("nan.npy", "nan.npy: y: expected finite values, got nan at index [4, 1, 2]"),
    ("integer.npy",
     "integer.npy: y: expected dtype float64, float32, float16, bfloat16, uint8, got torch.int64"),
    ("complex.npy",
     "complex.npy: y: expected dtype float64, float32, float16, bfloat16, uint8, got torch.complex64"),
    ("w.npy", "x.npy: expected shape ['B'] with B >= 1 to match w.npy, got [7, 2, 3]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "message"), BAD, ids=[name for name, _ in BAD])
def test_bad_data_file(here, capsys, name, message):
    corrupt(name.split(":")[0])
    assert cli.main(["posterior", name, "x.npy", "--sigma", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dfkernels posterior: error: {message}") and error.count("\n") == 1
    assert not os.path.exists("out.npz") and not os.path.exists("owned")


def test_bad_queries_and_weights(here, capsys):
    x = np.load("x.npy")
    x[5, 0, 0] = np.inf
    np.save("inf.npy", x)
    assert cli.main("posterior y.npy inf.npy --sigma 1 --chunk 4".split()) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("dfkernels posterior: error: inf.npy, rows 4 to 6: x: expected finite values")
        and "inf" in error
    )
    np.save("short_w.npy", np.zeros(49))
    assert cli.main("posterior y.npy x.npy --sigma 1 --log-prior short_w.npy".split()) == 2
    message = "short_w.npy: log_prior: expected shape [50] (one weight per atom), got [49]"
    assert capsys.readouterr().err == f"dfkernels posterior: error: {message}\n"
    np.save("none.npy", np.zeros((0, 2, 3)))
    assert cli.main("posterior y.npy none.npy --sigma 1".split()) == 2
    assert "none.npy: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--sigma 0", "argument --sigma: expected a number > 0, got 0"),
        ("--sigma nan", "argument --sigma: expected a finite number, got nan"),
        ("--sigma 1 --alpha inf", "argument --alpha: expected a finite number, got inf"),
        ("--sigma 1 --chunk 0", "argument --chunk: expected at least 1, got 0"),
        ("--sigma 1 --dtype int8", "argument --dtype: invalid choice: 'int8'"),
        ("", "the following arguments are required: --sigma"),
    ],
)
def test_bad_options(here, capsys, extra, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["posterior", "y.npy", "x.npy", *extra.split()])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_unwritable_result(here, capsys):
    Path("file").touch()
    assert cli.main("posterior y.npy x.npy --sigma 1 -o file/out.npz".split()) == 2
    assert capsys.readouterr().err.startswith("dfkernels posterior: error: file: cannot write there: ")


def test_a_failed_write_leaves_the_old_file(here):
    path = here / "result.bin"
    path.write_bytes(b"old")

    def full(file):
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(_files.FileError, match=r"result\.bin: cannot write: No space left on device$"):
        _files.write(path, full)
    assert path.read_bytes() == b"old" and sorted(os.listdir()) == ["result.bin", "w.npy", "x.npy", "y.npy"]
    _files.write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_interrupt(here, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(_files, "load", stop)
    assert cli.main("posterior y.npy x.npy --sigma 1".split()) == 130
    assert capsys.readouterr().err == "\ndfkernels posterior: interrupted\n"


def test_reproduce_takes_one_experiment_or_all(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", "table4"])
    message = "argument experiment: invalid choice: 'table4' (choose from "
    assert stop.value.code == 2 and message in capsys.readouterr().err
    args = cli._parser().parse_args(["reproduce", "all"])
    assert args.out == Path("out/reproduce") and args.quick is False  # the demo's files are out/*
    with pytest.raises(SystemExit):
        cli.main(["reproduce", "--help"])
    assert "{errata,table2,table3,adjoint,likelihood,all}" in capsys.readouterr().out


def test_the_bar_makes_room_for_printing(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("reproduce", 4) as bar:
        bar.step("one")
        bar.clear()
        assert re.search(r"reproduce ━{7} +25 % +0 s  one\r\x1b\[2K$", sys.stderr.getvalue())


def test_version_and_env(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"dfkernels {__version__}\n"
    assert cli.main(["env"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_as_a_module(here):
    run = subprocess.run(
        [sys.executable, "-m", "dfkernels", "posterior", "y.npy", "nowhere.npy", "--sigma", "1"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert run.returncode == 2 and run.stderr == "dfkernels posterior: error: nowhere.npy: no such file\n"
