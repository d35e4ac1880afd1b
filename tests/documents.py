"""What the tests of the documents share: where the pages are, and their code blocks."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs" / "guide").glob("*.md"))
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "dfkernels/**/*.md")
    for page in ROOT.glob(pattern)
    if not page.name.startswith(".")
)


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", without_blocks(text))


def promised(code: str) -> list[str]:
    """What a code block says that it prints: the comment after each call of print."""
    return re.findall(r"^print\(.*\) +# (.+)$", code, re.M)


def run(code: str, name: str, given: dict) -> list[str]:
    """Run a code block in the names of `given`, and return the lines that it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, name, "exec"), given)
    return printed.getvalue().splitlines()
