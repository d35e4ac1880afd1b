"""bench on the CPU without a measurement: results files, the machines that they name, and their
tables."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dfkernels as df

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import __main__ as bench  # noqa: E402
from bench import machine, peers, table  # noqa: E402
from bench.cases import NOISE, OPS, Case, atoms  # noqa: E402

ABOUT = {"cpu": "Some CPU", "cpu_isa": "v4", "threads": "2", "isa": "v4", "torch": "2.13.0"}
ROW = {
    "op": "posterior",
    "B": "8",
    "N": "50000",
    "d": "64",
    "noise": "low",
    "dfkernels_ms": "1.5",
    "gemm_ms": "3",
    "bound": "GEMM",
    "time_over_floor": "2",
    "speedup": "2",
    "date": "2026-01-02",
    "commit": "0123abc",
    **dict.fromkeys(("read_gbs", "gemm_gflops", "exp_gs"), "10.0"),
    **ABOUT,
}


@pytest.fixture
def restarted(monkeypatch):
    """The environments with which `hold` starts the process anew, on a CPU that has AVX-512."""
    found = []

    class Restart(Exception):
        pass

    def execve(path, arguments, environment):
        found.append(environment)
        raise Restart

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(machine, "cpu_isa", lambda: "v4")
    monkeypatch.setattr(machine.platform, "machine", lambda: "x86_64")
    for name in machine.HELD["v3"]:
        monkeypatch.delenv(name, raising=False)
    return found, Restart


def test_a_run_below_the_cpu_starts_anew_with_the_peers_held_too(restarted, monkeypatch):
    environments, Restart = restarted
    monkeypatch.setattr(machine.native, "isa", lambda: ("v4", ""))
    assert machine.hold(None) == "v4" and not environments
    for isa in ("v3", "base"):
        with pytest.raises(Restart):
            machine.hold(isa)
        assert (
            machine.HELD[isa].items()
            <= environments[-1].items()
            <= {
                **os.environ,
                **machine.HELD[isa],
            }.items()
        )
    # as the variable of our kernels alone says, and the peers would run free
    monkeypatch.setattr(machine.native, "isa", lambda: ("v3", ""))
    monkeypatch.setenv("DFKERNELS_ISA", "v3")
    with pytest.raises(Restart):
        machine.hold(None)
    for name, value in machine.HELD["v3"].items():
        monkeypatch.setenv(name, value)
    assert machine.hold(None) == machine.hold("v3") == "v3" and len(environments) == 3


def test_a_cpu_without_more_is_not_held(restarted, monkeypatch):
    monkeypatch.setattr(machine, "cpu_isa", lambda: "v3")
    monkeypatch.setattr(machine.native, "isa", lambda: ("v3", ""))
    assert machine.hold(None) == machine.hold("v3") == "v3" and not restarted[0]
    monkeypatch.setattr(machine.native, "isa", lambda: ("", "DFKERNELS_ISA is 'v9', ..."))
    with pytest.raises(SystemExit, match="DFKERNELS_ISA is 'v9'"):
        machine.hold(None)


@pytest.mark.slow
@pytest.mark.skipif(machine.cpu_isa() != "v4", reason="needs a CPU with AVX-512")
def test_torch_is_held():
    code = """if True:
        import torch
        from bench import machine
        print(machine.hold("v3"), torch.backends.cpu.get_cpu_capability())
        print(torch._inductor.cpu_vec_isa.pick_vec_isa().bit_width())
        print(machine.text(machine.columns(2, {})).partition(" threads")[2])
    """
    environment = {k: v for k, v in os.environ.items() if k not in machine.HELD["v3"]}
    done = subprocess.run(
        [sys.executable, "-c", "import torch._inductor.cpu_vec_isa\n" + code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    version = machine.columns(2, {})["torch"]
    assert done.stdout.splitlines() == [
        "v3 AVX2",
        "256",
        f" (AVX-512 CPU held to AVX2), torch {version}",
    ]


@pytest.mark.parametrize("op", OPS)
def test_a_row_and_what_is_refused(op, monkeypatch):
    rates = {"read_gbs": 10.0, "gemm_gflops": 10.0, "exp_gs": 1.0}
    functions = {"gemm": peers.GEMM[op]}
    for noise in NOISE:
        case = Case(op, 5, 300, 4, noise, atoms(300, 4))
        row = bench.measure_case(case, functions, rates, 1)
        ours, peer = float(row["dfkernels_ms"]), float(row["gemm_ms"])
        assert row["best_peer"] == "gemm"
        assert float(row["speedup"]) == pytest.approx(peer / ours, rel=0.1)
        assert (row["other"], row["time_over_other"] != "") == {
            "log_prob": ("posterior", True),
            "draw": ("log_prob", True),
            "average": ("log_prob", True),
        }.get(op, ("", False))
    right = getattr(df.ops, op)
    monkeypatch.setattr(df.ops, op, lambda **inputs: wrong(right(**inputs)))
    low = Case(op, 5, 300, 4, "low", atoms(300, 4))
    with pytest.raises(SystemExit, match=f"{op} B=5 N=300 d=4 low: error .*; nothing is timed"):
        bench.check(low)


def wrong(result):
    """Another result of the same kind."""
    if isinstance(result, tuple):
        return type(result)(*(1.01 * part for part in result))
    return 1.01 * result if result.is_floating_point() else (result + 1) % 300


def test_the_peers_compute_what_we_do():
    """log_prob but for the constant of the weights, and draws as often as the weights say."""
    points = Case("log_prob", 5, 300, 4, "high", atoms(300, 4)).peer_inputs
    ours = {k: t for k, t in points.items() if k != "y_norm"}
    found = peers.log_prob_gemm(**points) - math.log(300)
    assert torch.allclose(found, df.ops.log_prob(**ours), atol=1e-5)
    torch.manual_seed(0)
    drawn = torch.stack([peers.draw_gemm(**points) for _ in range(100)])
    mean = points["y"][drawn].mean(0)
    assert (mean - df.ops.posterior(**ours).mean).abs().max() < 5 / 100**0.5


def test_every_machine_has_a_file_and_a_text():
    names = [machine.results("cpu", isa).name for isa in ("v4", "v3", "base", "neon")]
    assert names == ["cpu-avx512.csv", "cpu-avx2.csv", "cpu-base.csv", "cpu-neon.csv"]
    assert machine.text(ROW) == "Some CPU, 2 threads (AVX-512), torch 2.13.0"
    held = machine.text(ROW | {"isa": "v3"})
    assert held == "Some CPU, 2 threads (AVX-512 CPU held to AVX2), torch 2.13.0"
    assert machine.text(ROW | {"isa": "v3", "cpu_isa": "v3"}).count("(AVX2)") == 1


def test_tables_show_every_machine_that_has_results(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    fast = ROW | {"d": "2", "speedup": "8"}
    table.write_rows(machine.results("cpu", "v3"), [ROW | {"isa": "v3", "speedup": "3"}])
    assert list(table.by_machine("cpu")) == ["v3"]
    table.write_rows(machine.results("cpu", "v4"), [ROW, fast, ROW | {"noise": "high"}])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cpu-avx2.csv", "cpu-avx512.csv"]
    found = table.by_machine("cpu")
    lines = table.overview(found).splitlines()
    assert lines[2:4] == [
        "| `posterior` | low | 2 | **4.0** (2.0 to 8.0) | **3.0** (3.0 to 3.0) |",
        "| `posterior` | high | 1 | **2.0** (2.0 to 2.0) |  |",
    ]
    assert "(AVX-512), torch" in lines[-1] and "(AVX-512 CPU held to AVX2), torch" in lines[-1]
    text = table.markdown(found)
    assert text.count("### ") == 2 and text.index("### AVX-512") < text.index("### AVX2")
    assert "| 8 | 50,000 | 2 | low | **1.5** | 3.0 | 8.0 | 2.00 (GEMM) |" in text
