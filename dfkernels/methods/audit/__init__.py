"""Everything that data can say of a trained network.

The network is compared with the exact posterior mean of its training data and with itself on data
that it has never seen, its Jacobian with what the derivative of a score must be, and its samples
with the data. What the numbers say beyond their errors is said in sentences.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..._torch import check as argument
from ...cloud import PointCloud
from ...law import Law
from .._reporting import Callback, reporting
from ..convention import CheckReport, check
from ..convention.queries import Rng, data_mean, data_std
from ..denoiser import Denoiser, expect_denoiser
from ..sharded import ShardedCloud
from . import level, likelihoods, samples, verdict
from .checkpoint import Parts
from .configuration import configuration
from .levels import FEWEST, Level, Range, range_of, times
from .parts import LevelAudit, LikelihoodAudit, SampleAudit
from .report import AuditReport, Settings
from .task import Points, Task

__all__ = ["AuditReport", "audit"]

_MOST, _LEAST, _NUMBERS = 256, 32, 1 << 17  # queries of a level, where they are not given


@torch.no_grad()
def audit(
    denoiser: Denoiser,
    train: PointCloud | ShardedCloud | None,
    held_out: PointCloud | ShardedCloud | None,
    *,
    noise: tuple[float, float] | None = None,
    levels: int = 8,
    queries: int | None = None,
    points: int = 64,
    samples: int = 128,
    width: float | None = None,
    generator: torch.Generator | None = None,
    checkpoint: Path | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **conditions: object,
) -> AuditReport:
    """Audits a trained network against its data: does it fit, does it memorise, is it the score of
    anything, does it know its errors, and are its samples copies? Call it before you publish a
    network, or trust its likelihoods and samples.

    >>> report = audit(denoiser, train, held_out, progress=True)
    >>> print(report)

    It measures, one after the other, each with a standard error:

        check           `check`; if it names a mistake, the audit ends here
        levels          at each noise level the mean square error of the network's x_0 on noisy
                        training and held-out data, beside that of the exact posterior mean of the
                        training data, which memorises all of them; the asymmetry, trace and largest
                        eigenvalue of its Jacobian; and the posterior variance that the Jacobian
                        implies beside the error
        likelihood      of training and held-out points, by `log_prob` with Hutchinson's trace
        samples         by Heun's method, and their distances to the data

    and says in `report.findings`, by the rules of `verdict` with the numbers of `thresholds`, what
    is clear beyond three standard errors, and what these data cannot tell.

    Args:
        denoiser: the network as you use it.
        train: its training data, or a random part of them; None if you do not have them. Of a
            `ShardedCloud` all files are read some 30 times, and once or twice for each level.
        held_out: data of the same law that it was not trained on; None if there are none. Of the
            two at least one is needed, and each is given what it takes: without `train` there are
            no exact means and no samples, without either no signs of memorisation.
        noise: (low, high), levels sigma/alpha. Default: from a tenth of the data's standard
            deviation, or from where the median ESS is 1.5 if that is less, to the highest level of
            `check`, or the schedule's end.
        levels: how many, at least 2, spaced evenly in ln sigma.
        queries: per level and kind of data, each from another data point where there are enough;
            default: as many as have 2^17 numbers, from 32 to 256.
        points: of each kind, at least 4, whose likelihood is computed; 0: none.
        samples: how many are drawn, at least 4; 0: none.
        width: of a bin of quantised data, as in `log_prob`, for bits per dimension: points are then
            spread evenly over their bins. Default: the data are continuous, and the likelihood is
            that of noisy points at the lowest level. With points=0 it has to be None.
        generator: on the CPU; None: seed 0, so that a repeated call gives the same report.
        checkpoint: a file to which every finished part is written, whole or not at all. If it
            exists, the audit goes on from it, with the same result as if it had never stopped.
        callback: called as callback(done, total) after each part.
        progress: show a bar on stderr.
        conditions: keyword arguments of the network, the same for all data, which have to be data
            under these conditions. A tensor goes to calls with different numbers of rows: give it
            one row, or none, and to a network that needs as many rows as x has, a function that
            expands it. Those with a name from above: `denoiser.bind(noise=...)`.

    The Jacobian's products are derivatives in reverse mode and differences, so that attention needs
    no other backend. Memory: one pass over the atoms at a time, and batches of 2^17 numbers.

    Returns:
        An `AuditReport`: `.ok`, `.findings`, `.verdict` and all numbers; `print` shows tables.

    Raises:
        TypeError, ValueError: An argument is wrong, the network returned NaN, inf or another shape,
            there are fewer than 4 points of a kind, or the schedule does not reach `noise`; the
            message names it. A checkpoint that is damaged, of another configuration or cannot be
            written (a `FileError`).
    """
    clouds = _checked(denoiser, train, held_out)
    rng = Rng(generator)
    seed = int(torch.randint(1 << 31, (), generator=rng.generator, dtype=torch.int64, device="cpu"))
    denoiser = denoiser.bind(**conditions)
    fixed = Rng(None)  # the levels are the same for all seeds
    found = range_of(clouds[0], denoiser.schedule, noise, fixed)
    count = argument.integer("levels", levels, 2)
    if queries is None:
        queries = min(_MOST, max(_LEAST, _NUMBERS // clouds[0].d))
    queries = argument.integer("queries", queries, FEWEST)
    if not points:
        argument.unused("width", width, "with points=0, which leaves the likelihood out")
    groups = min(queries, *(len(cloud) for cloud in clouds))
    task = Task(
        denoiser,
        train,
        held_out,
        found.noise,
        _levels(denoiser, count, found.noise),
        groups,
        queries // groups,
        _number("samples", samples),
        _number("points", points),
        None if width is None else argument.positive("width", width),
        data_mean(clouds[0])[0].double(),
        data_std(clouds[0], fixed),
        seed,
    )
    given = {} if checkpoint is None else configuration(task)
    total = 1 + len(task.levels) + (len(clouds) if task.points else 0) + 1
    with reporting("audit", callback, progress, total) as report:
        return _report(task, found, Parts(checkpoint, given, denoiser, report, total))


def _report(task: Task, found: Range, parts: Parts) -> AuditReport:
    """Measures what is not known yet, and says what all of it means."""
    checked = parts.get("check", CheckReport | None, lambda: _check(task, found))
    measured, likelihood, sampled = (), None, None
    if checked is None or checked.cause in (None, "unknown"):
        measured = tuple(
            parts.get(f"level {i}", LevelAudit, lambda i=i, at=at: level.measured(task, i, at))
            for i, at in enumerate(task.levels, 1)
        )
        likelihood = _likelihood(task, parts)
        sampled = parts.get(
            "samples", SampleAudit | None, lambda: samples.measured(task, len(measured) + 2)
        )
    rounding = task.denoiser.rounding(task.normal(task.rng(0), 1).to(task.dtype))
    sizes = {kind: len(cloud) for kind, cloud in task.clouds.items()}
    train, held_out = sizes.get("train"), sizes.get("held_out")
    settings = Settings(
        task.denoiser.short,
        tuple(task.reference.event_shape),
        train,
        held_out,
        task.noise,
        task.groups * task.repeats,
        task.width,
        rounding,
        task.seed,
    )
    findings = [verdict.of_check(checked, found.obstacle)]
    if measured:
        findings += verdict.of_levels(measured, rounding)
    if likelihood is not None:
        findings += verdict.of_likelihood(likelihood)
    if sampled is not None:
        findings += verdict.of_samples(sampled)
    if measured:
        findings += verdict.of_data(train, held_out, rounding, measured)
    findings = tuple(verdict.doubted(findings, measured))
    return AuditReport(
        settings, checked, measured, likelihood, sampled, findings, parts.evaluations
    )


def _check(task: Task, found: Range) -> CheckReport | None:
    if found.check is None:
        return None
    generator = task.rng(0).generator
    return check(task.denoiser, task.reference, noise=found.check, generator=generator)


def _likelihood(task: Task, parts: Parts) -> LikelihoodAudit | None:
    """Of both kinds by the same random numbers."""
    if not task.points:
        return None
    seed = len(task.levels) + 1
    return likelihoods.compared(
        task,
        {
            kind: parts.get(
                f"likelihood of {kind}",
                likelihoods.PointLikelihoods,
                lambda cloud=cloud: likelihoods.measured(task, seed, cloud),
            )
            for kind, cloud in task.clouds.items()
        },
    )


def _levels(denoiser: Denoiser, count: int, noise: tuple[float, float]) -> tuple[Level, ...]:
    """The levels of the audit, noise rising."""
    t = times(denoiser.schedule, count, noise).flip(0)
    return tuple(
        Level(*(part.item() for part in (at, *denoiser.schedule(at)))) for at in t.unbind()
    )


def _number(name: str, value: int) -> int:
    """A number of points or samples: 0, or enough for a standard error."""
    if 0 < argument.integer(name, value, 0) < FEWEST:
        raise argument.mismatch(name, f"0 or at least {FEWEST}", value)
    return value


def _checked(denoiser: Denoiser, train: Points | None, held_out: Points | None) -> list[Points]:
    """The clouds that were given, the training data first.

    Raises:
        TypeError, ValueError: One of the arguments is wrong.
    """
    expect_denoiser(denoiser)
    given = {"train": train, "held_out": held_out}
    for name, cloud in given.items():
        if cloud is not None and not isinstance(cloud, Points):
            wrong = (
                f"{name}: expected a PointCloud, a ShardedCloud or None, got {type(cloud).__name__}"
            )
            if isinstance(cloud, Law):
                raise TypeError(
                    f"{wrong}: an audit asks which data points a network has learnt by heart; give "
                    "a sample of the mixture, PointCloud(mixture.sample(n, generator)), or compare "
                    "with it by df.check"
                )
            raise TypeError(f"{wrong}; wrap it: PointCloud(y)")
        if cloud is not None and len(cloud) < FEWEST:
            raise argument.mismatch(name, f"at least {FEWEST} points", f"{len(cloud)}")
    clouds = [cloud for cloud in given.values() if cloud is not None]
    if not clouds:
        raise argument.mismatch("train, held_out", "data of at least one kind", "None for both")
    if clouds[0].event_shape != clouds[-1].event_shape:
        shapes = [list(cloud.event_shape) for cloud in clouds]
        raise argument.mismatch("held_out", f"points of shape {shapes[0]} as in train", shapes[1])
    if clouds[0].device != clouds[-1].device:
        raise argument.mismatch("held_out", f"device {clouds[0].device}", clouds[-1].device)
    return clouds
