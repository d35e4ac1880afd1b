"""The blocks of docs/guide/adapters.md that need a library; tests/test_docs.py runs the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from documents import GUIDES, blocks, promised, run

PAGE = next(page for page in GUIDES if page.name == "adapters.md")
LIBRARIES = ("diffusers", "azula", "flow_matching")


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_guide_runs_and_prints_what_it_says(library):
    pytest.importorskip(library)
    torch.manual_seed(0)
    given: dict = {}
    assert sections()[library]
    for code in sections()[library]:
        assert run(code, PAGE.name, given) == promised(code)


def sections():
    """The blocks under each heading that is a library's."""
    parts = PAGE.read_text().split("\n## ")
    return {part.split("\n", 1)[0]: blocks(part, "py") for part in parts}
