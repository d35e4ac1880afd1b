"""What a run found: the file, the targets, the tables. `python -m bench.gpu.report` puts them into
docs/guide/gpu.md."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from experiments.text import markdown_table

from .cases import Case, geometric_mean

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results" / "gpu"
PAGE = ROOT / "docs" / "guide" / "gpu.md"
CONTENDERS = (
    "dfkernels",
    "torch",
    "torch-bf16",
    "compile",
    "sdpa",
    "keops",
    "flash-sinkhorn",
    "flash-sd-kde",
)


def write(result: dict, path: Path) -> None:
    """At once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(temporary, path)


def ms(row: dict, name: str) -> float | None:
    """A contender's median, None where it has none."""
    return row["contenders"].get(name, {}).get("ms")


def best(row: dict, names=CONTENDERS[1:]) -> tuple[float, str] | None:
    """(milliseconds, name) of the fastest of the named peers."""
    return min(((t, name) for name in names if (t := ms(row, name)) is not None), default=None)


def targets(result: dict) -> list[dict]:
    """What the kernels are to reach, and have; the least over the cases, or their geometric
    mean."""
    rows = [row for row in result["rows"] if ms(row, "dfkernels")]
    rates = result["rates"]

    def copied(row):
        return row["bytes"] / ms(row, "dfkernels") / rates["copy_gbs"] / 1e6

    def matrix(row):
        return row["flops"] / ms(row, "dfkernels") / rates["bf16_tflops"] / 1e9

    def over(*names):
        def ratio(row):
            found, mine = best(row, names), ms(row, "dfkernels")
            return found and mine and found[0] / mine

        return ratio

    # a chain's peer is hundreds of launches; a derivative has a floor of another op
    alike = [row for row in rows if row["group"] not in ("chain", "derivative")]
    everyone, plain = CONTENDERS[1:], ("torch", "torch-bf16")
    group = lambda name, **more: [
        row
        for row in rows
        if row["group"] == name and all(row[k] == value for k, value in more.items())
    ]
    wanted = [
        ("network: share of the copy bandwidth", 0.85, min, group("network", K=1), copied),
        ("memory: share of the copy bandwidth", 0.80, min, group("memory"), copied),
        (
            "compute: share of the bf16 matrix rate",
            0.60,
            min,
            group("compute", storage="bfloat16"),
            matrix,
        ),
        (
            "compute, float32: times faster than torch",
            2.0,
            min,
            group("compute", storage="float32"),
            over("torch"),
        ),
        (
            "small d: times faster than the fastest peer",
            1.0,
            min,
            group("small d"),
            over(*everyone),
        ),
        ("all: times faster than torch, geometric mean", 3.0, geometric_mean, alike, over(*plain)),
        (
            "all: times faster than torch.compile, geometric mean",
            2.0,
            geometric_mean,
            alike,
            over("compile"),
        ),
    ]
    found = []
    for name, least, combine, chosen, value in wanted:
        values = [v for row in chosen if (v := value(row)) is not None]
        reached = combine(values) if values else None
        met = None if reached is None else reached >= least
        found.append(
            {"target": name, "wanted": least, "reached": reached, "met": met, "cases": len(values)}
        )
    return found


def line(row: dict) -> str:
    """A row of the run, as it is printed."""
    name, mine = Case.of(row).name, row["contenders"]["dfkernels"]
    if "ms" not in mine:
        return f"{name}: {mine}"
    peer = best(row)
    ratio = "" if peer is None else f"  {peer[0] / mine['ms']:.2f} x faster than {peer[1]}"
    over = mine["ms"] / row["floor_ms"]
    return (
        f"{name}: {mine['ms']:.4g} ms  {over:.2f} x floor ({row['bound']})  error"
        f" {mine['error']:.1e}{ratio}"
    )


def earlier(row: dict, old: dict | None) -> tuple[float, float] | None:
    """(milliseconds, error) of ours in the row of an earlier result with the same case, if it was
    measured there."""
    name = Case.of(row).name
    for then in (old or {"rows": []})["rows"]:
        if Case.of(then).name == name and (took := ms(then, "dfkernels")):
            return took, then["contenders"]["dfkernels"]["error"]
    return None


def against(row: dict, old: dict | None) -> str:
    """How many times as fast as in an earlier result this row is, and its error then."""
    then, now = earlier(row, old), ms(row, "dfkernels")
    if then is None or not now:
        return ""
    return f"  {then[0] / now:.2f} x as fast as before, error then {then[1]:.1e}"


def against_all(result: dict, old: dict) -> str:
    """The geometric mean of `against` over all rows."""
    pairs = [(earlier(row, old), ms(row, "dfkernels")) for row in result["rows"]]
    ratios = [then[0] / now for then, now in pairs if then is not None and now]
    return (
        f"{geometric_mean(ratios):.2f} x as fast as commit {old['commit']} of {old['date']}, the"
        f" geometric mean of {len(ratios)} rows"
    )


def summary(result: dict) -> list[str]:
    verdict = {True: "met", False: "MISSED", None: "not measured"}
    return [
        f"{t['target']}: {'-' if t['reached'] is None else format(t['reached'], '.2f')}"
        f" (wanted {t['wanted']:.2f}, {t['cases']} cases): {verdict[t['met']]}"
        for t in result["targets"]
    ]


def markdown(result: dict) -> str:
    """The tables for docs/guide/gpu.md."""
    about, rates = result["machine"], result["rates"]
    names = [n for n in CONTENDERS if any(ms(row, n) for row in result["rows"])]
    lines = [
        (
            f"Commit {result['commit']} on {result['date']}: {about['gpu']}, driver"
            f" {about['driver']}, torch {about['torch']}, triton {about['triton']}; measured in"
            " the same run: copy"
            f" {rates['copy_gbs']:,.0f} GB/s, matrix products {rates['bf16_tflops']:,.0f} (bf16)"
            f" and {rates['fp32_tflops']:,.0f} (float32) TFLOP/s, exp {rates['exp_gs']:,.0f} G/s."
            " Milliseconds (median):"
        ),
        "",
    ]
    head = ["op", "B", "N", "d", "K", "", *names, "best peer / ours", "ours / floor"]
    cells = []
    for row in result["rows"]:
        mine = ms(row, "dfkernels")
        if not mine:
            continue
        times = ["" if (t := ms(row, n)) is None else f"{t:.3g}" for n in names]
        times[0] = f"**{times[0]}**"
        peer = best(row)
        ratio = "" if peer is None else format(peer[0] / mine, ".1f")
        what = row["form"] or f"{row['storage']}, {row['noise']} noise"
        for more in ("derivative", "way"):
            if row.get(more):
                what += f", {row[more]}"
        size = [f"{row['B']:,}", f"{row['N']:,}", str(row["d"]), str(row["K"])]
        over = f"{mine / row['floor_ms']:.2f} ({row['bound']})"
        cells.append([f"`{row['op']}`", *size, what, *times, ratio, over])
    lines.append(markdown_table(head, cells, words={0, 5}))
    return "\n".join(lines)


def with_tables(text: str, results: list[dict]) -> str:
    """`text` with everything between the markers <!-- gpu --> and <!-- /gpu --> made anew."""
    body = "\n\n".join(map(markdown, results)) or "No measured run is committed yet."
    return re.sub(
        r"<!-- gpu -->.*?<!-- /gpu -->",
        lambda _: f"<!-- gpu -->\n{body}\n<!-- /gpu -->",
        text,
        flags=re.S,
    )


def read_results() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(), read_results()))
