"""The tables of docs/guide/scale.md: what was measured, and what the model says on paper."""

from __future__ import annotations

from experiments.text import markdown_table

from .. import machine
from . import model, paper

PICTURE = (
    "![Passes on two cores, predicted against measured, and passes over a billion latents on H200s,"
    " on paper](../images/scale-light.png)"
)
HEAD = ["where the atoms are", "dtype", "N", "d", "B", "ranks"]
HEAD += ["floor, s", "predicted, s", "measured, s", "measured / predicted"]
LARGE_HEAD = ["files in", "B", "reading alone, GB/s", "a pass, GB/s", "of that rate", "memory, MiB"]
PAPER_HEAD = ["latents in", "dtype", "GPUs", "a pass, B = 1", "its messages", "as long up to B ="]


def seconds(value: float) -> str:
    """To three digits, in a unit that fits."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0), ("ms", 1e-3)):
        if value >= 2 * size or unit == "ms":
            return f"{value / size:.3g} {unit}"
    raise AssertionError


def of_cases(rows: list[dict]) -> str:
    cells = []
    for r in rows:
        case = [r["store"], r["dtype"], f"{int(r['N']):,}", f"{int(r['d']):,}", r["B"], r["ranks"]]
        times = [f"{float(r[name]):.3g}" for name in ("floor_s", "predicted_s", "measured_s")]
        cells.append([*case, *times, f"**{float(r['over_predicted']):.2f}**"])
    return markdown_table(HEAD, cells, words={0, 1})


def of_large(rows: list[dict]) -> str:
    cells = []
    for r in rows:
        rates = [float(r["bytes"]) / float(r[k]) / 1e9 for k in ("reading_s", "measured_s")]
        share = f"**{100 * float(r['of_rate']):.0f} %**"
        memory = f"{float(r['peak_mb']) * 1e6 / 2**20:,.0f}"
        cells.append([r["store"], r["B"], *(f"{v:.2f}" for v in rates), share, memory])
    return markdown_table(LARGE_HEAD, cells, words={0})


def of_ranks(rows: list[dict]) -> str:
    """Two ranks beside one."""
    head = ["B", "one rank, s", "two ranks, s", "times as fast"]
    head += ["messages, bytes", "with headers, on the wire"]
    cells = []
    for one, two in zip(*([r for r in rows if r["ranks"] == n] for n in "12"), strict=True):
        times = [float(r["measured_s"]) for r in (one, two)]
        sent = 2 * int(two["message_bytes"])  # what both receive
        cells.append(
            [
                one["B"],
                *(f"{t:.3g}" for t in times),
                f"**{times[0] / times[1]:.2f}**",
                f"{sent:,}",
                f"{float(two['wire_bytes']):,.0f}",
            ]
        )
    return markdown_table(head, cells)


def bound_from(row: dict) -> str:
    """From how many queries the floor is one of operations."""
    peak, found = float(row["gemm_gflops"]), []
    for store, rate in (
        ("memory", "read_gbs"),
        ("the page cache", "copy_gbs"),
        ("disk", "disk_gbs"),
    ):
        found.append(f"{model.compute_bound_from(1, float(row[rate]), peak):.0f} from {store}")
    return (
        f"By the floor, operations take longer than reading uint8 atoms for more queries than "
        f"{', '.join(found)}; four times as many where the atoms are float32."
    )


def markdown(found: dict[str, list[dict]]) -> str:
    """The figure, and what was measured on each machine."""
    if not found:
        return "No measured run is committed yet."
    return "\n\n".join([PICTURE, *map(of_machine, found.values())])


def of_machine(rows: list[dict]) -> str:
    """A machine's tables."""
    cases, large = ([r for r in rows if r["kind"] == kind] for kind in ("case", "out of core"))
    shared = [r for r in cases if r["threads_a_rank"] == "1"]
    rates = "; ".join(
        f"{what} {float(cases[0][name]):.3g} {unit}"
        for what, name, unit in (
            ("memory", "read_gbs", "GB/s"),
            ("torch.mm", "gemm_gflops", "GFLOP/s"),
            ("page cache, one thread", "copy_gbs", "GB/s"),
            ("disk", "disk_gbs", "GB/s"),
            ("messages", "link_gbs", "GB/s"),
            ("latency", "latency_us", "µs"),
        )
    )
    load = max(float(r["load"]) for r in cases)
    about = f"{machine.origin(cases[0])}; load average at most {load:.1f}"
    parts = [f"{about}; measured in the same run: {rates}.", "", of_cases(cases), ""]
    parts += [bound_from(cases[0])]
    parts += ["", "Two ranks of one thread, each with half of the files:", "", of_ranks(shared)]
    if large:
        size = int(large[0]["bytes"]) / 2**30
        load = max(float(r["load"]) for r in large)
        about = f"{machine.origin(large[0])}; load average at most {load:.1f}"
        parts += ["", f"{size:.0f} GiB of uint8 in {large[0]['files']} files ({about}):", ""]
        parts += [of_large(large)]
    return "\n".join(parts)


def on_paper() -> str:
    """A pass over 1e9 latents."""
    cells = []
    for store in paper.STORES:
        for dtype, itemsize in (("uint8", 1), ("bfloat16", 2)):
            least = paper.needed(store, itemsize)
            for gpus in sorted({least, 8, 64}):
                head = [store.name, dtype, str(gpus)]
                if gpus < least:
                    held = gpus * store.capacity / (itemsize * paper.N * paper.D)
                    cells.append([*head, f"holds {100 * held:.0f} %", "", ""])
                    continue
                alone, messages = paper.seconds(store, itemsize, gpus, 1)
                free = f"{paper.free_queries(store, itemsize):,.0f}"
                cells.append([*head, seconds(alone), seconds(messages), free])
    return markdown_table(PAPER_HEAD, cells, words={0, 1})
