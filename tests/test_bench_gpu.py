"""bench.gpu without a GPU: the grid, the roofline's arithmetic, rows, file and tables, with a fake
timer."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.gpu import __main__ as gpu  # noqa: E402
from bench.gpu import cases, measure, peers, report  # noqa: E402
from bench.gpu.cases import Case  # noqa: E402

RATES = {
    "copy_gbs": 4000.0,
    "bf16_tflops": 800.0,
    "tf32_tflops": 400.0,
    "fp32_tflops": 50.0,
    "exp_gs": 4000.0,
}
TINY = [
    Case("memory", "posterior", 3, 40, 6, storage="bfloat16", noise="low"),
    Case("grid", "posterior", 3, 40, 6),
    Case("grid", "fisher_matvec", 3, 40, 6, K=2),
    Case("grid", "fisher_diagonal", 3, 40, 6),
    Case("grid", "fisher_dense", 3, 40, 6),
    Case("network", "endpoint_matvec", 4, 0, 6, form="paper"),
    Case("network", "endpoint_matvec", 4, 0, 6, K=2, form="centred"),
    Case("network", "matched_trace", 4, 0, 6, form="paper"),
    Case("chain", "transport_chain", 4, 7, 3, K=5),
    Case("grid", "log_prob", 3, 40, 6),
    Case("grid", "draw", 3, 40, 6),
    Case("grid", "average", 3, 40, 6),
    Case("derivative", "posterior", 3, 40, 6, derivative="mean y reverse"),
    Case("derivative", "fisher_matvec", 3, 40, 6, derivative="fisher_matvec x forward"),
]


def row_of(case, monkeypatch, deadline=math.inf):
    """measure_case on the CPU: every run takes 1, 2, then 6 ms; torch.compile is the identity."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)

    def timer(function, seconds):
        function()
        return [1.0, 2.0, 6.0]

    return gpu.measure_case(case, RATES, timer, lambda f: (f, False), "cpu", 2**33, deadline)


@pytest.mark.slow
def test_without_a_gpu_it_says_so():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu"], cwd=ROOT, capture_output=True, text=True
    )
    if not torch.cuda.is_available():
        assert (done.returncode, done.stdout) == (2, "")
        assert (
            done.stderr == "python -m bench.gpu: torch sees no CUDA device; nothing was measured\n"
        )


def test_the_grid_has_what_the_targets_speak_of():
    grid = cases.grid()
    assert len({case.name for case in grid}) == len(grid)
    kernels = {path.parent.name for path in (ROOT / "dfkernels" / "ops").glob("*/triton.py")}
    assert {case.op for case in grid} == kernels & {*peers.PLAIN, *peers.REFERENCES}
    memory = [case for case in grid if case.group == "memory"]
    assert {(c.N, c.d, c.storage, c.B) for c in memory} == {
        (1_280_000, 4096, "bfloat16", B) for B in (1, 4, 16)
    }
    compute = {(c.B, c.N, c.d) for c in grid if c.group == "compute"}
    assert compute == {(4096, 262_144, 1024)}
    assert {(c.B, c.N, c.d) for c in grid if c.group == "small d"} == {
        (65_536, 65_536, d) for d in (2, 16)
    }
    network = {(c.op, c.B, c.d) for c in grid if c.group == "network" and c.K == 1}
    shapes = ((64, 65_536), (256, 12_288))
    assert network == {
        (op, *shape) for op in ("endpoint_matvec", "matched_trace") for shape in shapes
    }
    assert {(c.B, c.N, c.d) for c in grid if c.group == "chain"} == {(4096, 3, 2), (4096, 64, 16)}


def test_the_floor_is_the_largest_of_three():
    posterior = Case("memory", "posterior", 1, 1_280_000, 4096, storage="bfloat16")
    assert posterior.bytes == 2 * 1_280_000 * 4096 + 4 * 2 * 4096
    assert posterior.flops == 4 * 1_280_000 * 4096
    time_of_y, bound = cases.floor(posterior, RATES)
    assert bound == "memory" and time_of_y == pytest.approx(10.48576 / 4000 * 1000, rel=1e-4)
    many = Case("compute", "posterior", 4096, 262_144, 1024, storage="bfloat16")
    assert cases.floor(many, RATES) == (pytest.approx(many.flops / 800e9), "matrix")
    assert cases.floor(Case("compute", "posterior", 4096, 262_144, 1024), RATES)[
        0
    ] == pytest.approx(many.flops / 50e9)
    plane = Case("small d", "posterior", 65_536, 65_536, 2)
    assert cases.floor(plane, RATES) == (pytest.approx(65_536**2 / 4e9), "exp")
    assert Case("grid", "fisher_matvec", 2, 3, 5, K=4).flops == 2 * 9 * 2 * 3 * 5
    assert Case("network", "endpoint_matvec", 64, 0, 65_536).bytes == 4 * 4 * 64 * 65_536
    assert Case("network", "matched_trace", 64, 0, 65_536).bytes == 2 * 4 * 64 * 65_536
    chain = Case("chain", "transport_chain", 10, 3, 2, K=7)
    assert chain.bytes == 4 * (3 * 2 + 2 * 10 * 2 + 10 * 4) and chain.exps == 7 * 10 * 3
    assert chain.flops == 2 * 7 * 10 * (2 * 6 + 9 + 8)


def test_a_small_gpu_gets_fewer_atoms():
    case = Case("memory", "posterior", 1, 1_280_000, 4096, storage="bfloat16")
    assert case.within(141 * 2**30) == case
    assert case.within(16 * 2**30).N == 2**32 // (2 * 4096)


@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
def test_a_row(case, monkeypatch):
    row = row_of(case, monkeypatch)
    names = {"dfkernels", "torch"}
    names |= {"torch-bf16"} if case.storage == "bfloat16" else set()
    alone = case.op in ("fisher_dense", "transport_chain", "draw") or case.derivative
    names |= set() if alone else {"compile"}
    names |= {"sdpa"} if case.op == "posterior" and not case.derivative else set()
    assert set(row["contenders"]) >= names
    for name in names:
        found = row["contenders"][name]
        assert found["ms"] == 2.0 and found["runs"] == 3, found
        if case.op == "draw" and name == "torch":  # other noise
            continue
        # bfloat16 weights and queries of a plain peer cost it digits, of ours none
        assert found["error"] < (
            1e-4 if case.storage == "float32" or name == "dfkernels" else 0.05
        ), name
    assert json.loads(json.dumps(row)) == row
    assert "2 ms" in gpu.line(row)


def test_the_exact_result_is_the_references():
    from cases import REFERENCES, _normal

    normal = _normal(1)
    x, y, v, alpha, sigma = (
        normal(2, 5),
        normal(30, 5),
        normal(2, 3, 5),
        normal(2),
        0.5 + normal(2).abs(),
    )
    for op in peers.PLAIN.keys() - {"log_prob", "draw"}:  # those come of their references
        given = {"v": v} if op == "fisher_matvec" else {}
        want = REFERENCES[op](x=x, y=y, alpha=alpha, sigma=sigma, **given)
        want = want[1] if op == "posterior" else want
        got = measure.exact(op, x, y, alpha, sigma, **given)
        assert got.shape == want.shape and measure.relative_error(got, want) < 1e-12, op


def test_what_cannot_run_says_why(monkeypatch):
    late = row_of(TINY[1], monkeypatch, deadline=time.monotonic() - 1)
    assert late["contenders"] == {"dfkernels": {"skipped": "out of time"}}
    assert gpu.line(late).endswith("{'skipped': 'out of time'}")
    monkeypatch.setattr(peers, "bytes_needed", lambda case, name: 2**40 * (name == "torch"))
    large = row_of(TINY[1], monkeypatch)
    assert large["contenders"]["torch"] == {"skipped": "needs 1024 GiB for [B, N] arrays"}
    assert large["contenders"]["dfkernels"]["ms"] == 2.0
    monkeypatch.undo()

    def broken(**inputs):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(peers.PLAIN, "posterior", broken)
    assert row_of(TINY[1], monkeypatch)["contenders"]["torch"] == {
        "failed": "RuntimeError: no such kernel"
    }


def test_the_whole_command(monkeypatch, tmp_path, capsys):
    """From the tests to the summary, everything that needs a GPU replaced."""
    one_case = gpu.measure_case
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "Events", lambda: lambda function, seconds: [1.0, 2.0, 6.0])
    monkeypatch.setattr(measure, "graphed", lambda function: (function, True))
    monkeypatch.setattr(measure, "rates", lambda timer: RATES)
    monkeypatch.setattr(gpu, "grid", lambda: TINY)
    monkeypatch.setattr(gpu, "measure_case", lambda *a: one_case(*a[:4], "cpu", *a[5:]))
    monkeypatch.setattr(gpu, "machine", lambda: result_of({})["machine"] | {"memory": 2**33})
    said = {"passed": 3, "failed": 0, "seconds": 1.0, "tail": ""}
    monkeypatch.setattr(gpu, "tests", lambda timeout: said)
    monkeypatch.setattr(gpu, "sanitizer", lambda deadline: {"memcheck": "clean"})
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--out", str(path)])
    assert gpu.main() == 0
    result = json.loads(path.read_text())
    assert [row["op"] for row in result["rows"]] == [case.op for case in TINY]
    assert (
        result["tests"] == said
        and result["sanitizer"] == {"memcheck": "clean"}
        and result["rates"] == RATES
    )
    assert capsys.readouterr().out.endswith(
        f"{path}: 14 cases, 0 without time; 0 of ours wrong or failed\n"
    )
    page = report.with_tables("<!-- gpu -->x<!-- /gpu -->", [result])
    assert page.count("| `fisher_matvec` |") == 2 and page.count(", fisher_matvec x forward |") == 1
    path.unlink()
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--only", "endpoint", "--minutes", "0"])
    assert gpu.main() == 0 and list(tmp_path.iterdir()) == []
    assert "None: 2 cases, 2 without time; 0 of ours wrong or failed" in capsys.readouterr().out


def test_what_a_peer_needs():
    plane = Case("small d", "posterior", 65_536, 65_536, 2)
    assert (
        peers.bytes_needed(plane, "torch") == 3 * 2**34 and peers.bytes_needed(plane, "sdpa") == 0
    )
    wide = Case("memory", "posterior", 1, 1000, 4096, storage="bfloat16")
    assert peers.bytes_needed(wide, "torch") == 4 * 1000 * (3 + 4096)
    assert (
        peers.bytes_needed(wide, "torch-bf16")
        == peers.bytes_needed(wide, "compile")
        == 4 * 1000 * 3
    )
    assert peers.bytes_needed(Case("network", "endpoint_matvec", 64, 0, 65_536), "torch") == 0
    assert (
        peers.bytes_needed(Case("chain", "transport_chain", 4096, 64, 16, K=9), "torch")
        == 12 * 2**22
    )


def test_a_command_that_fails_or_hangs():
    assert gpu.shell(sys.executable, "-c", "print('a'); raise SystemExit(3)") == (3, "a\n")
    assert gpu.shell(sys.executable, "-c", "import time; time.sleep(60)", timeout=0.2) == (124, "")
    assert gpu.shell("no-such-program-as-this")[0] == 127


def test_the_cuda_tests_are_counted(monkeypatch):
    said = "...F\n=== short summary ===\n1 failed, 3 passed, 2 skipped in 0.1s\n"
    monkeypatch.setattr(gpu, "shell", lambda *command, timeout: (1, said))
    found = gpu.tests(timeout=1)
    assert (found["passed"], found["failed"], found["tail"]) == (3, 1, said)
    monkeypatch.setattr(gpu, "shell", lambda *command, timeout: (124, "...."))
    assert gpu.tests(timeout=1)["failed"] == -1
    monkeypatch.setattr(gpu, "shell", lambda *command, timeout: (0, "5 passed in 1s\n"))
    assert gpu.tests(timeout=1) == {"passed": 5, "failed": 0, "seconds": 0.0, "tail": ""}


def result_of(times):
    """A result with one case, and what `times` says of it."""
    case = Case("compute", "posterior", 4096, 262_144, 1024, storage="bfloat16")
    least, bound = cases.floor(case, RATES)
    row = {**vars(case), "sigma": case.sigma, "bytes": case.bytes, "flops": case.flops}
    row |= {
        "floor_ms": least,
        "bound": bound,
        "contenders": {n: {"ms": t} for n, t in times.items()},
    }
    machine = {"gpu": "H", "driver": "1", "torch": "2", "triton": "3"}
    return {"machine": machine, "date": "2000-01-01", "rates": RATES, "rows": [row]}


def test_targets_are_arithmetic():
    floor_ms = 4 * 4096 * 262_144 * 1024 / 800e9
    found = report.targets(
        result_of({"dfkernels": 2 * floor_ms, "torch": 8 * floor_ms, "compile": 3 * floor_ms})
    )
    by_name = {
        t["target"].split(":")[0] + (" compile" in t["target"]) * " compile": t for t in found
    }
    reached = {
        name: (t["reached"], t["met"]) for name, t in by_name.items() if t["reached"] is not None
    }
    assert reached["compute"] == (pytest.approx(0.5), False)
    ratios = [t["reached"] for t in found if t["target"].startswith("all")]
    assert ratios == [pytest.approx(4.0), pytest.approx(1.5)]
    assert [t["met"] for t in found if t["target"].startswith("all")] == [True, False]
    chains = result_of({"dfkernels": 1.0, "torch": 100.0})
    chains["rows"][0] |= {"group": "chain", "op": "transport_chain"}
    assert [t["cases"] for t in report.targets(chains)] == [0] * len(found)
    assert [t["target"] for t in found if t["met"] is None and t["cases"]] == []


def test_the_table_and_the_summary():
    result = result_of({"dfkernels": 10.0, "torch": 40.0, "sdpa": 25.0})
    result["targets"] = report.targets(result)
    lines = report.markdown(result).splitlines()
    assert lines[0].startswith(
        "H, driver 1, torch 2, triton 3, 2000-01-01; measured in the same run: copy 4,000 GB/s"
    )
    assert lines[2].startswith("| op | B | N | d | K |  | dfkernels | torch | sdpa |")
    case = "| `posterior` | 4,096 | 262,144 | 1024 | 1 | bfloat16, high noise |"
    assert lines[-1] == case + " **10** | 40 | 25 | 2.5 | 1.82 (matrix) |"
    assert lines[-1].count("|") == lines[2].count("|") == lines[3].count("|")
    assert (
        "compute: share of the bf16 matrix rate: 0.55 (wanted 0.60, 1 cases): MISSED"
        in report.summary(result)
    )


def test_the_file_is_written_at_once(tmp_path):
    path = tmp_path / "results" / "gpu.json"
    report.write({"rows": [1]}, path)
    report.write({"rows": [1, 2]}, path)
    assert json.loads(path.read_text()) == {"rows": [1, 2]}
    assert [p.name for p in path.parent.iterdir()] == ["gpu.json"]
