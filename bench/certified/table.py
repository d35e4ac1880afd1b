"""The tables of docs/guide/certified.md, from bench/results/certified.csv."""

from __future__ import annotations

import math

from experiments.text import markdown_table

from .. import machine


def power(value: float) -> str:
    """A bound or an error to a digit, rounded up."""
    if not value:
        return "0"
    exponent = math.floor(math.log10(value))
    digit = math.ceil(value / 10.0**exponent * (1 - 1e-12))
    return f"1e{exponent + 1}" if digit == 10 else f"{digit}e{exponent}"


def share(value: float) -> str:
    """A part of the whole: in per cent, or its order of magnitude."""
    return f"{100 * value:.1f} %" if value >= 1e-3 else "< 1e-16" if value < 1e-16 else power(value)


def times_faster(text: str) -> str:
    return f"**{float(text):.{1 if float(text) >= 2 else 2}f}**"


def milliseconds(text: str) -> str:
    return f"{float(text):.1f}" if float(text) >= 1 else f"{float(text):.2f}"


def level_table(rows: list[dict]) -> str:
    """Of the first cloud: times, what was read, and how far off the results are."""
    peer = bool(rows[0]["k"])
    head = ["σ", "dense, ms", "certified, ms", "times faster", "atoms read", "weight dropped ≤"]
    head.append("error of the mean")
    if peer:
        head += [f"top {int(rows[0]['k']):,}, ms", "weight missed", "error of the mean"]
    table = []
    for r in rows:
        cells = [
            r["sigma"],
            milliseconds(r["dense_ms"]),
            milliseconds(r["certified_ms"]),
            times_faster(r["ratio"]),
            f"{float(r['atoms_read']):,.0f}",
            power(float(r["dropped_mass"])),
            power(float(r["certified_mean_error"])),
        ]
        if peer:
            cells += [
                milliseconds(r["faiss_ms"]),
                share(float(r["faiss_missing_mass"])),
                power(float(r["faiss_mean_error"])),
            ]
        table.append(cells)
    return markdown_table(head, table)


def others_table(clouds: dict[tuple[str, int], list[dict]]) -> str:
    """Of the other clouds: times only."""
    head = [f"{name}, N = {N:,}, d = {rows[0]['d']}" for (name, N), rows in clouds.items()]
    table = []
    for level in zip(*clouds.values(), strict=True):
        cells = [
            f"{milliseconds(r['dense_ms'])} / {milliseconds(r['certified_ms'])}: "
            f"{times_faster(r['ratio'])}"
            for r in level
        ]
        table.append([level[0]["sigma"], *cells])
    return markdown_table(["σ", *head], table)


def dominant(steps: list[dict]) -> str:
    """The first steps, the noisiest, that take nine tenths of the certified time."""
    total, taken = sum(float(r["certified_ms"]) for r in steps), 0.0
    for r in steps:
        taken += float(r["certified_ms"])
        if taken >= 0.9 * total:
            break
    noise = float(r["sigma"]) / float(r["alpha"])
    return f"steps 1 to {r['step']}, σ/α ≥ {noise:.2g}: {100 * taken / total:.0f} %"


def path_table(rows: list[dict]) -> str:
    head = ["trajectory", "dense, ms", "certified, ms", "times faster"]
    head += ["samples (states) differ by", "most of that time"]
    table = []
    for r in rows:
        if r["kind"] == "trajectory":
            steps = [s for s in rows if s["kind"] == "step" and s["schedule"] == r["schedule"]]
            cells = [
                f"{r['schedule']}, {r['step']} steps",
                milliseconds(r["dense_ms"]),
                milliseconds(r["certified_ms"]),
                times_faster(r["ratio"]),
                f"{power(float(r['samples_apart']))} ({power(float(r['states_apart']))})",
                dominant(steps),
            ]
            table.append(cells)
    return markdown_table(head, table, words={0, 5})


def markdown(rows: list[dict]) -> str:
    """What stands in docs/guide/certified.md between <!-- certified --> and <!-- /certified -->."""
    about, clouds, indexed = rows[0], {}, []
    for r in rows:
        if r["kind"] == "level":
            clouds.setdefault((r["data"], int(r["N"])), []).append(r)
        elif r["kind"] == "index":
            cost = f"{float(r['build_s']):.2g} s, {float(r['index_share']):.2f} of the cloud's size"
            indexed.append(f"{r['data']}, N = {int(r['N']):,}: {cost}")
    (name, N), first = next(iter(clouds.items()))
    peer = f"faiss-cpu {about['faiss']}" if about["faiss"] else "faiss-cpu was not installed"
    made = (
        f"{machine.text(about)}, {peer}, {about['date']}; "
        f"B = {first[0]['B']}, ε = {power(float(about['tolerance']))}, "
        f"medians over {first[0]['batches']} batches or more."
    )
    return "\n".join(
        [
            made,
            "",
            f"{name}, N = {N:,}, d = {first[0]['d']}:",
            "",
            level_table(first),
            "",
            "Dense / certified, ms: times faster",
            "",
            others_table({k: v for k, v in clouds.items() if v is not first}),
            "",
            f"Trajectories over the N = {N:,} {name}:",
            "",
            path_table(rows),
            "",
            f"The index: {'; '.join(indexed)}.",
        ]
    )
