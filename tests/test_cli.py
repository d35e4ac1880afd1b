"""The command line on real files: results, exit codes, messages; never a traceback."""

from __future__ import annotations

import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dfkernels as df
from dfkernels import __version__, cli, ops
from dfkernels._io import arrays as _arrays
from dfkernels._torch import native
from dfkernels.cli import posterior
from experiments import NAMES
from experiments import __main__ as experiments
from experiments.progress import Progress

POSTERIOR = ["posterior", "y.npy", "x.npy", "--sigma", "1"]


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


def refused(capsys, argv):
    """The error, one line, of a posterior that ends with exit code 2."""
    assert cli.main(["posterior", *argv.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dfkernels posterior: error: ") and error.count("\n") == 1
    return error.removeprefix("dfkernels posterior: error: ").strip()


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
    if name.endswith(".npy"):  # which the result is not
        assert refused(capsys, f"{argv} --force").startswith(f"{name}: expected a name that ends")
        assert Path(name).read_bytes() == before
        return
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


def test_a_result_is_named_for_what_it_is(here, capsys):
    for name in ("result", "result.dat", "deep/result.npy"):
        assert refused(capsys, f"y.npy x.npy --sigma 1 -o {name}") == (
            f"{name}: expected a name that ends in .npz, or with a slash for a folder of .npy "
            f"files: {name}.npz, or {name}/"
        )
        assert not Path(name).exists() and not Path(name).parent.joinpath("result.npz").exists()
    assert cli.main(["posterior", "y.npy", "x.npy", "--sigma", "1", "-o", "result.NPZ"]) == 0
    assert np.load("result.NPZ")["ess"].shape == (7,)


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
