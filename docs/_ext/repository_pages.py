"""Files of the repository that are pages of the site too, and links from one to the other.

A page listed in PAGES shows the file named there. In every page, a link to such a file leads to its
page; one to another file outside docs/, which the site does not have, becomes its text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
    "derivations/posterior": "dfkernels/ops/posterior/README.md",
    "derivations/fisher_matvec": "dfkernels/ops/fisher_matvec/README.md",
    "derivations/mixture_posterior": "dfkernels/ops/mixture_posterior/README.md",
    "derivations/transport_chain": "dfkernels/ops/transport_chain/README.md",
    "derivations/sums": "dfkernels/ops/common/README.md",
}
_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:)([^)\s#]+)(#[^)\s]*)?\)")


def with_links(text: str, page: Path, file: Path) -> str:
    """The text of `file` with its links as they have to be in `page`, a path below docs/."""
    pages = {(ROOT / source).resolve(): DOCS / f"{name}.md" for name, source in PAGES.items()}

    def link(match: re.Match[str]) -> str:
        label, path, anchor = match[1], match[2], match[3] or ""
        target = (file.parent / path).resolve()
        target = pages.get(target, target)
        if target.exists() and not target.is_relative_to(DOCS):
            return label
        return f"[{label}]({os.path.relpath(target, page.parent)}{anchor})"

    return _LINK.sub(link, text)


def _read(app: Sphinx, name: str, source: list[str]) -> None:
    page = Path(app.env.doc2path(name))
    if page.suffix != ".md":
        return
    file = page
    if name in PAGES:
        file = ROOT / PAGES[name]
        app.env.note_dependency(str(file))
        source[0] = file.read_text()
    source[0] = with_links(source[0], page, file)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
