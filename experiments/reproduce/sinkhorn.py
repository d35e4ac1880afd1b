"""Entropic transport: what a stop test is for. Schedules without one, plain and over-relaxed
half-steps, and `methods.sinkhorn`, to one converged solution; and what pairs from batches cost.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dfkernels.methods.sinkhorn import Coupling, NotConverged, divergence, solve

from . import sinkhorn_figures as figures
from .section import Claim, Picture, Section, Table
from .sinkhorn_schedules import (
    Dense,
    alternated,
    eight_gaussians,
    normal,
    scheduled,
    scheduled_divergence,
)

STAGES = ["schedules", "iterations", "batches"]
SCALINGS = (0.5, 0.8, 0.9, 0.95)
PRINTED = {  # column-marginal error and error of x - T(x), an earlier re-enactment of GeomLoss
    0.5: {0.5: (0.44, 0.23), 0.8: (0.17, 0.11), 0.9: (0.07, 0.07), 0.95: (0.03, 0.04)},
    0.05: {0.5: (1.1, 0.49), 0.8: (0.44, 0.22), 0.9: (0.21, 0.14), 0.95: (0.12, 0.07)},
}
BLURS = (0.5, 0.05)
TOLS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
RELAXED = {"plain": 1.0, "over-relaxed, 1.5": 1.5, "over-relaxed, 1.8": 1.8}
TOL = 1e-4
COARSE = (0.2, 0.35, 0.5)  # scalings, for the divergence


@dataclass(frozen=True)
class Stop:
    """Ours, at a tolerance."""

    tol: float
    iterations: int
    error: float
    velocity: float  # relative error of the debiased velocity


@dataclass(frozen=True)
class Schedule:
    """One of GeomLoss's kind."""

    passes: int
    error: float  # of the columns
    move: float  # relative error of x - T(x)
    cost: float  # <a, f> + <b, g> less the optimum
    apart: float  # primal less that value


@dataclass(frozen=True)
class Study:
    """One blur."""

    blur: float
    schedules: dict[float, Schedule]
    curves: dict[str, list[float]]  # the error after each iteration
    stops: list[Stop]
    apart: float  # primal less dual of ours at TOL
    start: int  # passes of our start, through larger eps
    coupling: Coupling


def quietly(*args, **kwargs) -> Coupling:
    """`solve`, where not converging is a result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)
        return solve(*args, **kwargs)


def start_passes(x: Tensor, y: Tensor, blur: float) -> int:
    """Of `solve` for small sets: two for each eps, from the size of the costs down by quarters."""
    size = sum(float((p - p.mean(0)).square().sum(1).mean()) for p in (x, y)) / 2
    return 2 * max(0, math.ceil(math.log(size / blur**2, 4)))


def study(x: Tensor, y: Tensor, blur: float, most: int) -> Study:
    problem = Dense(x, y, blur**2)
    costs, best = problem.costs, quietly(x, y, blur, tol=1e-10, max_iter=2000)
    itself = quietly(x, x, blur, tol=1e-12, max_iter=2000)
    move, velocity = best.barycentric_map() - x, best.barycentric_map() - itself.barycentric_map()
    schedules = {}
    for scaling in SCALINGS:
        f, g, passes = scheduled(problem, scaling)
        image = problem.softmin(problem.softmin(g, costs), costs.T)
        schedules[scaling] = Schedule(
            passes,
            float(((g - image) / problem.eps).expm1().abs().mean()),
            float((problem.map(g) - x - move).norm() / move.norm()),
            problem.dual(f, g) - best.cost,
            problem.primal(f, g) - problem.dual(f, g),
        )
    curves = {}
    for name, relaxation in RELAXED.items():
        curves[name] = []
        for error in alternated(problem, relaxation, most):
            curves[name].append(error)
            if error <= TOL:
                break
    stops, kept = [], best
    for tol in TOLS:
        c = quietly(x, y, blur, tol=tol, max_iter=2000)
        own = quietly(x, x, blur, tol=tol, max_iter=2000)
        found = c.barycentric_map() - own.barycentric_map()
        off = float((found - velocity).norm() / velocity.norm())
        stops.append(Stop(tol, int(c.iterations), float(c.marginal_error), off))
        kept = c if tol == TOL else kept
    apart = problem.primal(kept.f, kept.g) - kept.cost
    return Study(blur, schedules, curves, stops, apart, start_passes(x, y, blur), kept)


def transport_cost(c: Coupling, x: Tensor, y: Tensor) -> Tensor:
    """<P, c>, the mean cost of a pair, of each problem of a batched coupling [G]."""
    squares = (x.square().sum(-1).mean(-1) + y.square().sum(-1).mean(-1)) / 2
    return squares - (x * c.barycentric_map()).sum(-1).mean(-1)


@dataclass(frozen=True)
class Batches:
    """What pairs cost that are made within batches of a size."""

    size: int
    mean: float
    error: float


def batches(x: Tensor, y: Tensor, blur: float, sizes: tuple[int, ...], count: int) -> list[Batches]:
    """Of pairs within batches of each size, and of the whole set."""
    found, generator = [], torch.Generator().manual_seed(0)
    for size in sizes:
        draw = lambda p, size=size: p[torch.randint(len(p), (count, size), generator=generator)]
        first, second = draw(x), draw(y)
        c = solve(first, second, blur, tol=1e-4, batched=True)
        costs = transport_cost(c, first, second)
        found.append(Batches(size, float(costs.mean()), float(costs.std()) / count**0.5))
    whole = solve(x[None], y[None], blur, batched=True)
    return [*found, Batches(len(x), float(transport_cost(whole, x[None], y[None])), 0.0)]


def run(quick: bool, out: Path, step: Callable[[str], None]) -> Section:
    """Nothing is trained; `out` is not used."""
    begin = time.perf_counter()
    step(STAGES[0])
    n, most = (64, 200) if quick else (256, 5000)
    x, y = normal(n, 0), eight_gaussians(n, 1)
    two = lambda seed: torch.cat([0.1 * normal(32, seed), 0.1 * normal(32, seed + 1) + 5])
    apart = Dense(two(0), two(2), 0.01)
    values = {s: scheduled_divergence(apart, s) for s in COARSE}
    right = float(divergence(apart.x, apart.y, 0.1, tol=1e-8, max_iter=5000).value)
    step(STAGES[1])
    studies = {blur: study(x, y, blur, most) for blur in (BLURS[:1] if quick else BLURS)}
    step(STAGES[2])
    whole, sizes = (512, (16, 64)) if quick else (4096, (16, 64, 256, 1024))
    count = 8 if quick else 32
    pairs = {
        "8gaussians, d = 2, blur 0.2": batches(
            normal(whole, 0), eight_gaussians(whole, 1), 0.2, sizes, count
        ),
        "normal laws, d = 16, blur 1": batches(
            normal(whole, 0, 16), 0.5 * normal(whole, 1, 16) + 1, 1.0, sizes, count
        ),
    }
    return Section(
        "sinkhorn",
        "Entropic transport: what a stop test is for",
        _text(studies, values, right),
        [
            *[_schedules(s, n) for s in studies.values()],
            _stops(studies),
            _iterations(studies),
            _negative(values, right),
            _pairs(pairs, count),
        ],
        [
            Picture(
                "errors",
                "Marginal error against passes over all pairs: half-steps from zero, schedules of"
                " GeomLoss's kind (scaling 0.5 to 0.95, one mark each), and ours at tolerances from"
                " 1e-1 to 1e-7, with the passes of its start.",
                partial(figures.errors, studies),
            ),
            Picture(
                "coupling",
                "Pairs drawn from the plan between a normal law and eight Gaussians.",
                partial(figures.couplings, studies, x, y),
            ),
        ],
        _claims(studies, values, right, pairs),
        {"all": time.perf_counter() - begin},
    )


def _schedules(s: Study, n: int) -> Table:
    known = PRINTED.get(s.blur, {})
    rows = [
        [
            f"{scaling}",
            f"{row.passes}",
            f"{row.error:.2f}",
            f"{known[scaling][0]}",
            f"{row.move:.2f}",
            f"{known[scaling][1]}",
            f"{row.cost:+.1e}",
            f"{row.apart:+.1e}",
        ]
        for scaling, row in s.schedules.items()
    ]
    return Table(
        f"Schedules without a stop test, blur {s.blur}",
        [
            "scaling", "passes", "column error", "earlier", "error of x − T(x)", "earlier",
            "value − optimum", "primal − value",
        ],
        rows,
        f"{n} points of a normal law and of eight Gaussians (FFJORD's), float64. A schedule takes"
        " one symmetric update for each level of ε and extrapolates once. Earlier: the same"
        " re-enacted on other draws of 256 points. Value: ⟨a, f⟩ + ⟨b, g⟩; primal: ⟨P, c⟩ +"
        f" ε KL(P | a bᵀ) of its plan. Ours at a marginal error of {TOL:g}: primal − value"
        f" {s.apart:+.0e}.",
    )  # fmt: skip


def _stops(studies: dict[float, Study]) -> Table:
    return Table(
        "The velocity at the marginal error where we stop",
        ["blur", "tol", "iterations", "marginal error", "error of the velocity"],
        [
            [f"{s.blur}", f"{t.tol:.0e}", f"{t.iterations}", f"{t.error:.1e}", f"{t.velocity:.1e}"]
            for s in studies.values()
            for t in s.stops
        ],
        "Velocity: T_xy(x) − T_xx(x), minus the gradient of the divergence over the weights;"
        " relative to the one at 1e-10, in the 2-norm over the points.",
    )


def _reached(curve: list[float]) -> str:
    return f"{len(curve)}" if curve[-1] <= TOL else f"> {len(curve)} (at {curve[-1]:.0e})"


def _ours(s: Study) -> int:
    return next(t.iterations for t in s.stops if t.tol == TOL)


def _iterations(studies: dict[float, Study]) -> Table:
    return Table(
        f"Iterations to a marginal error of {TOL:g}",
        ["blur", *RELAXED, "ours"],
        [
            [f"{s.blur}", *[_reached(c) for c in s.curves.values()], f"{_ours(s)}"]
            for s in studies.values()
        ],
        "Of two half-steps each, from zero; ours with Anderson's steps, from a start at larger ε"
        f" that takes {', '.join(f'{s.start} passes (blur {s.blur})' for s in studies.values())}.",
    )


def _negative(values: dict[float, float], right: float) -> Table:
    rows = [[f"schedule, scaling {s}", f"{v:.2e}"] for s, v in values.items()]
    return Table(
        "A divergence that a coarse schedule makes negative",
        ["how", "divergence"],
        [*rows, ["ours, marginal error 1e-8", f"{right:.2e}"]],
        "Two sets of 64 points, each in two clusters 5 apart, blur 0.1. It cannot be negative.",
    )


def _pairs(pairs: dict[str, list[Batches]], count: int) -> Table:
    rows = []
    for name, found in pairs.items():
        whole = found[-1].mean
        for b in found:
            over = f"{100 * (b.mean / whole - 1):+.1f} %"
            rows.append([name, f"{b.size:,}", f"{b.mean:.3f} ± {b.error:.3f}", over])
    return Table(
        "What pairs within batches cost",
        ["sets", "batch", "mean cost of a pair", "over the whole"],
        rows,
        f"⟨P, c⟩ of the entropic plan within each of {count} batches drawn from the set, solved in"
        " one call; the last row of each set is the plan of the whole, from which `draw` pairs any"
        " batch.",
    )


def _text(studies: dict[float, Study], values: dict[float, float], right: float) -> list[str]:
    last = list(studies.values())[-1]
    rough = last.schedules[0.8]
    return [
        (
            "A schedule of falling ε with one update for each level, as GeomLoss runs, says nothing"
            f" of how far it came. At blur {last.blur} and scaling 0.8 its columns are off by"
            f" {rough.error:.2f} (in sum, of 1) and x − T(x), from which a flow takes its"
            f" velocity, by {100 * rough.move:.0f} %. What it returns as the value is no bound: its"
            " primal can be below. A measured marginal error costs no pass, since the half-steps"
            " that follow need the same sums."
        ),
        (
            "The debiased divergence is a small difference of three such values. Where mass would"
            " have to go between clusters, a coarse schedule leaves it where it is, and the"
            f" difference comes out as {min(values.values()):.1e} where {right:.1e} is right."
        ),
        (
            "Pairs made within batches are pairs of another problem: their mean cost is above that"
            " of the whole plan, the more so the smaller the batch and the more dimensions there"
            " are. `Coupling.draw` takes pairs for a batch from the plan of the whole."
        ),
    ]


def _claims(
    studies: dict[float, Study],
    values: dict[float, float],
    right: float,
    pairs: dict[str, list[Batches]],
) -> list[Claim]:
    found = []
    for s in studies.values():
        kept = all(t.error <= t.tol for t in s.stops)
        most = f"{max(t.error / t.tol for t in s.stops):.2f} of tol"
        found.append(Claim(f"blur {s.blur}: marginal error", most, "≤ tol", kept, True))
        apart = abs(s.apart)
        found.append(
            Claim(f"blur {s.blur}: |primal − dual| at 1e-4", f"{apart:.0e}", "< 1e-3",
                  apart < 1e-3, True)
        )  # fmt: skip
        velocity = s.stops[-1].velocity
        found.append(
            Claim(f"blur {s.blur}: error of the velocity at tol {TOLS[-1]:.0e}",
                  f"{velocity:.0e}", "≤ 1e-6", velocity <= 1e-6)
        )  # fmt: skip
        plain = len(s.curves["plain"])
        sign = "" if s.curves["plain"][-1] <= TOL else "> "
        found.append(
            Claim(f"blur {s.blur}: plain iterations over ours", f"{sign}{plain / _ours(s):.1f}",
                  "≥ 2", plain >= 2 * _ours(s))
        )  # fmt: skip
    coarse = min(values.values())
    found.append(
        Claim("two clusters: a coarse schedule's divergence; ours", f"{coarse:.0e}; {right:.0e}",
              "negative; positive", coarse < 0 < right, True)
    )  # fmt: skip
    for name, rows in pairs.items():
        over = [b.mean > rows[-1].mean for b in rows[:1]]
        found.append(
            Claim(f"{name}: smallest batches cost more", f"{rows[0].mean / rows[-1].mean:.2f}",
                  "> 1", all(over), True)
        )  # fmt: skip
    return found
