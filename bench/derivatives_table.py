"""The tables of first derivatives in the documents, from bench/results/derivatives-*.csv, and the
targets that their rows are held to."""

from __future__ import annotations

import math

from experiments.text import markdown_table

from . import machine

PASSES, PASSES_OF_ATOMS = 3.0, 5.0  # of posterior's pass: at most, in y at most
ROUNDING = 2.0**-23  # of a result that is stored in float32
PEER_ERRORS = ("gemm_error", "difference_error")


def misses(row: dict) -> list[str]:
    """Which of its targets a row misses."""
    found = []
    if float(row["passes"]) > (PASSES_OF_ATOMS if row["argument"] == "y" else PASSES):
        found.append("passes")
    if float(row["speedup"]) < 1:
        found.append("slower than autograd")
    better = min(float(row[k]) for k in PEER_ERRORS if row[k])
    if not float(row["error"]) <= 2 * better + ROUNDING:
        found.append("error")
    return found


def shown(row: dict) -> str:
    """A row as a line on the terminal."""
    peers = f"{row['gemm_error']} gemm, {row['difference_error'] or '-'} differences"
    return (
        f"{row['case']:12s} {row['output']:15s} {row['argument']:9s} {row['mode']:7s}"
        f" {float(row['dfkernels_ms']):9.2f} ms {float(row['passes']):7.2f} passes"
        f" ({float(row['whole_passes']):.2f} in all) {float(row['speedup']):6.2f} x autograd"
        f" ({float(row['speedup_alone']):.2f} alone), error {row['error']} ({peers})"
        f" {', '.join(misses(row))}"
    ).rstrip()


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def numbers(rows: list[dict], column: str) -> list[float]:
    return [float(r[column]) for r in rows]


def summary(rows: list[dict]) -> list[str]:
    """What is printed at the end: per mode and kind of argument, and how many rows miss what."""
    lines = []
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["argument"]), []).append(row)
    for (mode, argument), part in groups.items():
        passes, faster = numbers(part, "passes"), numbers(part, "speedup")
        lines.append(
            f"{mode}, in {argument}: {geometric_mean(passes):.2f} passes (most {max(passes):.2f}),"
            f" {geometric_mean(faster):.2f} x autograd (least {min(faster):.2f};"
            f" alone {geometric_mean(numbers(part, 'speedup_alone')):.2f})"
        )
    for what in ("passes", "slower than autograd", "error"):
        lines.append(f"{what}: {sum(what in misses(r) for r in rows)} of {len(rows)} rows miss")
    return lines


def cost(row: dict) -> str:
    """Passes of the derivative, and how many times as fast as autograd it and the result are."""
    passes, faster = float(row["passes"]), float(row["speedup"])
    return f"{passes:.{1 if passes >= 0.1 else 2}f} ({faster:.{0 if faster >= 10 else 1}f})"


def grid(rows: list[dict], mode: str) -> str:
    """Of one case: outputs by arguments."""
    cells = {(r["output"], r["argument"]): cost(r) for r in rows if r["mode"] == mode}
    outputs, arguments = (dict.fromkeys(key[i] for key in cells) for i in (0, 1))
    head = [f"{mode} mode", *(f"`{a}`" for a in arguments)]
    lines = [[f"`{o}`", *(cells.get((o, a), "") for a in arguments)] for o in outputs]
    return markdown_table(head, lines, {0})


def over_plain(row: dict) -> float:
    """The error over that of the better plain form."""
    return float(row["error"]) / min(float(row[k]) for k in PEER_ERRORS if row[k])


def in_all(rows: list[dict]) -> str:
    """What holds in all cases of a machine: costs by mode, and errors."""
    parts = []
    for mode in dict.fromkeys(r["mode"] for r in rows):
        part = [r for r in rows if r["mode"] == mode]
        passes, faster = numbers(part, "passes"), numbers(part, "speedup")
        parts.append(
            f"{mode} mode {geometric_mean(passes):.1f} passes (at most {max(passes):.1f}),"
            f" {geometric_mean(faster):.1f} times as fast as autograd (at least {min(faster):.2f})"
        )
    errors = [over_plain(r) for r in rows if float(r["error"])]
    parts.append(
        f"error {geometric_mean(errors):.1f} times that of the better plain form"
        f" (at most {max(errors):.1f})"
    )
    return "; ".join(parts)


def sizes(rows: list[dict]) -> str:
    """B, N, d and sigma of every case."""
    found = dict.fromkeys((r["B"], int(r["N"]), r["d"], r["sigma"]) for r in rows)
    return "; ".join(f"{B}, {N:,}, {d}, {sigma}" for B, N, d, sigma in found)


def markdown(found: dict[str, list[dict]]) -> str:
    """What stands in docs/guide/oracle.md: the first case of the first machine, and for each
    machine what holds in all cases."""
    if not found:
        return ""
    rows = next(iter(found.values()))
    first = [r for r in rows if r["case"] == rows[0]["case"]]
    r = first[0]
    lines = [
        f"B = {r['B']}, N = {int(r['N']):,}, d = {r['d']}, σ = {r['sigma']}, float32; "
        f"{machine.origin(r)}. Passes for the derivative; in brackets, how many times "
        "as fast as autograd through the GEMM form it is together with the result:"
    ]
    for mode in dict.fromkeys(r["mode"] for r in first):
        lines += ["", grid(first, mode)]
    lines += ["", f"Geometric means over all outputs and arguments at B, N, d, σ = {sizes(rows)}:"]
    lines += ["", *(f"- {machine.text(rs[0])}: {in_all(rs)}." for rs in found.values())]
    return "\n".join(lines)


def in_short(found: dict[str, list[dict]]) -> str:
    """README's sentence about derivatives."""
    if not found:
        return ""
    rows = next(iter(found.values()))
    passes, faster = numbers(rows, "passes"), numbers(rows, "speedup")
    most = {y: max(float(r["passes"]) for r in rows if (r["argument"] == "y") == y) for y in (0, 1)}
    return (
        f"A first derivative of any output in any argument, reverse or forward, costs"
        f" {geometric_mean(passes):.1f} passes of `posterior` in the geometric mean, at most"
        f" {most[0]:.1f} (in `y` {most[1]:.1f}), and is **{geometric_mean(faster):.1f}**"
        f" ({min(faster):.1f} to {max(faster):.0f}) times as fast, with the result, as PyTorch's"
        f" autograd through matrix products. {machine.origin(rows[0])}."
    )
