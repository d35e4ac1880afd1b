"""The denoiser: a network of any convention, or the data set itself, as posterior mean, noise
prediction and score.

With x = alpha x_0 + sigma eps and an output `out` of the network, the predictions of x_0 and eps
are each (p x + q out) m:

    network        predicts                  x_0: p, q, m                  eps: p, q, m
    epsilon        eps                       1, -sigma, 1/alpha            out itself
    sample         x_0                       out itself                    1, -alpha, 1/sigma
    v_prediction   alpha eps - sigma x_0     alpha, -sigma, 1/n            sigma, alpha, 1/n
    flow           alpha' x_0 + sigma' eps   sigma', -sigma, 1/D           -alpha', alpha, 1/D
    score          -eps/sigma                1, sigma^2, 1/alpha           -sigma out

n = alpha^2 + sigma^2, D = alpha sigma' - sigma alpha'; primes are derivatives in t. n and D are
never 0, so that v_prediction and flow hold over the whole closed range of a schedule, ends
included; where |sigma'| > 1, as sigma' may be infinite, x_0 of a flow has p, q and D divided by it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .._torch import check, words
from .._torch.shapes import column
from ..law import Law
from ..schedule import Schedule
from ._calls import call, checked, dtype_of, random_layers
from ._posterior_mean import PosteriorMean

__all__ = ["PREDICTION_TYPES", "Denoiser", "expect_denoiser"]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow", "score")
Clock = Callable[[Tensor], Tensor]


class Denoiser(nn.Module):
    """The posterior mean E[x_0 | x_t], the noise prediction and the score of a trained network, or
    of a data set, whatever the network was trained to predict.

    >>> denoiser = Denoiser(network, schedule.VP(), "v_prediction")
    >>> mean = denoiser(x, t, label=label)  # also .eps(x, t, ...), .score(x, t, ...)

    Args:
        network: `network(x, t, **conditions)` -> the prediction, for x [B, *E] and t [B]: an
            `nn.Module`, or any callable.
        schedule: maps t to alpha, sigma and their derivatives.
        prediction_type: what the network returns:
            "epsilon": the noise eps (DDPM); "sample": the clean sample x_0 (with schedule.EDM, t =
            sigma, this is EDM's `model(x, sigma)`); "v_prediction": alpha eps - sigma x_0 (Salimans
            & Ho 2022, VP); "flow": the velocity dx_t/dt = f x + g2 eps / (2 sigma) (with
            schedule.RectifiedFlow, x_0 - eps; with ReversedRectifiedFlow, eps - x_0); "score": the
            gradient of log q_t, -eps/sigma (NCSN).
        clock: what the network is given as its time: a function of the schedule's t, [B] in
            float64 -> [B], such as `lambda t: 1000 * t` or `schedule.sigma`; default: t itself, as
            an integer (int64) with a discrete schedule.

    It is an `nn.Module`: its parameters and buffers are the network's where that is a Module, and
    none otherwise (a plain callable is kept as it is, and `.to()` does not move it). Keyword
    arguments of `forward`, `eps`, `score`, `denoised` and `both` go to the network; `bind` sets
    them once for all calls.

    Dtypes. x is cast to the network's dtype, the one of most numbers in its floating parameters
    (without parameters, x's), and so is the time, after the clock, but to float32 for a network in
    half precision; a clock's result in any other dtype than float64 is not cast, nor are
    conditions. A network with a true attribute `full_precision` is given x and the time uncast: for
    one that computes with x itself around a network in lower precision. Either is given copies,
    which it may change in place. Levels are computed in float64, results are in x's dtype: a
    float32 network gives float32's precision to a float64 x. A discrete schedule rounds t: the
    network and the levels belong to the same timestep.

    Outputs. The prediction, of x's shape, is a tensor, or the attribute `sample` of an object
    (diffusers), the first entry of a tuple or list, or the entry "sample" of a dict, or its only
    one. Where it has exactly twice the channels (dim 1) of x, as with a learned variance, the first
    half counts.

    Each result is computed by the formula that is finite and accurate over the closed range of t.
    Every output of the network is checked, but its values are not looked at on an accelerator,
    under vmap or torch.compile.

    Raises:
        RuntimeError, IndexError, TypeError: The network raised it; the message says what the
            network was given, and the cause is the network's own error.
        ValueError: The network's output has another shape, NaN or inf; or there is no result at t:
            x_0 of an "epsilon" or "score" network at alpha = 0, eps of a "sample" or "score"
            network at sigma = 0, eps of a "flow" network where d sigma/dt is infinite (VP, Cosine
            and VE at t = 0), a score at sigma = 0. The message names `network` or t.
        TypeError: The network returned no tensor, or one of integers, booleans or complex numbers.
    """

    schedule: Schedule
    prediction_type: str
    clock: Clock | None
    conditions: dict[str, object]

    def __init__(
        self,
        network: Callable[..., object],
        schedule: Schedule,
        prediction_type: str = "epsilon",
        *,
        clock: Clock | None = None,
    ) -> None:
        check.function("network", network, "a callable network(x, t)")
        check.instance("schedule", schedule, Schedule, "a dfkernels.schedule")
        check.choice("prediction_type", prediction_type, PREDICTION_TYPES)
        if clock is not None:
            check.function("clock", clock, "a callable clock(t)")
        super().__init__()
        self.network, self.schedule, self.prediction_type = network, schedule, prediction_type
        self.clock, self.conditions, self._shared = clock, {}, _Shared()
        self.training = getattr(network, "training", False)

    @classmethod
    def exact(cls, cloud: Law, schedule: Schedule, *, tolerance: float | None = None) -> Denoiser:
        """The ideal denoiser of a finite data set: exact, differentiable in x, and it memorises; or
        of a `GaussianMixture`.

        Args:
            cloud: the atoms, or the mixture. `.to(device)` moves them, with their index; their
                storage dtype stays what it is, since computation follows x's.
            schedule: maps t to alpha and sigma.
            tolerance: as in `DiffusionFisher`.

        torch.compile breaks its graph here: with fullgraph=True call `ops.posterior`.

        Raises:
            ValueError: At a call: sigma = 0 at t, where a data set has no posterior mean; or as in
                `DiffusionFisher`.
        """
        return cls(PosteriorMean(cloud, schedule, tolerance), schedule, "sample")

    @property
    def evaluations(self) -> int:
        """The number of calls of the network, without those inside a compiled graph; may be set."""
        return self._shared.calls

    @evaluations.setter
    def evaluations(self, calls: int) -> None:
        self._shared.calls = calls

    def bind(self, **conditions: object) -> Denoiser:
        """The same denoiser with keyword arguments that it passes to the network at every call.

        It shares network, parameters and `evaluations` with this one. Arguments given at a call
        take precedence.
        """
        if not conditions:
            return self
        bound = copy.copy(self)
        bound.conditions = {**self.conditions, **conditions}
        return bound

    def extra_repr(self) -> str:
        parts = [repr(self.schedule), repr(self.prediction_type), *self.conditions]
        if not isinstance(self.network, nn.Module):  # which the representation of a Module shows
            parts.insert(0, self._network_name)
        return ", ".join(parts)

    @property
    def _network_name(self) -> str:
        kind = type(self.network).__name__
        return getattr(self.network, "__name__", kind)

    @property
    def short(self) -> str:
        """A representation in one line, without the network's layers."""
        return f"Denoiser({self._network_name}, {self.schedule!r}, {self.prediction_type!r})"

    def rounding(self, x: Tensor) -> float:
        """The relative rounding of results at x: of x's dtype or of the network's, the larger."""
        return max(torch.finfo(dtype).eps for dtype in (x.dtype, dtype_of(self.network, x)))

    def warn_in_training(self, name: str) -> None:
        """Warns, once, that the network is in training mode, where that changes its output: for a
        function `name` that takes the network as it is.
        """
        if self._shared.warned or torch.compiler.is_compiling():
            return
        if found := random_layers(self.network):
            self._shared.warned = True
            warnings.warn(
                f"{name}: the network is in training mode with dropout or batch normalisation, "
                f"which makes it random (first of {len(found)} layers: {found[0]}): call "
                "denoiser.eval() first",
                RuntimeWarning,
                stacklevel=3,
            )

    def levels(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma), each [B] in x's dtype, evaluated in float64."""
        alpha, sigma = self.schedule(_time(x, t, self.schedule))
        return alpha.to(x.dtype), sigma.to(x.dtype)

    def forward(self, x: Tensor, t: float | Tensor, **conditions: object) -> Tensor:
        """The posterior mean E[x_0 | x_t = x], [B, *E]. One call of the network.

        Args:
            x: [B, *E], float32 or float64.
            t: a number, [] or [B], in the schedule's range.
            conditions: keyword arguments of the network.
        """
        t = _time(x, t, self.schedule)
        return self._denoised(x, t, self._call(x, t, conditions))

    def denoised(self, x: Tensor, t: float | Tensor, **conditions: object) -> Tensor:
        """The posterior mean, as a call of the denoiser gives it, but past any hooks."""
        return self.forward(x, t, **conditions)

    def eps(self, x: Tensor, t: float | Tensor, **conditions: object) -> Tensor:
        """The noise prediction (x - alpha E[x_0 | x])/sigma, [B, *E]. One call of the network."""
        t = _time(x, t, self.schedule)
        return self._eps(x, t, self._call(x, t, conditions))

    def score(self, x: Tensor, t: float | Tensor, **conditions: object) -> Tensor:
        """The gradient of log q_t at x, -eps/sigma, [B, *E]. One call of the network."""
        t = _time(x, t, self.schedule)
        sigma = self.schedule.sigma(t)
        self.schedule._exists("the score", sigma > 0, "sigma = 0", t)
        return self._eps(x, t, self._call(x, t, conditions)) * column(-1 / sigma, x)

    def both(self, x: Tensor, t: float | Tensor, **conditions: object) -> tuple[Tensor, Tensor]:
        """(noise prediction, posterior mean) by one call of the network."""
        t = _time(x, t, self.schedule)
        out = self._call(x, t, conditions)
        return self._eps(x, t, out), self._denoised(x, t, out)

    def eps_of(self, x: Tensor, t: float | Tensor, out: Tensor) -> Tensor:
        """The noise prediction from what the network returned at x and t, for a caller that has
        called it by other means. Counts as an evaluation.
        """
        t = _time(x, t, self.schedule)
        self._shared.count()
        return self._eps(x, t, checked("network", out, x, t))

    def _call(self, x: Tensor, t: Tensor, conditions: dict[str, object]) -> Tensor:
        out = call(self.network, x, self._clocked(t), {**self.conditions, **conditions})
        self._shared.count()
        return checked("network", out, x, t)

    def _clocked(self, t: Tensor) -> Tensor:
        """What the network is given as its time."""
        if self.clock is not None:
            time = self.clock(t)
            check.tensor("clock", time)
            return time
        return t.long() if self.schedule.discrete else t

    def _denoised(self, x: Tensor, t: Tensor, out: Tensor) -> Tensor:
        if self.prediction_type == "sample":
            return out
        alpha, sigma = self.schedule(t)
        if self.prediction_type == "epsilon":
            self.schedule._exists("x_0 of an 'epsilon' network", alpha > 0, "alpha = 0", t)
            return _difference(x, sigma, out, alpha)
        if self.prediction_type == "score":
            self.schedule._exists("x_0 of a 'score' network", alpha > 0, "alpha = 0", t)
            return _difference(x, -(sigma**2), out, alpha)
        if self.prediction_type == "v_prediction":
            return _combined(x, out, alpha, -sigma, 1 / (alpha**2 + sigma**2))
        alpha_rate, sigma_rate = self.schedule.rates(t)
        w = 1 / sigma_rate.abs().clamp_min(1)  # 0 where infinite
        p, q = sigma_rate.clamp(-1, 1), -sigma * w
        return _combined(x, out, p, q, 1 / (alpha * p + alpha_rate * q))

    def _eps(self, x: Tensor, t: Tensor, out: Tensor) -> Tensor:
        if self.prediction_type == "epsilon":
            return out
        alpha, sigma = self.schedule(t)
        if self.prediction_type == "sample":
            self.schedule._exists("eps of a 'sample' network", sigma > 0, "sigma = 0", t)
            return _difference(x, alpha, out, sigma)
        if self.prediction_type == "score":
            self.schedule._exists("eps of a 'score' network", sigma > 0, "sigma = 0", t)
            return column(-sigma, x) * out
        if self.prediction_type == "v_prediction":
            return _combined(x, out, sigma, alpha, 1 / (alpha**2 + sigma**2))
        alpha_rate, sigma_rate = self.schedule.rates(t)
        finite = sigma_rate.isfinite()
        self.schedule._exists("eps of a 'flow' network", finite, "d sigma/dt is infinite", t)
        return _combined(x, out, -alpha_rate, alpha, 1 / (alpha * sigma_rate - sigma * alpha_rate))


class _Shared:
    """What a denoiser shares with those that `bind` makes of it: the number of calls, and whether
    it has warned.
    """

    calls, warned = 0, False

    def count(self) -> None:
        # torch.compile takes an integer inside a Module for a constant, and would compile the
        # denoiser anew at every call
        if not torch.compiler.is_compiling():
            self.calls += 1


def expect_denoiser(denoiser: object) -> None:
    """Refuses what is no Denoiser, such as a network or a data set that is not wrapped in one."""
    if not isinstance(denoiser, Denoiser):
        way = "(network, schedule, prediction_type)"
        if isinstance(denoiser, Law):
            way = ".exact(cloud, schedule)"
        raise TypeError(
            f"denoiser: expected a Denoiser, got {type(denoiser).__name__}; wrap it: Denoiser{way}"
        )


def _time(x: Tensor, t: float | Tensor, schedule: Schedule) -> Tensor:
    """The times t, checked against the schedule's range, as [B] in float64 on x's device."""
    check.query("x", x)
    t = schedule._time(t)
    if t.ndim and t.shape != x.shape[:1]:
        got = words.per_query_shape(t.shape, x.shape[0])
        raise check.mismatch("t", f"a number, shape [] or [{x.shape[0]}]", got)
    return t.to(x.device, torch.float64).expand(x.shape[0])


def _difference(x: Tensor, level: Tensor, out: Tensor, divisor: Tensor) -> Tensor:
    """(x - level out)/divisor in x's dtype, for levels [B] in float64, in the order in which what
    cancels, cancels before it is rounded.
    """
    return (x - column(level, x) * out) * column(1 / divisor, x)


def _combined(x: Tensor, out: Tensor, p: Tensor, q: Tensor, m: Tensor) -> Tensor:
    """(p x + q out) m in x's dtype, for levels [B] in float64. The dtype need not hold p, q and m:
    next to alpha = 0 they are as small or large as its square.
    """
    return column(p * m, x) * x + column(q * m, x) * out
