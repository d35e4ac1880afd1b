"""bench.derivatives on a tiny case: that it measures derivatives, what it writes, and its tables.
Never a time."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

from dfkernels._torch import native

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import derivatives, derivatives_table, machine, table  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::dfkernels.ops.SlowDerivativeWarning")
TINY = derivatives.Case("tiny", 9, 30, 5, 1.0)
ROW = {
    "case": "high",
    "B": "32",
    "N": "20000",
    "d": "256",
    "sigma": "12.8",
    "output": "mean",
    "argument": "x",
    "mode": "reverse",
    "dfkernels_ms": "3",
    "passes": "1.5",
    "whole_passes": "2.5",
    "speedup": "20",
    "speedup_alone": "10",
    "error": "1e-06",
    "gemm_error": "1e-06",
    "difference_error": "",
    "date": "2026-01-02",
    "commit": "0123abc",
    "cpu": "Some CPU",
    "cpu_isa": "v4",
    "threads": "2",
    "isa": "v4",
    "torch": "2.13.0",
}


@pytest.mark.parametrize("mode", derivatives.MODES)
def test_all_forms_agree(mode):
    """Also that the errors are those of the last queries: of nine, eight are looked at."""
    keys = [
        *itertools.product(("mean", "ess"), ("x", "y", "log_prior")),
        *itertools.product(("fisher_trace", "log_prob", "fisher_diagonal"), ("sigma",)),
        *itertools.product(("fisher_matvec",), ("alpha", "y", "v")),
    ]
    for output, argument in keys:
        found = derivatives.Derivative(TINY, output, argument, mode).errors()
        assert set(found) == {"error", "gemm_error", "difference_error"}
        assert 0 < max(found.values()) < 1e-5, (output, argument, found)


def test_a_wrong_derivative_is_seen(monkeypatch):
    right = derivatives.ours
    monkeypatch.setattr(derivatives, "ours", lambda output, **inputs: 1.1 * right(output, **inputs))
    for argument, mode in itertools.product(("x", "y"), derivatives.MODES):
        found = derivatives.Derivative(TINY, "mean", argument, mode).errors()
        assert found["error"] == pytest.approx(0.1, rel=1e-4)


@pytest.mark.skipif(not native.available, reason="the benchmark needs the compiled part")
def test_part_of_it_writes_the_file_asked_for_and_no_document(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(derivatives, "CASES", (TINY,))
    monkeypatch.setattr(table, "write_pages", lambda: pytest.fail("a document changes"))
    monkeypatch.setattr(machine, "hold", lambda isa: "v4")
    out = tmp_path / "some.csv"
    threads = str(torch.get_num_threads())
    command = "x --rounds 1 --cases tiny --outputs mean fisher_matvec --arguments x v --threads"
    monkeypatch.setattr(sys, "argv", [*command.split(), threads, "--out", str(out)])
    derivatives.main()
    rows = table.read_rows(out)
    assert [(r["output"], r["argument"], r["mode"]) for r in rows] == [
        *itertools.product(("mean",), ("x",), derivatives.MODES),
        *itertools.product(("fisher_matvec",), ("x", "v"), derivatives.MODES),
    ]
    for row in rows:
        ours, whole = float(row["dfkernels_ms"]), float(row["posterior_ms"])
        assert float(row["passes"]) == pytest.approx(ours / whole, rel=0.1)
        assert (row["dfkernels_forward_ms"] != "") == (row["mode"] == "reverse")
        before = float(row["dfkernels_forward_ms"] or 0)
        assert float(row["whole_passes"]) == pytest.approx((ours + before) / whole, rel=0.1)
        assert row["cpu"] and row["isa"] and row["threads"] == threads
    assert "of 6 rows miss" in capsys.readouterr().out


def test_what_misses():
    def row(**changes):
        return derivatives_table.misses(ROW | {k: str(v) for k, v in changes.items()})

    assert row() == row(passes=3.0, speedup=1.0, error=2.1e-6) == []
    assert row(passes=3.1) == ["passes"] and row(passes=4.9, argument="y") == []
    assert row(passes=5.1, speedup=0.99, argument="y") == ["passes", "slower than autograd"]
    assert row(error=2.2e-6) == ["error"] and row(error="nan") == ["error"]
    assert row(difference_error=1e-7) == ["error"]  # the better of both forms


def test_the_tables():
    slow = ROW | {"argument": "y", "passes": "6", "speedup": "0.5", "error": "4e-06"}
    other = ROW | {"case": "low", "B": "64", "passes": "24", "mode": "forward"}
    rows = [ROW, slow, ROW | {"output": "ess", "passes": "0.02"}, other]
    lines = derivatives_table.markdown({"v4": rows}).splitlines()
    assert lines[0].startswith(
        "B = 32, N = 20,000, d = 256, σ = 12.8, float32; Some CPU, 2 threads"
    )
    assert lines[2:6] == [
        "| reverse mode | `x` | `y` |",
        "| :-- | --: | --: |",
        "| `mean` | 1.5 (20) | 6.0 (0.5) |",
        "| `ess` | 0.02 (20) |  |",
    ]
    assert lines[-1] == (
        "- Some CPU, 2 threads (AVX-512), torch 2.13.0: reverse mode 0.6 passes (at most 6.0),"
        " 5.8 times as fast as autograd (at least 0.50); forward mode 24.0 passes (at most 24.0),"
        " 20.0 times as fast as autograd (at least 20.00); error 1.4 times that of the better plain"
        " form (at most 4.0)."
    )
    short = derivatives_table.in_short({"v4": rows, "v3": []})
    assert "1.4 passes" in short and "at most 24.0 (in `y` 6.0)" in short and "(0.5 to 20)" in short
    assert derivatives_table.markdown({}) == derivatives_table.in_short({}) == ""
