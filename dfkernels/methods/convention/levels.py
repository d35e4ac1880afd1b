"""Other noise levels than those of the schedule, at which a network may have been trained.

A network that assumes other levels returns, for the same x, what is exact at these. So its outputs
are compared with the exact answers for x at the levels of other schedules, and then at any level.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...law import Law
from ...schedule import VP, Cosine, Schedule, SubVP, Tabulated
from ...schedule._tabulated import floored
from ..denoiser import Denoiser
from .outputs import read
from .queries import Queries, exact
from .report import Explanation, judged

__all__ = ["any_levels", "other_schedules"]

_QUERIES = 16  # of the search for any level, which begins with all of these, in octaves
_OCTAVES = [k / 4 for k in range(-16, 17)]
_FINER = [k / 16 for k in (-3, -2, -1, 1, 2, 3)]


def other_schedules(
    denoiser: Denoiser, cloud: Law, queries: list[Queries], outs: Sequence[Tensor]
) -> Iterator[Explanation]:
    """The levels of well-known schedules of the same kind at the same times."""
    for name, schedule in _similar(denoiser.schedule):
        there = [_at(schedule, cloud, q, q.t, q.x) for q in queries]
        pairs = [(q, out) for q, out in zip(there, outs, strict=True) if q is not None]
        if len(pairs) == len(queries):
            means = [read(denoiser.prediction_type, schedule, q, out) for q, out in pairs]
            found = [q for q, _ in pairs]
            # at more noise even the data's mean has a small error
            if found[0].error(means[0]) < 0.999 * found[0].of_data_mean:
                yield judged("noise level", f"the noise levels of {name}", found, means)


def any_levels(
    denoiser: Denoiser, cloud: Law, queries: list[Queries], outs: Sequence[Tensor]
) -> Iterator[Explanation]:
    """For each level that at which the output fits best."""
    schedule = denoiser.schedule
    if isinstance(schedule, Tabulated) and denoiser.prediction_type != "flow":
        schedule = VP(0.1, 40.0)  # the same curve of alpha and sigma, but longer
    found = [
        _best(denoiser.prediction_type, schedule, cloud, q, out)
        for q, out in zip(queries, outs, strict=True)
    ]
    there = [best[1] for best in found if best is not None]
    if len(there) < len(queries):
        return
    named = ", ".join(f"{q.sigma / q.alpha:.3g}" for q in there)
    said = ", ".join(f"{q.sigma / q.alpha:.3g}" for q in queries)
    change = f"noise levels sigma/alpha of about {named} in place of {said}"
    means = [best[2] for best in found if best is not None]
    yield judged("noise level", change, there, means, 1, len(there))


def _best(
    kind: str, schedule: Schedule, cloud: Law, q: Queries, out: Tensor
) -> tuple[float, Queries, Tensor] | None:
    """The error, the queries and the mean at the level where the error is least; None where that
    is an end of the search.
    """
    fitted: dict[float, tuple[float, Queries, Tensor]] = {}
    for octaves in (_OCTAVES, _FINER):
        middle = min(fitted, key=lambda k: fitted[k][0]) if fitted else 0.0
        for k in octaves:
            s = q.sigma / q.alpha * 2 ** (middle + k)
            try:
                t = schedule.t_of_log_snr(-2 * math.log(s)).item()
            except ValueError:  # beyond the schedule's end
                continue
            few = _at(schedule, cloud, q, t, q.x[:_QUERIES])
            if few is not None:
                mean = read(kind, schedule, few, out[:_QUERIES])
                fitted[middle + k] = few.error(mean), few, mean
    best = min(fitted, key=lambda k: fitted[k][0]) if fitted else math.inf
    return fitted[best] if abs(best) < max(_OCTAVES) else None


def _at(schedule: Schedule, cloud: Law, q: Queries, t: float, x: Tensor) -> Queries | None:
    """Queries at the time t of a schedule, with the exact answers; None where one atom has all the
    weight, or the data have none.
    """
    alpha, sigma = (level.item() for level in schedule(t))
    if not (alpha > 0 and sigma > 0):
        return None
    mean, std, ess = exact(cloud, x, alpha, sigma)
    found = q._replace(t=t, alpha=alpha, sigma=sigma, x=x, mean=mean, std=std)
    return found._replace(ess=ess.median().item()) if std > 0 else None


def _similar(schedule: Schedule) -> Iterator[tuple[str, Schedule]]:
    """Schedules with which this one may have been confused, of the same times, with their names."""
    if isinstance(schedule, Tabulated):
        for name, table in _tables(schedule).items():
            yield name, Tabulated(table)
    elif isinstance(schedule, (VP, Cosine)):
        others: list[Schedule] = [VP(), SubVP(), Cosine()]
        if isinstance(schedule, VP):
            betas = schedule.beta_min, schedule.beta_max
            others += [VP(*betas), SubVP(*betas)]
        for i, other in enumerate(others):
            if other != schedule and other not in others[:i]:
                yield repr(other), other


def _tables(schedule: Schedule) -> dict[str, Tensor]:
    """Tables of alphas_cumprod of a schedule's length."""
    steps = round(schedule.t_range[1]) + 1
    index = torch.arange(steps + 1, dtype=torch.float64, device="cpu")
    unit = index[:-1] / (steps - 1)
    linear = 1e-4 + unit * (0.02 - 1e-4)
    root = 0.00085**0.5 + unit * (0.012**0.5 - 0.00085**0.5)
    cosine = torch.cos((index / steps + 0.008) / 1.008 * math.pi / 2).square()
    betas = {
        "DDPM's linear betas, 0.0001 to 0.02": linear,
        "Stable Diffusion's scaled-linear betas, 0.00085 to 0.012": root.square(),
        "iDDPM's cosine betas": (1 - cosine[1:] / cosine[:-1]).clamp_max(0.999),
    }
    tables = {name: (1 - beta).cumprod(0) for name, beta in betas.items()}
    own = schedule.alpha(index[:-1])
    rescaled = (own - own[-1]) * (own[0] / (own[0] - own[-1]))
    tables["this table rescaled to zero terminal SNR"] = floored(rescaled.square())
    return tables
