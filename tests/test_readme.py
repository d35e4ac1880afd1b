"""README.md keeps its word: its code runs and prints what it says, and what it names exists."""

from __future__ import annotations

import math
import re
import shlex

import pytest
import torch
from documents import GUIDES, README, ROOT, blocks, code_spans, promised, run

import dfkernels as df
import experiments.__main__
from dfkernels import cli

TEXT = README.read_text()
MAKE_TARGETS = " ".join(
    re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
).split()
PYPROJECT = (ROOT / "pyproject.toml").read_text()


def commands(text: str) -> list[str]:
    """Every command line in a page, its comment taken off."""
    lines = [
        line.split("  #")[0].strip() for block in blocks(text, "sh") for line in block.splitlines()
    ]
    spans = [s for s in code_spans(text) if re.match(r"(make|python -m|pip|dfkernels) ", s)]
    return [line for line in lines if line] + spans


def test_the_example_prints_what_it_says():
    example, _ = blocks(TEXT, "python")
    assert len(promised(example)) == example.count("print(") == 3
    assert run(example, "README.md", {}) == promised(example)


def test_the_example_with_a_network_runs():
    """With a network that knows the answer for Gaussian data, in v: alpha eps - sigma x_0 = 0 at
    unit variance."""
    _, example = blocks(TEXT, "python")
    generator = torch.Generator().manual_seed(0)
    x = 50 * torch.randn(4, 3, dtype=torch.float64, generator=generator)
    schedule = df.schedule.VP(0.1, 20.0)
    given = {
        "df": df,
        "torch": torch,
        "network": lambda x, t: 0 * x,
        "schedule": schedule,
        "cloud": df.PointCloud(torch.randn(50, 3, dtype=torch.float64, generator=generator)),
        "x": x * schedule.alpha(schedule.t_of_log_snr(torch.tensor(-2 * math.log(50.0)))),
    }
    run(example, "README.md", given)
    normal = torch.distributions.Normal(0.0, 1.0)
    truth = normal.log_prob(given["path"].x[-1]).sum(1)
    # Heun's error in 40 steps, and a prior without the data's own spread, (1/50)^2
    assert torch.allclose(given["result"].log_prob, truth, atol=0.05)


def test_what_the_table_names_can_be_called():
    table = TEXT.split("## What do you want to do?")[1].split("\n## ")[0]
    named = re.findall(r"`df\.([\w.]+)\(", table)
    assert len(named) >= 9
    for name in named:
        found = df
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found), name
    guides = set(re.findall(r"\]\(docs/guide/([\w-]+\.md)\)", TEXT))
    assert guides <= {page.name for page in GUIDES}


@pytest.mark.parametrize("page", [README, *GUIDES], ids=lambda page: page.name)
def test_commands_exist(page):
    for command in commands(page.read_text()):
        words = shlex.split(command)
        if words[0] == "make":
            assert words[1] in MAKE_TARGETS, command
        elif words[:2] == ["pip", "install"]:
            extras = re.findall(r"\[(\w+)\]", command)
            assert all(f"\n{extra} = [" in PYPROJECT for extra in extras), command
        elif words[:3] == ["python", "-m", "experiments"]:
            if words[3:]:
                assert experiments.__main__._parser().parse_args(words[3:]).command == words[3]
        elif words[:2] == ["python", "-m"] and words[2] != "dfkernels":
            module = ROOT / words[2].replace(".", "/")
            assert words[2].split(".")[0] in ("bench", "tools"), command
            assert module.with_suffix(".py").exists() or (module / "__main__.py").exists(), command
        else:
            assert "dfkernels" in (words[0], words[-1]), command
            arguments = words[1:] if words[0] == "dfkernels" else words[3:]
            if len(arguments) > 1:
                assert cli._parser().parse_args(arguments).command == arguments[0]


def test_readme_has_the_commands_of_a_checkout():
    assert {"make demo", "make test", "make docs", "pip install ."} <= set(commands(TEXT))


def test_ci_runs_what_readme_says():
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_readme_is_short():
    words = [line for line in TEXT.splitlines() if not line.startswith("|")]
    assert len(" ".join(words).split()) <= 1100


def test_the_pictures_are_small():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXT) + re.findall(
        r'(?:src|srcset)="([^"]+)"', TEXT
    )
    assert len(pictures) == 3
    for picture in pictures:
        assert 20_000 < (ROOT / picture).stat().st_size <= 400_000
