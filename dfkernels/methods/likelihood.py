"""PF-ODE log-likelihood in the noise level s = sigma/alpha, nowhere divided by a power of sigma.

With xbar = x/alpha, along the flow dxbar/d ln s = s eps(x, t) (math: the PF-ODE; Chen et al. 2018, FFJORD),

    d log q/d ln s = -sigma^2 tr F = -(d - tr Cov_w(u)),    log q_x = log q_xbar - d ln alpha,

from s_min (the data end) to s_max, where xbar ~ N(0, (s_max^2 + data_std^2) I). tr F comes from the exact
cloud, a trained trace network (DF-TM), Hutchinson's estimator or the exact divergence of the network: any
function (x, t) -> tr F [B], or `Hutchinson` and `Divergence`, which differentiate the denoiser itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _check
from ..cloud import PointCloud
from ..fisher import DiffusionFisher
from ..schedule import Schedule
from .denoiser import Denoiser, checked
from .grid import time_grid
from .trace_matching import MatchedTrace

__all__ = ["METHODS", "Divergence", "Hutchinson", "Likelihood", "exact", "log_prob"]

METHODS = ("heun", "rk4", "dopri5")
MODES = ("jvp", "vjp")
KINDS = ("rademacher", "gaussian")
Trace = Callable[[Tensor, Tensor], Tensor]
Both = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
State = tuple[Tensor, Tensor]


class Likelihood(NamedTuple):
    """What `log_prob` returns. Under another prior, log_prob changes by what latent_log_prob changes."""

    log_prob: Tensor  # [B], nats: log density of x = x_{t_min}
    bits_per_dim: Tensor  # [B]: of x/alpha, -log2 density / d - log2(width)
    latent: Tensor  # [B, *E]: x_{t_max}
    latent_log_prob: Tensor  # [B], nats: of latent/alpha under the normal prior at s_max
    evaluations: int  # calls of the network, each on the whole batch
    products: int  # products of the network's Jacobian with a vector, per sample


def log_prob(
    denoiser: Denoiser,
    x: Tensor,
    noise: tuple[float, float],
    trace: Trace | Hutchinson | Divergence,
    *,
    method: str = "rk4",
    steps: int = 64,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    data_std: float = 0.0,
    width: float = 1.0,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Likelihood:
    """log q_{t_min}(x): the density at s_min, i.e. of alpha (x_0 + s_min noise), not of x_0 itself.

    Data x_0 of a continuous law: pass alpha x_0 + sigma eps, a sample of the density that is evaluated.
    Quantised data (8-bit images, say): pass alpha (x_0 + u), u uniform over the bin, and `width`; the mean
    bits_per_dim is then an upper bound of the quantised data's under the model (Theis et al. 2016).

    Args:
        denoiser: the flow; its schedule must reach `noise`.
        x: [B, *E], float32 or float64: the state at s_min; the computation follows its dtype.
        noise: (s_min, s_max), levels sigma/alpha, 0 < s_min < s_max.
        trace: (x, t) -> tr F [B], e.g. a `trace_matching.MatchedTrace` or `exact(cloud, schedule)`; or
            `Hutchinson(generator, ...)`, `Divergence()`, which share the network's evaluation.
        method: "heun" (order 2, 2 evaluations per step), "rk4" (order 4, 4 per step), both with `steps` equal
            steps in ln s; "dopri5": adaptive, by torchdiffeq, to rtol and atol jointly over the batch.
        data_std: standard deviation added to the prior's: 0 for variance exploding, 1 for N(0, I) of a
            variance-preserving process, the data's own for the least error.
        width: of a bin, in units of x/alpha: 2/256 for 8-bit values spread over [-1, 1]; 1 if continuous.
        step: called as step(done, total) after each step; once with "dopri5".

    Differentiable; call it under torch.no_grad() otherwise.

    Raises ValueError or TypeError naming the argument, `network` or `trace` (wrong shape, NaN, inf);
    ModuleNotFoundError for "dopri5" without torchdiffeq.
    """
    d = _check.query("x", x).shape[1]
    _check.choice("method", method, METHODS)
    time_grid(denoiser.schedule, 1, noise)  # raises for a wrong range, or one out of the schedule's reach
    for name, value, least in (("steps", steps, 1), ("data_std", data_std, 0)):
        if not least <= value < math.inf:
            raise _check.mismatch(name, f"at least {least}", value)
    for name, value in (("width", width), ("rtol", rtol), ("atol", atol)):
        if not 0 < value < math.inf:
            raise _check.mismatch(name, "a finite value > 0", value)
    both = trace.begin(denoiser, x) if isinstance(trace, _Derivative) else _separate(denoiser, trace)
    low, high = (math.log(level) for level in noise)
    stages, before = 0, denoiser.evaluations

    def levels(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = denoiser.schedule.t_of_log_snr(-2 * u.detach().double().clamp(low, high))
        return t, *denoiser.schedule(t)

    def velocity(u: Tensor, state: State) -> State:
        nonlocal stages
        stages += 1
        t, alpha, sigma = levels(u)
        eps, tr = both(alpha * state[0], t)
        checked("trace", tr, state[1], t.expand(len(x)))
        return sigma / alpha * eps, -(sigma**2) * tr

    u = torch.linspace(low, high, 2 if method == "dopri5" else steps + 1, dtype=torch.float64)
    first, last = levels(u[0])[1], levels(u[-1])[1]
    state = (x / first, x.new_zeros(len(x)))
    if method == "dopri5":
        state = _adaptive(velocity, state, u, rtol, atol)
        step(1, 1)
    else:
        advance = _heun if method == "heun" else _rk4
        for i in range(steps):
            state = advance(velocity, u[i], u[i + 1] - u[i], state)
            step(i + 1, steps)
    variance = noise[1] ** 2 + data_std**2
    square = state[0].reshape(len(x), d).square().sum(1)
    prior = -(square / variance + d * math.log(2 * math.pi * variance)) / 2
    nats = prior - state[1]
    bits = -nats / (d * math.log(2)) - math.log2(width)
    return Likelihood(
        nats - d * first.log().item(),
        bits,
        state[0] * last,
        prior,
        denoiser.evaluations - before,
        stages * (trace.products(d) if isinstance(trace, _Derivative) else 0),
    )


def exact(cloud: PointCloud, schedule: Schedule) -> Trace:
    """tr F of the data set itself (Prop. 5): with `Denoiser.exact(cloud, schedule)`, log q_t of the cloud."""
    return lambda x, t: DiffusionFisher(x, cloud, *schedule(t)).trace()


class _Derivative:
    """A trace that differentiates the denoiser: tr F = tr(J)/sigma, J = d eps/dx."""

    def begin(self, denoiser: Denoiser, x: Tensor) -> Both:
        """(x, t) -> (eps, tr F) for one trajectory."""
        raise NotImplementedError

    def products(self, d: int) -> int:
        """Jacobian products per sample and evaluation."""
        raise NotImplementedError


@dataclass(frozen=True)
class Hutchinson(_Derivative):
    """tr F ~ mean_k <v_k, J v_k>/sigma, J = d eps/dx, for K probes v with E v v^T = I: unbiased at any K.

    The probes are drawn once per trajectory, as in FFJORD: the solver sees a smooth field, and log_prob is
    unbiased but for the solver's error.

    Args:
        generator: on x's device; the same state gives the same bits.
        probes: K, the number of Jacobian products per evaluation.
        kind: "rademacher" (+-1: the least variance among independent entries) or "gaussian".
        mode: "vjp" (reverse mode) or "jvp" (forward mode: slower for small networks, keeps no graph).
    """

    generator: torch.Generator
    probes: int = 1
    kind: str = "rademacher"
    mode: str = "vjp"

    def __post_init__(self) -> None:
        if not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(self.generator).__name__}")
        if self.probes < 1:
            raise _check.mismatch("probes", "at least 1", self.probes)
        _check.choice("kind", self.kind, KINDS)
        _check.choice("mode", self.mode, MODES)

    def begin(self, denoiser: Denoiser, x: Tensor) -> Both:
        shape, how = (self.probes, *x.shape), {"generator": self.generator, "device": x.device}
        if self.kind == "gaussian":
            v = torch.randn(shape, dtype=x.dtype, **how)
        else:
            v = torch.randint(2, shape, dtype=x.dtype, **how) * 2 - 1

        def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            eps, forms = _quadratic_forms(denoiser, x, t, self.mode, [v])
            return eps, forms.mean(0) / denoiser.levels(x, t)[1]

        return both

    def products(self, d: int) -> int:
        return self.probes


@dataclass(frozen=True)
class Divergence(_Derivative):
    """tr F = sum_j <e_j, J e_j>/sigma, J = d eps/dx: exact for the network, by d Jacobian products.

    Args:
        chunk: products done together: fewer calls, more memory.
        mode: "vjp" or "jvp", as for `Hutchinson`.
    """

    chunk: int = 8
    mode: str = "vjp"

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise _check.mismatch("chunk", "at least 1", self.chunk)
        _check.choice("mode", self.mode, MODES)

    def begin(self, denoiser: Denoiser, x: Tensor) -> Both:
        def axes() -> Iterator[Tensor]:
            d = x[0].numel()
            for j in torch.arange(d, device=x.device).split(self.chunk):
                rows = torch.nn.functional.one_hot(j, d).to(x.dtype)
                yield rows.view(len(j), 1, *x.shape[1:]).expand(-1, *x.shape)

        def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            eps, forms = _quadratic_forms(denoiser, x, t, self.mode, axes())
            return eps, forms.sum(0) / denoiser.levels(x, t)[1]

        return both

    def products(self, d: int) -> int:
        return d


def _quadratic_forms(
    denoiser: Denoiser, x: Tensor, t: Tensor, mode: str, stacks: Iterable[Tensor]
) -> tuple[Tensor, Tensor]:
    """eps [B, *E] and <v, J v> [K, B], J = d eps/dx, for the vectors of all stacks, each [k, B, *E]."""

    def network(x: Tensor) -> Tensor:
        return denoiser.eps(x, t)

    forms = []
    if mode == "vjp":
        eps, pull = torch.func.vjp(network, x)
    for v in stacks:
        if mode == "vjp":
            products = torch.func.vmap(pull)(v)[0] if len(v) > 1 else pull(v[0])[0][None]
        else:
            push = torch.func.vmap(lambda v: torch.func.jvp(network, (x,), (v,)), out_dims=(None, 0))
            eps, products = push(v)
        forms.append((v * products).reshape(*v.shape[:2], -1).sum(2))
    checked("network", eps, x, t.expand(len(x)))  # not looked at under torch.func
    return eps, torch.cat(forms)


def _separate(denoiser: Denoiser, trace: Trace) -> Both:
    if not callable(trace):
        raise TypeError(f"trace: expected a callable trace(x, t), got {type(trace).__name__}")

    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        eps = denoiser.eps(x, t)
        return eps, trace(x, t, eps) if isinstance(trace, MatchedTrace) else trace(x, t)

    return both


def _along(state: State, h: Tensor | float, *slopes: tuple[float, State]) -> State:
    """state + h sum_k c_k slope_k, for each part of the state."""
    return tuple(y + h * sum(c * k[part] for c, k in slopes) for part, y in enumerate(state))


def _heun(f: Callable[[Tensor, State], State], u: Tensor, h: Tensor, y: State) -> State:
    k1 = f(u, y)
    k2 = f(u + h, _along(y, h, (1, k1)))
    return _along(y, h, (1 / 2, k1), (1 / 2, k2))


def _rk4(f: Callable[[Tensor, State], State], u: Tensor, h: Tensor, y: State) -> State:
    k1 = f(u, y)
    k2 = f(u + h / 2, _along(y, h, (1 / 2, k1)))
    k3 = f(u + h / 2, _along(y, h, (1 / 2, k2)))
    k4 = f(u + h, _along(y, h, (1, k3)))
    return _along(y, h, (1 / 6, k1), (1 / 3, k2), (1 / 3, k3), (1 / 6, k4))


def _adaptive(f: Callable[[Tensor, State], State], y: State, u: Tensor, rtol: float, atol: float) -> State:
    try:
        from torchdiffeq import odeint
    except ModuleNotFoundError:
        raise ModuleNotFoundError('torchdiffeq not installed: pip install "dfkernels[ode]"') from None
    path = odeint(f, y, u.to(y[0].device), rtol=rtol, atol=atol, method="dopri5")
    return tuple(part[-1] for part in path)
