"""`python -m experiments reproduce`: a quick run of everything, what is written when something
goes wrong, and
the errata's numbers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from dfkernels._io.files import FileError
from dfkernels._page import extra
from experiments.progress import Progress

pytest.importorskip("sklearn", reason="needs the extra: pip install dfkernels[demo]")
pytest.importorskip("matplotlib", reason="needs the extra: pip install dfkernels[demo]")
pytest.importorskip("PIL", reason="needs the extra: pip install dfkernels[demo]")

from coarse_figures import draw_coarsely
from matplotlib.figure import Figure

from experiments import NAMES, reproduce
from experiments import __main__ as program
from experiments.reproduce import errata, errata_bounds, report
from experiments.reproduce.section import Claim, Picture, Section, Table


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """One quick run of every experiment: (folder, exit code, stages that were reported)."""
    out, stages = tmp_path_factory.mktemp("reproduce") / "out", []
    step = Progress.step
    with pytest.MonkeyPatch.context() as patch:
        draw_coarsely(patch)
        patch.setattr(
            Progress,
            "step",
            lambda bar, stage="", units=1: (stages.append(stage), step(bar, stage, units)),
        )
        code = program.main(["reproduce", "all", "--quick", "--out", str(out)])
    return out, code, stages


@pytest.mark.slow
def test_everything_runs(finished):
    out, code, _ = finished
    text = (out / "reproduction.md").read_text()
    assert code == 0 and "\n- " not in text  # no problem is reported
    rows = re.findall(r"^\| (\w+) \| .* \| (holds|not judged) \|$", text, re.MULTILINE)
    assert {name for name, _ in rows} == set(NAMES)
    assert {verdict for _, verdict in rows} == {"holds", "not judged"}
    assert len([name for name, verdict in rows if (name, verdict) == ("table3", "holds")]) == 7
    assert (
        "\n| EDM | 27.09 % | 24.51 % | 0.00 % | 24.58 % |" in text
    )  # Table 3: as printed, authors', and so on


@pytest.mark.slow
def test_every_figure_is_there_and_is_shown(finished):
    out = finished[0]
    figures = sorted(p.name for p in (out / "reproduction").iterdir())
    shown = re.findall(
        r"!\[[^\]]*\]\(reproduction/([^)]+)\)", (out / "reproduction.md").read_text()
    )
    assert sorted(shown) == figures and {f.split("-")[0] for f in figures} == set(NAMES)
    for figure in figures:
        assert (out / "reproduction" / figure).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (out / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 2 * len(figures)  # light and dark
    assert not re.search(
        r"(?:src|href|srcset)=['\"](?!data:|#)", page
    )  # nothing outside is referred to
    assert "prefers-color-scheme:dark" in page
    written = {p.name for p in out.iterdir()} - {"networks-quick"}
    assert written == {
        "index.html",
        "reproduction.md",
        "reproduction",
        *(f"{n}.md" for n in NAMES),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_stages_are_counted(finished, name):
    """The bar's length is right: as many steps as STAGES, and one for the figures."""
    module = sys.modules[f"experiments.reproduce.{name}"]
    assert [s.split(": ")[0] for s in finished[2]].count(name) == len(module.STAGES) + 1


# ---- experiments that fail, with fakes


def experiment(monkeypatch, name, *, claims=(), error=None, draw=None):
    """Put a fake in the place of an experiment."""

    def run(quick, out, step):
        step("work")
        if error is not None:
            raise error
        return Section(
            name,
            f"The {name}",
            ["It is *so* <b>."],
            [Table("Numbers", ["σ", "value"], [["1", "2.5"]], "|x| in nats")],
            [Picture("plot", "A `plot`.", draw or (lambda theme: Figure()))],
            list(claims),
            {"training": 90.0},
        )

    fake = SimpleNamespace(STAGES=["work"], run=run)
    monkeypatch.setitem(sys.modules, f"experiments.reproduce.{name}", fake)


GOOD = Claim("error", "1e-16", "< 1e-10", True, check=True)
BAD = Claim("error", "0.5", "< 1e-10", False, check=True)
MISSED = Claim("mean error", "7.1 %", "≤ 5.8 %", False)


def names(monkeypatch, *chosen):
    monkeypatch.setattr(program, "NAMES", chosen)


def test_a_failing_check_fails_the_command(tmp_path, monkeypatch, capsys):
    experiment(monkeypatch, "table2", claims=[GOOD, BAD])
    assert program.main(["reproduce", "table2", "--quick", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert (
        "\nCHECK FAILED: table2: error: reached 0.5, target < 1e-10\n1 of 2 checks hold\n"
        in printed
    )
    assert (
        "| table2 | error | 0.5 | < 1e-10 | FAILS |" in (tmp_path / "reproduction.md").read_text()
    )
    assert "<td class=words>FAILS</td>" in (tmp_path / "index.html").read_text()


def test_a_missed_target_is_stated_and_is_no_failure(tmp_path, monkeypatch, capsys):
    experiment(monkeypatch, "table2", claims=[GOOD, MISSED])
    assert program.main(["reproduce", "table2", "--out", str(tmp_path)]) == 0
    line = "target not reached: table2: mean error: reached 7.1 %, target ≤ 5.8 %"
    count = "1 of 1 checks hold; 0 of 1 targets reached"
    assert f"\n{line}\n{count}\n" in capsys.readouterr().out
    row = "| table2 | mean error | 7.1 % | ≤ 5.8 % | not reached |"
    text = (tmp_path / "reproduction.md").read_text()
    assert (
        row in text
        and f"\n- {line}\n" in text
        and f"<p class=problem>{line}</p>" in (tmp_path / "index.html").read_text()
    )
    assert program.main(["reproduce", "table2", "--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "1 of 1 checks hold; targets are not judged in a quick run\n" in printed
    assert "target not reached" not in printed
    text = (tmp_path / "reproduction.md").read_text()
    assert row.replace("not reached", "not judged") in text and report._QUICK in text


def test_an_experiment_that_raises_loses_nothing_of_the_others(tmp_path, monkeypatch, capsys):
    names(monkeypatch, "errata", "table2", "table3")
    experiment(monkeypatch, "errata", claims=[GOOD])
    experiment(monkeypatch, "table2", error=ValueError("y: expected\nfinite values"))
    experiment(monkeypatch, "table3", claims=[GOOD])
    assert program.main(["reproduce", "all", "--quick", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert (
        "\nFAILED: table2: ValueError: y: expected finite values\n2 of 2 checks hold\n"
        in printed.out
    )
    assert "Traceback" in printed.err and "in run\n" in printed.err
    files = {
        "errata.md",
        "table3.md",
        "reproduction.md",
        "index.html",
        "reproduction",
        "networks-quick",
    }
    assert {p.name for p in tmp_path.iterdir()} == files
    assert sorted(os.listdir(tmp_path / "reproduction")) == ["errata-plot.png", "table3-plot.png"]
    failed = "FAILED: table2: ValueError: y: expected finite values"
    assert f"\n- {failed}\n" in (tmp_path / "reproduction.md").read_text()
    assert f"<p class=problem>{failed}</p>" in (tmp_path / "index.html").read_text()


def test_a_figure_that_cannot_be_drawn_keeps_the_numbers(tmp_path, monkeypatch, capsys):
    experiment(monkeypatch, "table2", claims=[GOOD], draw=lambda theme: 1 / 0)
    assert program.main(["reproduce", "table2", "--quick", "--out", str(tmp_path)]) == 1
    assert "FAILED: table2: ZeroDivisionError: division by zero" in capsys.readouterr().out
    text = (tmp_path / "table2.md").read_text()
    assert "| 1 | 2.5 |" in text and "![" not in text and not os.listdir(tmp_path / "reproduction")


def test_interrupt_keeps_what_was_finished(tmp_path, monkeypatch, capsys):
    names(monkeypatch, "errata", "table2", "table3")
    experiment(monkeypatch, "errata", claims=[GOOD])
    experiment(monkeypatch, "table2", error=KeyboardInterrupt())
    experiment(monkeypatch, "table3")
    assert program.main(["reproduce", "all", "--quick", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err.endswith("\npython -m experiments reproduce: interrupted\n")
    assert "| 1 | 2.5 |" in (tmp_path / "errata.md").read_text()
    assert "\n- not finished: table2, table3\n" in (tmp_path / "reproduction.md").read_text()
    assert (
        "<p class=problem>not finished: table2, table3</p>" in (tmp_path / "index.html").read_text()
    )


KILLED = """
import os, signal, sys
from types import SimpleNamespace
from experiments import NAMES, reproduce
from experiments import __main__ as program
program.NAMES = ("errata", "table2")
kill = SimpleNamespace(STAGES=["work"], run=lambda *args: os.kill(os.getpid(), signal.SIGKILL))
sys.modules["experiments.reproduce.table2"] = kill
program.main(["reproduce", "all", "--quick", "--out", sys.argv[1]])
"""


@pytest.mark.slow
def test_killed_run_keeps_what_was_finished(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert run.returncode == -9, run.stderr
    assert "| Prop. 7 |" in (tmp_path / "errata.md").read_text()
    assert (tmp_path / "reproduction" / "errata-errors.png").read_bytes()[:4] == b"\x89PNG"
    assert "\n- not finished: table2\n" in (tmp_path / "reproduction.md").read_text()


def test_full_disk(tmp_path, monkeypatch, capsys):
    """The tables are printed, the exit code is that of bad input, not of a failed experiment."""

    def full(path, fill):
        raise FileError(f"{path}: cannot write: No space left on device")

    experiment(monkeypatch, "table2", claims=[GOOD])
    monkeypatch.setattr(reproduce, "write", full)
    assert program.main(["reproduce", "table2", "--quick", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    message = f"{tmp_path}/reproduction/table2-plot.png: cannot write: No space left on device"
    assert (
        printed.err.endswith(f"python -m experiments reproduce: error: {message}\n")
        and "    2.5\n" in printed.out
    )


def test_missing_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name == "sklearn" else object())
    assert program.main(["reproduce", "errata", "--out", str(tmp_path / "out")]) == 2
    message = (
        "python -m experiments reproduce: error: sklearn not installed: pip install"
        ' "dfkernels[demo]"\n'
    )
    assert capsys.readouterr().err == message and not (tmp_path / "out").exists()


def test_unwritable_out_is_found_before_any_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    experiment(monkeypatch, "table2", error=AssertionError("worked first"))
    assert program.main(["reproduce", "table2", "--out", str(tmp_path / "file")]) == 2
    start = (
        f"python -m experiments reproduce: error: {tmp_path}/file/reproduction: cannot write"
        " there: "
    )
    assert capsys.readouterr().err.startswith(start)


# ---- the report


def test_markdown_shows_the_text_as_it_is():
    assert (
        report._markdown("a*b |x| <y, z> < 1e-3 ~ x_M `a|b*c` $")
        == r"a\*b \|x\| \<y, z> < 1e-3 \~ x_M `a|b*c` \$"
    )
    assert report._markdown("_x_ and x_0") == r"\_x\_ and x_0"


def test_tables_align_numbers_to_the_right():
    table = report._markdown_table(
        ["name", "error", "what"], [["0.5", "1.2 %", "a"], ["1", "–", "`b|` 2"]]
    )
    assert report._words([["1", "1", "x"], ["1", "a", "–"], ["1", "b", "~ 3 s"]]) == {0, 1}
    assert (
        table
        == "| name | error | what |\n| :-- | --: | :-- |\n| 0.5 | 1.2 % | a |\n| 1 | – | `b\\|` 2 |"
    )


def test_the_page_says_the_same(tmp_path, monkeypatch):
    experiment(monkeypatch, "table2", claims=[GOOD])
    assert program.main(["reproduce", "table2", "--out", str(tmp_path)]) == 0
    page, text = (tmp_path / "index.html").read_text(), (tmp_path / "reproduction.md").read_text()
    assert "It is *so* &lt;b&gt;." in page and r"It is \*so\* \<b>." in text
    assert "A <code>plot</code>." in page and "A `plot`." in text
    assert "|x| in nats" in page and r"\|x\| in nats" in text
    assert "training 90 s" in page and re.search(
        r"^\| table2 \| \d s \| training 90 s \|$", text, re.MULTILINE
    )
    assert "style='max-width:672px'" in page  # 6.4 inches
    assert "![The table2](reproduction/table2-plot.png)" in text
    [summary] = re.findall(r"<!-- summary -->\n(.*?)<!-- /summary -->", text, re.DOTALL)
    assert summary.startswith(
        "\nMade by `python -m experiments reproduce table2` on 20"
    ) and summary.endswith("hold.\n\n")


# ---- the errata


def test_errata_give_the_numbers_of_the_derivations():
    assert errata._eq10().errors[0] == pytest.approx(0.25, abs=1e-14)  # (N + 1)/N at N = 4
    for name in ("VE", "EDM"):  # f = 0: the printed B is minus the right one
        assert errata._flow_errors(errata._SCHEDULES[name])[0] == pytest.approx([2] * 9, abs=1e-12)
    seven, eight = errata_bounds.prop7(), errata_bounds.prop8()
    # 2 <mean, d2>/sigma^3 + d2^2/sigma^2 with |mean| = 3.8; the printed bound is the second term
    assert seven.error == pytest.approx(16e-3 * 3.8 + 4e-6, rel=1e-9) and seven.bounds[
        0
    ] == pytest.approx(4e-6)
    # C - (x0 x0^T - mean mean^T) = (e2 e2^T - e1 e1^T)/2
    assert eight.error == pytest.approx(0.5**0.5 / 0.05**4, rel=1e-12)
    assert eight.bounds == pytest.approx((1.6e4, 3.2e5))
    assert (
        0.3 < seven.largest <= 1 and 0.3 < eight.largest <= 1
    )  # the right bounds hold, and are not idle


def test_an_erratum_that_is_none_does_not_hold():
    row = errata._eq10()
    swapped = errata.Formula(*([""] * 4), row.values, row.errors[::-1])
    idle = errata.Formula(*([""] * 4), row.values, (0.0, 0.0))
    assert row.holds and not swapped.holds and not idle.holds
    bound = errata_bounds.prop8()
    assert (
        bound.holds and not errata_bounds.Bound(*([""] * 4), bound.error, bound.bounds, 1.01).holds
    )
    assert not errata_bounds.Bound(*([""] * 4), bound.error, bound.bounds[::-1], 0.5).holds
