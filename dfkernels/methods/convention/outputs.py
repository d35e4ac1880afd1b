"""What a network returned, read in other ways, and a network that is called in other ways."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...schedule import Schedule
from ..denoiser import Denoiser
from .queries import Queries

__all__ = ["altered", "clocks", "output", "read", "scales", "with_network"]


def output(denoiser: Denoiser, q: Queries, conditions: dict[str, object]) -> Tensor:
    """What the network returns for the queries, [Q, *E]. One call.

    Raises:
        ValueError: It holds NaN or inf.
    """
    eps, mean = denoiser.both(q.x, q.t, **conditions)
    kind = denoiser.prediction_type
    if kind == "sample":
        out = mean
    elif kind == "epsilon":
        out = eps
    elif kind == "v_prediction":
        out = q.alpha * eps - q.sigma * mean
    elif kind == "score":
        out = eps * (-1 / q.sigma)
    else:
        alpha_rate, sigma_rate = (rate.item() for rate in denoiser.schedule.rates(q.t))
        out = alpha_rate * mean + sigma_rate * eps
    if not bool(out.isfinite().all()):  # which the denoiser does not look at on an accelerator
        raise ValueError(f"network: returned NaN or inf at t = {q.t:g}")
    return out


def read(kind: str, schedule: Schedule, q: Queries, out: Tensor) -> Tensor:
    """The posterior mean if `out` is the prediction of that kind."""
    return Denoiser(lambda x, t: out, schedule, kind)(q.x, q.t)


class _Altered(nn.Module):
    """A network that is given other times, or scaled states."""

    def __init__(self, network: Callable[..., object], time: float | None, scale: float) -> None:
        super().__init__()
        self.network, self.time, self.scale = network, time, scale
        self.full_precision = getattr(network, "full_precision", False)

    def forward(self, x: Tensor, t: Tensor, **conditions: object) -> object:
        if self.time is not None:
            time = self.time if t.is_floating_point() else round(self.time)
            t = torch.full_like(t, time)
        return self.network(self.scale * x, t, **conditions)


def altered(denoiser: Denoiser, time: float | None = None, scale: float = 1.0) -> Denoiser:
    """The same denoiser, whose network is given `time` for every t, and `scale` x for x."""
    return with_network(denoiser, _Altered(denoiser.network, time, scale))


def with_network(denoiser: Denoiser, network: nn.Module) -> Denoiser:
    """The same denoiser of another network; calls count as the first one's."""
    other = copy.copy(denoiser)
    other._modules = dict(denoiser._modules)  # which copy.copy shares
    other.network = network
    return other


def clocks(schedule: Schedule, t: float) -> Iterator[tuple[str, float]]:
    """Times that a network may expect where the schedule says t, with how they are written."""
    alpha, sigma = (level.item() for level in schedule(t))
    low, high = schedule.t_range
    forward = {"t": t}
    if high < torch.inf:
        forward[f"{low + high:g} - t"] = low + high - t
    for name, time in forward.items():
        yield name, time
        name = name if name == "t" else f"({name})"
        for factor in (999, 1000):
            if high <= 1:
                yield f"{factor} {name}", factor * time
            elif high >= 100:
                yield f"{name}/{factor}", time / factor
    s = torch.tensor(sigma / alpha, dtype=torch.float64, device="cpu")
    yield "sigma", sigma
    yield "sigma/alpha", s.item()
    yield "1000 sigma", 1000 * sigma
    yield "ln(sigma/alpha)/4", s.log().item() / 4
    yield "ln(sigma/alpha)", s.log().item()
    if alpha == 1:
        yield "sigma^2", sigma**2


def scales(q: Queries) -> Iterator[tuple[str, float]]:
    """Factors of x that a network may expect, with how its argument is then written."""
    yield "x/alpha", 1 / q.alpha
    yield "x/sqrt(alpha^2 + sigma^2)", 1 / (q.alpha**2 + q.sigma**2) ** 0.5
    yield "x/sqrt(alpha^2/4 + sigma^2)", 1 / (q.alpha**2 / 4 + q.sigma**2) ** 0.5
    yield "alpha x", q.alpha
