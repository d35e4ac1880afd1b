"""Every Triton kernel compiled for four GPUs without one: registers, spills and shared memory keep
to a budget.

The kernels are those that the launchers launch for the shapes in bench/triton_budget.py, the
arguments specialised as Triton would. `python -m bench.triton_budget` writes the budget anew; say
in the commit why it grew.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
pytest.importorskip("triton.backends.nvidia", reason="Triton was built without its NVIDIA part")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import triton_budget as budget  # noqa: E402
from dfkernels.ops.common.triton import device  # noqa: E402

KNOWN = {tuple(row[k] for k in budget.KEY): row for row in budget.read()}
SAMPLE = 20  # one in so many of the kernels that are known is compiled all the same
OTHER = triton.__version__ not in {row["triton"] for row in KNOWN.values()}


@pytest.mark.skipif(
    OTHER, reason=f"no budget for Triton {triton.__version__}: another compiler has others"
)
def test_the_budget_is_of_these_kernels_on_every_gpu():
    """By names, for which nothing is compiled; and in what was measured no loop spills."""
    for cc in budget.CAPABILITIES:
        rows = {
            key[1:3]: row
            for key, row in KNOWN.items()
            if (key[0], key[3]) == (triton.__version__, cc)
        }
        assert rows.keys() == budget.launches(cc).keys(), "run python -m bench.triton_budget"
        assert [row for row in rows.values() if row["loop_spills"]] == []
        assert max(row["shared"] for row in rows.values()) <= device.DEVICES[cc].shared


@pytest.mark.slow
@pytest.mark.parametrize(
    "cc", [90, 100]
)  # `python -m bench.triton_budget` takes all four, two minutes each
def test_every_kernel_keeps_to_its_budget(cc):
    """Nothing spills in a loop, and shared memory fits the device, with any Triton; the rest as
    committed.

    A kernel of which the committed row has measured the same source is not compiled again, but for
    some: the same compiler makes the same of it.
    """
    allowed = {
        key: row for key, row in KNOWN.items() if (key[0], key[3]) == (triton.__version__, cc)
    }
    sample = sorted(row["source"] for row in allowed.values())[::SAMPLE]
    known = frozenset(row["source"] for row in allowed.values()) - {*sample}
    measured = {tuple(row[k] for k in budget.KEY): row for row in budget.measure([cc], known)}
    assert [row for row in measured.values() if row["loop_spills"]] == []
    assert [row for row in measured.values() if row["shared"] > device.DEVICES[cc].shared] == []
    if OTHER:
        return
    assert measured and measured.keys() <= allowed.keys(), "run python -m bench.triton_budget"
    over = {
        key: {k: (row[k], allowed[key][k]) for k in budget.COUNTS if row[k] > allowed[key][k]}
        for key, row in measured.items()
    }
    assert {key: counts for key, counts in over.items() if counts} == {}


def test_a_change_of_a_kernel_or_of_how_it_is_specialised_changes_its_digest():
    launch = next(iter(budget.launches(90).values()))
    digests = {budget.digest(launch)}
    digests.add(budget.digest(launch._replace(options=launch.options | {"num_warps": 1})))
    digests.add(budget.digest(launch._replace(aligned=launch.aligned[1:])))
    name = next(k for k, kind in launch.signature.items() if kind[0] == "*")
    digests.add(budget.digest(launch._replace(signature=launch.signature | {name: "*fp64"})))
    source = textwrap.dedent(inspect.getsource(launch.kernel.fn))
    changed = triton.jit(launch.kernel.fn)
    changed._unsafe_update_src(source[source.index("def ") :] + "    pass\n")
    digests.add(budget.digest(launch._replace(kernel=changed)))
    assert len(digests) == 5


def test_no_float_argument_of_a_kernel_has_to_be_exact():
    """It is a float32 on a GPU, in float64 kernels too: log N lost digits that way. `gap` and
    `one` may be rounded, scale (which is `factor` too) and offset go with float32 alone. What must
    be exact goes in as an integer.
    """
    for (_, name), launch in budget.launches(90).items():
        floats = {k for k, kind in launch.signature.items() if kind in ("fp32", "fp64")}
        assert floats <= {"gap", "one", "scale", "offset", "factor"}, name
        assert "*fp64" not in launch.signature.get("x", "") or not launch.constants.get("AFFINE"), (
            name
        )


def test_every_op_is_called():
    packages = (ROOT / "dfkernels" / "ops").glob("*/triton.py")
    elsewhere = set(budget.LAUNCHERS)  # the search is no op over all atoms
    assert set(budget.CALLS) == {path.parent.name for path in packages} | elsewhere


def test_recorded_launches_are_what_the_shapes_lead_to():
    """Ones are constants and multiples of 16 known, as when Triton sees the arguments."""
    named = {
        launch.name: launch
        for (file, _), launch in budget.launches(90).items()
        if "endpoint" in file
    }
    key = "endpoint fp32 CENTRED=True STAGE=row ROWS=1 BLOCK=4096 PADDED=1 warps=8 ctas=1"
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
    row = {
        "triton": "3.7.1",
        "file": "a",
        "kernel": "k",
        "cc": 90,
        **dict.fromkeys(budget.COUNTS, 1),
        "source": "0a",
    }
    other = {**row, "triton": "3.8.0"}
    path = tmp_path / "budget.csv"
    budget.write([row, other], path)
    budget.write([{**row, "registers": 2}], path)
    assert budget.read(path) == [{**row, "registers": 2}, other]
