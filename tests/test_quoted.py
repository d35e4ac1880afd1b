"""What guides quote of the reproduction and of benchmarks are the numbers of the last run."""

from __future__ import annotations

import csv
import re

import pytest
from documents import ROOT

REPRODUCED = (ROOT / "docs/reproduction.md").read_text().replace("−", "-")
NUMBER = r"-?\d+(?:\.\d+)?"


def cells(row: str) -> list[str]:
    """The cells of the one row of the reproduction's tables that begins so."""
    [found] = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", REPRODUCED, re.M)
    return [cell.strip() for cell in found.split("|")]


def reached(claim: str) -> list[float]:
    """The numbers that a claim of the reproduction's summary reached."""
    return [float(n) for n in re.findall(NUMBER, cells(claim)[0])]


def after(heading: str, row: str) -> list[float]:
    """The numbers in a row of the table below a heading of the reproduction."""
    table = REPRODUCED.split(f"### {heading}\n")[1].split("\n### ")[0]
    [found] = re.findall(rf"^\| {re.escape(row)} \|(.*)\|$", table, re.M)
    return [float(n) for n in re.findall(NUMBER, found)]


def pairs_of_particles() -> dict[tuple[str, str], float]:
    """How many times as fast as tensors of all pairs, in float32, by (M, d)."""
    with open(ROOT / "bench/results/particles-avx512.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["dtype"] == "float32"]
    return {(row["M"], row["d"]): float(row["ratio"]) for row in rows}


def quoted(guide: str, sentence: str) -> tuple[str, ...]:
    """The numbers in a guide's sentence, whose lines are joined."""
    text = " ".join((ROOT / "docs/guide" / guide).read_text().split())
    [found] = re.findall(sentence, text)
    return found if isinstance(found, tuple) else (found,)


def expect(said: tuple[str, ...], found: list[float]) -> None:
    """What was said is what was found, rounded to as many digits."""
    assert len(said) == len(found)
    for text, value in zip(said, found, strict=True):
        unit = 10.0 ** -len(text.partition(".")[2])
        assert abs(float(text) - value) <= 0.501 * unit, (text, value)


N = f"({NUMBER})"
QUOTES = {
    "a matched trace": lambda: expect(
        quoted("likelihood.md", rf"off by {N} bits per dimension on average, against {N} for Hut"),
        reached(r"likelihood | DF-TM, residual, against Hutchinson, K = 1: mean \|error\|"),
    ),
    "its speed": lambda: expect(
        quoted("likelihood.md", rf"in {N} times less time than the full divergence"),
        reached("likelihood | DF-TM, residual, against the exact divergence: speed"),
    ),
    "DF-EA": lambda: expect(
        quoted("guidance.md", rf"it guided {N} points fewer digits"),
        [-n for n in reached("adjoint | digits: paper (DF-EA, eq. 20) guides as well as vjp")],
    ),
    "iterations": lambda: expect(
        quoted(
            "sinkhorn.md", rf"takes {N} times as many at a blur of {N}, and more than {N} times"
        ),
        [
            reached("sinkhorn | blur 0.5: plain iterations over ours")[0],
            0.5,
            float(int(reached("sinkhorn | blur 0.05: plain iterations over ours")[0])),
        ],
    ),
    "log q of Langevin": lambda: expect(
        quoted("langevin.md", rf"mean log q of its samples is {N} nats too low at four steps"),
        [-after("Law of the path, and log q of the samples", "4")[-1]],
    ),
    "reflow": lambda: expect(
        quoted(
            "reflow.md",
            rf"had gone from {N} to {N} with synthetic pairs, to {N} with .* and stayed at {N}",
        ),
        [
            after(
                "Networks, last round: by a fine solver, by 10 steps of Euler's method and by one",
                f"digits | {row}",
            )[0]
            / 1000
            for row in ("first round", "synthetic", "anchor, re-noised", "fresh")
        ],
    ),
    "particles": lambda: expect(
        quoted(
            "particles.md",
            rf"{N} times as fast at M = 512, d = 10, {N} times at M = 2048 and "
            rf"{N} times at M = 512, d = 100",
        ),
        [pairs_of_particles()[key] for key in (("512", "10"), ("2048", "10"), ("512", "100"))],
    ),
}


@pytest.mark.parametrize("what", QUOTES)
def test_a_number_is_that_of_the_last_run(what):
    QUOTES[what]()


def test_the_energy_distances_are_those_of_the_last_run():
    table = (ROOT / "docs/guide/langevin.md").read_text()
    for steps in ("1", "4", "16"):
        [row] = re.findall(rf"^\| {steps} \| (.*) \|$", table, re.M)
        found = after("Energy distance to the exact law, by steps", steps)
        for text, value in zip(row.split(" | "), found, strict=True):
            if text.startswith("< "):
                assert value < float(text[2:]), (steps, text, value)
            else:
                expect((text,), [value])
