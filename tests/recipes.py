"""The recipes of docs/guide/recipes.md, run as the scripts that they are."""

from __future__ import annotations

import os
import subprocess
import sys

import torch
from documents import GUIDES, ROOT, blocks
from shards import write_shards

import dfkernels as df

PAGE = next(page for page in GUIDES if page.name == "recipes.md")
MOMENTS = ("log_weight", "log_mass", "mean", "variance", "weight_square")
SIZES = (7, 300, 1, 40, 12)  # rows of the files


def recipes() -> dict[str, str]:
    """The scripts of the page by the name in their first line."""
    found = (code.split("\n", 1) for code in blocks(PAGE.read_text(), "py"))
    return {name.removeprefix("# "): code for name, code in found}


def total_of(name: str, folder) -> tuple[df.Partial, df.Partial]:
    """What a recipe writes, run as a script in a folder with data, and what one process gets."""
    y = torch.randn(sum(SIZES), 2, 3, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(1))
    write_shards(folder / "latents", y.split(SIZES))
    torch.save(x, folder / "queries.pt")
    (folder / name).write_text(recipes()[name])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    how = {"capture_output": True, "text": True, "cwd": folder, "env": environment}
    done = subprocess.run([sys.executable, name], timeout=300, **how)
    assert done.returncode == 0, done.stderr
    found = torch.load(folder / "total.pt", weights_only=False)
    return found, df.ShardedCloud(folder / "latents").partial(x, 1.0, 0.5)
