"""Log-density, score, denoiser and Fisher information of a law that is known by a sampler only.

A simulator, a generative model or a formula may be able to draw y, while its density, let alone
that of x = alpha y + sigma eps, is unknown. n draws with weights W_i (1, or importance weights of a
proposal) are atoms, and the law of x is the expectation of what the operators compute:

    log q(x)  ~ log sum_i W_i N(x; alpha y_i, sigma^2 I) - log sum_i W_i
    E[y | x]  ~ mean, (alpha mean - x)/sigma^2 the score, F ~ (I - (alpha/sigma)^2 C)/sigma^2

with the posterior weights, mean and covariance C of the draws: ratios of averages, self-normalised
estimators with a bias of order 1/n and an error of order 1/sqrt(n). Draws are made in batches that
are forgotten once they are merged (`dfkernels.merge`), and all queries see the same ones.

The batches go in turn to 32 groups. The standard errors are the delete-one-group jackknife's: with
theta_k the result of all draws but group k's, error^2 = (31/32) sum_k (theta_k - mean theta)^2. It
needs no derivative of any result by any sum, keeps 32 Partials and nothing of the draws, and
follows Student's law with 31 degrees of freedom: a 95 % interval is 2.04 errors to either side.

Source: Efron & Stein, The jackknife estimate of variance (1981).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._merge import merge
from .._torch import check
from .._torch.objects import plain
from .._torch.shapes import column
from .._torch.types import Level
from ..partial import Partial
from ._reporting import Callback, reporting
from .degenerate import DegenerateWeights

__all__ = ["GROUPS", "LEAST_ESS", "Estimate", "estimate"]

GROUPS = 32  # of draws, for the errors
LEAST_ESS = 100  # below it errors are too small too often
_LARGEST_BATCH = 8192

Sampler = Callable[[int, torch.Generator], Tensor | tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Estimate:
    """What `estimate` returns, for queries ``[B, *E]`` in their dtype. An error is the standard
    error of what it is named for; 2.04 of them to either side make a 95 % interval.

    Attributes:
        log_prob, log_prob_error: the log-density in nats, [B].
        mean, mean_error: the posterior mean of y given x, the ideal denoiser, ``[B, *E]``.
        score, score_error: grad_x log q, ``[B, *E]``.
        fisher_trace, fisher_trace_error: tr F, F = -Hessian log q, [B].
        fisher_matvec, fisher_matvec_error: F v in v's shape, or None.
        ess: the effective number of draws at each query, 1 / sum w_i^2, [B].
        reliable: whether ess is at least `LEAST_ESS`, bool [B]. Where it is not, one draw more may
            change everything, and the errors are then not to be believed.
        draws: how many draws were made.
        groups: the merged draws of each group; `dfkernels.merge(groups)` is the `Partial` of all.
        generator_state: where the draws go on, with `start=`.
    """

    log_prob: Tensor
    log_prob_error: Tensor
    mean: Tensor
    mean_error: Tensor
    score: Tensor
    score_error: Tensor
    fisher_trace: Tensor
    fisher_trace_error: Tensor
    fisher_matvec: Tensor | None
    fisher_matvec_error: Tensor | None
    ess: Tensor
    reliable: Tensor
    draws: int
    groups: tuple[Partial, ...] = field(repr=False)
    generator_state: Tensor = field(repr=False)


@torch.no_grad()
def estimate(
    sampler: Sampler,
    x: Tensor,
    alpha: Level,
    sigma: Level,
    *,
    n: int,
    tol: float | None = None,
    v: Tensor | None = None,
    batch: int | None = None,
    seed: int = 0,
    start: Estimate | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Estimate:
    """Estimates log-density, score, denoiser and Fisher information of a sampler's law under noise,
    with standard errors.

    >>> sampler = lambda n, generator: torch.randn(n, 3, generator=generator).exp()  # log-normal
    >>> result = estimate(sampler, x, alpha, sigma, n=100_000)
    >>> result.log_prob, result.log_prob_error

    Args:
        sampler: sampler(n, generator) -> y ``[n, *E]``, n independent draws in x's dtype or a
            narrower one, on x's device; or (y, log_weight [n]), draws of another law with the log
            of their importance weights, the density of the law over that of the proposal, up to a
            constant. A log weight of -inf is a weight of 0. Independence of the draws, also from
            one call to the next, is what the errors stand on.
        x: Queries ``[B, *E]``, float32 or float64.
        alpha, sigma: Levels, numbers or [B]; sigma > 0.
        n: Draws to have in the end, those of `start` included. They come in rounds of 32 batches,
            all of them whole, so there may be up to one round more.
        tol: None, or the standard error of log_prob, in nats, below which it stops after a round,
            once it holds at every query and every query is reliable.
        v: Vectors ``[B, *E]`` or ``[B, K, *E]`` in x's dtype, for F v.
        batch: Draws of one call of the sampler, and all that are held at once; by default 8192, or
            a 32nd of n where that is less. The law of the results is the same for any batch, their
            last digits and the draws are not.
        seed: Of the generator, on x's device, that the sampler is given. With `start` the draws go
            on where they were, and the seed has no influence.
        start: An earlier result for the same queries, to go on from. With the same batch the result
            is, to the bit, that of one longer run; `torch.save` takes it.
        callback: callback(draws, end) after each batch: how many were made, of how many at most.
        progress: Whether to show a bar on stderr.

    Where tol is not met after n draws the errors say so; go on with `start=` and a larger n.

    Returns:
        An `Estimate`, which carries no graph.

    Raises:
        TypeError, ValueError: An argument is wrong, or what the sampler returns; the message names
            it. Or every draw has the weight 0.
    """
    n = check.integer("n", n, 1)
    wanted = -math.inf if tol is None else check.positive("tol", tol)
    seed = check.integer("seed", seed, 0, 2**63 - 1)
    check.function("sampler", sampler, "a function (n, generator) -> y")
    batch = min(_LARGEST_BATCH, -(-n // GROUPS)) if batch is None else batch
    batch = check.integer("batch", batch, 1)
    check.query("x", x)
    with plain(x.device):
        nothing = Partial.of(x, x[:0], alpha, sigma, v=v)
        groups, draws = [nothing] * GROUPS, 0
        generator = torch.Generator(x.device).manual_seed(seed)
        if start is not None:
            groups, draws = _groups_of(start, nothing), start.draws
            generator.set_state(start.generator_state)
        in_a_round = GROUPS * batch
        end = draws + max(0, -(-(n - draws) // in_a_round)) * in_a_round
        with reporting("monte_carlo", callback, progress, end) as report:
            while draws < end:
                for k in range(GROUPS):
                    part = _draw(sampler, batch, generator, nothing)
                    groups[k] = merge([groups[k], part])
                    draws += batch
                    report(draws, end)
                if tol is not None and _precise(groups, wanted):
                    break
        result = _estimate(groups, draws, generator.get_state())
    _warn(result)
    return result


def _groups_of(start: Estimate, nothing: Partial) -> list[Partial]:
    """The groups of an earlier result, which is for these queries."""
    check.instance("start", start, Estimate, "an Estimate")
    try:
        merge([nothing, start.groups[0]])
    except ValueError as error:
        raise ValueError(f"start: expected an estimate for these queries: {error}") from None
    return list(start.groups)


def _draw(sampler: Sampler, n: int, generator: torch.Generator, nothing: Partial) -> Partial:
    """A batch of draws as a part, once it is what a sampler has to return."""
    drawn = sampler(n, generator)
    y, log_weight = drawn if isinstance(drawn, tuple) and len(drawn) == 2 else (drawn, None)
    x = nothing.x
    if isinstance(y, Tensor) and y.shape[1:] == x.shape:
        of_y = f"to go with the sampler's draws of shape {list(y.shape)}"
        raise check.other_event("x", x.shape, y.shape[1:], of_y)
    try:
        check.tensor("y", y)
        expected = [n, *x.shape[1:]]
        if list(y.shape) != expected:
            raise check.mismatch("y", f"shape {expected}", list(y.shape))
        if log_weight is not None:
            check.tensor("log_weight", log_weight)
            if log_weight.shape != (n,):
                raise check.mismatch("log_weight", f"shape [{n}]", list(log_weight.shape))
            bad = log_weight.isnan() | (log_weight == math.inf)
            if bool(bad.any()):
                value = log_weight[bad][0].item()
                raise check.mismatch("log_weight", "values < inf and not nan", value)
        return Partial.of(x, y, nothing.alpha, nothing.sigma, log_weight, v=nothing.v)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"sampler: {error}") from error


def _precise(groups: list[Partial], tol: float) -> bool:
    total = merge(groups)
    if bool(total.log_weight == -math.inf):
        return False
    good = (_errors(groups)["log_mass"] <= tol) & (1 / total.weight_square >= LEAST_ESS)
    return bool(good.all())


def _moments(part: Partial) -> dict[str, Tensor]:
    """What the results are linear in; NaN where there is no draw with a weight."""
    found = {
        "log_mass": part.log_mass - part.log_weight,
        "mean": part.mean,
        "variance": part.variance,
    }
    if part.covariance_product is not None:
        found["covariance_product"] = part.covariance_product
    if bool(part.log_weight == -math.inf):
        return {name: torch.full_like(t, math.nan) for name, t in found.items()}
    return found


def _errors(groups: list[Partial]) -> dict[str, Tensor]:
    """The jackknife's standard errors of `_moments`, in float64."""
    after = [groups[-1]]  # what comes after group k is after[k], in the end
    for part in groups[-2:0:-1]:
        after.append(merge([part, after[-1]]))
    after.reverse()
    centre = _moments(merge(groups))
    total = {name: torch.zeros_like(t) for name, t in centre.items()}
    square = {name: torch.zeros_like(t) for name, t in centre.items()}
    before = None
    for k, part in enumerate(groups):
        others = [p for p in (before, after[k] if k < len(after) else None) if p is not None]
        for name, value in _moments(merge(others)).items():
            moved = value - centre[name]
            total[name] += moved
            square[name] += moved * moved
        before = part if before is None else merge([before, part])
    G = len(groups)
    spread = lambda name: (square[name] - total[name] ** 2 / G).clamp_min(0)
    errors = {name: (spread(name) * (G - 1) / G).sqrt() for name in centre}
    # without one of the groups nothing had a weight: an error without bound
    return {name: torch.nan_to_num(e, nan=math.inf, posinf=math.inf) for name, e in errors.items()}


def _estimate(groups: list[Partial], draws: int, state: Tensor) -> Estimate:
    total = merge(groups)
    if bool(total.log_weight == -math.inf):
        raise ValueError(f"sampler: expected draws with a weight, got -inf for all {draws}")
    p, errors, dtype = total.posterior(), _errors(groups), total.x.dtype
    alpha, sigma = total.alpha.double(), total.sigma.double()
    # of the score by the mean, and of F by C; the score's size cannot cancel in either
    first, second = alpha.abs() / sigma**2, (alpha / sigma**2) ** 2
    product = errors.get("covariance_product")

    def times(factor: Tensor, error: Tensor) -> Tensor:
        """Where alpha is 0 nothing depends on the draws, whatever their error."""
        found = column(factor, error) * error
        return torch.where(error == math.inf, torch.nan_to_num(found, posinf=math.inf), found)

    return Estimate(
        log_prob=p.log_prob,
        log_prob_error=errors["log_mass"].to(dtype),
        mean=p.mean,
        mean_error=errors["mean"].to(dtype),
        score=total.score(),
        score_error=times(first, errors["mean"]).to(dtype),
        fisher_trace=p.fisher_trace,
        fisher_trace_error=times(second, errors["variance"]).to(dtype),
        fisher_matvec=None if product is None else total.fisher_matvec(),
        fisher_matvec_error=None if product is None else times(second, product).to(dtype),
        ess=p.ess,
        reliable=1 / total.weight_square >= LEAST_ESS,
        draws=draws,
        groups=tuple(groups),
        generator_state=state,
    )


def _warn(result: Estimate) -> None:
    bad = int((~result.reliable).sum())
    if bad:
        warnings.warn(
            f"at {bad} of {len(result.reliable)} queries the effective number of draws is below "
            f"{LEAST_ESS}, at the worst {float(result.ess.min()):.1f} of {result.draws}: the "
            "errors stated there are not to be believed (`reliable` says where). What helps: more "
            "draws, a larger sigma, or a proposal that draws near x/alpha, with importance weights",
            DegenerateWeights,
            stacklevel=4,  # this function, estimate, and what torch.no_grad wraps it in
        )
