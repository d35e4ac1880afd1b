"""PF-ODE log-likelihood in the noise level s = sigma/alpha, nowhere divided by a power of sigma.

With xbar = x/alpha, along the flow dxbar/d ln s = s eps(x, t) (math: the PF-ODE; Chen et al. 2018,
FFJORD),

    d log q/d ln s = -sigma^2 tr F = -(d - tr Cov_w(u)),    log q_x = log q_xbar - d ln alpha,

from s_min (the data end) to s_max, where xbar ~ N(0, (s_max^2 + data_std^2) I). tr F comes from the
exact cloud, a trained trace network (DF-TM), Hutchinson's estimator or the exact divergence of the
network: any function (x, t) -> tr F [B], or `Hutchinson` and `Divergence`, which differentiate the
denoiser itself.

The error of the integration. A small error (dxbar, dl) of the state and of the integral of d log q,
made at the level s, changes log q at the start by dxbar . score - dl: log q at x is the same from
wherever on its path one begins, so that its derivative in the state is the score there, -eps/s,
which is at hand. Hence local errors add up in nats without an adjoint equation.
"""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import check
from .._torch.shapes import flat
from . import solvers
from ._calls import checked
from ._reporting import Callback, reporting
from .denoiser import Denoiser
from .grid import noise_range, time_grid
from .traces import Divergence, Hutchinson, Source, Trace, exact, source_of

__all__ = ["METHODS", "Divergence", "Hutchinson", "Likelihood", "exact", "log_prob"]

METHODS = ("heun", "rk4", "dopri5")
_FIXED = {"heun": solvers.HEUN, "rk4": solvers.RK4}
State = solvers.State  # (x/alpha [B, *E], the integral of d log q [B])

# above both, an estimated error is worth a warning
_WARN_NATS, _WARN_BITS = 0.1, 0.01

# closed Newton-Cotes rules over 1 to 4 steps, in steps; the first is Euler's
_RULES = {
    1: (1, 0),
    2: (1 / 3, 4 / 3, 1 / 3),
    3: (3 / 8, 9 / 8, 9 / 8, 3 / 8),
    4: (14 / 45, 64 / 45, 24 / 45, 64 / 45, 14 / 45),
}


class Likelihood(NamedTuple):
    """What `log_prob` returns. Under another prior, log_prob changes by what latent_log_prob
    changes.
    """

    log_prob: Tensor  # [B], nats: log density of x = x_{t_min}
    bits_per_dim: Tensor  # [B]: of x/alpha, -log2 density / d - log2(width)
    latent: Tensor  # [B, *E]: x_{t_max}
    latent_log_prob: Tensor  # [B], nats: of latent/alpha under the normal prior at s_max
    evaluations: int  # calls of the network, each on the whole batch
    products: int  # products of the network's Jacobian with a vector, per sample
    error: Tensor  # [B], nats: the estimated error of the integration in log_prob; no bound
    trace_error: Tensor  # [B], nats: the standard error that random probes leave in log_prob


def log_prob(
    denoiser: Denoiser,
    x: Tensor,
    noise: tuple[float, float],
    trace: str | Trace | Source,
    *,
    generator: torch.Generator | None = None,
    method: str = "dopri5",
    steps: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_evaluations: int | None = None,
    data_std: float = 0.0,
    width: float = 1.0,
    callback: Callback | None = None,
    progress: bool = False,
    **conditions: object,
) -> Likelihood:
    """The log-likelihood of x under a diffusion model, by the probability-flow ODE.

    It is log q_{t_min}(x), the density at the lowest noise level s_min, i.e. of
    alpha (x_0 + s_min noise), not of x_0 itself.

    >>> result = log_prob(denoiser, x, (0.01, 50.0), "hutchinson", progress=True)
    >>> result.bits_per_dim, result.error

    Data x_0 of a continuous law: pass alpha x_0 + sigma eps, a sample of the density that is
    evaluated. Quantised data (8-bit images, say): pass alpha (x_0 + u), u uniform over the bin, and
    `width`; the mean bits_per_dim is then an upper bound of the quantised data's under the model
    (Theis et al. 2016).

    Args:
        denoiser: the flow; its schedule must reach `noise`.
        x: [B, *E], float32 or float64: the state at s_min; the computation follows its dtype.
        noise: (s_min, s_max), levels sigma/alpha, 0 < s_min < s_max.
        trace: where tr F comes from:
            "exact": the data set, for a `Denoiser.exact`;
            "divergence": all d products with the network's Jacobian, or `Divergence(...)`;
            "hutchinson": one random product, or `Hutchinson(generator, probes, ...)`;
            a function (x, t) -> tr F [B], such as a `trace_matching.MatchedTrace`, or
            `exact(cloud, schedule)`;
            any `traces.Source`.
        generator: of the probes of "hutchinson", on x's device; None: seed 0, so that a repeated
            call gives the same bits. For any other `trace` it has to be None.
        method: "dopri5" (order 5, 6 evaluations per step) chooses its steps by their errors; it
            looks at values, and so cannot run under vmap; for a discrete schedule, on whose
            staircase its steps would become ever shorter, it is refused. "rk4" (order 4, 4 per
            step) and "heun" (order 2, 2 per step) take `steps` equal steps in ln s.
        steps: of "rk4" and "heun"; None: 64. With "dopri5" it has to be None.
        rtol, atol: of "dopri5"; None: 1e-5. With another method they have to be None. For each
            sample a step's error is at most rtol |x/alpha| + atol s in the root mean square over
            the entries of x/alpha, and rtol d + atol nats. The batch takes steps together, those of
            its stiffest sample: what else is in the batch moves a result within the tolerance.
        max_evaluations: of the velocity by "dopri5"; None: 5000, see RuntimeError. With another
            method it has to be None.
        data_std: standard deviation added to the prior's: 0 for variance exploding, 1 for N(0, I)
            of a variance-preserving process, the data's own for the least error.
        width: of a bin, in units of x/alpha: 2/256 for 8-bit values spread over [-1, 1]; 1 if
            continuous.
        callback: called as callback(done, total) after each step; for "dopri5" in percent of the
            way in ln s, out of 100.
        progress: show a bar on stderr.
        conditions: keyword arguments of the network.

    `error` adds up the sizes of the local errors, of an embedded method of order 4 for "dopri5",
    else of what a quadrature of the slopes at the steps' ends says (one evaluation more), and of
    the rounding of the states. It knows nothing of the prior's error, nor of the trace's. Where it
    exceeds both 0.1 nats and 0.01 bits per dimension, a RuntimeWarning says so. `trace_error` is
    that of K >= 2 random probes, from the spread of log_prob over them: the standard deviation over
    K^(1/2). It is 0 where no probes are drawn, and NaN for one probe, which has no spread. Results
    have the units of x to the power -d, and nothing else depends on the units of x, the data and
    `noise`.

    Differentiable in the steps taken; call it under torch.no_grad() otherwise. With the trace of a
    network that is a second derivative of it, which attention has in one backend only: call
    it within torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH).

    Returns:
        A `Likelihood`, with log_prob in nats and the estimated error.

    Raises:
        TypeError, ValueError: An argument, or what `network` or `trace` returned, is wrong (shape,
            NaN, inf); the message names it.
        NotImplementedError: "divergence" or "hutchinson" asks for a derivative that PyTorch does
            not have of the network's attention, or of checkpointed activations, or that the network
            cuts, as by torch.no_grad().
        RuntimeError: "dopri5" gives up before it would exceed max_evaluations, as it may at low
            noise, where the flow of a finite data set is stiff between atoms. The message says at
            which noise level.
    """
    d = check.query("x", x).shape[1]
    check.choice("method", method, METHODS)
    noise = noise_range(noise)
    if method == "dopri5" and denoiser.schedule.discrete:
        expected = "'rk4' or 'heun' with a discrete schedule, whose flow is a staircase that steps "
        expected += "chosen by their errors do not end on"
        raise check.mismatch("method", expected, repr(method))
    time_grid(denoiser.schedule, 1, noise)  # raises for a range out of the schedule's reach
    steps, adaptive = steps_of(method, steps), method == "dopri5"
    rtol, atol, most = _tolerances(method, rtol, atol, max_evaluations)
    data_std, width = check.nonnegative("data_std", data_std), check.positive("width", width)
    denoiser.warn_in_training("log_prob")
    denoiser, before = denoiser.bind(**conditions), denoiser.evaluations
    flow = _Flow(denoiser, x, noise, source_of(trace, denoiser, x, generator))
    error = _LocalErrors(x, rtol, atol)
    with reporting("log_prob", callback, progress, 100 if adaptive else steps) as report:
        if adaptive:
            state = _adaptive(flow, x, noise, error, most, report)
        else:
            state = _fixed(_FIXED[method], flow, x, error, steps, report)
    first, last = flow.levels(math.log(noise[0]))[1], flow.levels(math.log(noise[1]))[1]
    variance = noise[1] ** 2 + data_std**2
    square = state[0].reshape(len(x), d).square().sum(1)
    prior = -(square / variance + d * math.log(2 * math.pi * variance)) / 2
    nats = prior - state[1]
    bits = -nats / (d * math.log(2)) - math.log2(width)
    _warn(error.total(), d, method)
    return Likelihood(
        nats - d * first.log().item(),
        bits,
        state[0] * last,
        prior,
        denoiser.evaluations - before,
        flow.calls * flow.source.products(d),
        error.total(),
        _standard_error(*state[1:]),
    )


def steps_of(method: str, steps: int | None) -> int:
    """The number of equal steps of a method; 0 for "dopri5", which chooses its own."""
    if method != "dopri5":
        return check.integer("steps", 64 if steps is None else steps, 1)
    own = "which chooses its steps by rtol and atol (method='rk4' takes as many as you say)"
    check.unused("steps", steps, f"with method='dopri5', {own}")
    return 0


def _tolerances(
    method: str, rtol: float | None, atol: float | None, max_evaluations: int | None
) -> tuple[float, float, int]:
    """Those of "dopri5", and 0 for the other methods."""
    given = {"rtol": rtol, "atol": atol, "max_evaluations": max_evaluations}
    if method != "dopri5":
        for name, value in given.items():
            check.unused(name, value, f"with method={method!r}, which takes `steps` equal steps")
        return 0.0, 0.0, 0
    return (
        check.positive("rtol", 1e-5 if rtol is None else rtol),
        check.positive("atol", 1e-5 if atol is None else atol),
        check.integer("max_evaluations", 5000 if max_evaluations is None else max_evaluations, 1),
    )


class _Flow:
    """The slope of the state (xbar, l) in u = ln s, with l the integral of d log q; of K random
    estimates of the trace, l is their mean, and their own integrals [K, B] follow it in the state.
    """

    def __init__(
        self, denoiser: Denoiser, x: Tensor, noise: tuple[float, float], source: Source
    ) -> None:
        self.source = source
        self.both = source.begin(denoiser, x)
        self.schedule, self.calls = denoiser.schedule, 0
        self.low, self.high = (math.log(level) for level in noise)

    def levels(self, u: float) -> tuple[Tensor, Tensor, Tensor]:
        """(t, alpha, sigma) at ln s = u, each [] in float64."""
        t = self.schedule.t_of_log_snr(-2 * min(max(u, self.low), self.high))
        return t, *self.schedule(t)

    def __call__(self, u: float, state: State) -> State:
        self.calls += 1
        t, alpha, sigma = self.levels(u)
        eps, tr = self.both(alpha * state[0], t)
        random = self.source.estimates() > 0
        mean = tr.mean(0) if random else tr
        mean = checked(
            "trace",
            mean,
            state[1],
            t.expand(len(mean) if isinstance(mean, Tensor) and mean.ndim else 1),
        )
        each = (mean, tr) if random else (mean,)
        return sigma / alpha * eps, *(-(sigma**2) * part for part in each)

    def start(self, x: Tensor) -> State:
        K = self.source.estimates()
        each = (x.new_zeros(len(x)), x.new_zeros(K, len(x))) if K else (x.new_zeros(len(x)),)
        return x / self.levels(self.low)[1], *each


def _standard_error(mean: Tensor, each: Tensor | None = None) -> Tensor:
    """That of the mean [B] of random estimates [K, B]."""
    if each is None:
        return torch.zeros_like(mean.detach())
    if len(each) == 1:
        return torch.full_like(mean.detach(), math.nan)
    gap = each.detach() - mean.detach()
    return (gap.square().sum(0) / (len(each) * (len(each) - 1))).sqrt()


class _LocalErrors:
    """Adds up the local errors of each sample in nats, and judges steps by them."""

    def __init__(self, x: Tensor, rtol: float, atol: float) -> None:
        self.rtol, self.atol = rtol, atol
        self.sum = self.rounding = x.detach().new_zeros(len(x))

    def nats(self, u: float, state: State, slope: State, error: State) -> tuple[Tensor, Tensor]:
        """The size in nats of a local error (dxbar, dl), |dxbar . score - dl|, and of the rounding
        of xbar, each [B].
        """
        s = math.exp(u)
        score = flat(slope[0].detach() / s)  # times -s
        size = (flat(error[0].detach() / s) * score).sum(1) + error[1].detach()
        unit = torch.finfo(score.dtype).eps / 2
        return size.abs(), unit * (flat(state[0].detach() / s) * score).norm(dim=1)

    def judge(self, step: solvers.Step) -> float:
        """The largest error of any sample relative to the tolerance."""
        s, d = math.exp(step.u), max(1, step.after[0].shape[1:].numel())
        rms = lambda part: flat(part.detach()).norm(dim=1) / math.sqrt(d)
        nats, rounding = self.nats(step.u, step.after, step.slope, step.error)
        ratio = torch.stack(
            [
                rms(step.error[0])
                / (
                    self.rtol * torch.maximum(rms(step.before[0]), rms(step.after[0]))
                    + self.atol * s
                ),
                nats
                / (self.rtol * d + self.atol + 8 * rounding),  # no step is better than rounding
            ]
        )
        return ratio.max().item() if ratio.numel() else 0.0

    def add(self, u: float, state: State, slope: State, error: State) -> None:
        nats, rounding = self.nats(u, state, slope, error)
        self.sum, self.rounding = self.sum + nats, self.rounding + rounding**2

    def total(self) -> Tensor:
        """The estimated error of the integration in nats, [B]: truncation errors add up at worst,
        rounding errors as independent ones.
        """
        return self.sum + self.rounding.sqrt()


def _adaptive(
    flow: _Flow,
    x: Tensor,
    noise: tuple[float, float],
    error: _LocalErrors,
    limit: int,
    report: Callback,
) -> State:
    least = 8 * torch.finfo(x.dtype).eps
    if error.rtol < least:
        raise check.mismatch("rtol", f"at least {least:.2g} with x in {x.dtype}", error.rtol)

    def accept(step: solvers.Step) -> None:
        error.add(step.u, step.after, step.slope, step.error)
        report(round(100 * (step.u - flow.low) / (flow.high - flow.low)), 100)

    try:
        return solvers.adaptive(
            flow, flow.start(x), flow.low, flow.high, error.judge, accept, limit
        )
    except solvers.Unfinished as stop:
        raise RuntimeError(
            f"log_prob: gave up at noise level {math.exp(stop.u):.4g} of {noise[0]:g} to "
            f"{noise[1]:g}, after {stop.evaluations} evaluations: {stop.why} in ln s. "
            f"Raise max_evaluations = {limit} or noise[0], or accept the error of steps of equal "
            'length (method="rk4")'
        ) from None


def _fixed(
    tableau: solvers.Tableau,
    flow: _Flow,
    x: Tensor,
    error: _LocalErrors,
    steps: int,
    report: Callback,
) -> State:
    """Integrates in equal steps. The state's change over each block of up to 4 of them is compared
    with a Newton-Cotes rule of the slopes, which is of higher order, or of the same and with
    another error.
    """
    h, ends, state = (flow.high - flow.low) / steps, _block_ends(steps), flow.start(x)
    begin, block = state, []
    for i in range(steps + 1):
        u = flow.low + i * h
        # the last slope is for the error alone
        with torch.set_grad_enabled(torch.is_grad_enabled() and i < steps):
            block.append(flow(u, state))
        if i in ends:
            rule = solvers.advanced(begin, h, _RULES[len(block) - 1], block)
            gap = tuple(a.detach() - b.detach() for a, b in zip(state, rule, strict=True))
            error.add(u, state, block[-1], gap)
            begin, block = state, block[-1:]
        if i < steps:
            at = lambda c, y, u=u: flow(u + c * h, y)
            state = solvers.advanced(
                state, h, tableau.b, solvers.slopes(tableau, at, state, h, block[-1])
            )
            report(i + 1, steps)
    return state


def _block_ends(steps: int) -> set[int]:
    """The steps at which blocks of 4 end, with 2 or 3 steps in the last ones rather than 1."""
    ends = set(range(4, steps + 1, 4)) | {steps}
    return ends - {steps - 1} | {steps - 2} if steps > 4 and steps % 4 == 1 else ends


def _warn(error: Tensor, d: int, method: str) -> None:
    if check.values_hidden(error) or not len(error):
        return
    large = error > max(_WARN_NATS, _WARN_BITS * d * math.log(2))
    if bool(large.any()):
        how = "smaller rtol and atol" if method == "dopri5" else 'more steps, or method="dopri5"'
        warnings.warn(
            "log_prob: the estimated error of the integration is up to "
            f"{error.max().item():.2g} nats, and large for {int(large.sum())} of {len(error)} "
            f"samples: take {how}; see Likelihood.error",
            RuntimeWarning,
            stacklevel=3,
        )
