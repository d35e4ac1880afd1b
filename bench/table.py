"""The documents' tables, made of bench/results/*.csv. `python -m bench.table` writes them; a test
compares."""

from __future__ import annotations

import csv
import math
import os
import re
from pathlib import Path

from experiments.text import markdown_table

from . import derivatives_table, machine, sinkhorn_table
from .certified import table as certified_table
from .scale import tables as scale_tables

ROOT = Path(__file__).resolve().parent.parent
CERTIFIED = machine.RESULTS / "certified.csv"
SHOWN = ("v4", "v3")  # the instruction sets whose results the documents show
PAGES = {  # the page in which the table between <!-- mark --> and <!-- /mark --> stands
    "speed": ROOT / "README.md",
    "bench": ROOT / "docs" / "guide" / "speed.md",
    "derivatives": ROOT / "docs" / "guide" / "oracle.md",
    "derivatives-in-short": ROOT / "README.md",
    "certified": ROOT / "docs" / "guide" / "certified.md",
    "sinkhorn": ROOT / "docs" / "guide" / "sinkhorn.md",
    "scale": ROOT / "docs" / "guide" / "scale.md",
    "scale-on-paper": ROOT / "docs" / "guide" / "scale.md",
}
CONTENDERS = ("dfkernels", "gemm", "sdpa", "compile", "torch")


def read_rows(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> None:
    """Replaces a results file, all of it or nothing."""
    temporary = path.with_suffix(".part")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


def by_machine(kind: str) -> dict[str, list[dict]]:
    """The rows of a benchmark for each instruction set whose results are there."""
    paths = {isa: machine.results(kind, isa) for isa in SHOWN}
    return {isa: read_rows(path) for isa, path in paths.items() if path.exists()}


def geometric_mean(rows: list[dict], column: str) -> float:
    return math.exp(sum(math.log(float(r[column])) for r in rows) / len(rows))


def groups(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        found.setdefault((row["op"], row["noise"]), []).append(row)
    return found


def summary(rows: list[dict]) -> list[str]:
    return [
        f"{op}, {noise}: {geometric_mean(part, 'speedup'):.2f} x the best peer (least"
        f" {min(float(r['speedup']) for r in part):.2f}),"
        f" {geometric_mean(part, 'time_over_floor'):.2f} x the floor" + over_other(part)
        for (op, noise), part in groups(rows).items()
    ]


def over_other(rows: list[dict]) -> str:
    """The time in that of another op, where it is given."""
    if not rows[0].get("other"):
        return ""
    most = max(float(r["time_over_other"]) for r in rows)
    mean = geometric_mean(rows, "time_over_other")
    return f", {mean:.2f} x {rows[0]['other']} (most {most:.2f})"


def markdown(found: dict[str, list[dict]]) -> str:
    """For each machine all cases, under a heading of its own."""
    parts = []
    for isa, rows in found.items():
        parts += [f"### {machine.INSTRUCTIONS[isa]}", "", all_cases(rows), ""]
    return "\n".join(parts).rstrip()


def all_cases(rows: list[dict]) -> str:
    about = rows[0]
    lines = [
        (
            f"{machine.origin(about)}; measured in the same run: "
            f"memory {about['read_gbs']} GB/s, torch.mm {about['gemm_gflops']} GFLOP/s, "
            f"exp {about['exp_gs']} G/s."
        ),
        "",
    ]
    for op in dict.fromkeys(r["op"] for r in rows):
        names = [n for n in CONTENDERS if any(r["op"] == op and r.get(f"{n}_ms") for r in rows)]
        head = ["B", "N", "d", "noise", *names, "best peer / ours", "ours / floor"]
        other = next((r["other"] for r in rows if r["op"] == op and r.get("other")), None)
        head += [f"ours / `{other}`"] if other else []
        cells = []
        for r in (r for r in rows if r["op"] == op):
            times = [f"{float(r[f'{name}_ms']):.1f}" for name in names]
            times[0] = f"**{times[0]}**"  # ours
            ratios = [f"{float(r['speedup']):.1f}", f"{float(r['time_over_floor']):.2f}"]
            ratios[1] += f" ({r['bound']})"
            ratios += [f"{float(r['time_over_other']):.2f}"] if other else []
            cells.append([r["B"], f"{int(r['N']):,}", r["d"], r["noise"], *times, *ratios])
        for noise, part in ((n, p) for (o, n), p in groups(rows).items() if o == op):
            ratios = [f"**{geometric_mean(part, 'speedup'):.1f}**"]
            columns = ("time_over_floor", *(("time_over_other",) if other else ()))
            ratios += [f"**{geometric_mean(part, column):.2f}**" for column in columns]
            cells.append(["", "", "", f"{noise}, geometric mean", *("" for _ in names), *ratios])
        table = markdown_table(head, cells, words={3})
        lines += [f"`{op}`, float32, milliseconds (median):", "", table]
        lines.append("")
    return "\n".join(lines).rstrip()


def overview(found: dict[str, list[dict]]) -> str:
    """One line per operator and noise level, one column per machine: how many times faster than
    the best peer."""
    grouped = {isa: groups(rows) for isa, rows in found.items()}
    columns = (f"times as fast, {machine.INSTRUCTIONS[isa]}" for isa in found)
    head = ["operator", "noise", "cases", *columns]
    lines = []
    for op, noise in dict.fromkeys(key for parts in grouped.values() for key in parts):
        parts = [p.get((op, noise), []) for p in grouped.values()]
        cells = [speedups(part) if part else "" for part in parts]
        lines.append([f"`{op}`", noise, str(max(map(len, parts))), *cells])
    made = [machine.origin(rows[0]) for rows in found.values()]
    return "\n".join(
        [markdown_table(head, lines, {0, 1}), "", f"Geometric mean and range; {'; '.join(made)}."]
    )


def speedups(rows: list[dict]) -> str:
    """How many times faster than the best peer: geometric mean and range."""
    ratios = [float(r["speedup"]) for r in rows]
    return f"**{geometric_mean(rows, 'speedup'):.1f}** ({min(ratios):.1f} to {max(ratios):.1f})"


def with_block(text: str, mark: str, body: str) -> str:
    """`text` with `body` in place of what stands between <!-- mark --> and <!-- /mark -->."""
    block = f"<!-- {mark} -->\n{body}\n<!-- /{mark} -->"
    return re.sub(f"<!-- {mark} -->.*?<!-- /{mark} -->", lambda _: block, text, flags=re.S)


def bodies() -> dict[str, str]:
    """The table for each mark, from the results that are there."""
    found, derivatives = by_machine("cpu"), by_machine("derivatives")
    return {
        "speed": overview(found),
        "bench": markdown(found),
        "derivatives": derivatives_table.markdown(derivatives),
        "derivatives-in-short": derivatives_table.in_short(derivatives),
        "certified": certified_table.markdown(read_rows(CERTIFIED)),
        "sinkhorn": sinkhorn_table.markdown(by_machine("sinkhorn")),
        "scale": scale_tables.markdown(by_machine("scale")),
        "scale-on-paper": scale_tables.on_paper(),
    }


def write_pages() -> None:
    """Write all tables into their pages."""
    for mark, body in bodies().items():
        page = PAGES[mark]
        page.write_text(with_block(page.read_text(), mark, body))


if __name__ == "__main__":
    write_pages()
