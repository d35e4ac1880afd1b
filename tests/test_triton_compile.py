"""Every Triton kernel compiled for four GPUs without one: registers, spills and shared memory keep to a
budget.

The kernels are those that the launchers launch for the shapes in bench/triton_budget.py, the arguments
specialised as Triton would. `python -m bench.triton_budget` writes the budget anew; say in the commit why it
grew.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia", reason="Triton was built without its NVIDIA part")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import triton_budget as budget  # noqa: E402

from dfkernels.ops import _triton  # noqa: E402

KNOWN = {tuple(row[k] for k in budget.KEY): row for row in budget.read()}


@pytest.fixture(scope="module")
def measured():
    return budget.measure()


def test_nothing_spills_in_a_loop(measured):
    assert [row for row in measured if row["loop_spills"]] == []


def test_shared_memory_fits_every_device(measured):
    too_much = [row for row in measured if row["shared"] > _triton.DEVICES[row["cc"]].shared]
    assert too_much == []


def test_registers_and_shared_memory_stay_within_the_budget(measured):
    """Only with a Triton whose figures are committed: another compiler has others."""
    if triton.__version__ not in {row["triton"] for row in KNOWN.values()}:
        pytest.skip(f"no budget for Triton {triton.__version__}")
    for row in measured:
        allowed = KNOWN.get(tuple(row[k] for k in budget.KEY))
        assert allowed is not None, f"run python -m bench.triton_budget: new is {row}"
        assert {k: row[k] for k in budget.COUNTS if row[k] > allowed[k]} == {}, (row, allowed)


def test_the_budget_is_of_these_kernels(measured):
    found = {tuple(row[k] for k in budget.KEY) for row in measured}
    stale = {key for key in KNOWN if key[0] == triton.__version__} - found
    assert stale == set(), "run python -m bench.triton_budget"


def test_every_op_is_called():
    packages = (ROOT / "dfkernels" / "ops").glob("*/triton.py")
    assert set(budget.CALLS) == {path.parent.name for path in packages}


@pytest.mark.parametrize("cc", budget.CAPABILITIES)
def test_recorded_launches_are_what_the_shapes_lead_to(cc):
    """Ones are constants and multiples of 16 known, as when Triton sees the arguments."""
    named = {launch.name: launch for (file, _), launch in budget.launches(cc).items() if "endpoint" in file}
    key = "kernel fp32 CENTRED=True STAGE=row ROWS=1 BLOCK=4096 PADDED=1 warps=8 ctas=1"
    launch = named[key]  # B = 4096, K = 4, d = 3072
    assert launch.constants["pieces"] == 1 and launch.signature["pieces"] == "constexpr"
    assert launch.signature["x0"] == "*fp32" and launch.signature["K"] == "i32"
    assert {"x0", "out", "d", "B"} <= set(launch.aligned) and "K" not in launch.aligned
    assert launch.options == {"num_warps": 8, "num_ctas": 1}


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R4 ;
        /*0020*/                   LDL R5, [R1+0x4] ;
        /*0030*/                   STL.64 [R1+0x8], R6 ;
        /*0040*/              @!P0 BRA 0x20 ;
        /*0050*/                   LDL R4, [R1] ;
        /*0060*/                   BRA 0x60;
"""


def test_spills_are_counted_in_innermost_loops_only():
    assert budget.loop_spills(SASS) == 2
    assert budget.loop_spills(SASS.replace("0x20 ", "0x30 ")) == 1
    assert budget.loop_spills(SASS.replace("0x20 ", "0x50 ")) == 0
    outer = SASS + "        /*0070*/              @P1 BRA 0x10 ;\n"
    assert budget.loop_spills(outer) == 2  # what stands around the inner loop is not counted


def test_the_budget_file_keeps_other_compilers(tmp_path):
    row = {"triton": "3.7.1", "file": "a", "kernel": "k", "cc": 90, **dict.fromkeys(budget.COUNTS, 1)}
    other = {**row, "triton": "3.8.0"}
    path = tmp_path / "budget.csv"
    budget.write([row, other], path)
    budget.write([{**row, "registers": 2}], path)
    assert budget.read(path) == [{**row, "registers": 2}, other]
