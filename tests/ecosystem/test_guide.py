"""The blocks of docs/guide/adapters.md that need a library; tests/test_docs.py runs the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from documents import GUIDES, blocks, promised, run

PAGE = next(page for page in GUIDES if page.name == "adapters.md")
LIBRARIES = ("diffusers", "k-diffusion", "azula", "flow_matching", "torchcfm")

ADAPTERS = {
    "diffusers": "from_diffusers",
    "EDM": "from_edm",
    "k-diffusion": "from_k_diffusion",
    "azula": "from_azula",
    "flow_matching": "from_flow_matching",
    "torchcfm": "from_torchcfm",
    "score_sde": "from_score_sde",
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_guide_runs_and_prints_what_it_says(library, request, monkeypatch):
    if library == "k-diffusion":
        monkeypatch.setitem(sys.modules, "k_diffusion", request.getfixturevalue("k_diffusion"))
    else:
        pytest.importorskip(library)
    torch.manual_seed(0)
    given: dict = {}
    assert sections()[library]
    for code in sections()[library]:
        assert run(code, PAGE.name, given) == promised(code)


def test_every_library_s_section_starts_with_the_whole_way():
    parts = {part.split("\n", 1)[0]: part for part in PAGE.read_text().split("\n## ")}
    for name, adapter in ADAPTERS.items():
        first = (blocks(parts[name], "py") + blocks(parts[name], "python"))[0]
        steps = [f"df.adapt.{adapter}(", "df.check(", "df.sample(", "df.log_prob("]
        assert all(step in first for step in steps), name


def sections():
    """The blocks under each heading that is a library's."""
    parts = PAGE.read_text().split("\n## ")
    return {part.split("\n", 1)[0]: blocks(part, "py") for part in parts}
