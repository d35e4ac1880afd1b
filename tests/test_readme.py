"""README.md keeps its word: the example runs and prints what it says, what is named exists, the
table is the benchmark's.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from cases import OPS

import dfkernels as df
from dfkernels import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/*.md", "dfkernels/**/*.md")
    for page in ROOT.glob(pattern)
    if not page.name.startswith(".")
)
MAKE_TARGETS = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.M | re.S)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))


def commands() -> list[str]:
    """Every command line in README, its comment taken off."""
    lines = [line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    spans = [s for s in code_spans(README) if re.match(r"(make|python -m|pip|dfkernels) ", s)]
    return [line for line in lines if line] + spans


def test_the_example_prints_what_it_says():
    example, _, _ = blocks("python")
    expected = re.findall(r"^print\(.*\) +# (.+)$", example, re.M)
    assert len(expected) == example.count("print(") == 3
    assert sum(bool(line) and not line.startswith("import") for line in example.splitlines()) <= 12
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {})
    assert printed.getvalue().splitlines() == expected


def test_the_methods_example_runs():
    """With a network that knows the answer for Gaussian data, in v: alpha eps - sigma x_0 = 0 at
    unit variance."""
    _, _, example = blocks("python")
    generator = torch.Generator().manual_seed(0)
    x = 50 * torch.randn(4, 3, dtype=torch.float64, generator=generator)
    schedule = df.schedule.VP(0.1, 20.0)
    given = {
        "df": df,
        "network": lambda x, t: 0 * x,
        "schedule": schedule,
        "cloud": df.PointCloud(torch.randn(50, 3, dtype=torch.float64, generator=generator)),
        "x": x * schedule.alpha(schedule.t_of_log_snr(torch.tensor(-2 * math.log(50.0)))),
    }
    exec(compile(example, "README.md", "exec"), given)
    normal = torch.distributions.Normal(0.0, 1.0)
    truth = normal.log_prob(given["path"].x[-1]).sum(1)
    # Heun's error in 40 steps, and a prior without the data's own spread, (1/50)^2
    assert torch.allclose(given["result"].log_prob, truth, atol=0.05)


def test_the_certified_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, example, _ = blocks("python")
    cloud = df.PointCloud(torch.randn(4200, 512, generator=torch.Generator().manual_seed(0)))
    given = {"df": df, "cloud": cloud, "x": cloud.y[:3] + 0.1, "alpha": 1.0, "sigma": 0.1}
    exec(compile(example, "README.md", "exec"), given)
    assert bool((given["F"].dropped_mass <= 1e-6).all()) and bool(
        (given["F"].atoms_read < 50).all()
    )
    assert [p.name for p in tmp_path.iterdir()] == ["cloud.index.safetensors"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_paths_exist(page):
    text = page.read_text()
    links = [
        t.split("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith("http")
    ]
    assert [t for t in links if not (page.parent / t).exists()] == []
    # paths from the root of the repository; <op> is a placeholder, a pattern must match something
    paths = [
        s
        for s in code_spans(text)
        if re.fullmatch(r"[\w.*/<>-]+", s)
        and s.split("/")[0] in {"csrc", "dfkernels", "tests", "bench", "docs"}
    ]
    paths = [p.replace("<op>", "posterior") for p in paths if "/" in p]
    assert [p for p in paths if not list(ROOT.glob(p.rstrip("/")))] == []


def test_the_test_of_paths_sees_them():
    spans = code_spans((ROOT / "CONTRIBUTING.md").read_text())
    assert {"dfkernels/ops/_kinds.py", "tests/cases.py", "csrc/ops/<op>.cpp"} <= set(spans)


def test_commands_exist():
    assert {"make demo", "make test", "pip install ."} <= set(commands())
    assert any(c.startswith("dfkernels posterior ") for c in commands())
    for command in commands():
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in MAKE_TARGETS, command
        elif words[:2] == ["pip", "install"]:
            wanted = re.findall(r"\[(\w+)\]", command)
            assert all(
                f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in wanted
            )
        elif words[:2] == ["python", "-m"] and words[2] != "dfkernels":
            assert words[2].split(".")[0] == "bench"
            assert (ROOT / (words[2].replace(".", "/") + ".py")).exists() or (
                ROOT / words[2].replace(".", "/") / "__main__.py"
            ).exists()
        else:
            assert "dfkernels" in (words[0], words[-1]), command
            arguments = words[1:] if words[0] == "dfkernels" else words[3:]
            if arguments and arguments != ["--help"]:
                assert cli._parser().parse_args(arguments).command == arguments[0]


def test_ci_runs_what_readme_says():
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_the_op_table_is_the_ops():
    signatures = re.findall(r"^\| `(\w+)\(([\w, ]+)\)` \|", README, re.M)
    named = [name for name, _ in signatures]
    assert named == [*OPS, "transport_chain"] and sorted(named) == [
        n for n in df.ops.__all__ if n.islower()
    ]
    for name, arguments in signatures:
        declared = list(inspect.signature(getattr(df.ops, name)).parameters)
        assert arguments.split(", ") == declared[: arguments.count(",") + 1], name


def test_objects_have_what_readme_lists():
    section = README.split("## Objects and schedules")[1].split("\n## ")[0]
    cloud, fisher, top_k, schedules = section.split("\n- ")[1:]
    calls = dict(re.findall(r"`(?:schedule\.)?(\w+)\(([^()`]*)\)`", section))
    for cls, text in ((df.PointCloud, cloud), (df.DiffusionFisher, fisher), (df.top_k, top_k)):
        given = [a.split("=")[0] for a in calls[cls.__name__].split(", ")]
        assert given == list(inspect.signature(cls).parameters)
        for member in re.findall(r"`(\w+)(?:\([\w, ]*\))?`", text):
            assert hasattr(cls, member) or member == cls.__name__ or member in df.TopK._fields, (
                member
            )
    for name in re.findall(r"`(?:schedule\.)?([A-Z]\w+)[(`]", schedules):
        assert issubclass(getattr(df.schedule, name), df.schedule.Schedule)
    for member in ("f", "g2", "log_snr", "t_of_log_snr"):
        assert f"`{member}`" in schedules
        assert callable(getattr(df.schedule.VP(), member))


def test_variables_are_read_somewhere():
    named = set(re.findall(r"DFKERNELS_\w+", README))
    sources = [
        p
        for d in ("dfkernels", "csrc", "_build")
        for p in (ROOT / d).rglob("*.*")
        if p.suffix in (".py", ".cpp")
    ]
    code = "".join(p.read_text() for p in [*sources, ROOT / "setup.py"])
    assert named == set(re.findall(r"""["'](DFKERNELS_\w+)["']""", code))


def test_the_tables_are_the_committed_results(monkeypatch):
    """The benchmarks' are those of the CSVs, and the reproduction's numbers those of
    docs/reproduction.md."""
    monkeypatch.syspath_prepend(ROOT)
    table = importlib.import_module("bench.table")
    for mark in ("bench", "certified", "reproduction"):
        assert README.count(f"<!-- {mark} -->") == README.count(f"<!-- /{mark} -->") == 1
    for path, command in (
        (table.RESULTS, "make bench"),
        (table.CERTIFIED, "python -m bench.certified"),
        (table.REPRODUCTION, "dfkernels reproduce all"),
    ):
        if not path.exists():
            pytest.fail(
                f"{path.relative_to(ROOT)} does not exist: run `{command}` and commit it",
                pytrace=False,
            )
    document, certified = table.REPRODUCTION.read_text(), table.read_rows(table.CERTIFIED)
    made = table.with_tables(README, table.read_rows(), document, certified)
    assert made == README, "run `python -m bench.table`"
    marked = "a\n<!-- reproduction -->\nold\n<!-- /reproduction -->\nb"
    block = f"<!-- reproduction -->\n{table.summary_of(document)}\n<!-- /reproduction -->"
    assert table.with_tables(marked, table.read_rows(), document, certified) == f"a\n{block}\nb"
    assert table.summary_of(document).startswith("Made by `dfkernels reproduce ")


def test_the_gpu_table_is_the_committed_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    report = importlib.import_module("bench.gpu.report")
    assert README.count("<!-- gpu -->") == README.count("<!-- /gpu -->") == 1
    assert report.with_tables(README, report.read_results()) == README, (
        "run `python -m bench.gpu.report`"
    )


def test_the_pictures_are_small():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README) + re.findall(
        r'(?:src|srcset)="([^"]+)"', README
    )
    assert pictures == [
        f"docs/images/{name}.png" for name in ("digits", "certified-dark", "certified-light")
    ]
    for picture in pictures:
        assert 20_000 < (ROOT / picture).stat().st_size <= 400_000
