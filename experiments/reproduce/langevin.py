"""Levenberg-Marquardt-Langevin (arXiv 2505.24222): what its published correction is, what sound
preconditioners do, and the same covariance in few-step sampling.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from .langevin_chains import EXPECTED, Row, chains, cloud, curvature, draws
from .langevin_figures import chains as chains_figure
from .langevin_figures import correction as correction_figure
from .langevin_figures import steps as steps_figure
from .langevin_published import EXPECTED as SINES
from .langevin_published import LAMB, Kappa, Run, extrapolation, leak, sampled
from .langevin_steps import NAMES, NOISE, PASSES, Steps, compared, floor, mean_log_prob, turn
from .section import Claim, Picture, Section, Table

STAGES = ["published correction", "chains", "many chains", "few steps"]
COUNTS = {True: (1, 2, 4), False: (1, 2, 4, 8, 16, 32, 64)}
MANY, AT = 2048, (1, 2, 5, 10, 20, 50, 100)
GOALS = (4, 16)  # steps of DDIM whose error the full C is to reach, in a quick run and a full one


def run(quick: bool, out: Path, step: Callable[[str], None]) -> Section:
    """The whole section; nothing is trained, `out` is not used."""
    begin = time.perf_counter()
    step(STAGES[0])
    runs = [sampled(n) for n in LAMB if not quick or n in (5, 10)]
    kappas, leaked = extrapolation(), leak()
    step(STAGES[1])
    y = cloud()
    least, share = curvature(y, 500 if quick else 2000)
    few = chains(y, 64 if quick else 256, (20,) if quick else (100,))
    step(STAGES[2])
    many = few if quick else chains(y, MANY, AT)
    between = time.perf_counter()
    step(STAGES[3])
    turned, n = y @ turn(), 300 if quick else 3000
    found = compared(turned, COUNTS[quick], n, 300 if quick else 6000)
    noise = floor(turned, n)
    truth = mean_log_prob(turned, draws(turned, 10 * n, NOISE[0], 20))
    pictures = [
        Picture(
            "correction",
            "The published correction at kappa = 0, first-order increments, d = 3072. Left: the"
            " angle by which it turns a step in float32; crosses: expected. Right: how far samples"
            " end from those of the plain solver, corrected, and turned by the same angles in"
            " random directions.",
            lambda theme: correction_figure(runs, theme),
        ),
        Picture(
            "chains",
            "Variance of the chains in three of eight directions, from 0 at the mean: dashed"
            " without Metropolis. M₁ = σ²I + α²C.",
            lambda theme: chains_figure(many, theme),
        ),
        Picture(
            "steps",
            "From σ = 20 to 0.3 in few steps. Left: energy distance of samples to draws from q;"
            " the band: what two sets of draws show; less than a quarter of that is drawn there."
            " Middle: Kullback-Leibler divergence of the whole path, infinite for deterministic"
            " steps. Right: mean log q of the samples.",
            lambda theme: steps_figure(found, noise, truth, theme),
        ),
    ]
    return Section(
        "langevin",
        "Levenberg-Marquardt-Langevin: the published correction, sound ones, few steps",
        _text(runs, kappas, leaked, least, share, many, found, truth),
        [
            _sines(runs),
            _samples(runs),
            _kappas(kappas),
            *_chains(few, many),
            _distances(found, noise),
            _paths(found, truth),
        ],
        pictures,
        _claims(runs, kappas, leaked, least, share, few, many, found),
        {"chains": between - begin, "few steps": time.perf_counter() - between},
    )


# ---- tables


def _number(value: float, places: int = 2) -> str:
    return f"{value:.{places}f}".replace("-", "−")


def _sines(runs: list[Run]) -> Table:
    rows = []
    for run in runs:
        first, median = SINES[run.steps]
        sines = [f"{value:.2g}" for value in (first, run.first, median, run.median)]
        rows.append([str(run.steps), f"{LAMB[run.steps]:g}", *sines, f"{run.rest:.0e}"])
    return Table(
        "The angle between a corrected step and the step itself",
        ["steps", "λ", "sine, first step: expected", "float32", "sine, median: expected", "float32",
         "float64: 1 − cos"],
        rows,
        "First-order increments −σ(eʰ − 1) ε, d = 3072, DDPM's linear betas, the published λ,"
        " κ = 0; along the path of the plain solver; of 16 samples the median. The"
        " sines are rounding noise and depend on the order in which sums are added up (± 30 %);"
        " expected: by an earlier implementation."
        " 1 − cos is itself known to 1e-15 only.",
    )  # fmt: skip


def _samples(runs: list[Run]) -> Table:
    rows = [
        [
            str(run.steps),
            *(f"{run.moved[name]:.2g}" for name in ("float64", "float32", "noise")),
            *(f"{run.power[name]:.3g}" for name in ("baseline", "float64", "float32", "noise")),
        ]
        for run in runs
    ]
    return Table(
        "What the correction does to samples",
        ["steps", "moved: float64", "float32", "random, same sine", "|ε|²/d: plain", "float64",
         "float32", "random, same sine"],
        rows,
        "Moved: |x − x of the plain solver|/|x|, median of 16 samples of a data set of 64 smooth"
        " random images, whose score is exact; all but the correction is in float64. Random: every"
        " step of the plain solver is turned in a random direction, by the angle that float32"
        " turned. |ε|²/d at the last level: 1 for draws from q.",
    )  # fmt: skip


def _kappas(kappas: list[Kappa]) -> Table:
    rows = [[f"{k.kappa:g}", f"{k.angle:.3f}°", f"{k.predicted:.3f}°"] for k in kappas]
    return Table(
        "κ > 0: the angle between the corrected step and the step",
        ["κ", "as published", "extrapolation"],
        rows,
        f"Two independent contributions n and n₋ in d = 3072, λ = {LAMB[10]:g}, float64."
        " Extrapolation: e + τ (n − n₋)⊥, e = κ n₋ + (1 − κ) n, ⊥: across e,"
        " τ = κ (λ + |e|²)|e|²/(λ ⟨n, e⟩).",
    )


def _chains(few: list[Row], many: list[Row]) -> list[Table]:
    rate = lambda value: "–" if value is None else f"{value:.2f}"
    beside = [
        [
            row.name,
            *(rate(v) for pair in zip(EXPECTED[row.name], row.numbers, strict=True) for v in pair),
        ]
        for row in few
    ]
    alone = [[row.name, *map(rate, row.numbers)] for row in many]
    parts = ("long", "5th", "short", "acceptance")
    return [
        Table(
            f"Langevin chains: variance / true variance after {few[0].steps[-1]} steps",
            ["chain", *(f"{part}: {who}" for part in parts for who in ("expected", "here"))],
            beside,
            "N = 1000 atoms in two halves, d = 8, deviations 3 to 0.05, σ = 0.3; step 0.5;"
            f" {few[0].count} chains from the mean, whose variance has a standard error of"
            f" {100 * few[0].error:.0f} %; the same noise in every row but the last. Long, 5th and"
            " short: of the eight directions. M₁ = σ²I + α²C, S = σ²F. The expected numbers are of"
            " an earlier implementation, with another such cloud and other noise.",
        ),
        Table(
            f"The same by {many[0].count} chains",
            ["chain", *parts],
            alone,
            f"Standard error: {100 * many[0].error:.0f} %.",
        ),
    ]


def _distances(found: list[Steps], noise: float) -> Table:
    rows = [[str(one.steps), *(_number(one.distance[name], 4) for name in NAMES)] for one in found]
    return Table(
        "Energy distance to the exact law, by steps",
        ["steps", *NAMES.values()],
        rows,
        f"Two sets of draws from q are up to {noise:.4f} apart. Axes in units of their deviation."
        " Passes over the data for a step: "
        + ", ".join(f"{NAMES[name]} {count}" for name, count in PASSES.items())
        + ". Of a network, the diagonal takes d Jacobian products.",
    )


def _paths(found: list[Steps], truth: float) -> Table:
    kinds = list(found[0].path)
    rows = [
        [
            str(one.steps),
            *(f"{one.path[name]:.3g}" for name in kinds),
            *(_number(one.log_prob[name] - truth) for name in NAMES),
        ]
        for one in found
    ]
    return Table(
        "Law of the path, and log q of the samples",
        ["steps", *(f"KL: {NAMES[name].partition(',')[0]}" for name in kinds),
         *(f"log q: {NAMES[name].partition(',')[0]}" for name in NAMES)],
        rows,
        "KL(q ‖ p) of the path in nats, by Monte Carlo with the exact q(x_s | x_t), and for full C"
        " with the whole square root. log q: mean over the samples minus that of draws from q;"
        " positive where samples crowd together, negative where they are too wide.",
    )  # fmt: skip


# ---- what follows


def _differ(rows: list[Row]) -> float:
    """The largest difference from the expected variances, in standard errors of 256 chains."""
    pairs = [pair for row in rows for pair in zip(EXPECTED[row.name][:3], row.last, strict=True)]
    return max(abs(want - found) / (found * (2 / 256) ** 0.5) for want, found in pairs)


def slope(found: list[Steps], name: str) -> float:
    """The power of 1/steps with which the path's divergence falls, over the last two doublings."""
    last, first = found[-1], found[-3]
    return math.log(first.path[name] / last.path[name]) / math.log(first.steps / last.steps)


def _goal(found: list[Steps]) -> Steps:
    return [one for one in found if one.steps in GOALS][-1]


def needed(found: list[Steps], name: str, distance: float) -> int:
    """The fewest steps of a sampler from which on its distance is at most this; 0 for none."""
    enough = 0
    for one in reversed(found):
        if one.distance[name] > distance:
            break
        enough = one.steps
    return enough


def _text(
    runs: list[Run],
    kappas: list[Kappa],
    leaked: float,
    least: float,
    share: float,
    many: list[Row],
    found: list[Steps],
    truth: float,
) -> list[str]:
    ten = next(run for run in runs if run.steps == 10)
    tiny = next(k for k in kappas if k.kappa == 1e-6)
    plain, metropolis, gibbs = many[0], many[3], many[5]
    four, goal = next(one for one in found if one.steps == 4), _goal(found)
    reached = {name: needed(found, name, goal.distance["ddim"]) for name in ("full", "heun")}
    return [
        (
            "The method's printed tables need pretrained networks and are not known to us; what can"
            " be measured is the correction in its published code. That code takes the network's"
            " contribution n to a step, multiplies it by (λI + e eᵀ)⁻¹, e = κ n₋ + (1 − κ) n, and"
            " scales the result back to the length of n. With κ = 0, its default and the value in"
            " every script, e = n: the product is parallel to n, and the scaling takes the factor"
            " out again. In exact arithmetic the method is the plain solver, and in float64 it is"
            " so to rounding."
        ),
        (
            "In float32 the product is a difference of nearly equal vectors, and what is left of it"
            " is rounding noise of the length of n: at 10 steps the first one is turned by an angle"
            f" whose sine is {ten.first:.2f}. What this does is what turning each step by the same"
            " angle in a random direction does, as the second table shows. With few steps that is"
            " a kind of stochasticity; with the exact score of a small data set and five to eight"
            " steps, it destroys the samples, since one turned step leaves the support and the next"
            " increments grow with the distance."
        ),
        (
            "κ > 0 is no Levenberg-Marquardt step either: it extrapolates along n − n₋, and how far"
            f" jumps: κ = 1e-6 turns the step by {tiny.angle:.0f}°. The scheduler never resets"
            " n₋, so that the first step of a batch is corrected with the last contribution of the"
            f" batch before: the same noise then ends {leaked:.2g} of its length away (κ = 0.01,"
            " 10 steps). And e eᵀ, of rank one and positive, does not resemble the Fisher"
            f" information: at {100 * share:.0f} % of draws from q the least eigenvalue of σ²F is"
            f" negative, down to {_number(least)} (an extreme, which differs from cloud to cloud),"
            " so that a small damping does not make it positive definite."
        ),
        (
            "What is sound: M₁ = σ²I + α²C, the covariance of a Gibbs sweep, is positive definite"
            " at every x. Preconditioned chains spread faster (longest direction), but unadjusted"
            f" they are as biased as the plain ones: {plain.last[2]:.2f} of the variance in the"
            " shortest direction for plain Langevin, and more elsewhere. With Metropolis, which"
            f" the exact log q allows, it is {metropolis.last[2]:.2f}. But Gibbs sampling itself"
            f" ({gibbs.last[0]:.2f}, {gibbs.last[1]:.2f}, {gibbs.last[2]:.2f}) mixes faster for the"
            " price of one pass: the data set is the test bed of such preconditioners, not their"
            " use. The expected table is of 256 chains, whose variances have a standard error of"
            " 9 %: the ± 0.1 asked for is less than two such tables differ by. What 2048 chains"
            f" give differs from it by at most {_differ(many):.1f} of its standard errors."
        ),
        (
            "Their use is few-step sampling: the reverse step with the full covariance (LGS). By"
            f" energy distance {reached['full']} steps of it are as near to q as {goal.steps} steps"
            f" of DDIM and {reached['heun']} of Heun's method, with {4 * reached['full']} passes"
            f" over the data against {goal.steps} and {2 * reached['heun']}. The law of its path"
            " improves as the square of the number of steps, the others' as the number. By log q of"
            " the samples it is"
            " worse than DDIM: at four steps its samples lie"
            f" {_number(four.log_prob['full'] - truth)} nats from the draws' mean, DDIM's"
            f" {_number(four.log_prob['ddim'] - truth)}. A Gaussian step reproduces mean and"
            " covariance, and so the law at large; it smears what is not Gaussian in q(x_s | x_t),"
            " here the single atoms, while deterministic steps keep samples near them."
        ),
    ]


def _claims(
    runs: list[Run],
    kappas: list[Kappa],
    leaked: float,
    least: float,
    share: float,
    few: list[Row],
    many: list[Row],
    found: list[Steps],
) -> list[Claim]:
    rest = max(run.rest for run in runs)
    apart = max(abs(k.angle - k.predicted) for k in kappas)
    claims = [
        Claim("float64: 1 − cos of the correction", f"{rest:.0e}", "< 1e-13", rest < 1e-13, True),
        Claim("κ > 0 is the extrapolation", f"{apart:.0e}° apart", "< 1e-5°", apart < 1e-5, True),
        Claim(
            "a batch changes the one after it (κ = 0.01)", f"{leaked:.2g}", "> 0.01",
            leaked > 0.01, True,
        ),
        Claim("smallest eigenvalue of σ²F", _number(least), "< 0", least < 0, True),
    ]  # fmt: skip
    for run in runs:
        pairs = zip((run.first, run.median), SINES[run.steps], strict=True)
        off = max(abs(value / want - 1) for value, want in pairs)
        claims.append(
            Claim(f"sines at {run.steps} steps", f"{100 * off:.0f} % off", "≤ 30 %", off <= 0.3)
        )
    ratios = [run.moved["float32"] / run.moved["noise"] for run in runs]
    worst = max(ratios, key=lambda ratio: abs(math.log(ratio)))
    claims += [
        Claim("float32 moves samples as random turns do", f"{worst:.2f} times", "1 ± 0.3",
              abs(worst - 1) <= 0.3),
        Claim("smallest eigenvalue of σ²F, value", _number(least), "−5.2 ± 1",
              abs(least + 5.2) <= 1),
        Claim("draws with an indefinite F", f"{100 * share:.0f} %", "66 ± 5 %",
              abs(share - 0.66) <= 0.05),
    ]  # fmt: skip
    for row in few:
        pairs = zip(row.numbers, EXPECTED[row.name], strict=True)
        off = max(abs(a - b) for a, b in pairs if a is not None and b is not None)
        claims.append(
            Claim(f"chains, {row.name}: largest difference", f"{off:.2f}", "≤ 0.1", off <= 0.1)
        )
    return claims + _sound(many, found)


def _sound(many: list[Row], found: list[Steps]) -> list[Claim]:
    adjusted = [row for row in many if row.acceptance is not None]
    off = max(abs(row.last[2] - 1) / (row.last[2] * row.error) for row in adjusted)
    ordered = all(one.path["full"] < one.path["none"] for one in found)
    claims = [
        Claim("Metropolis and Gibbs: shortest direction", f"{off:.1f} standard errors", "< 5",
              off < 5, True),
        Claim("path: full C below DDPM at every number of steps", str(ordered), "True", ordered,
              True),
    ]  # fmt: skip
    for name, power in (("none", -1), ("full", -2)):
        value = slope(found, name)
        claims.append(
            Claim(
                f"path: divergence of {NAMES[name].partition(',')[0]} falls as steps to the power",
                _number(value), f"{_number(power, 0)} ± 0.3", abs(value - power) <= 0.3,
            )
        )  # fmt: skip
    goal = _goal(found)
    enough = needed(found, "full", goal.distance["ddim"])
    claims.append(
        Claim(
            f"steps of the full C to the energy distance of DDIM's {goal.steps}", str(enough),
            f"≤ {goal.steps // 2}", 0 < enough <= goal.steps // 2,
        )
    )  # fmt: skip
    return claims
