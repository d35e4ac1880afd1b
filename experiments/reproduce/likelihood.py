"""Likelihood of held-out digits: the trace of the Fisher information from six sources along one
flow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfkernels.cloud import PointCloud
from dfkernels.fisher import DiffusionFisher
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.likelihood import Divergence, Hutchinson, Likelihood, exact, log_prob
from dfkernels.methods.trace_matching import MatchedTrace

from . import digits
from . import likelihood_figures as figures
from . import likelihood_tables as tables
from .likelihood_tables import Level, Row, number, signed
from .section import Claim, Picture, Section, progress

_TRUTH = 10 * ["exact divergence"]
_LEVELS = 5 * ["density at each noise level"]
STAGES = [
    *digits.DENOISER,
    *digits.TRACE["residual"],
    *digits.TRACE["paper"],
    *_TRUTH,
    "other traces",
    "solvers",
    *_LEVELS,
]

_PROBES = (1, 4, 16)
_S = (0.03, 0.1, 0.3, 1.0, 3.0)  # noise levels at which network and data set are compared
_COPIES = 8  # dequantised copies of every training image in the data set's own law


def run(quick: bool, out: Path, step: Callable[[str], None]) -> Section:
    """Networks from checkpoints in `out`, or trained."""
    begin = time.perf_counter()
    data = digits.load()
    network = digits.denoiser(quick, out, step)
    matched = {form: digits.matched_trace(quick, out, step, network, form) for form in digits.TRACE}
    trained = time.perf_counter()
    steps = 6 if quick else 32
    images = digits.dequantised(data.held[: 4 if quick else 48], torch.Generator().manual_seed(1))

    def row(name: str, trace, how=lambda done, total: None) -> Row:
        start = time.perf_counter()
        result = density(
            network, images, digits.NOISE[0], trace, data.std, steps=steps, callback=how
        )
        seconds = time.perf_counter() - start
        return Row(name, result.bits_per_dim, seconds, result.evaluations, result.products)

    truth = row("exact divergence", Divergence(), progress(_TRUTH, step))
    rows = [
        truth,
        *(row(f"Hutchinson, K = {k}", Hutchinson(_seeded(k), k)) for k in _PROBES),
        row("DF-TM, residual form", matched["residual"]),
        row("DF-TM, paper's form", matched["paper"]),
        row("data set's, exact", exact(_cloud(data.train, 1), digits.SCHEDULE)),
    ]
    step("other traces")
    solvers = _solvers(network, images, data.std, steps)
    step("solvers")
    report = progress(_LEVELS, step)
    levels = []
    for s in _S:
        levels.append(_level(network, matched, data, s, 2 if quick else 24, steps))
        report(len(levels), len(_S))
    return Section(
        name="likelihood",
        title="Likelihood: bits per dimension of held-out digits",
        text=_text(rows, levels),
        tables=[
            tables.traces(rows, len(images), steps),
            tables.solvers(solvers),
            tables.by_level(levels, _COPIES),
        ],
        pictures=[
            Picture(
                "error",
                "Left: mean absolute error against the exact divergence, and time for all images."
                " Right: every image; on the line, both agree.",
                partial(figures.error, rows),
            ),
            Picture(
                "levels",
                "Bits per dimension of images with noise under the law at that noise level, by the"
                " network and by the training set's own mixture, which leaves the figure where it"
                " memorises.",
                partial(figures.levels, levels),
            ),
        ],
        claims=_claims(rows, solvers, levels, _identity(data)),
        seconds={"training": trained - begin, "likelihoods": time.perf_counter() - trained},
    )


def density(
    network: Denoiser, images: Tensor, s: float, trace, std: float, *, steps: int | None, **how: Any
) -> Likelihood:
    """log q_s at x = alpha images, s = sigma/alpha, in steps as long as `steps` over the whole
    range; None for a method that chooses its own."""
    top = digits.NOISE[1]
    share = math.log(top / s) / math.log(top / digits.NOISE[0])
    alpha = digits.SCHEDULE.alpha(_time(s)).to(images.dtype)
    options: dict[str, Any] = {"method": "rk4", **how}
    return log_prob(
        network, alpha * images, (s, top), trace, data_std=std, width=digits.WIDTH,
        steps=None if steps is None else math.ceil(steps * share), **options,
    )  # fmt: skip


def _time(s: float) -> Tensor:
    return digits.SCHEDULE.t_of_log_snr(torch.tensor(-2 * math.log(s), dtype=torch.float64))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _cloud(images: Tensor, copies: int) -> PointCloud:
    draw = _seeded(2)
    return PointCloud(torch.cat([digits.dequantised(images, draw) for _ in range(copies)]))


def _solvers(network: Denoiser, images: Tensor, std: float, steps: int) -> list[Row]:
    """The same probes by every solver; the last one is the reference."""
    rows = []
    for method, factor in (("heun", 1), ("heun", 2), ("rk4", 1), ("dopri5", 1), ("rk4", 4)):
        start = time.perf_counter()
        equal = None if method == "dopri5" else factor * steps
        result = density(
            network, images, digits.NOISE[0], Hutchinson(_seeded(4), 4), std, steps=equal,
            method=method,
        )  # fmt: skip
        name = {"heun": "Heun", "rk4": "RK4", "dopri5": "Dormand-Prince 5, adaptive"}[method]
        name += "" if equal is None else f", {equal} steps"
        seconds = time.perf_counter() - start
        rows.append(Row(name, result.bits_per_dim, seconds, result.evaluations, result.products))
    return rows


def _level(
    network: Denoiser,
    matched: dict[str, MatchedTrace],
    data: digits.Digits,
    s: float,
    n: int,
    steps: int,
) -> Level:
    """Images perturbed to the level s, so that they are samples of the density that is
    evaluated."""
    draw = _seeded(3)
    alpha, sigma = digits.SCHEDULE(_time(s))

    def noisy(images: Tensor) -> Tensor:
        x_0 = digits.dequantised(images[:n], draw)
        return x_0 + s * torch.randn(x_0.shape, generator=draw)

    held, own = noisy(data.held), noisy(data.train)
    d = held[0].numel()
    cloud = _cloud(data.train, _COPIES)

    def bits(at: DiffusionFisher) -> float:
        nats = at.log_prob.mean().item() + d * alpha.log().item()
        return -nats / (d * math.log(2)) - math.log2(digits.WIDTH)

    by_set, of_own = (DiffusionFisher(alpha.float() * x, cloud, alpha, sigma) for x in (held, own))

    def model(trace) -> Tensor:
        return density(network, held, s, trace, data.std, steps=steps).bits_per_dim

    truth = model(Divergence())
    errors = {form: (model(trace) - truth).abs().mean().item() for form, trace in matched.items()}
    return Level(
        s, truth.mean().item(), bits(by_set), bits(of_own), by_set.ess.median().item(), **errors
    )


def _identity(data: digits.Digits) -> float:
    """Nats between the two ways to log q_1 of the data set, in float64: along its own flow, and by
    the mixture's sum.
    """
    cloud = PointCloud(data.train.double())
    alpha, sigma = digits.SCHEDULE(_time(1.0))
    x = alpha * data.held[:4].double()
    flow = Denoiser.exact(cloud, digits.SCHEDULE)
    result = log_prob(flow, x, (1.0, digits.NOISE[1]), exact(cloud, digits.SCHEDULE), method="rk4")
    last = digits.SCHEDULE(_time(digits.NOISE[1]))
    there = DiffusionFisher(result.latent, cloud, *last).log_prob + x[0].numel() * last[0].log()
    here = DiffusionFisher(x, cloud, alpha, sigma).log_prob
    return (result.log_prob - result.latent_log_prob + there - here).abs().max().item()


# ---- what is said


def _text(rows: list[Row], levels: list[Level]) -> list[str]:
    truth, one, four, _, residual, paper, of_set = rows
    size = {row.name: number(row.error(truth).abs().mean().item()) for row in rows}
    spread = number(residual.error(truth).std().item())
    share = truth.seconds / residual.seconds
    low, unit, high = levels[0], levels[-2], levels[-1]
    return [
        (
            "The density of an image under a diffusion model is an integral of the trace of the"
            " Fisher information along the PF-ODE: d log q/d ln s = −σ² tr F with s = σ/α. What is"
            f" evaluated is the density at s = {digits.NOISE[0]:g}, a twelfth of a grey level's"
            " width, at dequantised images; its bits are an upper bound of those of the 17 grey"
            " levels. The paper has no such experiment; the targets are ours."
        ),
        (
            "The residual form of DF-TM needs no derivative of the network and comes within"
            f" {size[residual.name]} bits/dim per image of the exact divergence, in {share:.0f}"
            f" times less time; Hutchinson's estimator with one probe, {size[one.name]}. But that"
            " is all it gains here: the trace network is of the noise network's size, a Jacobian"
            " product costs about as much as a call of either, and K = 4 probes, in"
            f" {four.seconds / residual.seconds:.1f} times DF-TM's time, err by {size[four.name]}."
            " The errors also differ in kind. Hutchinson's is random: it vanishes as 1/√K, and in"
            " the mean over images. DF-TM's has a bias"
            f" ({signed(residual.error(truth).mean().item())}; spread {spread}) that no averaging"
            " removes: it learned the trace of the law that the images come from, the divergence"
            " is that of the network's own field, and the two agree only as far as both networks"
            " are right."
        ),
        (
            f"The paper's form is no use at this level (mean |error| {size[paper.name]} bits/dim):"
            " eq. 17 multiplies the trace network's error by α²d/σ⁴, of which d/s² is left in the"
            " integrand, and the network starts from a Gaussian's answer here (Table 2 shows a"
            " better start). Where the noise is of the order of the data's standard deviation it"
            f" is as good as the other form, as the last table shows: {number(unit.paper)} against"
            f" {number(unit.residual)} from s = {unit.s:g} on."
        ),
        (
            "The exact trace of the data set is exact for another law: the mixture of the training"
            " images' own Gaussians. Along the network's flow at low noise it means nothing (mean"
            f" |error| {size[of_set.name]}). On its own flow it gives that mixture's density to"
            f" rounding, and whether this is worth having depends on the noise: at s = {low.s:g}"
            f" the set gives held-out images {number(low.held, 1)} bits/dim and its own"
            f" {number(low.own, 1)}, pure memory; at s = {high.s:g} it gives"
            f" {number(high.held, 2)} and the network, {number(high.network, 2)}. It can be"
            " trusted where the effective number of atoms is well above one."
        ),
    ]


def _claims(
    rows: list[Row], solvers: list[Row], levels: list[Level], identity: float
) -> list[Claim]:
    truth, one, _, sixteen, residual, paper, _ = rows
    size = {row.name: row.error(truth).abs().mean().item() for row in rows}
    bias = sixteen.error(truth)
    standard = (bias.mean() / (bias.std() / len(bias) ** 0.5)).item()
    speed = truth.seconds / residual.seconds
    solver = solvers[2].error(solvers[-1]).abs().max().item()
    gap = abs(levels[-1].network - levels[-1].held)
    return [
        Claim(
            "flow of the data set = its mixture, at σ/α = 1",
            f"{identity:.0e} nats apart",
            "< 1e-3",
            identity < 1e-3,
            check=True,
        ),
        Claim(
            "Hutchinson, K = 16: mean error",
            f"{abs(standard):.1f} standard errors",
            "< 4",
            abs(standard) < 4,
            check=True,
        ),
        Claim(
            "RK4 against four times its steps", f"{solver:.0e} bits/dim", "< 0.01", solver < 0.01
        ),
        Claim(
            f"network = data set at σ/α = {levels[-1].s:g}, held out",
            f"{gap:.3f} bits/dim apart",
            "< 0.05",
            gap < 0.05,
        ),
        Claim(
            "DF-TM, residual: mean |error|",
            f"{size[residual.name]:.3f} bits/dim",
            "< 0.1",
            size[residual.name] < 0.1,
        ),
        Claim(
            "DF-TM, residual, against Hutchinson, K = 1: mean |error|",
            f"{size[residual.name]:.3f} and {size[one.name]:.3f}",
            "smaller",
            size[residual.name] < size[one.name],
        ),
        Claim(
            "DF-TM, paper's form against residual: mean |error|",
            f"{size[paper.name] / size[residual.name]:.1f} times",
            "> 2",
            size[paper.name] > 2 * size[residual.name],
        ),
        Claim(
            "DF-TM, residual, against the exact divergence: speed",
            f"{speed:.0f} times",
            "> 10",
            speed > 10,
        ),
    ]
