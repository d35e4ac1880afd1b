"""Networks and schedules that a command is given: from functions and files, and every message."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dfkernels as df
from dfkernels._io.files import FileError
from dfkernels.cli import networks, schedules

SOURCE = """
import torch
from torch import nn

import dfkernels as df
import beside

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(beside.SCALE))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t):
        return self.dropout(self.scale * x)

def net():
    return Net()

def plain():
    return lambda x, t: 0.5 * x

def denoiser():
    return df.Denoiser(Net(), df.schedule.VP(), "sample")

def sized(width, depth=2):
    return Net()

def optional(width=3):
    return Net()

def nothing():
    pass

def broken():
    raise ValueError("no weights\\nsecond line")

def leaving():
    raise SystemExit(3)

def interrupted():
    raise KeyboardInterrupt

model = Net()
number = 3
"""


class Half(nn.Module):
    def forward(self, x, t):
        return 0.5 * x + 0.0 * t[:, None]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with source.py, a package.module, and a package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("source.py").write_text(SOURCE)
    Path("beside.py").write_text("SCALE = 0.25\n")
    Path("package_of_a_user").mkdir()
    Path("package_of_a_user/__init__.py").touch()
    Path("package_of_a_user/module.py").write_text("def net():\n    return lambda x, t: 2.0 * x\n")
    yield tmp_path
    for name in [n for n in sys.modules if n.split(".")[0] in ("beside", "package_of_a_user")]:
        del sys.modules[name]


def export(name, dynamic=True):
    size = {0: torch.export.Dim("batch")} if dynamic else None
    example = (torch.zeros(4, 3), torch.zeros(4))
    program = torch.export.export(Half(), example, dynamic_shapes=(size, size) if size else None)
    torch.export.save(program, name)


def script(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(Half()), name)


def load(name, schedule="VP", prediction_type="sample", clock=None):
    return networks.load(name, schedule, prediction_type, clock)


def refused(name, *arguments, **options):
    with pytest.raises(FileError) as error:
        load(name, *arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


X = torch.arange(6.0).reshape(2, 3)


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("source.py:net", 0.25),
        ("source.py:plain", 0.5),
        ("source.py:optional", 0.25),
        ("package_of_a_user.module:net", 2.0),
    ],
)
def test_functions(here, name, factor):
    """In eval mode: dropout would be seen."""
    torch.testing.assert_close(load(name)(X, 0.5), factor * X)


def test_a_file_elsewhere_finds_what_lies_beside_it(here, monkeypatch):
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    torch.testing.assert_close(load("../source.py:net")(X, 0.5), 0.25 * X)


def test_a_denoiser_brings_its_conventions(here):
    found = load("source.py:denoiser", None, None)
    assert found.schedule == df.schedule.VP() and found.prediction_type == "sample"
    torch.testing.assert_close(found(X, 0.5), 0.25 * X)
    assert refused("source.py:denoiser", "VP", None, clock=2.0) == (
        "source.py:denoiser: returned a Denoiser, which has its schedule, prediction type and"
        " clock: leave out --schedule, --clock"
    )


def test_exported_and_scripted(here):
    export("half.pt2")
    script("half.pt")
    for name in ("half.pt2", "half.pt"):
        found = load(name)
        networks.try_out(name, found, torch.randn(3, 3))
        torch.testing.assert_close(found(X, 0.5), 0.5 * X)


def test_the_clock(here):
    Path("clocked.py").write_text("def net():\n    return lambda x, t: 0 * x + t[:, None]\n")
    torch.testing.assert_close(
        load("clocked.py:net", clock=1000.0)(X, 0.25), torch.full((2, 3), 250.0)
    )
    torch.testing.assert_close(load("clocked.py:net")(X, 0.25), torch.full((2, 3), 0.25))


MESSAGES = [
    ("nothing", "nothing: expected module:function or file.py:function, a function that returns"),
    ("net.onnx", "net.onnx: expected module:function or file.py:function"),
    ("source.py:", "source.py:: expected module:function or file.py:function"),
    ("missing.py:net", "missing.py: no such file"),
    ("missing.pt2", "missing.pt2: no such file"),
    (
        "no_such_module:net",
        "no_such_module:net: cannot be imported: ModuleNotFoundError: No module named",
    ),
    (
        "source.py:wrong",
        (
            "source.py:wrong: no function wrong there; functions: net, plain, denoiser, sized,"
            " optional, nothing, broken, leaving, interrupted"
        ),
    ),
    (
        "source.py:sized",
        "source.py:sized: expected a function without arguments, got one that needs width",
    ),
    (
        "source.py:model",
        "source.py:model: expected a function that returns the network, got Net",
    ),
    (
        "source.py:number",
        "source.py:number: expected a function that returns the network, got int",
    ),
    (
        "source.py:nothing",
        "source.py:nothing: expected it to return a network, got NoneType",
    ),
    ("source.py:broken", "source.py:broken: raised ValueError: no weights (source.py, line 36)"),
    ("source.py:leaving", "source.py:leaving: raised SystemExit: 3 (source.py, line 39)"),
    ("syntax.py:net", "syntax.py:net: cannot be imported: SyntaxError: invalid syntax (syntax.py,"),
    ("raises.py:net", "raises.py:net: cannot be imported: ZeroDivisionError: division by zero"),
    ("weights.pt", "weights.pt: truncated, or no file of torch.jit.save (of a file of weights,"),
    ("short.pt2", "short.pt2: truncated, or no file of torch.export.save: "),
]


@pytest.mark.parametrize(("name", "message"), MESSAGES, ids=[name for name, _ in MESSAGES])
def test_wrong_networks(here, name, message):
    Path("syntax.py").write_text("def net(:\n")
    Path("raises.py").write_text("1 / 0\n")
    if name == "weights.pt":
        torch.save(nn.Linear(2, 2).state_dict(), name)
    if name == "short.pt2":
        export("whole.pt2")
        whole = Path("whole.pt2").read_bytes()
        Path(name).write_bytes(whole[: len(whole) // 2])
    assert refused(name).startswith(message)


def test_an_interrupt_is_none_of_its_errors(here):
    with pytest.raises(KeyboardInterrupt):
        load("source.py:interrupted")


def test_conventions_must_be_said(here):
    assert refused("source.py:net", None, None) == (
        "source.py:net: is a network: --schedule and --prediction-type must say how to read it"
    )
    assert refused("source.py:net", "VP", None) == (
        "source.py:net: is a network: --prediction-type must say how to read it"
    )


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (
            "x @ torch.zeros(4, 4)",
            "network: expected a prediction for x [3, 3] float32 on cpu, t [3] float32 on cpu; it"
            " raised RuntimeError: mat1 and mat2 shapes cannot be multiplied",
        ),
        ("x[:, :2]", "network: expected output of shape [3, 3], got [3, 2]"),
        ("x * float('nan')", "network: returned NaN or inf for 3 of 3 samples"),
        ("None", "network: expected a tensor"),
        (
            "x if len(x) == 3 else 1 / 0",
            "a call with x [2, 3] and t [2] failed: ZeroDivisionError: division by zero (odd.py,"
            " line 3)",
        ),
    ],
)
def test_a_network_is_tried_before_any_work(here, returned, message):
    Path("odd.py").write_text(f"import torch\ndef net():\n    return lambda x, t: {returned}\n")
    with pytest.raises(FileError) as error:
        networks.try_out("odd.py:net", load("odd.py:net"), torch.randn(3, 3))
    start = f"odd.py:net: {message}"
    assert str(error.value).startswith(start) and "\n" not in str(error.value)


def test_what_a_script_raises_is_in_the_line(here):
    script("half.pt")
    with pytest.raises(FileError) as error:
        networks.try_out("half.pt", load("half.pt"), torch.randn(3, 2, 3))
    assert str(error.value).startswith("half.pt: network: expected a prediction for x [3, 2, 3]")
    assert "size of tensor" in str(error.value) and "\n" not in str(error.value)


def test_a_graph_for_one_batch_size_is_found_out(here):
    export("fixed.pt2", dynamic=False)
    with pytest.raises(FileError, match=r"^fixed.pt2: a call with x \[3, 3\] and t \[3\] failed: "):
        networks.try_out("fixed.pt2", load("fixed.pt2"), torch.randn(3, 3))


# --- schedules


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("VP", df.schedule.VP()),
        (" VP(beta_min=0.1, beta_max=+20) ", df.schedule.VP(0.1, 20.0)),
        ("VP(0.2, 10)", df.schedule.VP(0.2, 10.0)),
        ("RectifiedFlow()", df.schedule.RectifiedFlow()),
        ("GeometricVE(sigma_max=1e2)", df.schedule.GeometricVE(sigma_max=100.0)),
    ],
)
def test_schedules(text, expected):
    assert repr(schedules.parse(text)) == repr(expected)


def test_a_schedule_of_a_table_in_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = np.linspace(0.99, 0.01, 50)
    np.save("table.npy", table)
    found = schedules.parse("Tabulated('table.npy', discrete=True)")
    expected = df.schedule.Tabulated(torch.from_numpy(table), discrete=True)
    assert found.discrete and repr(found) == repr(expected)
    assert found.alpha(7).item() == expected.alpha(7).item()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vp", "--schedule: expected a name, or a name with numbers such as VP(beta_max=20), of "),
        ("", "--schedule: expected a name"),
        ("Schedule", "--schedule: expected a name"),
        ("VP(", "--schedule: expected a name"),
        ("VP\0", "--schedule: expected a name"),
        ("__import__('os').system('touch owned')", "--schedule: expected a name"),
        (
            "VP(beta=3)",
            (
                "--schedule VP(beta=3): expected VP(beta_min=0.1, beta_max=20.0): got an unexpected"
                " keyword argument 'beta'"
            ),
        ),
        (
            "VP(beta_max=max(1, 2))",
            "--schedule VP(beta_max=max(1, 2)): expected VP(beta_min=0.1, beta_max=20.0): ",
        ),
        ("VP(beta_max=None)", "--schedule VP(beta_max=None): expected VP(beta_min=0.1, "),
        ("VP(**{})", "--schedule VP(**{}): expected VP("),
        ("VP(beta_max=-1)", "--schedule VP(beta_max=-1): expected VP("),
        ("Tabulated('none.npy')", "none.npy: no such file"),
    ],
)
def test_wrong_schedules(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError) as error:
        schedules.parse(text)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert not Path("owned").exists()


def test_the_error_lists_all_schedules():
    with pytest.raises(FileError) as error:
        schedules.parse("DDPM")
    listed = set(re.findall(r"\w+", str(error.value).partition(", of ")[2].partition(", got")[0]))
    assert listed == set(df.schedule.__all__) - {"Schedule"}
