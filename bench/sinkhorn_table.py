"""The table of entropic transport in the documents, from bench/results/sinkhorn-*.csv."""

from __future__ import annotations

from experiments.text import markdown_table

from . import machine

HEAD = ["d", "blur / spread", "", "iterations", "error", "seconds", "times ours", "MB"]


def lines(rows: list[dict]) -> list[list[str]]:
    """The rows as cells; a case is named once, by its first row, which is ours."""
    found: list[list[str]] = []
    for before, row in zip([{"case": None}, *rows], rows, strict=False):
        first = row["case"] != before["case"]
        case = [row["d"], row["blur_over_spread"]] if first else ["", ""]
        sign = ">" if row["iterations"].startswith(">") else ""
        numbers = [row["iterations"], row["error"], sign + row["seconds"], row["ratio"]]
        found.append([*case, row["contender"], *numbers, row["megabytes"]])
    return found


def markdown(found: dict[str, list[dict]]) -> str:
    """For each machine its table and what it was measured on."""
    parts = []
    for rows in found.values():
        parts += [markdown_table(HEAD, lines(rows), words={2}), ""]
        parts += ["; ".join(dict.fromkeys(f"{machine.origin(row)}" for row in rows)) + ".", ""]
    return "\n".join(parts).rstrip()
