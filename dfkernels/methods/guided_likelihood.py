"""The likelihood of samples against the scale of their guidance, and across seeds (Fig. 1b and
Fig. 2 of the paper).

A seed is a noise x_T, and a scale w is a flow: classifier-free guidance moves it away from the
model's own, which is that at w = 1. For each pair, x_w is what the flow at w makes of the seed's
noise, by a deterministic sampler, and its density is taken at the noise level where sampling ends.
Under which flow is a choice:

    "model"    log q_1(x_w): what the model says of the sample. One density for the samples of all
               scales, so that their numbers can be compared.
    "guided"   log q_w(x_w): the density of the law from which the sample was drawn, which is
               another one at each scale. Its mean over the seeds is minus the differential entropy
               of that law: how much guidance narrows it, nothing about the model.

At w = 1 they are the same. For the same samples, mean log q_w - mean log q_1 estimates the
Kullback-Leibler divergence of the guided law from the model's.

All of it is of x/alpha = x_0 + s noise at the lowest level s, and of the flows from N(0, s_max^2 +
data_std^2) at the highest, from which sampling starts and in which the likelihood ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import check, words
from . import _results, likelihood, samplers
from ._reporting import Callback, reporting
from .denoiser import Denoiser
from .grid import noise_range, time_grid
from .traces import Hutchinson, Source, Trace

__all__ = ["UNDER", "GuidedSample", "ScaleSummary", "guided_likelihood", "summarised"]

UNDER = ("model", "guided")
DenoiserAt = Callable[[float], Denoiser]


class GuidedSample(NamedTuple):
    """A row of what `guided_likelihood` returns. The errors are those of `nll`, in its unit."""

    scale: float  # of the guidance
    seed: int  # of the initial noise
    nll: float  # nats per number of x/alpha: -log q / d
    bits_per_dim: float  # the same in bits
    integration_error: float  # estimated, of the likelihood's solver
    trace_error: float  # standard error of the random probes; NaN for one probe
    evaluations: int  # calls of the network, each on a whole batch, sampling included


class ScaleSummary(NamedTuple):
    """What the samples of one scale have in common."""

    scale: float
    seeds: int
    nll: float  # mean over the seeds, nats per number
    standard_error: float  # of the mean: standard deviation / seeds^(1/2); NaN for one seed
    integration_error: float  # the largest
    trace_error: float  # root mean square


def summarised(rows: Sequence[GuidedSample]) -> list[ScaleSummary]:
    """One summary for each scale, in the order in which they come."""
    found = []
    for scale in dict.fromkeys(row.scale for row in rows):
        same = [row for row in rows if row.scale == scale]
        n, mean = len(same), sum(row.nll for row in same) / len(same)
        square = sum((row.nll - mean) ** 2 for row in same)
        error = math.sqrt(square / (n - 1) / n) if n > 1 else math.nan
        probes = math.sqrt(sum(row.trace_error**2 for row in same) / n)
        worst = max(row.integration_error for row in same)
        found.append(ScaleSummary(scale, n, mean, error, worst, probes))
    return found


def guided_likelihood(
    denoiser_at: DenoiserAt,
    shape: Sequence[int],
    scales: Sequence[float],
    seeds: Sequence[int],
    noise: tuple[float, float],
    *,
    under: str = "model",
    sampling_steps: int = 50,
    trace: str | Trace | Source = "hutchinson",
    probes: int | None = None,
    method: str = "dopri5",
    steps: int | None = None,
    data_std: float = 1.0,
    batch: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    checkpoint: Path | None = None,
    configuration: Mapping[str, object] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> list[GuidedSample]:
    """The negative log-likelihood of one sample for each guidance scale and each seed.

    >>> def at(scale):
    ...     guided = df.ClassifierFreeGuidance(network, scale, {"label": 10})
    ...     return df.Denoiser(guided, schedule).bind(label=torch.tensor([3]))
    >>> rows = guided_likelihood(at, (3, 32, 32), (1, 2, 4, 8), range(16), (0.02, 80.0))
    >>> [(at.scale, at.nll, at.standard_error) for at in summarised(rows)]

    Args:
        denoiser_at: the denoiser at a guidance scale, with its conditions bound so that it takes
            batches of any size; at the scale 1 it is the model's own. Without guidance:
            `lambda scale: denoiser`, and scales = [1].
        shape: [*E], that of one sample.
        scales: of the guidance, distinct. Each starts from the same noise, so that differences
            between scales are known better than either of them.
        seeds: distinct integers of at least 0. The noise of a seed is that of
            torch.randn([1, *E], generator=torch.Generator().manual_seed(seed)) in float32 on the
            CPU, whatever batch, dtype and device: what a pipeline of diffusers draws for the seed.
        noise: (s_min, s_max), levels sigma/alpha. Heun's sampler runs from s_max to s_min, and the
            density is that at s_min.
        under: "model" or "guided", the flow whose density it is: see the module.
        sampling_steps: of the sampler, spaced as EDM's; two calls of the network each.
        trace: as for `log_prob`, but that "hutchinson" takes the probes of a sample from its seed's
            generator, after the noise: they are the same at every scale and in any batch.
        probes: of "hutchinson"; None: 2. Their spread is `trace_error`. For another `trace` it has
            to be None.
        method, steps: as for `log_prob`. The samples of a batch share the steps of "dopri5", which
            moves results within its tolerance; with steps of equal length the batch does not matter
            but for rounding.
        data_std: x/alpha starts from N(0, s_max^2 + data_std^2). With 1 this is N(0, I) in x for a
            variance-preserving process, as pipelines have it.
        batch: how many samples are computed together.
        dtype, device: of x.
        checkpoint: a JSON file {"configuration": {...}, "rows": [{"scale": ...}, ...]}, written
            after each batch, whole or not at all. Rows that it holds are not computed again: a run
            that was killed goes on, and a finished one may be given more scales and seeds.
        configuration: whatever else decides the result (weights, prompt): numbers, strings, lists,
            dicts. A checkpoint with another configuration, or other arguments, is refused.
        callback: called as callback(done, total) after each step of sampler and solver.
        progress: show a bar on stderr.

    Returns:
        A `GuidedSample` for each scale and seed, scale by scale.

    Raises:
        TypeError, ValueError: An argument is wrong, or the network returns another shape, NaN or
            inf: the message names it, with scale and seeds. A `FileError` (a ValueError) names a
            checkpoint that is unreadable, or of another configuration.
        RuntimeError, NotImplementedError: as `log_prob` raises them; the checkpoint stays.
    """
    settings = _Settings(
        shape=tuple(check.integer("shape", n, 1) for n in shape),
        noise=noise_range(noise),
        under=under,
        sampling_steps=check.integer("sampling_steps", sampling_steps, 1),
        trace=_checked(trace),
        probes=_probes(trace, probes),
        method=method,
        steps=likelihood.steps_of(method, steps),
        data_std=check.constant("data_std", data_std),
        dtype=dtype,
        device=torch.device(device),
    )
    scales = [check.constant("scales", scale) for scale in scales]
    seeds = [check.integer("seeds", seed, 0) for seed in seeds]
    _distinct("scales", scales)
    _distinct("seeds", seeds)
    batch = check.integer("batch", batch, 1)
    run = settings.configuration() | dict(configuration or {})
    rows = _results.Rows(GuidedSample, ("scale", "seed"), run, checkpoint)
    left = {scale: [seed for seed in seeds if (scale, seed) not in rows] for scale in scales}
    parts = [
        (scale, some[i : i + batch])
        for scale, some in left.items()
        for i in range(0, len(some), batch)
    ]
    total = settings.stages * len(parts)
    with reporting("guided_likelihood", callback, progress, total) as report, torch.no_grad():
        for i, (scale, some) in enumerate(parts):
            step = lambda done, _, i=i: report(i * settings.stages + done, total)
            rows.add(_computed(denoiser_at, scale, some, settings, step))
    return [rows[scale, seed] for scale in scales for seed in seeds]


@dataclass(frozen=True)
class _Settings:
    """What decides the rows, beside network, scales and seeds."""

    shape: tuple[int, ...]
    noise: tuple[float, float]
    under: str
    sampling_steps: int
    trace: str | Trace | Source
    probes: int  # 0 where nothing draws any
    method: str
    steps: int  # 0 for "dopri5"
    data_std: float
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        check.choice("under", self.under, UNDER)
        check.choice("method", self.method, likelihood.METHODS)
        check.nonnegative("data_std", self.data_std)
        check.choice("dtype", self.dtype, (torch.float32, torch.float64))

    @property
    def stages(self) -> int:
        """The steps of a batch, as they are reported."""
        return self.sampling_steps + (self.steps or 100)

    def configuration(self) -> dict[str, object]:
        """As a checkpoint holds it."""
        named = self.trace if isinstance(self.trace, str) else type(self.trace).__name__
        return {
            "shape": list(self.shape),
            "noise": list(self.noise),
            "under": self.under,
            "sampling_steps": self.sampling_steps,
            "trace": named,
            "probes": self.probes,
            "method": self.method,
            "steps": self.steps,
            "data_std": self.data_std,
            "dtype": words.dtype(self.dtype),
        }


def _checked(trace: str | Trace | Source) -> str | Trace | Source:
    if isinstance(trace, Hutchinson):
        expected = "'hutchinson' with probes=, whose probes follow the seeds"
        raise check.mismatch("trace", expected, "a Hutchinson")
    return trace


def _probes(trace: str | Trace | Source, probes: int | None) -> int:
    """How many a sample has; 0 where nothing draws any."""
    if isinstance(trace, str) and trace == "hutchinson":
        return check.integer("probes", 2 if probes is None else probes, 1)
    check.unused("probes", probes, "unless trace='hutchinson', which draws them")
    return 0


def _distinct(name: str, values: Sequence[float]) -> None:
    if not values:
        raise check.mismatch(name, "at least one", "none")
    twice = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise check.mismatch(name, "distinct ones", f"{twice[0]:g} twice")


def _computed(
    denoiser_at: DenoiserAt,
    scale: float,
    seeds: list[int],
    settings: _Settings,
    report: Callback,
) -> list[GuidedSample]:
    """One batch: samples, and their likelihood."""
    guided = _denoiser(denoiser_at, scale)
    judge = guided if settings.under == "guided" or scale == 1 else _denoiser(denoiser_at, 1.0)
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    steps, before = settings.sampling_steps, guided.evaluations
    try:
        x = _sampled(guided, generators, settings, report)
        calls = guided.evaluations - before
        found = likelihood.log_prob(
            judge,
            x,
            settings.noise,
            Hutchinson(generators, settings.probes)
            if settings.trace == "hutchinson"
            else settings.trace,
            method=settings.method,
            steps=settings.steps or None,
            data_std=settings.data_std,
            callback=lambda done, total: report(steps + done, settings.stages),
        )
    except ValueError as error:  # such as a Denoiser's about NaN
        which = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
        raise ValueError(f"{error} (guidance scale {scale:g}, {which})") from error
    d = math.prod(settings.shape)
    columns = zip(
        seeds,
        found.bits_per_dim.tolist(),
        (found.error / d).tolist(),
        (found.trace_error / d).tolist(),
        strict=True,
    )
    return [
        GuidedSample(
            scale, seed, bits * math.log(2), bits, error, probes, calls + found.evaluations
        )
        for seed, bits, error, probes in columns
    ]


def _denoiser(denoiser_at: DenoiserAt, scale: float) -> Denoiser:
    found = denoiser_at(scale)
    if not isinstance(found, Denoiser):
        raise TypeError(
            f"denoiser_at: expected a function that returns a Denoiser, got {type(found).__name__}"
        )
    return found


def _sampled(
    denoiser: Denoiser, generators: list[torch.Generator], settings: _Settings, report: Callback
) -> Tensor:
    """Samples at the lowest noise level, [B, *E], one for each generator."""
    how = {"dtype": torch.float32, "device": "cpu"}
    drawn = [torch.randn(1, *settings.shape, generator=one, **how) for one in generators]
    t = time_grid(denoiser.schedule, settings.sampling_steps, settings.noise, "edm")
    alpha, sigma = denoiser.schedule(t[0])
    std = math.hypot(sigma.item(), alpha.item() * settings.data_std)
    x = std * torch.cat(drawn).to(settings.device, settings.dtype)
    return samplers.sample(denoiser, x, t, "heun", keep=1, callback=report).x[-1]
