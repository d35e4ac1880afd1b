"""The command line on real files: results, exit codes, messages; never a traceback."""

from __future__ import annotations

import importlib
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

import dfkernels as df
from dfkernels import __version__, cli, ops
from dfkernels._io import arrays as _arrays
from dfkernels._io import files
from dfkernels._io.console import Console
from dfkernels._torch import native
from dfkernels.cli import inputs, posterior
from experiments import NAMES
from experiments import __main__ as experiments
from experiments.progress import Progress


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
            np.testing.assert_allclose(
                results[name], getattr(expected, name).numpy(), rtol=rtol, atol=1e-5
            )
        np.testing.assert_allclose(
            results["score"], expected.score(x, alpha, sigma).numpy(), rtol=rtol, atol=1e-5
        )


def test_posterior_of_files(here, capsys):
    argv = (
        "posterior y.npy x.npy --sigma 0.5 --alpha 0.8 --log-prior w.npy --chunk 3 --dtype float64"
    )
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


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8]
)
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_formats_and_storage_types(here, suffix, dtype):
    """What safetensors.torch and torch.save write is read back, in each storage type, alone or
    picked by name.
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
    assert (
        cli.main(f"posterior data.{suffix}:atoms q.npy --sigma 0.7 --scale 0.5 --offset -1".split())
        == 0
    )
    check("out.npz", ops.posterior(x, y.float(), 1.0, 0.7, scale=0.5, offset=-1.0), x, 1.0, 0.7)


def write_safetensors(path, header, payload):
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + payload)


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
            name,
            {"y": {"dtype": "F32", "shape": [50, 2, 3], "data_offsets": [0, 1200]}},
            b"\0" * 100,
        )
    elif name == "lie.safetensors":
        write_safetensors(
            name,
            {"y": {"dtype": "F32", "shape": [50, 2, 3], "data_offsets": [0, 100]}},
            b"\0" * 100,
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
        np.save(name, np.full((50, 2, 3), 1 << 40))
    elif name == "wide.npy":
        np.save(name, np.full((50, 2, 3), 1e300))
    elif name == "none.npy":
        np.save(name, np.zeros((0, 2, 3)))
    elif name == "number.npy":
        np.save(name, 3.0)
    elif name == "complex.npy":
        np.save(name, np.zeros((50, 2, 3), np.complex64))


BAD = [
    ("missing.npy", "missing.npy: no such file"),
    ("data.csv", "data.csv: expected one of .npy, .npz, .safetensors, .pt, .pth, got .csv"),
    ("short.npy", "short.npy: truncated or unreadable: mmap length is greater than file size"),
    ("head.npy", "head.npy: truncated or unreadable: "),
    ("text.npy", "text.npy: truncated or unreadable: "),
    ("empty.npy", "empty.npy: truncated or unreadable: "),
    ("object.npy", "object.npy: truncated or unreadable: "),
    (
        "evil.pt",
        "evil.pt: holds more than tensors, numbers and texts, or is damaged: save the tensor alone",
    ),
    ("list.pt", "list.pt: expected a tensor or a dict of tensors"),
    ("two.pt", "two.pt: holds 2 arrays (a, b): name one as two.pt:KEY"),
    ("two.pt:c", "two.pt: holds 2 arrays (a, b), none of them named c"),
    ("short.pt", "short.pt: truncated or unreadable: "),
    *(
        (
            f"{name}.safetensors",
            f"{name}.safetensors: truncated or unreadable: Error while deserializing header: {why}",
        )
        for name, why in (
            ("short", "incomplete metadata, file not fully covered"),
            ("lie", "invalid shape, data type, or offset for tensor"),
            ("head", "header too large"),
            ("json", "invalid JSON in header: expected"),
        )
    ),
    ("nan.npy", "nan.npy: y: expected finite values, got nan at index [4, 1, 2]"),
    (
        "integer.npy",
        (
            "integer.npy: expected numbers that float32 can hold, got 1099511627776 at index [0, 0,"
            " 0]; --dtype float64 computes with more digits"
        ),
    ),
    (
        "wide.npy",
        (
            "wide.npy: expected numbers that float32 can hold, got 1e+300 at index [0, 0, 0];"
            " --dtype float64 computes with more digits"
        ),
    ),
    (
        "none.npy",
        "none.npy: expected shape [N, *E] with N >= 1 and no empty dimension, got [0, 2, 3]",
    ),
    ("number.npy", "number.npy: expected shape [N, *E] with N >= 1 and no empty dimension, got []"),
    (
        "complex.npy",
        (
            "complex.npy: expected a dense array of real numbers, got dtype complex64: save its"
            " real part, a.real"
        ),
    ),
    ("w.npy", "x.npy: expected shape [B] with B >= 1 to match w.npy, got [7, 2, 3]"),
]


@pytest.mark.parametrize(("name", "message"), BAD, ids=[name for name, _ in BAD])
def test_bad_data_file(here, capsys, name, message):
    corrupt(name.split(":")[0])
    assert cli.main(["posterior", name, "x.npy", "--sigma", "1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dfkernels posterior: error: {message}") and error.count("\n") == 1
    assert not os.path.exists("out.npz") and not os.path.exists("owned")


def refused(capsys, argv):
    """The error, one line, of a posterior that ends with exit code 2."""
    assert cli.main(["posterior", *argv.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dfkernels posterior: error: ") and error.count("\n") == 1
    return error.removeprefix("dfkernels posterior: error: ").strip()


def test_bad_values_in_queries_name_the_row_of_the_file(here, capsys):
    x = np.load("x.npy")
    for name, row, value, got in (("inf.npy", 5, np.inf, "inf"), ("nan.npy", 6, np.nan, "nan")):
        np.save(name, np.where(np.arange(7)[:, None, None] == row, value, x))
        error = refused(capsys, f"y.npy {name} --sigma 1 --chunk 4")
        assert (
            error == f"{name}, row {row}: expected finite values, got {got} at index [{row}, 0, 0]"
        )
    x[6] = 1e30  # finite, and too far from every atom
    np.save("far.npy", x)
    assert refused(capsys, "y.npy far.npy --sigma 1 --chunk 4").startswith(
        "far.npy, rows 4 to 6: x: expected "
    )
    np.save("wide.npy", np.full_like(x, 1e300))
    assert refused(capsys, "y.npy wide.npy --sigma 1 --chunk 4").startswith(
        "wide.npy: expected numbers that float32 can hold, got "
    )


def test_the_error_names_the_file_at_fault(here, capsys, monkeypatch):
    """Each of three files in turn, with the other two as they should be."""
    np.save("short.npy", np.zeros(49))
    error = refused(capsys, "y.npy x.npy --sigma 1 --log-prior short.npy")
    assert error == "short.npy: expected shape [50], one log weight per atom of y.npy, got [49]"
    for value in (np.nan, np.inf, -np.inf):
        np.save("weights.npy", np.full(50, value))
        error = refused(capsys, "y.npy x.npy --sigma 1 --log-prior weights.npy")
        assert error.startswith("weights.npy: log_prior: expected ")
    np.save("none.npy", np.zeros((0, 2, 3)))
    error = refused(capsys, "y.npy none.npy --sigma 1 --log-prior w.npy")
    assert error == "none.npy: expected shape [B, 2, 3] with B >= 1 to match y.npy, got [0, 2, 3]"
    bad = np.load("y.npy")
    bad[3] = np.nan
    np.save("nan.npy", bad)
    error = refused(capsys, "nan.npy x.npy --sigma 1 --log-prior w.npy")
    assert error.startswith("nan.npy: y: expected finite values, got nan at index [3, 0, 0]")
    assert refused(capsys, "y.npy x.npy --sigma 1 --alpha 1e300").startswith(
        "alpha: expected a finite value"
    )
    error = refused(capsys, "y.npy x.npy --sigma 1e-50")
    assert error == "sigma: expected a number that is > 0 in float32 too, got 1e-50"

    def fail(*args):
        raise ValueError("DFKERNELS_ISA: expected base or v3, got 'v9'")

    monkeypatch.setattr(posterior, "posterior_sums", fail)
    assert (
        refused(capsys, "y.npy x.npy --sigma 1") == "DFKERNELS_ISA: expected base or v3, got 'v9'"
    )


@pytest.mark.parametrize(
    "stored", [np.array([[1.0], [2.0], [1e300]]), np.array([[1], [2], [1 << 60]])]
)
def test_what_float32_lacks_does_not_matter_in_masked_atoms(stored):
    """The masked atom's number becomes whatever it may; the others' are still looked at."""
    atoms = torch.from_numpy(stored)
    masked = torch.tensor([False, False, True])
    assert inputs.converted("y.npy", atoms, torch.float32, masked=masked)[:2].tolist() == [
        [1],
        [2],
    ]
    with pytest.raises(
        files.FileError, match=r"^y\.npy: expected numbers that float32 can hold, .* \[2, 0\]"
    ):
        inputs.converted("y.npy", atoms, torch.float32, masked=masked.roll(1))


@pytest.mark.parametrize("code", ["i1", ">i2", "u2", "u4", "<i8", ">u8", ">f8", "f2"])
def test_numbers_of_any_dtype_in_any_role(here, code):
    """Integers of every width, halves and the other byte order: as atoms, as queries and as log
    weights."""
    draw = np.random.default_rng(1)
    y, x, w = (draw.integers(0, 5, shape).astype(code) for shape in ((50, 3), (4, 3), (50,)))
    for name, a in (("iy.npy", y), ("ix.npy", x), ("iw.npy", w)):
        np.save(name, a)
    assert (
        cli.main(["posterior", "iy.npy", "ix.npy", "--sigma", "0.9", "--log-prior", "iw.npy"]) == 0
    )
    y, x, w = (torch.from_numpy(a.astype("f4")) for a in (y, x, w))
    check("out.npz", ops.posterior(x, y, 1.0, 0.9, w), x, 1.0, 0.9)


def test_integers_that_float32_lacks_are_exact_in_float64(here, capsys):
    y = np.array([[0], [(1 << 24) + 1], [(1 << 25) + 1]])
    np.save("big.npy", y)
    error = refused(capsys, "big.npy big.npy --sigma 1")
    assert error.startswith(
        "big.npy: expected numbers that float32 can hold, got 16777217 at index [1, 0]"
    )
    assert (
        cli.main(["posterior", "big.npy", "big.npy", "--sigma", "0.1", "--dtype", "float64"]) == 0
    )
    assert np.load("out.npz")["mean"].tolist() == y.tolist()


def test_results_are_inputs(here):
    """What the command writes it also reads, and so is what a masked atom is worth."""
    np.save("m.npy", np.where(np.arange(50) < 10, 0, -np.inf))
    assert (
        cli.main(
            ["posterior", "y.npy", "x.npy", "--sigma", "2", "--log-prior", "m.npy", "-o", "a.npz"]
        )
        == 0
    )
    assert cli.main(["posterior", "y.npy", "a.npz:mean", "--sigma", "2", "-o", "b.npz"]) == 0
    assert np.load("b.npz")["mean"].shape == (7, 2, 3)


def test_results_do_not_depend_on_global_state(here):
    argv = "posterior y.npy x.npy --sigma 0.5 --log-prior w.npy -o"
    assert cli.main([*argv.split(), "a.npz"]) == 0
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.inference_mode(), torch.device("meta"), torch.autocast("cpu"):
            assert cli.main([*argv.split(), "b.npz"]) == 0
    finally:
        torch.set_default_dtype(before)
    with np.load("a.npz") as a, np.load("b.npz") as b:
        for name in a.files:
            assert a[name].dtype == b[name].dtype and (a[name] == b[name]).all()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--sigma 0", "argument --sigma: expected a number > 0, got 0"),
        ("--sigma -1e-3", "argument --sigma: expected a number > 0, got -1e-3"),
        ("--sigma 1e-400", "argument --sigma: expected a number > 0, got 1e-400"),
        ("--sigma 1e400", "argument --sigma: expected a finite number, got 1e400"),
        ("--sigma nan", "argument --sigma: expected a finite number, got nan"),
        ("--sigma 1,5", "argument --sigma: expected a number, got '1,5'"),
        ("--sigma 1 --offset -inf", "argument --offset: expected a finite number, got -inf"),
        ("--sigma 1 --chunk 1.5", "argument --chunk: expected a whole number, got '1.5'"),
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


def test_options_at_their_ends(here):
    """A chunk larger than any index, no signal at all, a negative number with an exponent."""
    argv = f"posterior y.npy x.npy --sigma 1 --chunk {10**30} --alpha 0 --offset -1e-3"
    assert cli.main(argv.split()) == 0
    y, x = arrays("y.npy", "x.npy")
    check("out.npz", ops.posterior(x.float(), y, 0.0, 1.0, offset=-1e-3), x.float(), 0.0, 1.0)


def test_unwritable_result_is_found_before_any_work(here, capsys, monkeypatch):
    monkeypatch.setattr(_arrays, "load", lambda name: pytest.fail("worked first"))
    Path("file").touch()
    error = refused(capsys, "y.npy x.npy --sigma 1 -o file/out.npz")
    assert error == "file/out.npz: cannot write: Not a directory"
    assert refused(capsys, "y.npy x.npy --sigma 1 -o .") == ".: cannot write: it is a directory"


@pytest.mark.parametrize("name", ["y.npy", "x.npz", "w.npy", "hard.npz", "link.npz"])
def test_an_input_is_replaced_only_by_force(here, capsys, name):
    """Whichever input, by its own name, another hard link or a symbolic link."""
    os.link("y.npy", "hard.npz")
    os.symlink("w.npy", "link.npz")
    np.savez("x.npz", x=np.load("x.npy"))
    before = Path(name).read_bytes()
    argv = f"y.npy x.npz:x --sigma 1 --log-prior w.npy -o {name}"
    assert refused(capsys, argv).startswith(f"{name}: is the input ")
    assert Path(name).read_bytes() == before
    assert cli.main(["posterior", *argv.split(), "--force"]) == 0
    assert np.load(name)["mean"].shape == (7, 2, 3) and os.path.islink("link.npz")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_too_little_memory(here, capsys, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(posterior, "posterior_sums", fail)
    assert (
        refused(capsys, "y.npy x.npy --sigma 1")
        == "not enough memory: a smaller --chunk needs less"
    )


def test_the_result_has_the_name_that_was_given(here):
    for name in ("result", "result.dat"):
        assert cli.main(["posterior", "y.npy", "x.npy", "--sigma", "1", "-o", name]) == 0
        assert np.load(name)["ess"].shape == (7,)


def test_interrupt(here, capsys, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(_arrays, "load", stop)
    assert cli.main(["posterior", "y.npy", "x.npy", "--sigma", "1"]) == 130
    assert capsys.readouterr().err == "\ndfkernels posterior: interrupted\n"


def test_reproduce_takes_one_experiment_or_all(capsys):
    with pytest.raises(SystemExit) as stop:
        experiments.main(["reproduce", "table4"])
    message = "argument experiment: invalid choice: 'table4' (choose from "
    assert stop.value.code == 2 and message in capsys.readouterr().err
    args = experiments._parser().parse_args(["reproduce", "all"])
    assert args.out == Path("out/reproduce") and args.quick is False  # the demo's files are out/*
    with pytest.raises(SystemExit):
        experiments.main(["reproduce", "--help"])
    assert f"{{{','.join((*NAMES, 'all'))}}}" in capsys.readouterr().out


def test_the_bar_makes_room_for_printing(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("reproduce", 4) as bar:
        bar.step("one")
        bar.clear()
        assert re.search(r"reproduce \S+ +25 %  00:00, one\r +\r$", sys.stderr.getvalue())


def test_the_bar_of_posterior(here, monkeypatch):
    """It is drawn on terminals only, and nothing of it is left at the end."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert cli.main([*POSTERIOR, "--chunk", "2"]) == 0
        shown = stream.getvalue()
        assert re.fullmatch("\rposterior: 0.00 queries.*\r +\r" if stream.isatty() else "", shown)


def test_index(here, capsys):
    """What the command writes, a program reads; a file that is there is checked, never replaced."""
    y = np.random.default_rng(1).standard_normal((300, 16)).astype(np.float32)
    np.save("large.npy", y)
    argv = ["index", "large.npy", "--log-prior", "prior.npy", "--scale", "0.5"]
    np.save("prior.npy", np.where(np.arange(300) == 7, -np.inf, 0.0))
    assert cli.main([*argv, "--out", "r/large.safetensors"]) == 0
    assert capsys.readouterr().out.endswith("written: r/large.safetensors\n")
    written = Path("r/large.safetensors").stat()
    cloud = df.PointCloud(torch.from_numpy(y), torch.from_numpy(np.load("prior.npy")), scale=0.5)
    found, built = cloud.index("r/large.safetensors"), cloud.index()
    assert all(torch.equal(a, b) for a, b in zip(found, built, strict=True))
    assert cli.main([*argv, "--out", "r/large.safetensors"]) == 0
    assert "is the index of these atoms" in capsys.readouterr().out
    assert Path("r/large.safetensors").stat().st_mtime_ns == written.st_mtime_ns
    for wrong in (
        ["index", "large.npy", "--out", "r/large.safetensors"],
        [*argv, "--out", "y.npy"],
    ):
        assert cli.main(wrong) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"dfkernels index: error: {wrong[-1]}: ") and "anew" in error
    np.save("small.npy", y[:, :2])
    assert cli.main(["index", "small.npy", "--out", "small.safetensors"]) == 2
    assert "expected atoms of at least 32 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "reproduce"])
def test_commands_that_left_the_package_say_where_they_are(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--quick"])
    message = f"dfkernels: error: in a checkout: python -m experiments {command}\n"
    assert stop.value.code == 2 and capsys.readouterr().err == message


def test_version_and_env(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"dfkernels {__version__}\n"
    assert cli.main(["env"]) == 0
    assert torch.__version__ in capsys.readouterr().out


def test_env_with_an_instruction_set_that_the_cpu_lacks(capsys, monkeypatch):
    why = "DFKERNELS_ISA: expected base or v3, got v9"

    class Module:
        @staticmethod
        def build_info():
            facts = dict.fromkeys(("compiler", "flags", "built_with_torch", "target_torch"), "?")
            return {**facts, "isa_levels": ["base", "v3"]}

        @staticmethod
        def isa():
            raise RuntimeError(why)

    monkeypatch.setattr(native, "module", Module)
    monkeypatch.setattr(native, "available", True)
    assert cli.main(["env"]) == 0
    printed = capsys.readouterr().out
    assert f"none: {why}" in printed and f"cannot run: {why}" in printed


def test_starting_loads_no_experiment():
    """Only the names that `reproduce` takes."""
    lazy = "experiments.reproduce"
    loaded = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(lazy)}
    try:
        importlib.reload(experiments)._parser()
        assert not any(name.startswith(lazy) for name in sys.modules)
    finally:
        sys.modules.update(loaded)


# ---- standard output and error


def in_child(argv, *, stdout="out", stderr="err", encoding="utf-8"):
    """`dfkernels ARGV` in a forked process. stdout, stderr: a file's name, a descriptor, or None
    for closed.

    Returns the exit code, 120 where Python would fail to flush at exit, as it does at the end of a
    process.
    """
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a forked process has none of its parent's threads
            streams = []
            for number, to in ((1, stdout), (2, stderr)):
                if to is None:
                    os.close(number)
                    streams.append(None)
                    continue
                os.dup2(
                    to if isinstance(to, int) else os.open(to, os.O_WRONLY | os.O_CREAT, 0o666),
                    number,
                )
                streams.append(
                    io.TextIOWrapper(io.FileIO(number, "w", closefd=False), encoding, "strict")
                )
            sys.stdout, sys.stderr = streams
            try:
                code = cli.main(argv)
            except SystemExit as stop:
                code = stop.code
            try:
                for stream in streams:
                    if stream is not None:
                        stream.flush()
            except OSError:
                code = 120
            os._exit(code)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
POSTERIOR = ["posterior", "y.npy", "x.npy", "--sigma", "1"]


@pytest.fixture
def broken():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize(
    "argv", [["env"], ["--help"], ["--version"], ["posterior", "--help"], POSTERIOR]
)
def test_a_pipe_that_nobody_reads_ends_quietly(here, broken, argv):
    assert in_child(argv, stdout=broken) == 141
    assert Path("err").read_text() == ""
    assert argv != POSTERIOR or np.load("out.npz")["ess"].shape == (7,)


def test_an_error_keeps_its_code_when_nobody_reads(here, broken):
    assert (
        in_child(["posterior", "no.npy", "x.npy", "--sigma", "1"], stdout=broken, stderr=broken)
        == 2
    )
    assert in_child(POSTERIOR, stderr=broken) == 0  # only the progress is lost


@pytest.mark.parametrize(("stdout", "stderr"), [(None, "err"), ("out", None), (None, None)])
def test_closed_standard_streams(here, stdout, stderr):
    assert in_child(POSTERIOR, stdout=stdout, stderr=stderr) == 0
    assert np.load("out.npz")["ess"].shape == (7,)
    assert (
        in_child(["posterior", "no.npy", "x.npy", "--sigma", "1"], stdout=stdout, stderr=stderr)
        == 2
    )
    assert in_child(["posterior"], stdout=stdout, stderr=stderr) == 2
    assert in_child(["env"], stdout=stdout, stderr=stderr) == 0


def test_closed_descriptors_are_not_given_to_the_next_files(here):
    """Else what C code prints there would get into the results."""
    child = os.fork()
    if child == 0:
        try:
            os.close(1)
            os.close(2)
            with Console():
                opened = os.open("y.npy", os.O_RDONLY)
            os._exit(10 + opened)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) > 12


def test_a_full_standard_output_is_an_error(here):
    assert in_child(["env"], stdout="/dev/full") == 2
    assert (
        Path("err").read_text()
        == "dfkernels env: error: standard output: No space left on device\n"
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-16", "utf-8"])
def test_any_encoding(here, encoding):
    """A name with letters that the encoding lacks, and one that is no text at all."""
    for name in ("\u00fc\u4e2d.npz", os.fsdecode(b"\xff.npz")):
        assert in_child([*POSTERIOR, "-o", name], encoding=encoding) == 0
        assert np.load(name)["ess"].shape == (7,)
        assert "written: " in Path("out").read_text(encoding)
        assert in_child(["posterior", f"no{name}", "x.npy", "--sigma", "1"], encoding=encoding) == 2
        assert "no such file" in Path("err").read_text(encoding)


def test_signs_that_an_encoding_lacks_become_ascii():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii", "strict")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with Console():
            sys.stderr.write("━━━─ 8 × 8 σ ≤ 1 ü\n")
        assert raw.getvalue() == b"===- 8 x 8 sigma <= 1 \\xfc\n" and stream.errors == "strict"


def test_the_result_on_standard_output_is_all_there_is(here):
    """-o /dev/stdout: what is said about the result goes to standard error."""
    assert in_child([*POSTERIOR, "-o", "/dev/stdout"], stdout="got.npz") == 0
    assert np.load("got.npz")["mean"].shape == (7, 2, 3)
    assert "written: /dev/stdout" in Path("err").read_text()


@pytest.mark.parametrize(
    "main, codes", [(cli.main, "0 2 130 141"), (experiments.main, "0 1 2 130 141")]
)
def test_exit_codes_are_in_the_help(main, codes, capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.partition("exit codes:\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == codes.split()


@pytest.mark.slow
def test_as_a_module(here):
    run = subprocess.run(
        [sys.executable, "-m", "dfkernels", "posterior", "y.npy", "nowhere.npy", "--sigma", "1"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (
        run.returncode == 2
        and run.stderr == "dfkernels posterior: error: nowhere.npy: no such file\n"
    )
