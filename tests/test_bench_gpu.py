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
from bench.gpu import cases, checks, compile, contender, measure, peers, report  # noqa: E402
from bench.gpu.cases import Case  # noqa: E402
from bench.gpu.processes import Process  # noqa: E402

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
    Case("lists", "posterior", 3, 40, 6, way="lists of 7"),
    Case("lists", "fisher_matvec", 3, 40, 6, K=2, way="lists of 7"),
    Case("lists", "posterior", 3, 40, 16, storage="bfloat16", noise="low", way="tolerance"),
    Case("lists", "posterior", 3, 40, 6, K=5, way="top_k"),
]


BENCH = contender.Bench(
    timer=lambda function, seconds: [1.0, 2.0, 6.0],
    capture=lambda function: (function, False),
    kernels=lambda function: [("sweep_kernel", 1, 1.5)],
    device="cpu",
    memory=2**33,
)


def row_of(case, monkeypatch):
    """A row measured on the CPU: every run takes 1, 2, then 6 ms; torch.compile is the identity."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    result = {"machine": {"memory": 2**33}, "rates": RATES}
    shown = []
    gpu.measure([case], result, on_the_cpu, shown.append)
    assert shown[-1] is result["rows"][0]
    return result["rows"][0]


def on_the_cpu(name, request, seconds):
    """The answer of a contender's process, which takes lines of JSON."""
    answer = contender.answer(json.loads(json.dumps({**request, "name": name})), BENCH)
    return json.loads(json.dumps(answer))


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


def test_of_lists_each_querys_rows_are_read():
    """All atoms once is what a search is compared with."""
    lists = Case("lists", "posterior", 3, 40, 6, way="lists of 7")
    assert lists.bytes == 4 * (3 * 7 * 6 + 3 * 6 * 2) and lists.exps == 3 * 7
    assert lists.flops == 4 * 3 * 7 * 6
    atoms = lists.inputs("cpu")["atoms"].view(3, 7)
    assert bool((atoms.diff(dim=1) == 5).all() & (atoms >= 0).all() & (atoms < 40).all())
    search = Case("lists", "posterior", 3, 40, 6, K=5, way="top_k")
    assert search.bytes == 4 * (40 * 6 + 3 * 6 * 2) and search.flops == search.exps == 0


def test_a_small_gpu_gets_fewer_atoms():
    case = Case("memory", "posterior", 1, 1_280_000, 4096, storage="bfloat16")
    assert case.within(141 * 2**30) == case
    assert case.within(16 * 2**30).N == 2**32 // (2 * 4096)


@pytest.mark.parametrize("case", TINY, ids=lambda c: c.name)
def test_a_row(case, monkeypatch):
    row = row_of(case, monkeypatch)
    names = {"dfkernels", "torch"}
    names |= {"torch-bf16"} if case.storage == "bfloat16" else set()
    other = case.derivative or case.way not in ("", "tolerance")
    alone = case.op in ("fisher_dense", "transport_chain", "draw") or other
    names |= set() if alone else {"compile"}
    names |= {"sdpa"} if case.op == "posterior" and not other else set()
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
    assert "2 ms" in report.line(row)
    assert row["kernels"] == [["sweep_kernel", 1, 1.5]]


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


CHILD = """
import json, sys, time
print('{"ready": true}', flush=True)
for line in sys.stdin:
    n = json.loads(line)["n"]
    if n == 1: time.sleep(60)
    if n == 2: raise SystemExit("out of memory")
    print(json.dumps({"twice": 2 * n}), flush=True)
"""


def test_what_hangs_or_crashes_takes_nothing_along():
    child = Process(sys.executable, "-c", CHILD)
    try:
        ask = lambda n, deadline=math.inf: child.ask({"n": n}, 5.0, deadline)
        assert ask(5) == {"twice": 10} and ask(6) == {"twice": 12}
        pid = child.running.pid
        assert child.ask({"n": 1}, 0.3, math.inf) == {"failed": "no answer within 0 s"}
        assert child.running is None and ask(7) == {"twice": 14} and child.running.pid != pid
        assert ask(2) == {"failed": "the process died: out of memory"}
        assert ask(8, time.monotonic() - 1) == {"skipped": "out of time"}
        assert child.running is None
    finally:
        child.close()
    missing = Process(sys.executable, "-c", "raise SystemExit('no device')")
    assert missing.ask({"n": 1}, 5.0, math.inf) == {"failed": "the process died: no device"}


def test_the_most_important_first_and_slow_starters_last(monkeypatch):
    asked = []

    def ask(name, request, seconds):
        asked.append((name, request["case"]["op"], seconds))
        return {"skipped": "out of time"}

    result = {"machine": {"memory": 2**33}, "rates": RATES}
    gpu.measure(TINY[:3], result, ask, lambda row: None)
    ours, theirs = gpu.LIMIT["dfkernels"], 15.0
    assert asked[:5] == [
        ("dfkernels", "posterior", ours),
        ("torch", "posterior", theirs),
        ("torch-bf16", "posterior", theirs),
        ("sdpa", "posterior", theirs),
        ("dfkernels", "posterior", ours),
    ]
    assert [name for name, *_ in asked].index("compile") == 9
    assert {name for name, *_ in asked[9:]} <= set(peers.LATER)
    assert len(result["rows"]) == 3
    assert [c.group for c in cases.grid()[:2]] == ["memory", "memory"]
    assert {c.B for c in cases.chosen("posterior B=(4|16) ")} == {4, 16}
    assert cases.chosen("no such case") == []


def test_all_kernels_of_the_cases_are_compiled_once(monkeypatch):
    """On tensors without a device; nothing runs."""
    few = [TINY[0], TINY[1], TINY[5], TINY[8], TINY[12], *TINY[14:]]
    calls = []
    monkeypatch.setattr(
        compile.JITFunction, "run", lambda kernel, *v, warmup, **o: calls.append(warmup)
    )
    found = compile.launches(few)
    names = {module.removeprefix("dfkernels.ops.") for module, _ in found}
    assert {"common.triton.sweep", "common.triton.merge", "endpoint_matvec.triton"} <= names
    assert {"transport_chain.triton", "common.triton.pair_weights"} <= names
    assert "dfkernels.certified.triton_bounds" in names
    assert calls == []
    for compiles in found.values():
        compiles()
    assert calls == [True] * len(found)


def test_shares_are_put_together(monkeypatch):
    said = [(0, 'noise\n{"kernels": 3, "failed": {"k": "E"}}\n'), (1, "no torch")]
    monkeypatch.setattr(gpu, "COMPILERS", 2)
    monkeypatch.setattr(checks, "shell", lambda *c, timeout: said[int(c[3])])
    found = gpu.compile_kernels("", 1.0)
    assert found["kernels"] == 3
    assert found["failed"] == {"k": "E", "share 1": "exit 1: no torch"}


@pytest.fixture
def without_a_gpu(monkeypatch):
    """Everything that needs one replaced."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cases, "grid", lambda: TINY)
    monkeypatch.setattr(checks, "machine", lambda: result_of({})["machine"] | {"memory": 2**33})
    monkeypatch.setattr(checks, "tests", lambda timeout: dict(SAID))
    monkeypatch.setattr(checks, "sanitizer", lambda deadline: {"memcheck": "clean"})
    compiled = {"kernels": 7, "failed": {}, "seconds": 1.0}
    monkeypatch.setattr(gpu, "compile_kernels", lambda pattern, seconds: compiled)

    class Here:
        start = close = lambda self: None

        def ask(self, request, seconds, deadline):
            if deadline < time.monotonic():
                return {"skipped": "out of time"}
            if "rates" in request:
                return RATES
            return on_the_cpu(request["name"], request, seconds)

    monkeypatch.setattr(gpu, "Process", Here)


SAID = {"passed": 3, "failed": 0, "seconds": 1.0, "tail": ""}


def test_the_whole_command(without_a_gpu, monkeypatch, tmp_path, capsys):
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--out", str(path)])
    assert gpu.main() == 0
    result = json.loads(path.read_text())
    assert [row["op"] for row in result["rows"]] == [case.op for case in TINY]
    assert result["tests"] == SAID and result["sanitizer"] == {"memcheck": "clean"}
    assert result["rates"] == RATES and result["compiled"]["kernels"] == 7
    assert capsys.readouterr().out.endswith(
        f"{path}: {len(TINY)} cases, 0 without time; 0 of ours wrong or failed\n"
    )
    page = report.with_tables("<!-- gpu -->x<!-- /gpu -->", [result])
    assert page.count("| `fisher_matvec` |") == 3 and page.count(" noise, lists of 7 |") == 2
    assert page.count(", fisher_matvec x forward |") == 1
    argv = ["bench.gpu", "--only", "endpoint", "--against", str(path)]
    monkeypatch.setattr(sys, "argv", argv)
    assert gpu.main() == 0 and list(tmp_path.iterdir()) == [path]
    out = capsys.readouterr().out
    assert "None: 2 cases, 0 without time; 0 of ours wrong or failed" in out
    assert out.count("  1.00 x as fast as before, error then ") >= 2
    assert "the geometric mean of 2 rows" in out
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "--only", "no such"])
    assert gpu.main() == 2
    assert "no case has 'no such' in its name" in capsys.readouterr().err


def test_without_time_it_ends_at_once(without_a_gpu, monkeypatch, tmp_path):
    path = tmp_path / "gpu.json"
    argv = ["bench.gpu", "--out", str(path), "--minutes", "0"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(RuntimeError, match="the device's rates were not found: .*out of time"):
        gpu.main()
    assert json.loads(path.read_text())["tests"] == SAID


def test_the_record_of_an_earlier_state_can_be_compared_with():
    """Row by row: the file of commit 18007ff, which knows nothing of derivatives."""
    [old] = [r for r in report.read_results() if r["commit"] == "18007ff"]
    assert old["date"] == "2026-11-26" and old["machine"]["gpu"] == "NVIDIA H200"
    case = next(c for c in cases.grid() if (c.B, c.op, c.noise) == (4, "posterior", "high"))
    row = gpu.new_row(case, old["rates"])
    row["contenders"]["dfkernels"] = {"ms": 5.0, "error": 1e-6}
    assert report.against(row, old) == "  5.13 x as fast as before, error then 1.8e-05"
    assert report.against(row, None) == ""
    known = [c for c in cases.grid() if report.earlier(gpu.new_row(c, RATES), old)]
    assert len(known) == len(old["rows"]) == 45


WRITE = """========= Error: Potential {} hazard detected at __shared__ 0x404 in block (0,0,0) :
=========     Write Thread ({},0,0) at {}+0x1a0 in merge.py:32
=========     Write Thread ({},0,0) at {}+0x1a0 in merge.py:32
=========     Current Value : {}, Incoming Value : {}
=========     Saved host backtrace up to driver entry point at kernel launch time
"""


def test_racecheck_tells_a_replicated_write_from_a_race():
    """The same value, by one instruction, in one warp; all else is a race."""
    same = WRITE.format("WAW", 23, "k", 24, "k", 7, 7)
    assert checks.verdict("racecheck", 0, "") == "clean"
    assert checks.verdict("racecheck", 124, same) == "no time"
    said = "clean but for 2 writes of the same value by lanes of one warp"
    assert checks.verdict("racecheck", 9, same + same) == said
    races = [
        WRITE.format("WAW", 23, "k", 24, "k", 2, 3),  # other values
        WRITE.format("WAW", 31, "k", 32, "k", 7, 7),  # other warps
        WRITE.format("WAW", 23, "k", 24, "j", 7, 7),  # other instructions
        WRITE.format("RAW", 23, "k", 24, "k", 7, 7),
        "=========     Current".join(same.split("=========     Current")[:1]),  # unknown values
    ]
    for race in races:
        found = checks.verdict("racecheck", 9, same + race)
        assert found.startswith("exit 9: Potential"), found
        assert checks.races(same + race)[0] == 1
    unread = "========= Error: Potential WAW hazard detected at somewhere else\n"
    assert checks.verdict("racecheck", 9, same + unread).startswith("exit 9: ")
    assert checks.verdict("memcheck", 9, same).startswith("exit 9: ")


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
    shell, python = checks.shell, sys.executable
    assert shell(python, "-c", "print('a'); raise SystemExit(3)") == (3, "a\n")
    assert shell(python, "-c", "import time; time.sleep(60)", timeout=0.2) == (124, "")
    assert shell("no-such-program-as-this")[0] == 127


def test_the_cuda_tests_are_counted(monkeypatch):
    said = "...F\n=== short summary ===\n1 failed, 3 passed, 2 skipped in 0.1s\n"
    monkeypatch.setattr(checks, "shell", lambda *command, timeout: (1, said))
    found = checks.tests(timeout=1)
    assert (found["passed"], found["failed"], found["tail"]) == (3, 1, said)
    monkeypatch.setattr(checks, "shell", lambda *command, timeout: (124, "...."))
    assert checks.tests(timeout=1)["failed"] == -1
    monkeypatch.setattr(checks, "shell", lambda *command, timeout: (0, "5 passed in 1s\n"))
    assert checks.tests(timeout=1) == {"passed": 5, "failed": 0, "seconds": 0.0, "tail": ""}


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
    return {
        "machine": machine,
        "commit": "abc",
        "date": "2000-01-01",
        "rates": RATES,
        "rows": [row],
    }


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
        "Commit abc on 2000-01-01: H, driver 1, torch 2, triton 3; measured in the same run: copy"
        " 4,000 GB/s"
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
