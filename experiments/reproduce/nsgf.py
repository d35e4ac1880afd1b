"""NSGF and NSGF++: 2-D sets beside flow matching, with the floor of every distance; what is wrong
in print; images, and the time between the two phases."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dfkernels.methods import nsgf
from dfkernels.methods.sinkhorn import divergence

from . import digits, mnist, nsgf_errata, nsgf_images
from .nsgf_figures import pictures
from .nsgf_metrics import planar_energy_distance, wasserstein
from .nsgf_networks import ETA, METHODS, STEPS, Effort, effort, sample, trained
from .nsgf_sets import SETS
from .nsgf_tables import Found, errata_tables, planar_tables, text, time_tables
from .section import Claim, Section

QUICK = ("8gaussians",)
STAGES = [*(f"{name}: three networks" for name in SETS), "errata", "digits", "MNIST"]


@dataclass(frozen=True)
class Planar:
    """What one set gave: the networks, and distances by method, "floor" among them."""

    networks: dict[str, nn.Module]
    found: Found


def run(quick: bool, out: Path, step: Callable[[str], None]) -> Section:
    """All of it; networks are kept in `out`."""
    budget, begin = effort(quick), time.perf_counter()
    planar = {}
    for name, stage in zip(SETS, STAGES, strict=False):
        step(stage)
        if not quick or name in QUICK:
            planar[name] = _planar(name, budget, out)
    seconds = {"2-D sets": time.perf_counter() - begin}
    step(STAGES[-3])
    n = 48 if quick else 256
    runs, rows = nsgf_errata.step_sizes(n), nsgf_errata.unconverged(n)
    signs = nsgf_errata.signs(n, ETA, 5)
    sizes = ([64], 256, 2) if quick else ([64, 256, 1024], 4096, 8)
    batches = nsgf_errata.batches(*sizes)
    studies = []
    for name, load in {"digits": digits.load, "MNIST": mnist.load}.items():
        if name == "MNIST" and (quick or not mnist.available()):
            step(f"{name}: left out")
            continue
        step(name)
        begin = time.perf_counter()
        studies.append(nsgf_images.study(name, load(), quick, budget, out))
        seconds[name] = time.perf_counter() - begin
    found = {name: p.found for name, p in planar.items()}
    return Section(
        "nsgf",
        "NSGF: the Sinkhorn gradient flow",
        text(found, rows, studies),
        [
            *planar_tables(found, budget),
            *errata_tables(runs, rows, signs, batches, n),
            *(table for study in studies for table in time_tables(study)),
        ],
        pictures({name: p.networks["NSGF"] for name, p in planar.items()}, runs, studies),
        [*_checks(runs, rows, signs), *_targets(found), *_on_images(studies)],
        seconds,
    )


def _planar(name: str, budget: Effort, out: Path) -> Planar:
    """Three networks of a set, and their distances to fresh points of the target."""
    task = SETS[name]
    networks = {m: trained(m, name, task, budget, out) for m in METHODS}
    near: dict[str, list[float]] = {m: [] for m in ("floor", *METHODS)}
    far: dict[str, list[float]] = {m: [] for m in ("floor", *METHODS)}
    for seed in range(budget.seeds):
        generator = torch.Generator().manual_seed(100 + seed)
        y, other = (task.target(budget.points, generator) for _ in range(2))
        x = task.source(budget.points, generator)
        near["floor"].append(wasserstein(other, y))
        for m, network in networks.items():
            near[m].append(wasserstein(sample(m, network, x), y))
    generator = torch.Generator().manual_seed(99)
    y, x = task.target(budget.target, generator), task.source(budget.many, generator)
    for _ in range(budget.seeds):
        far["floor"].append(planar_energy_distance(task.target(budget.many, generator), y))
    for m, network in networks.items():
        far[m].append(planar_energy_distance(sample(m, network, x), y))
    return Planar(networks, Found(near, far))


def _checks(
    runs: list[nsgf_errata.Steps], rows: list[nsgf_errata.Unconverged], signs: nsgf_errata.Signs
) -> list[Claim]:
    error = _derivative_error()
    at = {(r.blur, r.eta): r.distance for r in runs}
    two, one = (at[0.5, eta][-1] / at[0.5, eta][0] for eta in (2.0, 1.0))
    ours, best = rows[-1].velocity_error, min(r.velocity_error for r in rows[:-1])
    return [
        Claim(
            "velocity against finite differences of the divergence",
            f"{error:.0e}",
            "< 1e-6",
            error < 1e-6,
            check=True,
        ),
        Claim(
            "η = 2, blur 0.5: share of the distance left after 10 steps",
            f"{two:.2f}, and {one:.2f} at η = 1",
            "> 0.7, and < 0.4",
            two > 0.7 and one < 0.4,
            check=True,
        ),
        Claim(
            "error of the velocity at tol = 1e-4, against one pass over a schedule of ε",
            f"{ours:.0e} and {best:.0e}",
            "ten times smaller",
            10 * ours < best,
            check=True,
        ),
        Claim(
            "Prop. 2 as printed: the divergence rises",
            f"{signs.start:.3f} to {signs.against:.3f}; along v {signs.along:.3f}",
            "rises; along v falls",
            signs.along < signs.start < signs.against,
            check=True,
        ),
    ]


def _derivative_error() -> float:
    """Of the velocity of five particles, against central differences of S, relative to the largest
    entry."""
    x, y = nsgf_errata.particles(SETS["moons"], 5, 3)
    v = nsgf.velocity(x, y, 0.5, tol=1e-8, max_iter=10_000).value
    S = lambda x: float(divergence(x, y, 0.5, tol=1e-12, max_iter=10_000).value)
    h, want = 1e-4, torch.empty_like(x)
    for place in range(x.numel()):
        move = torch.zeros_like(x)
        move.view(-1)[place] = h
        want.view(-1)[place] = len(x) * (S(x - move) - S(x + move)) / (2 * h)
    return float((v - want).abs().max() / want.abs().max())


def _targets(found: dict[str, Found]) -> list[Claim]:
    claims = []
    for name, f in found.items():
        floor, spread = statistics.fmean(f.near["floor"]), statistics.stdev(f.near["floor"])
        value = statistics.fmean(f.near["NSGF"])
        claims.append(
            Claim(
                f"{name}: W2 of NSGF, {STEPS} steps",
                f"{value:.3f}",
                f"within a standard deviation of its floor, ≤ {floor + spread:.3f}",
                value <= floor + spread,
            )
        )
    for other in METHODS[1:]:
        wins = sum(f.far["NSGF"][0] < f.far[other][0] for f in found.values())
        claims.append(
            Claim(
                f"sets where NSGF has a smaller energy distance than {other}",
                f"{wins}",
                f"{len(found)}",
                wins == len(found),
            )
        )
    return claims


def _on_images(studies: list[nsgf_images.Study]) -> list[Claim]:
    claims = []
    for study in studies:
        plus, fm, law = study.best(nsgf_images.PLUS[0]), study.best("FM"), study.times[2]
        claims.append(
            Claim(
                f"{study.name}: energy distance of NSGF++, its best, against FM's best",
                f"{plus:.3f} and {fm:.3f}",
                "no larger",
                plus <= fm,
            )
        )
        claims.append(
            Claim(
                f"{study.name}: error of the time predictor on paths to held-out images",
                f"{law.error:.3f}",
                "< 0.05",
                law.error < 0.05,
            )
        )
    return claims
