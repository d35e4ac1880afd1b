"""The loop with accelerate that docs/guide/latents.md shows, in one process and in two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from documents import GUIDES, ROOT, blocks, run

pytest.importorskip("accelerate")
PAGE = next(page for page in GUIDES if page.name == "latents.md")


def prepared(folder, monkeypatch):
    """The names that the blocks before the loop make, in a folder of their own."""
    monkeypatch.chdir(folder)
    given: dict = {}
    for code in blocks(PAGE.read_text(), "python")[:2]:
        run(code, PAGE.name, given)
    return given


def test_the_loop_of_the_guide_moves_the_weights(tmp_path, monkeypatch):
    given = prepared(tmp_path, monkeypatch)
    (code,) = blocks(PAGE.read_text(), "py")
    run(code, PAGE.name, given)
    head = given["trained"].body.head.weight
    assert head.dtype == torch.float32 and head.isfinite().all() and head.abs().max() > 0


@pytest.mark.slow
def test_two_processes_end_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = blocks(PAGE.read_text(), "python")[:2]
    (loop,) = blocks(PAGE.read_text(), "py")
    networks = second[: second.index("how = ")]  # and the loss, without the training there
    names = first[first.index("latents = df") : first.index("print(latents)")]
    start = "import torch\nimport dfkernels as df\ngenerator = torch.Generator().manual_seed(0)\n"
    report = """
total = sum(p.detach().double().sum() for p in trained.parameters()).item()
with open(f"{accelerator.process_index}-of-{accelerator.num_processes}", "w") as file:
    file.write(f"{total!r} {int(torch.randint(99999, (1,), generator=draw))}")
"""
    (tmp_path / "data.py").write_text(first)
    (tmp_path / "loop.py").write_text(start + names + networks + loop + report)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment["ACCELERATE_USE_CPU"] = "true"
    how = {"capture_output": True, "text": True, "env": environment, "timeout": 300}
    assert subprocess.run([sys.executable, "data.py"], **how).returncode == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, "loop.py"], **how)
    assert done.returncode == 0, done.stderr
    found = [(tmp_path / f"{rank}-of-2").read_text().split() for rank in range(2)]
    assert found[0][0] == found[1][0]  # the weights, after steps by the mean of both gradients
    assert found[0][1] != found[1][1]  # the generators
