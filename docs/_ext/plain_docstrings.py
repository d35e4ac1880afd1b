"""Docstrings are plain text with Google's sections: only ``double backticks`` are markup.

Formulas such as |x - alpha y|^2 and shapes such as [B, *E] would otherwise be reStructuredText. An
indented block of a docstring's text is shown as it stands, line by line.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

_SECTION = re.compile(
    r"(Args|Attributes|Returns|Raises|Yields|Note|Notes|Example|Examples|References|Warning):$"
)


def _escaped(line: str) -> str:
    """The line with the characters escaped that reStructuredText would read as markup."""
    parts = re.split(r"(``.+?``)", line)
    parts[::2] = [re.sub(r"[\\*|`]|_(?=\W|$)", r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def plain(lines: list[str]) -> list[str]:
    """The docstring's lines as reStructuredText that reads as they do."""
    made: list[str] = []
    section = literal = False
    for number, line in enumerate(lines):
        indented, blank = line.startswith(" "), not line.strip()
        if not blank and not indented:
            section, literal = bool(_SECTION.match(line)), False
        elif not blank and not section and not literal and not lines[number - 1].strip():
            literal = True
            made += ["::", ""]
        made.append(line if blank or literal else _escaped(line))
    return made


def _process(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    lines[:] = plain(lines)
    if what in ("attribute", "property"):
        lines.insert(0, "")  # or napoleon would take "Score: ..." for a type and its description


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon's 500
    return {"parallel_read_safe": True, "parallel_write_safe": True}
