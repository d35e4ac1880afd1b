"""Docstrings are plain text with Google's sections: only `backticks`, single or double, are markup.

Formulas such as |x - alpha y|^2 and shapes such as [B, *E] would otherwise be reStructuredText. An
indented block of a docstring's text is shown as it stands, line by line.
"""

from __future__ import annotations

import re

from sphinx.application import Sphinx

_SECTION = re.compile(
    r"(Args|Attributes|Returns|Raises|Yields|Note|Notes|Example|Examples|References|Warning):$"
)


_ITEM = re.compile(r"(-|\d+\.) ")


def _escaped(line: str) -> str:
    """The line with the characters escaped that reStructuredText would read as markup."""
    parts = re.split(r"(``.+?``|`[^`]+`)", line)
    parts[::2] = [re.sub(r"[\\*|`]|_(?=\W|$)", r"\\\g<0>", part) for part in parts[::2]]
    parts[1::2] = [f"``{part.strip('`')}``" for part in parts[1::2]]
    return "".join(parts)


def plain(lines: list[str]) -> list[str]:
    """The docstring's lines as reStructuredText that reads as they do."""
    made: list[str] = []
    section = listed = literal = False
    for line in lines:
        indented, blank = line.startswith(" "), not line.strip()
        if blank:
            listed = False
        elif not indented:
            if literal and made[-1].strip():
                made.append("")
            section, literal = bool(_SECTION.match(line)), False
            listed = listed or bool(_ITEM.match(line))
        elif not (section or listed or literal):
            literal = True
            made += ["", "::", ""]
        made.append(line if blank or literal else _escaped(line))
    return made


def _process(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    lines[:] = plain(lines)
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]  # or napoleon would take "Score: ..." for a type and a description


def _skip(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object
) -> bool | None:
    """Fields of a NamedTuple without a text of their own: its docstring says what they are."""
    return True if (getattr(obj, "__doc__", "") or "").startswith("Alias for field ") else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", _process, priority=400)  # before napoleon's 500
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
