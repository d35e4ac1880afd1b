"""Does a network, as it is wrapped, fit its data? A comparison with the exact posterior mean.

Where the noise is high, any sound network is close to the exact posterior mean of its training
data. A wrong sign, clock or scale makes an error of order 1 there, and each of them a different
one: so an error is not only seen but named, by undoing one mistake after another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..._torch import check as argument
from ...law import Law, checked_law
from ..denoiser import Denoiser, expect_denoiser
from ..grid import noise_range
from .explain import explanations
from .outputs import output, read
from .queries import Queries, Rng, make_queries, noise_range_of
from .report import CheckedLevel, CheckReport, Explanation, explains, judged, overrules
from .verdict import notes_of, verdict_of

__all__ = ["CheckReport", "CheckedLevel", "Explanation", "check"]

_CLOSE = 0.3  # an error of this part of what is allowed needs no explanation
_REPEATABLE = 0.02  # two calls may differ by this many posterior standard deviations


@torch.no_grad()
def check(
    denoiser: Denoiser,
    cloud: Law,
    *,
    noise: tuple[float, float] | None = None,
    queries: int | None = None,
    generator: torch.Generator | None = None,
    **conditions: object,
) -> CheckReport:
    """Whether a network and its conventions fit the data that it was trained on, and if not, what
    is wrong. Call it before you sample with a network that you have wrapped, or compute a
    likelihood.

    >>> report = check(denoiser, cloud)
    >>> print(report)
    >>> assert report.ok, report.verdict

    The network's posterior mean is compared with the exact one at three levels of high noise. If
    they differ by more than a sound network's error, these changes are tried, and the one with
    which the error all but vanishes is named:

        cause              what was wrong
        sign               the output is negated
        flow sign          the velocity is eps - x_0 where the schedule says x_0 - eps, or reversed
        prediction type    the network predicts something else
        output scale       the output misses a factor
        clock              t is reversed, or in 0 ... 999, or sigma, or ln(sigma/alpha)/4, ...
        input scale        the network expects x/alpha, x/sqrt(alpha^2 + sigma^2), ...
        data scale         it was trained on a y + b: [0, 1] against [-1, 1], a scale or shift
                           factor of latents; one pair of numbers, or one per channel
        noise level        its schedule is another one: other betas, shifted sigmas, an alpha that
                           was rescaled to end at 0
        guidance           a `ClassifierFreeGuidance` that fits at scale 1
        train mode         it is in train mode, and fits in eval mode
        random             two calls with the same input differ
        unknown            none of these

    A clock, an input scale or a noise level is also found where the sign or the prediction type is
    wrong as well.

    Args:
        denoiser: the network as you use it.
        cloud: its training data, or a random part of them; or the law that they were drawn from, a
            `GaussianMixture`.
        noise: (low, high), levels sigma/alpha. Default: from the level where 100 atoms share the
            posterior weight (a quarter of all atoms if these are fewer than 400; the median ESS),
            but at least the data's standard deviation per number, to 4 times that, or to the
            schedule's end.
        queries: at each level; default: as many as have 2^14 numbers, from 16 to 256.
        generator: on the CPU; None: seed 0, so that a repeated call gives the same report.
        conditions: keyword arguments of the network; tensors with a row per query go with
            `queries`. The cloud has to hold the data under these conditions.

    Costs 4 calls of the network if it fits well, some 20 if less so, at most some 80 if it does
    not, and passes over the atoms for a few hundred batches of queries then. A network in train
    mode is called in eval mode as well, and left as it was.

    Returns:
        A `CheckReport`: `.ok`, `.cause`, `.verdict`, and the numbers; `print` shows a table.

    Raises:
        TypeError, ValueError: An argument is wrong, the network returned NaN, inf or another shape,
            the cloud has fewer than 4 atoms, or all the same, or the schedule has no noise as high
            as is needed; the message names it.
    """
    expect_denoiser(denoiser)
    checked_law("cloud", cloud)
    rng, before = Rng(generator), denoiser.evaluations
    count = None if queries is None else argument.integer("queries", queries, 1)
    levels = noise_range_of(cloud, denoiser.schedule, rng) if noise is None else noise_range(noise)
    given = make_queries(cloud, denoiser.schedule, levels, count, rng)
    outs = [output(denoiser, q, conditions) for q in given]
    start = _judged(denoiser, given, outs)
    spread = _spread(denoiser, given[0], outs[0], conditions)
    found: list[Explanation] = []
    if start.ratio > _CLOSE or spread > _REPEATABLE:
        found = _search(denoiser, cloud, given, outs, start, rng, conditions)
    fits = start.ratio <= 1 and spread <= _REPEATABLE
    fits = fits and not (found and overrules(found[0], start))
    cause = None if fits else _cause(start, found, spread)
    return CheckReport(
        fits,
        cause,
        verdict_of(cause, start, found, spread),
        tuple(
            CheckedLevel(q.t, q.alpha, q.sigma, q.ess, error, q.allowed, q.of_data_mean)
            for q, error in zip(given, start.errors, strict=True)
        ),
        tuple(found),
        notes_of(denoiser, given, fits),
        denoiser.evaluations - before,
    )


def _judged(denoiser: Denoiser, queries: list[Queries], outs: list[Tensor]) -> Explanation:
    kind, schedule = denoiser.prediction_type, denoiser.schedule
    means = [read(kind, schedule, q, out) for q, out in zip(queries, outs, strict=True)]
    return judged("", "", queries, means)


def _spread(denoiser: Denoiser, q: Queries, out: Tensor, conditions: dict[str, object]) -> float:
    """How much a second call with the same input differs, in posterior standard deviations."""
    kind, schedule = denoiser.prediction_type, denoiser.schedule
    first = read(kind, schedule, q, out)
    return q._replace(mean=first).error(read(kind, schedule, q, output(denoiser, q, conditions)))


def _search(
    denoiser: Denoiser,
    cloud: Law,
    queries: list[Queries],
    outs: list[Tensor],
    start: Explanation,
    rng: Rng,
    conditions: dict[str, object],
) -> list[Explanation]:
    """What was tried, in eval mode if the network is in train mode: first what explains the error
    at the start, so that nothing that does not hides it, and best first.
    """
    tried, now = [], start
    with _evaluating(denoiser) as changed:
        if changed:
            evaluated = [output(denoiser, q, conditions) for q in queries]
            if any(not torch.equal(a, b) for a, b in zip(outs, evaluated, strict=True)):
                now = _judged(denoiser, queries, evaluated)
                tried = [now._replace(cause="train mode", change="the network in eval mode")]
            outs = evaluated
        if now.ratio > _CLOSE:
            tried += explanations(denoiser, cloud, queries, outs, rng, conditions)
    return sorted(tried, key=lambda found: (not explains(found, start), found.rank))


@contextlib.contextmanager
def _evaluating(denoiser: Denoiser) -> Iterator[bool]:
    """The network in eval mode, and as it was afterwards; whether that changes anything."""
    network = denoiser.network
    modules = list(network.modules()) if isinstance(network, nn.Module) else []
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield bool(training)
    finally:
        for module in training:
            module.training = True


def _cause(start: Explanation, found: list[Explanation], spread: float) -> str:
    """The cause of the best change; train mode also where two calls differ and the rest fits."""
    if found and (
        explains(found[0], start) or (start.ratio <= 1 and found[0].cause == "train mode")
    ):
        return found[0].cause
    return "random" if spread > _REPEATABLE else "unknown"
