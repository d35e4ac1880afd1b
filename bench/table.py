"""README's tables from bench/results/*.csv and docs/reproduction.md. `python -m bench.table`
rewrites them; a test compares."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

from . import certified_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "cpu.csv"
CERTIFIED = ROOT / "bench" / "results" / "certified.csv"
REPRODUCTION = ROOT / "docs" / "reproduction.md"
README = ROOT / "README.md"
CONTENDERS = ("dfkernels", "gemm", "sdpa", "compile", "torch")


def read_rows(path: Path = RESULTS) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


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
        f" {geometric_mean(part, 'time_over_floor'):.2f} x the floor"
        for (op, noise), part in groups(rows).items()
    ]


def markdown(rows: list[dict]) -> str:
    about = rows[0]
    lines = [
        (
            f"{about['cpu']}, {about['threads']} threads ({about['isa']}), torch {about['torch']},"
            f" {about['date']}; measured in the same run: memory {about['read_gbs']} GB/s, torch.mm"
            f" {about['gemm_gflops']} GFLOP/s, exp {about['exp_gs']} G/s."
        ),
        "",
    ]
    for op in dict.fromkeys(r["op"] for r in rows):
        names = [n for n in CONTENDERS if any(r["op"] == op and r.get(f"{n}_ms") for r in rows)]
        lines += [
            f"`{op}`, float32, milliseconds (median):",
            "",
            f"| B | N | d | noise | {' | '.join(names)} | best peer / ours | ours / floor |",
            "|" + " --: |" * 3 + " :-- |" + " --: |" * (len(names) + 2),
        ]
        for r in rows:
            if r["op"] == op:
                times = " | ".join(
                    (
                        f"**{float(r['dfkernels_ms']):.1f}**"
                        if n == "dfkernels"
                        else f"{float(r[f'{n}_ms']):.1f}"
                    )
                    for n in names
                )
                lines.append(
                    f"| {r['B']} | {int(r['N']):,} | {r['d']} | {r['noise']} | {times} |"
                    f" {float(r['speedup']):.1f} | {float(r['time_over_floor']):.2f}"
                    f" ({r['bound']}) |"
                )
        for noise, part in ((n, p) for (o, n), p in groups(rows).items() if o == op):
            lines.append(
                f"| | | | {noise}, geometric mean | {' | '.join('' for _ in names)} |"
                f" **{geometric_mean(part, 'speedup'):.1f}** |"
                f" **{geometric_mean(part, 'time_over_floor'):.2f}** |"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def summary_of(document: str) -> str:
    """A reproduction's summary: what made it, and every target with what was reached."""
    return (
        re.search(r"<!-- summary -->(.*?)<!-- /summary -->", document, flags=re.S).group(1).strip()
    )


def with_tables(text: str, rows: list[dict], document: str, certified: list[dict]) -> str:
    """`text` with what stands between <!-- bench --> and <!-- /bench --> made anew, and <!--
    reproduction -->, and <!-- certified -->."""
    bodies = {
        "bench": markdown(rows),
        "reproduction": summary_of(document),
        "certified": certified_table.markdown(certified),
    }
    for mark, body in bodies.items():
        block = f"<!-- {mark} -->\n{body}\n<!-- /{mark} -->"
        text = re.sub(
            f"<!-- {mark} -->.*?<!-- /{mark} -->", lambda _, block=block: block, text, flags=re.S
        )
    return text


def write_readme() -> None:
    """From the results that are there."""
    README.write_text(
        with_tables(README.read_text(), read_rows(), REPRODUCTION.read_text(), read_rows(CERTIFIED))
    )


if __name__ == "__main__":
    write_readme()
