"""python -m bench.fit_costs: the constants by which the certified search decides which queries are
worth searching for (struct FittedCosts in csrc/certified/costs.h).

Measures, on this machine and for two lengths of atoms, what the dense kernel takes for one to eight
queries and for many, the kernel over lists for lists of several lengths, and the fine level of the
search for several numbers of candidates; fits the model in costs.h; and prints the struct's lines.
Nothing is written: copy what you trust. The clouds are random, with the spectrum of photographs.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import dfkernels as df
from dfkernels._constants import QUERY_GROUP
from dfkernels._torch import native
from dfkernels.certified.select_atoms import op as select_atoms

LENGTHS = (784, 3072)  # d of digits and of photographs
NUMBERS = 1 << 26  # of a cloud: far more than caches hold
SAMPLE = 32  # atoms of which the search computes exact logits first
SHARES = (0.01, 0.03, 0.1, 0.3, 0.7)  # of the atoms, in a query's list
CANDIDATE_SIGMAS = (0.002, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1)
SIGMA = 0.5  # of the dense kernel and of lists: some of the atoms carry weight


class Times(NamedTuple):
    """What was measured at one d, in units of what the dense kernel takes to read an atom."""

    dense_query: float
    dense_shared: float
    lists: list[tuple[float, float, float]]  # (rows, pairs, time), each per atom of the cloud
    fine: list[tuple[float, float]]  # (pairs, time), per atom of the cloud


def seconds(run: Callable[[], object], repeats: int) -> float:
    """The shortest time of a call: others on the machine only make it longer."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def random_cloud(d: int) -> df.PointCloud:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(NUMBERS // d, d, generator=generator) / torch.arange(1, d + 1) ** 0.75
    y[:: len(y) // SAMPLE] *= 5  # so that the sample says that all queries are worth searching for
    return df.PointCloud(y)


def queries(cloud: df.PointCloud, B: int, sigma: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = cloud.y[torch.randint(1, len(cloud), (B,), generator=generator)]
    return x + sigma * torch.randn(x.shape, generator=generator)


def dense_times(cloud: df.PointCloud, repeats: int) -> tuple[float, float, float]:
    """(seconds for reading all atoms, dense_query, dense_shared)."""
    counts = [1, 2, 4, QUERY_GROUP]
    took = {}
    for B in [*counts, 4 * QUERY_GROUP]:
        call = partial(df.ops.posterior, queries(cloud, B, SIGMA), cloud.y, 1.0, SIGMA)
        took[B] = seconds(call, repeats)
    line = torch.tensor([[1.0, B] for B in counts], dtype=torch.float64)
    times = torch.tensor([took[B] for B in counts], dtype=torch.float64)
    read, query = torch.linalg.lstsq(line, times).solution.tolist()
    return read, query / read, took[4 * QUERY_GROUP] / 4 / took[QUERY_GROUP]


def list_times(cloud: df.PointCloud, read: float, repeats: int) -> list[tuple[float, float, float]]:
    x, N = queries(cloud, QUERY_GROUP, SIGMA), len(cloud)
    generator, out = torch.Generator().manual_seed(2), []
    for share in SHARES:
        chosen = torch.rand(QUERY_GROUP, N, generator=generator) < share
        atoms, counts = chosen.nonzero()[:, 1].contiguous(), chosen.sum(1)
        lists = {"atoms": atoms, "counts": counts}
        took = seconds(partial(df.ops.posterior, x, cloud.y, 1.0, SIGMA, **lists), repeats)
        out.append((float(chosen.any(0).double().mean()), len(atoms) / N, took / read))
    return out


def fine_times(cloud: df.PointCloud, read: float, repeats: int) -> list[tuple[float, float]]:
    """By the difference between a search through both levels and one through the coarse level.

    With k = 2 no search drops the lightest atoms, so that the coarse one returns its candidates.
    """
    index, N, out = cloud.index(), len(cloud), []
    coarse = index._replace(
        fine_codes=index.fine_codes[:0, :0],
        code_scale=index.code_scale[:1],
        remainder_norm=index.remainder_norm[:1],
        axis_error=index.axis_error[:1],
    )
    gap = math.log(N / 1e-6)
    for sigma in CANDIDATE_SIGMAS:
        x = queries(cloud, QUERY_GROUP, sigma)
        level = x.new_ones(QUERY_GROUP)
        search = partial(select_atoms, x, cloud.y, level, sigma * level, None, 1.0, 0.0)
        counts = search(*coarse, gap, 2)[1]
        if int(counts.min()) >= 0:
            both, alone = (seconds(partial(search, *i, gap, 2), repeats) for i in (index, coarse))
            out.append((float(counts.sum()) / N, (both - alone) / read))
    return out


def measured(d: int, repeats: int) -> Times:
    cloud = random_cloud(d)
    read, query, shared = dense_times(cloud, repeats)
    fine = fine_times(cloud, read, repeats)
    return Times(query, shared, list_times(cloud, read, repeats), fine)


def least_squares(columns: Tensor, values: Tensor) -> tuple[list[float], float]:
    """(coefficients >= 0, sum of squared residuals): a column with a negative one is left out."""
    used = list(range(columns.shape[1]))
    while True:
        found = torch.linalg.lstsq(columns[:, used], values).solution
        if bool((found >= 0).all()):
            break
        del used[int(found.argmin())]
    out = values.new_zeros(columns.shape[1]).index_put((torch.tensor(used),), found)
    return out.tolist(), float((columns @ out - values).square().sum())


def fitted(all_times: dict[int, Times]) -> dict[str, float]:
    """The fields of FittedCosts, but for `dense_margin`, which is a choice."""
    ds = list(all_times)
    lists = torch.tensor(
        [
            [rows, rows / d, pairs, pairs / d, t]
            for d in ds
            for rows, pairs, t in all_times[d].lists
        ],
        dtype=torch.float64,
    )
    (row, row_start, pair, pair_start), _ = least_squares(lists[:, :4], lists[:, 4])
    fine = torch.tensor(
        [[pairs, pairs / d, t] for d in ds for pairs, t in all_times[d].fine],
        dtype=torch.float64,
    )
    best = None
    for decay in torch.arange(0.1, 3.0, 0.05).tolist():
        saturating = 1 - (-decay * fine[:, :1]).exp()
        found, error = least_squares(torch.cat([saturating, fine[:, :2]], 1), fine[:, 2])
        if best is None or error < best[0]:
            best = error, decay, found
    assert best is not None
    _, decay, (rows, fine_pair, fine_pair_start) = best
    return {
        "dense_query": statistics.mean(t.dense_query for t in all_times.values()),
        "dense_shared": statistics.mean(t.dense_shared for t in all_times.values()),
        "fine_rows": rows,
        "fine_decay": decay,
        "fine_pair": fine_pair,
        "fine_pair_start": fine_pair_start,
        "list_row": row,
        "list_row_start": row_start,
        "list_pair": pair,
        "list_pair_start": pair_start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.fit_costs", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="calls of which the fastest counts")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    times = {d: measured(d, args.repeats) for d in LENGTHS}
    for d, t in times.items():
        print(f"// d = {d}: dense_query {t.dense_query:.2f}, dense_shared {t.dense_shared:.2f}")
        for rows, pairs, took in t.lists:
            print(f"//   lists: rows {rows:.2f}, pairs {pairs:.2f}: {took:.2f}")
        for pairs, took in t.fine:
            print(f"//   fine level: pairs {pairs:.2f}: {took:.2f}")
    print(f"// {native.info().get('isa', 'no compiled part')}, {args.threads} threads")
    for name, value in fitted(times).items():
        print(f"  double {name} = {value:.2g};")


if __name__ == "__main__":
    main()
