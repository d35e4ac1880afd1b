"""`dfkernels audit` and its page: networks of every kind, what is written, and every message."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="needs the extra: pip install dfkernels[report]")
pytest.importorskip("jinja2", reason="needs the extra: pip install dfkernels[report]")

from coarse_figures import draw_coarsely

import dfkernels as df
from dfkernels import cli
from dfkernels._io import files
from dfkernels._page import extra, theme
from dfkernels.cli import audit as command
from dfkernels.methods.audit import level
from dfkernels.methods.audit.parts import Estimate
from dfkernels.methods.audit_page import _html, _levels, write_page

# The posterior mean of x_0 ~ N(0, I) under VP, where x has variance 1: alpha x. And its files.
SOURCE = """
import torch
from torch import nn

import dfkernels as df

class Gaussian(nn.Module):
    def forward(self, x, t):
        alpha = torch.exp(-0.25 * t * t * 19.9 - 0.05 * t).to(x.dtype)
        return x * alpha.reshape(-1, *(1 for _ in x.shape[1:]))

def net():
    return Gaussian()

def denoiser():
    return df.Denoiser(Gaussian(), df.schedule.VP(), "sample")

def nan():
    return lambda x, t: x * float("nan")

def needs(width):
    return Gaussian()
"""
FEW = "--levels 2 --queries 8 --points 4 --samples 8"
READ = "--schedule VP --prediction-type sample"
BOTH = "--train train.npy --held-out test.npy"


@pytest.fixture(scope="module", autouse=True)
def coarse():
    """Figures that are drawn in half the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_html, "_DPI", 40)
        yield


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with source.py and images train.npy [64, 1, 2, 2], test.npy [40, 1, 2, 2]."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("source.py").write_text(SOURCE)
    draw = np.random.default_rng(0)
    np.save("train.npy", draw.standard_normal((64, 1, 2, 2)).astype(np.float32))
    np.save("test.npy", draw.standard_normal((40, 1, 2, 2)).astype(np.float32))
    return tmp_path


def run(text):
    return cli.main(["audit", *text.split()])


def refused(capsys, text):
    """The error, one line, of a command that ends with exit code 2."""
    assert run(text) == 2
    error = capsys.readouterr().err
    assert error.startswith("dfkernels audit: error: ") and error.count("\n") == 1, error
    return error.removeprefix("dfkernels audit: error: ").strip()


def module():
    """The network of SOURCE as it stands there."""
    names: dict = {}
    exec(SOURCE, names)
    return names["Gaussian"]()


def export(name):
    size = {0: torch.export.Dim("batch")}
    example = (torch.zeros(4, 1, 2, 2), torch.zeros(4))
    torch.export.save(torch.export.export(module(), example, dynamic_shapes=(size, size)), name)


def script(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = (torch.zeros(4, 1, 2, 2), torch.zeros(4))
        torch.jit.save(torch.jit.trace(module(), example), name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One audit for all tests: its folder and what it printed."""
    with pytest.MonkeyPatch.context() as at:
        draw_coarsely(at)
        at.chdir(tmp_path_factory.mktemp("audit"))
        at.setattr(sys, "path", [*sys.path])
        Path("source.py").write_text(SOURCE)
        draw = np.random.default_rng(0)
        np.save("train.npy", draw.standard_normal((64, 1, 2, 2)).astype(np.float32))
        np.save("test.npy", draw.standard_normal((40, 1, 2, 2)).astype(np.float32))
        assert run(f"source.py:net {BOTH} {READ} {FEW}") == 0
        return Path.cwd()


def read(folder):
    return df.AuditReport.from_json((folder / "audit" / "audit.json").read_text())


def test_what_is_written_is_the_audit(finished):
    assert sorted(os.listdir(finished / "audit")) == ["audit.html", "audit.json"]
    train, held_out = (
        df.PointCloud(torch.from_numpy(np.load(finished / name)))
        for name in ("train.npy", "test.npy")
    )
    denoiser = df.Denoiser(module(), df.schedule.VP(), "sample")
    expected = df.audit(denoiser, train, held_out, levels=2, queries=8, points=4, samples=8)
    found = read(finished)
    assert found.verdict == expected.verdict
    assert [u.gap for u in found.levels] == [u.gap for u in expected.levels]
    assert found.likelihood == expected.likelihood
    assert torch.equal(found.samples.distances, expected.samples.distances)


def test_networks_of_files_give_the_same_audit(here, finished, capsys):
    export("net.pt2")
    script("net.ts")
    for name in ("net.pt2", "net.ts"):
        assert run(f"{name} {BOTH} {READ} {FEW} --out {name}.out") == 0
        found = df.AuditReport.from_json(Path(f"{name}.out/audit.json").read_text())
        for one, other in zip(found.levels, read(finished).levels, strict=True):
            assert one.train.network.value == pytest.approx(other.train.network.value, rel=1e-5)
            assert one.jacobian.trace.value == pytest.approx(other.jacobian.trace.value, rel=1e-3)
        printed = capsys.readouterr().out
        assert found.verdict in printed
        assert printed.endswith(f"written: {name}.out/audit.html, {name}.out/audit.json\n")


def test_a_denoiser_without_training_data(here):
    options = "--levels 2 --queries 8 --points 0 --samples 8 --noise 0.2 2 --seed 3"
    assert run(f"source.py:denoiser --held-out test.npy {options}") == 0
    found = df.AuditReport.from_json(Path("audit/audit.json").read_text())
    assert found.settings.train is None and found.settings.held_out == 40
    assert found.likelihood is None and found.samples is None
    assert found.levels[0].noise == pytest.approx(0.2) and found.levels[0].best is None
    assert "Without its training data" in Path("audit/audit.html").read_text()


def test_a_bad_verdict_is_a_result(here, capsys):
    """Data in [0, 1] of a network for [-1, 1]: the check names it, and the exit code is 0."""
    y = (np.load("train.npy") + 4) / 8
    np.save("scaled.npy", y)
    assert run(f"source.py:net --train scaled.npy {READ} {FEW}") == 0
    found = df.AuditReport.from_json(Path("audit/audit.json").read_text())
    assert found.check.cause == "data scale" and not found.ok
    assert found.check.verdict in capsys.readouterr().out
    page = Path("audit/audit.html").read_text()
    assert "trained on data of another scale" in page and "<figure" not in page
    assert run(f"source.py:net --train scaled.npy {READ} {FEW} --scale 8 --offset -4") == 0
    found = df.AuditReport.from_json(Path("audit/audit.json").read_text())
    assert found.check.ok and len(found.levels) == 2


MESSAGES = [
    (f"source.py:none {BOTH} {READ}", "source.py:none: no function none there; functions: net,"),
    (
        f"source.py:needs {BOTH} {READ}",
        "source.py:needs: expected a function without arguments, got one that needs width",
    ),
    (
        f"source.py:net {BOTH}",
        "source.py:net: is a network: --schedule and --prediction-type must say how to read it",
    ),
    (
        f"source.py:denoiser {BOTH} {READ}",
        (
            "source.py:denoiser: returned a Denoiser, which has its schedule, prediction type and"
            " clock: leave out --schedule, --prediction-type"
        ),
    ),
    (
        f"source.py:net {BOTH} --schedule DDPM --prediction-type sample",
        "--schedule: expected a name, or a name with numbers such as VP(beta_max=20), of Cosine,",
    ),
    (
        f"source.py:nan {BOTH} {READ}",
        ("source.py:nan: network: returned NaN or inf for 3 of 3 samples"),
    ),
    (f"source.py:net {READ}", "--train, --held-out: expected at least one of them"),
    (
        f"source.py:net --train train.npy --held-out other.npy {READ}",
        "other.npy: expected data of shape [1, 2, 2], as in train.npy, got [4]",
    ),
    (f"source.py:net --train short.npy {READ}", "short.npy: truncated or unreadable: "),
    (f"source.py:net --train few.npy {READ}", "few.npy: train: expected at least 4 points, got 3"),
    (f"source.py:net {BOTH} {READ} --levels 1", "levels: expected "),
    (f"source.py:net {BOTH} {READ} --noise 2 1", "noise: expected "),
    (f"source.py:net {BOTH} {READ} --noise 1 1e9", "noise: expected "),
    (f"source.py:net {BOTH} {READ} --device nowhere", "--device nowhere: "),
    (
        f"source.py:net {BOTH} {READ} --out file/out",
        "file/out/audit.json: cannot write: Not a directory",
    ),
]


@pytest.mark.parametrize(("text", "message"), MESSAGES, ids=range(len(MESSAGES)))
def test_every_mistake_has_one_line(here, capsys, text, message):
    np.save("other.npy", np.zeros((40, 4), np.float32))
    np.save("few.npy", np.zeros((3, 1, 2, 2), np.float32))
    Path("short.npy").write_bytes(Path("train.npy").read_bytes()[:-10])
    Path("file").touch()
    assert refused(capsys, text).startswith(message)


def test_what_is_missing_is_said_before_any_work(here, capsys, monkeypatch):
    monkeypatch.setattr(extra, "find_spec", lambda name: None)
    monkeypatch.setattr(command.inputs, "cloud", lambda *_: pytest.fail("worked first"))
    assert refused(capsys, f"source.py:net {BOTH} {READ}") == (
        'matplotlib, jinja2 not installed: pip install "dfkernels[report]"'
    )


def test_a_full_disk_is_said(here, capsys, monkeypatch):
    def fail(path, fill):
        raise files.FileError(f"{path}: cannot write: No space left on device")

    monkeypatch.setattr(files, "write", fail)
    error = refused(capsys, f"source.py:net {BOTH} {READ} {FEW}")
    assert error == "audit/checkpoint.json: cannot write: No space left on device"


def test_interrupted_and_gone_on(here, finished, capsys, monkeypatch):
    """Ctrl-C at the second level: the same command computes no finished part again."""
    measured, noise = level.measured, []

    def stops(*given, **options):
        noise.append(len(noise))
        if len(noise) == 2:
            raise KeyboardInterrupt
        return measured(*given, **options)

    monkeypatch.setattr(level, "measured", stops)
    text = f"source.py:net {BOTH} {READ} {FEW}"
    assert run(text) == 130
    assert capsys.readouterr().err.endswith(
        "\ndfkernels audit: interrupted: what is finished is in audit; the same command goes on"
        " from there\n"
    )
    assert os.listdir("audit") == ["checkpoint.json"]
    error = refused(capsys, f"{text} --seed 1")
    assert error.startswith("audit/checkpoint.json: checkpoint of another configuration: ")
    assert run(text) == 0 and len(noise) == 3
    assert sorted(os.listdir("audit")) == ["audit.html", "audit.json"]
    assert read(Path.cwd()).to_json() == read(finished).to_json()


# ---- the page


def pages(finished):
    return (finished / "audit" / "audit.html").read_text()


HEADINGS = [
    *("Verdict", "By noise level", "Likelihood and samples", "The check of its conventions"),
    *("Error", "Generalisation", "Is it a score?", "Fisher trace", "Calibration", "Likelihood"),
    *("Samples and training data", "The samples nearest to the training data"),
    "What was audited",
]


def test_the_page_has_the_verdict_and_all_figures(finished):
    page, report = pages(finished), read(finished)
    assert re.findall(r"<h2>(.*)</h2>", page) == HEADINGS
    text = re.sub(r"<[^>]+>", "", page)
    for finding in report.findings:
        assert finding.text in text.replace("&gt;", ">").replace("&lt;", "<").replace("&#39;", "'")
    assert page.count("<figure>") == 8
    assert f"{report.levels[0].noise:.4g}" in page and str(report.levels[0].gap is None) == "False"
    assert str(report.levels[1].held_out.network) in page


def test_the_page_is_one_file(finished):
    page = pages(finished)
    assert page.count("data:image/png;base64,") == 16  # eight figures in two themes
    rest = re.sub(r"data:image/png;base64,[\w+/=]+", "", page)
    assert not re.search(r"https?:|<link|<script|url\(|@import", rest)
    assert "prefers-color-scheme:dark" in rest


def test_the_page_escapes_text(finished, tmp_path):
    report = read(finished)
    named = report.settings._replace(denoiser="<script>alert(1)</script>")
    write_page(dataclasses.replace(report, settings=named), tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page
    assert "nearest to the training data</h2>" not in page  # without the data no images


def test_a_network_that_memorises_stays_in_the_figure(finished):
    """Its error on training data falls by more powers of ten than anybody wants to see."""
    low, high = read(finished).levels
    nothing = low.train._replace(network=Estimate(1e-40, 0.0))
    figure = _levels.errors((dataclasses.replace(low, train=nothing), high), theme.LIGHT)
    top = figure.axes[0]
    assert top.get_ylim()[0] == pytest.approx(1e-3 / 1.6) and top.get_ylim()[1] > 1
    names = [line.get_label() for line in top.lines if line.get_label()[0] != "_"]
    assert names[-1] == "network, training data"  # on top of the exact mean's


def test_the_page_wants_the_data_of_the_audit(finished, tmp_path):
    report = read(finished)
    for train, message in (
        (df.PointCloud(torch.zeros(63, 1, 2, 2)), r"expected the 64 atoms of shape \[1, 2, 2\]"),
        (df.PointCloud(torch.zeros(64, 4)), r"of the audit, got 64 of \[4\]"),
    ):
        with pytest.raises(ValueError, match=f"^train: .*{message}"):
            write_page(report, tmp_path / "p.html", train)
    with pytest.raises(TypeError, match="^report: expected an AuditReport, got str"):
        write_page(report.to_json(), tmp_path / "p.html")
    with pytest.raises(
        TypeError, match="^train: expected a PointCloud, a ShardedCloud or None, got Tensor"
    ):
        write_page(report, tmp_path / "p.html", torch.zeros(64, 4))
    assert not (tmp_path / "p.html").exists()
