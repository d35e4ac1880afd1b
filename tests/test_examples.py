"""The scripts in examples/ run, are short, and print the numbers that their texts speak of."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys

import pytest
import torch
from documents import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def output(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def rows(text: str) -> list[list[float]]:
    """The lines of a printed table, whose first column is sigma."""
    lines = re.findall(r"^ +[\d.]+ .*$", text, re.M)
    return [[float(number) for number in line.split()] for line in lines]


def test_there_are_six_and_each_is_short():
    assert len(EXAMPLES) == 6
    for path in EXAMPLES:
        text = path.read_text()
        assert len(text.splitlines()) < 80, path
        assert f"python examples/{path.name}" in text


def test_memorisation_audit(capsys):
    text = output("memorisation_audit", capsys)
    assert "flagged as copies: 20 of 20 copies, 0 of 20 held-out digits" in text
    assert "copies traced to their source: 20 of 20" in text
    effective = [ess for _, ess, _ in rows(text)]
    assert effective == sorted(effective) and effective[0] < 1.5 and effective[-1] > 100


@pytest.mark.slow
def test_score_ground_truth(capsys):
    table = rows(output("score_ground_truth", capsys))
    assert [row[0] for row in table] == [0.02, 0.1, 0.5, 2.0]
    for sigma, _, untrained, trained in table:
        assert trained < untrained / (2 if sigma > 0.05 else 1)
    assert table[0][3] > 5 * table[-1][3]  # it does not memorise


@pytest.mark.slow
def test_likelihood(capsys):
    text = output("likelihood", capsys)
    (truth,) = re.findall(r"true log-density: (\S+) nats", text)
    found = re.findall(r"trace=\w+: (\S+) nats.*?error (\S+),.*?(\d+) Jacobian", text)
    (exact, error, products), (_, rough, few) = found
    assert abs(float(exact) - float(truth)) < 0.005 and float(error) < 0.005 < float(rough)
    assert int(products) == 8 * int(few)


@pytest.mark.slow
def test_certified_sampling(capsys):
    text = output("certified_sampling", capsys)
    table = rows(text)
    assert len(table) == 4
    for _, read, left_out, error, bound in table:
        assert 1 <= read < 800 and left_out <= 1e-6
        assert error <= bound + 1e-5  # the bound is of exact arithmetic
    (apart,) = re.findall(r"images differ by at most (\S+)", text)
    assert float(apart) < 1e-5


@pytest.mark.slow
def test_distributed(capsys):
    alone = output("distributed", capsys).splitlines()
    script = str(ROOT / "examples" / "distributed.py")
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    two = subprocess.run(
        [sys.executable, *run], check=True, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ).stdout.splitlines()  # fmt: skip
    ranks = {"rank 0 reads part3.npy, part4.npy", "rank 1 reads part0.npy, part1.npy, part2.npy"}
    assert ranks < set(two) and len(two) == 6 and two[-4].endswith("files=5, ranks=2)")
    assert two[-3:] == alone[-3:]  # every digit
    (found, want) = re.findall(r"-?\d+\.\d+", alone[-3])
    assert abs(float(found) - float(want)) < 1e-4
    (apart,) = re.findall(r"differ from those in memory by (\S+)", alone[-2])
    assert float(apart) < 1e-5


@pytest.mark.slow
def test_latents(capsys):
    """An eighth of the training that the script does by itself."""
    script = runpy.run_path(str(ROOT / "examples" / "latents.py"))
    # its truth, by a derivative of the log-density along random signs: to 1.1 % here
    generator, sigma = torch.Generator().manual_seed(0), 0.5
    x = script["draw"](4, generator) + sigma * torch.randn(4, 4, 32, 32, generator=generator)
    v = script["POWER"].double() + sigma**2

    def log_q(x):
        c = script["hartley"](x)[:, None]
        return (-(c.square() / v + v.log()).sum((2, 3, 4)) / 2).logsumexp(1).sum()

    signs = torch.randint(2, x.shape, generator=generator).double() * 2 - 1
    _, product = torch.func.jvp(torch.func.grad(log_q), (x.double(),), (signs,))
    truth = script["true_trace"](x, sigma)
    assert torch.allclose(-(signs * product).sum((1, 2, 3)), truth, rtol=0.05)

    script["main"](steps=80)
    text = capsys.readouterr().out
    table = [re.findall(r"[\d.]+", line) for line in text.splitlines()[1:]]
    assert [row[0] for row in table] == ["0.2", "0.5", "1.0", "2.0", "5.0"]
    for sigma, _, untrained, matched, hutchinson in (map(float, row) for row in table):
        assert matched < 0.7 * untrained
        assert matched < hutchinson or sigma not in (0.5, 1.0)
