"""Tables and text of the NSGF experiment."""

from __future__ import annotations

import statistics
from typing import NamedTuple

from . import nsgf_images
from .nsgf_errata import BLUR, SHOWN, Batches, Signs, Steps, Unconverged
from .nsgf_images import PLUS
from .nsgf_metrics import DIRECTIONS
from .nsgf_networks import ETA, METHODS, STEPS, Effort
from .nsgf_sets import SETS
from .section import Table

__all__ = ["Found", "errata_tables", "planar_tables", "text", "time_tables"]

PAPER = {  # its table of 2-Wasserstein distances, 10 steps
    "8gaussians": {"NSGF": 0.285, "FM": 0.423, "OT-CFM": 0.289},
    "8gaussians-moons": {"NSGF": 0.144, "FM": 0.292, "OT-CFM": 0.173},
    "moons": {"NSGF": 0.077, "FM": 0.111, "OT-CFM": 0.088},
    "scurve": {"NSGF": 0.117, "FM": 0.171, "OT-CFM": 0.149},
    "checkerboard": {"NSGF": 0.252, "FM": 0.417, "OT-CFM": 0.253},
}


TRAINED, EXACT = PLUS


class Found(NamedTuple):
    """Distances of one set by method, "floor" among them: 2-Wasserstein (near), energy (far)."""

    near: dict[str, list[float]]
    far: dict[str, list[float]]


def _spread(values: list[float], digits: int = 3, unit: float = 1.0) -> str:
    mean, deviation = statistics.fmean(values) / unit, statistics.stdev(values) / unit
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def planar_tables(found: dict[str, Found], budget: Effort) -> list[Table]:
    names = ("floor", *METHODS)
    near = [
        [
            name,
            *(f"{PAPER[name][m]:.3f}" for m in METHODS),
            *(_spread(f.near[m]) for m in names),
        ]
        for name, f in found.items()
    ]
    far = [
        [
            name,
            _spread(f.far["floor"], 2, 1e-3),
            *(f"{f.far[m][0] / 1e-3:.2f}" for m in METHODS),
        ]
        for name, f in found.items()
    ]
    scales = ", ".join(f"{name}: {SETS[name].scale}" for name in found)
    return [
        Table(
            f"2-Wasserstein distance, {STEPS} steps",
            ["set", *(f"{m}, paper" for m in METHODS), "floor here", *METHODS],
            near,
            f"Exact, by the assignment of {budget.points:,} samples to as many points of the"
            f" target; mean ± standard deviation over {budget.seeds} draws of both, one training"
            " each. Floor: two draws of the target, no model. Scales (the paper gives none):"
            f" {scales}. All networks: the same MLP, 3 x {budget.width}, {budget.training:,} steps"
            f" of Adam on batches of 256. NSGF: blur a quarter of the standard"
            " deviation of a coordinate of the target (1.1 for scurve, 2.0 to 2.3 elsewhere), η ="
            f" {ETA:g}, a pool of {budget.batches} flows of {budget.flown} points. OT-CFM: pairs"
            f" drawn from one plan between {budget.coupled:,} points.",
        ),
        Table(
            f"Energy distance x 1000, {STEPS} steps",
            ["set", "floor", *METHODS],
            far,
            f"2 E|X − Y| − E|X − X'| − E|Y − Y'| of {budget.many:,} samples and"
            f" {budget.target:,} points of the target, the mean over {DIRECTIONS} directions of"
            " that of the projections, which sorting gives. Floor: mean ± standard deviation over"
            f" {budget.seeds} draws from the target.",
        ),
    ]


def errata_tables(
    runs: list[Steps], rows: list[Unconverged], signs: Signs, batches: list[Batches], n: int
) -> list[Table]:
    return [
        Table(
            "Step size: distance to the target after k steps",
            ["blur", "η", *(f"k = {k}" for k in SHOWN)],
            [[f"{r.blur:g}", f"{r.eta:g}", *(f"{w:.2f}" for w in r.distance)] for r in runs],
            f"2-Wasserstein distance of {n} particles to {n} points of 8gaussians. At η = 2 the"
            " particles jump to and fro; at a large blur the flow is slow near the target.",
        ),
        Table(
            "One pass over a schedule of ε is not converged",
            ["scaling", "updates", "marginal error", "error of the velocity"],
            [
                [r.scaling, f"{r.updates}", f"{r.marginal_error:.0e}", f"{r.velocity_error:.0e}"]
                for r in rows
            ],
            "GeomLoss's loop as NSGF uses it, re-enacted in float64: one symmetrised update for"
            f" each ε from the squared diameter down by scaling², the last half-step at blur"
            f" {BLUR:g}; {n} points on either side, 8gaussians. The paper has .80 to .95. Marginal"
            " error: Σ|Σ P − 1/n|. Error: relative to the norm of the converged velocity. Ours:"
            " `nsgf.velocity` at tol = 1e-4, which stops at a measured error.",
        ),
        Table(
            "Errata: what is printed, what is right",
            ["where", "printed", "right", "printed gives", "right gives"],
            _errata(signs),
            "The rest is notation: eq. 15 lacks the sign of −∇·(μ v) with v = −∇δF; Def. 1 has the"
            " power 1/p on the integral alone; eq. 19 has γ for ε and g(x) for g(y); the divergence"
            " is called a metric, and has no triangle inequality.",
        ),
        Table(
            "Minibatches: the velocity of one particle depends on its batch",
            ["points in a flow", "spread over batches", "mean against a large batch"],
            [[f"{b.n}", f"{100 * b.spread:.0f} %", f"{100 * b.bias:.0f} %"] for b in batches],
            "32 particles at the start, the rest of their batch drawn anew, relative to the size of"
            " their velocity (rms). The network learns the mean over batches, not the flow between"
            " the two laws; the last column holds what is left of the first by averaging over a"
            " few batches, too.",
        ),
    ]


def _errata(signs: Signs) -> list[list[str]]:
    S = lambda value: f"S = {value:.3f}"
    return [
        [
            "Prop. 2",
            "direction of steepest descent",
            "of steepest ascent: the velocity is minus it",
            f"{S(signs.against)}, from {signs.start:.3f}",
            f"{S(signs.along)}",
        ],
        [
            "Alg. 1 and 2",
            "t = 0, ..., T: T + 1 steps",
            "t = 0, ..., T − 1; the pool keeps t",
            f"{S(signs.one_more)} (T = 5)",
            f"{S(signs.steps)}",
        ],
    ]


def time_tables(study: nsgf_images.Study) -> list[Table]:
    floor = _spread(study.floor, 3)
    return [
        Table(
            f"NSGF++ on {study.name}, {study.side} x {study.side}: energy distance to held-out"
            " images",
            ["sampler", "evaluations", "energy distance"],
            [
                *([r.name, f"{r.evaluations}", f"{r.distance:.3f}"] for r in study.rows),
                ["floor", "–", floor],
            ],
            f"Of {nsgf_images.SAMPLES:,} samples and {study.held} held-out images, pixels in"
            " [−1, 1], by all pairs; floor: of random parts of the data of these"
            " sizes, mean ± standard deviation. First phase:"
            f" {nsgf_images.STEPS} steps, blur {nsgf_images.BLUR:g}, η = {nsgf_images.ETA:g}; then"
            " the straight flow from the time of each point. The trained time is one evaluation;"
            " the exact one none, but some hundred passes over the data. FM: the same straight"
            " network from noise.",
        ),
        Table(
            f"When is it? Time predictor on {study.name} against E[t|x]",
            ["points", "mean, exact", "mean, predicted", "error", "what t itself leaves open"],
            [
                [
                    t.law,
                    f"{t.exact.mean().item():.3f}",
                    f"{t.trained.mean().item():.3f}",
                    f"{t.error:.3f}",
                    f"{t.spread:.3f}",
                ]
                for t in study.times
            ],
            f"Exact: for the {study.known:,} training images as a data set, t uniform. Error: of"
            " the predictor, root mean square; the last column is that of t less E[t|x], which no"
            " predictor can know.",
        ),
    ]


def text(
    found: dict[str, Found], rows: list[Unconverged], studies: list[nsgf_images.Study]
) -> list[str]:
    below = sum(
        PAPER[name]["NSGF"] <= statistics.fmean(f.near["floor"]) for name, f in found.items()
    )
    ratio = [f.far["FM"][0] / f.far["NSGF"][0] for f in found.values()]
    coupled = [f.far["OT-CFM"][0] / f.far["NSGF"][0] for f in found.values()]
    end = studies[0].times[0]
    phases = "; ".join(
        f"on {study.name} from {study.rows[0].distance:.3f} to {study.best(TRAINED):.3f} with the"
        f" predictor and to {study.best(EXACT):.3f} with the exact time, where the same straight"
        f" network alone, from noise, comes to {study.best('FM'):.3f}"
        for study in studies
    )
    return [
        (
            "Neural Sinkhorn Gradient Flow (arXiv 2401.14069) moves particles down the Sinkhorn"
            " divergence to the target and trains a network on their velocities. Its claim, that"
            " the target is reached in few steps, holds. Its table cannot be read as a ranking:"
            f" {below} of the {len(found)} printed distances of NSGF lie at or below what two draws"
            " of the target itself have between them on the scales that are in use, and this"
            " sampling noise is as large as the differences in the table. So each number stands"
            " beside its floor here, and a second distance, on more points, ranks."
        ),
        (
            "By the energy distance FM is"
            f" {min(ratio):.1f} to {max(ratio):.1f} times as far from the target as NSGF after the"
            f" same {STEPS} evaluations, and flow matching on an optimal-transport coupling"
            f" {min(coupled):.1f} to {max(coupled):.1f} times, which on some sets is within the"
            " spread of the floor: between these two there is no ranking. None is at its"
            " floor: the flow resolves nothing smaller than the blur, and the network learns a"
            " mean over batches."
        ),
        (
            "Two habits of the practice matter more than what is printed wrong. One pass over a"
            " schedule of ε, as GeomLoss makes it, leaves velocities that are off by"
            f" {100 * rows[1].velocity_error:.0f} % at the scaling .8 and"
            f" {100 * rows[3].velocity_error:.0f} % at .95; iteration to a measured error of 1e-4"
            " takes fewer updates than the latter. And the step size, which the paper does not"
            " give, has a limit: at η = 2 nothing arrives."
        ),
        (
            "NSGF++ enters the straight flow at a time that a network predicts from x. What it is"
            " to predict is known exactly for a data set, E[t|x], a ratio of integrals of the"
            " diffused density over t, and needs no training. The end of the first phase does not"
            " follow the law of the paths on which the predictor was trained: there, on digits, it"
            f" says {end.trained.mean().item():.2f} on average where the exact mean is"
            f" {end.exact.mean().item():.2f}. The second phase takes the energy distance {phases}."
            " The paper's FID needs an Inception network, which is not at hand: those numbers are"
            " not compared."
        ),
    ]
