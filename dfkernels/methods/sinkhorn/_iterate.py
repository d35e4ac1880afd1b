"""Sinkhorn's iteration with a stop test."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import words
from ._anderson import Anderson
from ._problem import Problem
from .not_converged import NotConverged

__all__ = ["State", "iterate", "warn"]

_SHORTEN = 4.0  # a proposal that does not raise the dual, how much
_PATIENCE = 30  # iterations without progress, near the rounding, after which there will be none
_REASONS = _CONVERGED, _ROUNDING, _ITERATIONS = range(3)


class State(NamedTuple):
    """Potentials f, the best for g, and g of G problems, how far they are from a solution, and what
    it took; the best that were found."""

    f: Tensor  # [G, n]
    g: Tensor  # [G, m]
    error: Tensor  # [G], as in `Problem.marginal_error`
    iterations: Tensor  # [G]
    stopped: Tensor  # [G]: why, one of _REASONS

    @property
    def converged(self) -> Tensor:
        return self.stopped == _CONVERGED

    def updated(self, at: Tensor, f: Tensor, g: Tensor, error: Tensor, k: int) -> State:
        """With what was found in iteration k for the problems `at`."""
        if len(at) == len(self.f):
            return State(f, g, error, torch.full_like(self.iterations, k), self.stopped)
        return State(
            self.f.index_put((at,), f),
            self.g.index_put((at,), g),
            self.error.index_put((at,), error),
            self.iterations.index_fill(0, at, k),
            self.stopped,
        )


class _Now(NamedTuple):
    """Where the problems stand that still run."""

    problem: Problem
    f: Tensor
    g: Tensor
    length: Tensor  # of the last step, of which 1 is the proposal and 0 the plain one; [G]
    since: Tensor  # iterations without progress [G]

    def of(self, problems: Tensor) -> _Now:
        return _Now(self.problem.of(problems), *(t[problems] for t in self[1:]))


def iterate(
    problem: Problem,
    g: Tensor,
    tol: float,
    max_iter: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> State:
    """Iterates from g until the marginal error of each problem is at most tol, at least once.

    The plain iteration is two half-steps or, for a set with itself, where it converges by itself in
    a few dozen, the mean of g and a half-step. The error of g is known from the same half-steps, so
    that the test costs nothing, and the best g found is what is returned. A problem that has
    stopped is left out of the passes that follow.
    """
    f, none = problem.half_step(g), torch.zeros_like(problem.y.mass, dtype=torch.int64)
    best = State(f, g, torch.full_like(problem.y.mass, torch.inf), none, none.clone())
    now, mixer, same = (
        _Now(problem, f, g, none + 1.0, none),
        Anderson(problem.y.weights),
        _same(problem),
    )
    # numbers of the problems that still run
    whole = torch.arange(len(g), dtype=torch.int64, device=g.device)
    for k in range(1, max_iter + 1):
        image = now.f if same else now.problem.transposed.half_step(now.f)
        error, rounding = now.problem.marginal_error(now.g, image), now.problem.rounding(image)
        better = error < best.error[whole]
        at, f, g, least = _chosen(better, whole, now.f, now.g, error)
        best = best.updated(at, f, g, least, k)
        now = now._replace(since=torch.where(better, 0, now.since + 1))
        report(k, max_iter)
        hidden = (now.since >= _PATIENCE) & (best.error[whole] <= 16 * rounding) & (error > tol)
        best.stopped[whole[hidden]] = _ROUNDING
        on = (error > tol) & ~hidden
        if not bool(on.all()):
            whole, image, rounding, at = _chosen(
                on,
                whole,
                image,
                rounding,
                torch.arange(len(on), dtype=torch.int64, device=on.device),
            )
            now = now.of(at)
            mixer.keep(at)
        if not len(whole):
            return best
        now = _stepped(now, image, rounding, mixer)
    best.stopped[whole], best.iterations[whole] = _ITERATIONS, max_iter
    return best


def _chosen(where: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Of each tensor the part where [G] is true: the tensor itself, where all is."""
    return values if bool(where.all()) else tuple(t[where] for t in values)


def _same(problem: Problem) -> bool:
    return problem.x is problem.y


def _stepped(now: _Now, image: Tensor, rounding: Tensor, mixer: Anderson) -> _Now:
    """The next potentials, from the plain step and Anderson's proposal.

    The proposal is taken where the dual rises by as much as the plain step is sure to raise it, at
    least, else one nearer to the plain step: so that the iteration converges from anywhere, as
    Sinkhorn's does.
    """
    problem, f, g, length, since = now
    least = -problem.eps * rounding
    plain = (g + image) / 2
    if not _same(problem):
        least, plain = least + problem.sure_gain(f, g, image), image
    move = mixer.next(g, plain) - plain
    length = (_SHORTEN * length).clamp(max=1)
    new_g = plain + length[:, None] * move
    new_f = problem.half_step(new_g)
    refused = ~(problem.rise((f, g), new_f, new_g) >= least)
    while bool((refused & (length > 0)).any()):
        at = (refused & (length > 0)).nonzero()[:, 0]
        shorter = length[at] / _SHORTEN
        length[at] = torch.where(shorter > _SHORTEN**-4, shorter, 0)
        part = problem.of(at)
        new_g[at] = plain[at] + length[at, None] * move[at]
        new_f[at] = part.half_step(new_g[at])
        refused[at] = ~(part.rise((f[at], g[at]), new_f[at], new_g[at]) >= least[at])
    if bool((length == 0).any()):
        mixer.forget(length == 0)
        length = torch.where(length == 0, _SHORTEN**-2, length)
    return _Now(problem, new_f, new_g, length, since)


def warn(state: State, tol: float, dtype: torch.dtype) -> None:
    """Warns of problems that did not converge, and says what helps."""
    left = ~state.converged
    if not bool(left.any()):
        return
    worst = int(torch.where(left, state.error, -1).argmax())
    why = f"after {int(state.iterations[worst])} iterations; raise max_iter, blur or tol"
    if state.stopped[worst] == _ROUNDING:
        more = "give x and y in float64, or " if dtype == torch.float32 else ""
        why = f"where rounding in {words.dtype(dtype)} hides the rest; {more}raise blur or tol"
    of = f"{int(left.sum())} of {len(left)} problems " if len(left) > 1 else ""
    at = f"{of}stopped at a marginal error of {'up to ' * bool(of)}{float(state.error[worst]):.1e}"
    warnings.warn(
        f"sinkhorn: {at}, tol = {tol:.1e}, {why}",
        NotConverged,
        stacklevel=4,  # of who called solve or divergence,
    )
