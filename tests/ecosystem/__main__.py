"""python tests/ecosystem: the tests of df.adapt, with the libraries, and the table of what they
cover, which is written into docs/guide/adapters.md. A library that is missing is an error.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "guide" / "adapters.md"
# what a row is called, and the package whose version it names
LIBRARIES = {
    "diffusers": "diffusers",
    "EDM": None,
    "k-diffusion": "k-diffusion",
    "azula": "azula",
    "flow_matching": "flow-matching",
    "torchcfm": "torchcfm",
    "score_sde": None,
}
COLUMNS = {
    "sample": "our samplers, their networks",
    "likelihood": "likelihood of their networks",
    "check": "check of their networks",
    "audit": "audit of their networks",
    "exact": "their samplers, the exact data set",
}


class Table:
    """Counts the tests that passed for each cell."""

    def __init__(self) -> None:
        self.cells: dict[str, list[tuple[str, str]]] = {}
        self.passed: Counter[tuple[str, str]] = Counter()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            self.cells[item.nodeid] = [mark.args for mark in item.iter_markers("covers")]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.passed.update(self.cells[report.nodeid])

    def rows(self) -> str:
        lines = [
            f"| library | {' | '.join(COLUMNS.values())} |",
            f"| --- |{' --- |' * len(COLUMNS)}",
        ]
        for name, package in LIBRARIES.items():
            said = f"{name} {version(package)}" if package else f"{name} (stand-ins)"
            counts = [self.passed[name, column] for column in COLUMNS]
            cells = [f"{count} test{'s' * (count > 1)}" if count else "" for count in counts]
            lines.append(f"| {said} | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def main() -> int:
    table = Table()
    tests = [str(ROOT / "tests" / "ecosystem"), str(ROOT / "tests" / "test_adapt.py")]
    # of the page that is written below
    about = "tests/test_adapt.py::test_the_table_in_the_guide_is_of_the_pinned_libraries"
    how = ["-W", "ignore", "-p", "no:cacheprovider", "--deselect", about]
    code = pytest.main([*how, *tests], plugins=[table])
    if code:
        return int(code)
    without = [
        (name, column)
        for name in LIBRARIES
        for column in COLUMNS
        if not table.passed[name, column] and (name, column) != ("score_sde", "exact")
    ]
    if without:
        print(f"no test ran for {without}")
        return 1
    text = PAGE.read_text()
    between = re.compile(r"(<!-- adapters -->\n).*?(<!-- /adapters -->)", re.S)
    PAGE.write_text(between.sub(lambda found: found[1] + table.rows() + found[2], text))
    print(table.rows())
    return 0


if __name__ == "__main__":
    sys.exit(main())
