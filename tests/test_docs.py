"""The documents keep their word: code runs and prints what it says, links lead somewhere, tables
are the committed results, and the site builds without a warning."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch
from documents import GUIDES, PAGES, ROOT, blocks, code_spans, promised, run, without_blocks

import dfkernels as df
from tools.op_table import TABLE

# what torchrun says to a process without others
TORCHRUN = "RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=0"
WITH_CODE = [page for page in GUIDES if blocks(page.read_text(), "python")]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_a_guide_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in TORCHRUN.split():
        monkeypatch.setenv(*variable.split("="))
    torch.manual_seed(0)
    given: dict = {}
    for code in blocks(page.read_text(), "python"):
        assert run(code, page.name, given) == promised(code)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.replace("`", "").lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    return {slug(h) for h in re.findall(r"^#+ (.*)$", without_blocks(page.read_text()), re.M)}


def of_today(text: str) -> str:
    """The text without the first column, of paths that are gone, of tables that say "before"."""
    tables = re.compile(r"^\| before \|.*\n(?:\|.*\n)*", re.M)
    return tables.sub(lambda t: re.sub(r"^\|[^|]*\|", "|", t[0], flags=re.M), text)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_paths_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        found = page.parent / file if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target
    # paths from the root of the repository; <op> is a placeholder, a pattern must match something
    paths = [
        s
        for s in code_spans(of_today(text))
        if re.fullmatch(r"[\w.*/<>-]+", s)
        and s.split("/")[0]
        in {"csrc", "dfkernels", "tests", "bench", "docs", "experiments", "examples", "tools"}
    ]
    paths = [p.replace("<op>", "posterior") for p in paths if "/" in p]
    assert [p for p in paths if not list(ROOT.glob(p.rstrip("/")))] == []


def test_the_test_of_anchors_sees_them():
    assert slug("Adding an op: `x`, *y*") == "adding-an-op-x-y"
    assert of_today("a\n| before | now |\n| `x/y` | `z` |\nb\n") == "a\n| now |\n| `z` |\nb\n"
    assert "derivatives" in anchors(ROOT / "docs" / "guide" / "oracle.md")


def test_the_table_of_operators_is_complete():
    text = (ROOT / "docs" / "guide" / "oracle.md").read_text()
    signatures = re.findall(r"^\| `(\w+)\(([\w, ]+)\)` \|", text, re.M)
    named = [name for name, _ in signatures]
    assert named == list(TABLE)
    assert sorted(named) == [n for n in df.ops.__all__ if n.islower()]
    for name, arguments in signatures:
        declared = list(inspect.signature(getattr(df.ops, name)).parameters)
        assert arguments.split(", ") == declared[: arguments.count(",") + 1], name


def test_variables_are_read_somewhere():
    named = set(re.findall(r"DFKERNELS_\w+", (ROOT / "docs/guide/install.md").read_text()))
    sources = [
        p
        for d in ("dfkernels", "csrc", "_build")
        for p in (ROOT / d).rglob("*.*")
        if p.suffix in (".py", ".cpp")
    ]
    code = "".join(p.read_text() for p in [*sources, ROOT / "setup.py"])
    assert named == set(re.findall(r"""["'](DFKERNELS_\w+)["']""", code))


def test_the_tables_are_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    table = importlib.import_module("bench.table")
    bodies = table.bodies()
    assert set(bodies) == set(table.PAGES) >= {"speed", "bench", "derivatives", "certified"}
    for mark, body in bodies.items():
        text = table.PAGES[mark].read_text()
        assert text.count(f"<!-- {mark} -->") == text.count(f"<!-- /{mark} -->") == 1
        assert table.with_block(text, mark, body) == text, "run `python -m bench.table`"
    marked = "a\n<!-- speed -->\nold\n<!-- /speed -->\nb"
    assert table.with_block(marked, "speed", "new") == marked.replace("old", "new")


def test_the_gpu_table_is_the_committed_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    report = importlib.import_module("bench.gpu.report")
    text = report.PAGE.read_text()
    assert text.count("<!-- gpu -->") == text.count("<!-- /gpu -->") == 1
    assert report.with_tables(text, report.read_results()) == text, (
        "run `python -m bench.gpu.report`"
    )


class _Page(HTMLParser):
    """The anchors and the links of a page of the site."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors, self.links = set(), set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.anchors.add(value)
            if name in ("href", "src") and value:
                self.links.add(value)


@pytest.mark.slow
def test_the_site_builds_and_every_link_leads_somewhere(tmp_path):
    needed = ("sphinx", "furo", "myst_parser", "sphinx_copybutton", "mathjax")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        pytest.skip(f"docs/requirements.txt is not installed: no {missing[0]}")
    site = tmp_path / "site"
    made = subprocess.run(
        [
            sys.executable,
            "-m",
            "sphinx",
            "-b",
            "html",
            "-W",
            "--keep-going",
            "-q",
            "docs",
            str(site),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    pages = {path: _Page(path) for path in site.rglob("*.html")}
    assert site / "index.html" in pages and site / "guide" / "oracle.html" in pages
    dead = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"(https?|mailto|data|javascript):", link):
                assert not re.search(r"\.(js|css|woff2?)$", link), (
                    f"{path}: needs a network: {link}"
                )
                continue
            file, _, anchor = unquote(link).partition("#")
            target = (path.parent / file.partition("?")[0]).resolve() if file else path
            if not target.exists() or (
                anchor and target in pages and anchor not in pages[target].anchors
            ):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert dead == []
    # what is public has an entry in the pages made of docstrings
    documented = set().union(*(page.anchors for path, page in pages.items() if "api" in path.parts))
    public = [
        f"{module.__name__}.{name}"
        for module in (df, df.ops, df.schedule)
        for name in module.__all__
        if not inspect.ismodule(getattr(module, name))
    ]
    assert [name for name in public if name not in documented] == []
