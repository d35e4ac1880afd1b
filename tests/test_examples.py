"""The scripts in examples/ run, are short, and print the numbers that their texts speak of."""

from __future__ import annotations

import re
import runpy

import pytest
from documents import ROOT

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def output(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def rows(text: str) -> list[list[float]]:
    """The lines of a printed table, whose first column is sigma."""
    lines = re.findall(r"^ +[\d.]+ .*$", text, re.M)
    return [[float(number) for number in line.split()] for line in lines]


def test_there_are_four_and_each_is_short():
    assert len(EXAMPLES) == 4
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
