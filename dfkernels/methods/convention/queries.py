"""The queries of a check: at which noise levels, and the exact answers there.

A network and the data set that it was trained on have nearly the same posterior mean where many
atoms share the weight: it is then an average that one atom more or less does not change. So the
lowest noise level is the one where the median effective number of atoms (ESS) is 100, or a quarter
of all if these are fewer than 400, and not below the data's standard deviation per number. The
highest is 4 times that, or the schedule's end.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import check as argument
from ..._torch.objects import plain
from ...law import Law
from ...schedule import Schedule

__all__ = ["Queries", "Rng", "data_std", "exact", "make_queries", "noise_range_of", "reach"]

LEVELS, SPAN = 3, 4.0  # how many noise levels, and the highest over the lowest
_ENOUGH, _FEWEST = 100, 4  # atoms that share the weight at the lowest level; that a cloud must have
_LARGE = 4.0  # a standard deviation that data in a network's units do not have
_NUMBERS = 1 << 14  # of a batch of queries, where their count is not given
_ATOMS = 1 << 22  # numbers of the atoms from which the data's standard deviation is estimated


class Queries(NamedTuple):
    """The queries of one noise level, and the exact answers there."""

    t: float
    alpha: float
    sigma: float
    x: Tensor  # [Q, *E]
    mean: Tensor  # [Q, *E]: the exact posterior mean
    std: float  # the posterior's standard deviation per number, root mean square over the queries
    ess: float  # the median over the queries
    data_mean: Tensor  # [1, *E], of the atoms
    lowest: bool  # whether the other queries have more noise

    def error(self, mean: Tensor) -> float:
        """The root mean square of a mean's difference from the exact one, in units of `std`."""
        return _rms(mean.double() - self.mean.double()) / self.std

    @property
    def of_data_mean(self) -> float:
        """The error of the data's mean, whatever x is, as a prediction."""
        return self.error(self.data_mean)

    @property
    def allowed(self) -> float:
        """The error up to which a network fits: a loss 1/6 above the least one, noise predicted to
        10 %, or what other atoms of the same law would change, whichever is most; at the lowest
        level also clearly better than the data's mean.
        """
        noise = 0.1 * self.sigma / (self.alpha * self.std)
        limit = max(0.4, noise, 2 / math.sqrt(self.ess))
        return min(limit, 0.6 * self.of_data_mean) if self.lowest else limit


def exact(cloud: Law, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, float, Tensor]:
    """The posterior mean [Q, *E], the posterior's standard deviation per number, and how many data
    points stand behind it [Q]: the ESS of a data set.
    """
    with plain(x.device):
        p = cloud.posterior(x, alpha, sigma)
    variance = (sigma / alpha) ** 2 * (1 - sigma**2 * p.fisher_trace.double() / cloud.d)
    return p.mean, math.sqrt(max(variance.mean().item(), 0.0)), cloud._points_behind(p.ess)


def make_queries(
    cloud: Law, schedule: Schedule, noise: tuple[float, float], count: int | None, seed: Rng
) -> list[Queries]:
    """Queries alpha y + sigma eps of random atoms y at levels from noise[0] up to noise[1]."""
    if count is None:
        count = min(256, max(16, _NUMBERS // cloud.d))
    mean, found = data_mean(cloud)[0], []
    for i in range(LEVELS):
        s = noise[0] * (noise[1] / noise[0]) ** (i / (LEVELS - 1))
        t = schedule.t_of_log_snr(-2 * math.log(s)).item()
        alpha, sigma = (level.item() for level in schedule(t))
        x = _noisy(cloud, count, alpha, sigma, seed)
        truth, std, ess = exact(cloud, x, alpha, sigma)
        if not std > 0:
            raise ValueError(
                f"noise: expected levels at which several atoms share the posterior weight, got "
                f"sigma/alpha = {s:.4g}, where the weight is on one atom"
            )
        found.append(Queries(t, alpha, sigma, x, truth, std, ess.median().item(), mean, i == 0))
    return found


def noise_range_of(cloud: Law, schedule: Schedule, seed: Rng) -> tuple[float, float]:
    """The range of noise levels sigma/alpha of a check, by the rule above.

    Raises:
        ValueError: Too few atoms, atoms that are all the same, or a schedule that ends before.
    """
    atoms = data_mean(cloud)[1]
    if atoms < _FEWEST:
        raise argument.mismatch(
            "cloud", f"at least {_FEWEST} atoms of comparable weight", f"an ESS of {atoms:.3g}"
        )
    std = data_std(cloud, seed)
    if not std > 0:
        raise argument.mismatch("cloud", "atoms that differ", "atoms that are all the same")
    enough = min(_ENOUGH, atoms / 4)
    least, high = reach(schedule)
    low = max(std, least, _level_of(cloud, std, enough, seed))
    if low >= high:
        why = "are they in the units of the network's training?"
        if std < min(high, _LARGE):
            why = (
                f"these {len(cloud)} atoms are too few, in {cloud.d} dimensions, at the noise that "
                "the schedule reaches"
            )
        raise ValueError(
            f"schedule: expected noise sigma/alpha up to {low:.4g}, where {enough:.0f} atoms share "
            f"the posterior weight, got {schedule!r}, which ends at {high:.4g}. The data's "
            f"standard deviation is {std:.4g}: {why}"
        )
    return low, min(SPAN * low, high)


class Rng:
    """Random numbers drawn on the CPU in float64: the same ones on every device."""

    def __init__(self, generator: torch.Generator | None) -> None:
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        self.generator = argument.cpu_generator(generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def atoms(self, cloud: Law, count: int) -> Tensor:
        """Data drawn from the law, [count, *E] in float64."""
        return cloud.sample(count, self.generator)

    def different(self, cloud: Law, count: int) -> Tensor:
        """As `atoms`, but no atom of a data set twice where all have the same weight."""
        return cloud._without_repeats(count, self.generator)


def _noisy(cloud: Law, count: int, alpha: float, sigma: float, seed: Rng) -> Tensor:
    y = seed.atoms(cloud, count)
    x = alpha * y + sigma * seed.normal(*y.shape).to(y.device)
    return x.to(torch.float64 if cloud.dtype == torch.float64 else torch.float32)


def data_mean(cloud: Law) -> tuple[Tensor, float]:
    """The atoms' mean [1, *E], and their effective number, by the prior weights."""
    dtype = torch.float64 if cloud.dtype == torch.float64 else torch.float32
    x = torch.zeros(1, *cloud.event_shape, dtype=dtype, device=cloud.device)
    # at alpha = 0 the weights are the prior ones
    p = cloud.posterior(x, 0.0, 1.0)
    return p.mean, cloud._points_behind(p.ess).item()


def data_std(cloud: Law, seed: Rng) -> float:
    """The data's standard deviation per number, from some atoms."""
    y = seed.atoms(cloud, max(16, min(4096, _ATOMS // cloud.d)))
    return _rms(y - y.mean(0))


def _level_of(cloud: Law, std: float, ess: float, seed: Rng) -> float:
    """The noise level where the median ESS is as given, by interpolation between powers of 2."""
    pilots = max(4, min(16, _NUMBERS // cloud.d))
    last = None
    for k in range(-4, 24):
        s = std * 2.0**k
        here = (
            math.log(s),
            math.log(exact(cloud, _noisy(cloud, pilots, 1.0, s, seed), 1.0, s)[2].median().item()),
        )
        if here[1] >= math.log(ess):
            if last is None or here[1] <= last[1]:
                return s
            part = (math.log(ess) - last[1]) / (here[1] - last[1])
            return math.exp(last[0] + part * (here[0] - last[0]))
        last = here
    raise argument.mismatch("cloud", f"a noise level at which the ESS is {ess:.3g}", "none")


def reach(schedule: Schedule) -> tuple[float, float]:
    """The lowest and the highest noise level sigma/alpha of a schedule, a little inside."""
    ends = [schedule.log_snr(t).item() if t < math.inf else -math.inf for t in schedule.t_range]
    low, high = (math.exp(-lam / 2) if lam > -1400 else math.inf for lam in (max(ends), min(ends)))
    return low * (1 + 1e-6), high * (1 - 1e-6)


def _rms(difference: Tensor) -> float:
    return difference.square().mean().sqrt().item()
