"""An entropic transport plan, known by its potentials: no matrix of n times m numbers is kept."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ..._torch import check, words
from ._iterate import State
from ._points import Points, checked_points
from ._problem import Problem

__all__ = ["Coupling"]


class Coupling:
    """What `solve` finds: the plan P_ij = a_i b_j exp((f_i + g_j - c_ij)/eps) between x and y.

    Its rows add up to the weights of x but for rounding, its columns to those of y but for
    `marginal_error`. With a reach they add up to a_i exp(-f_i/rho) and, but for that error, to
    b_j exp(-g_j/rho), rho = reach^2: what the best plan has. Every product is a pass over the
    points; nothing here has a graph, except that `plan_matmul` can be differentiated in the matrix.

    Of a batched call every result has a leading axis of G problems, and what is a number of one
    problem (marginal_error, iterations, converged, gap, mass, cost) is a tensor [G].

    Attributes:
        blur: sqrt(eps), as the dtype of x holds it.
        reach: sqrt(rho) as it was given; None where the marginals are kept.
    """

    blur: float
    reach: float | None

    def __init__(self, problem: Problem, state: State, batched: bool) -> None:
        """For `solve`: what was found of the problem, as that has it."""
        self._problem, self._state, self._batched = problem, state, batched
        self.blur = problem.sigma * problem.x.unit
        self.reach = None if problem.rho is None else math.sqrt(problem.rho) * problem.x.unit

    def __repr__(self) -> str:
        p, found = self._problem, self._state
        reach = "" if self.reach is None else f", reach={self.reach:g}"
        many = f"{len(p.x.rows)} problems, " if self._batched else ""
        state = "converged" if bool(found.converged.all()) else "not converged"
        return (
            f"Coupling({many}n={p.x.rows.shape[1]}, m={p.y.rows.shape[1]}, blur={self.blur:g}"
            f"{reach}, marginal_error={float(found.error.max()):.1e}, {state})"
        )

    @property
    def marginal_error(self) -> Any:
        """sum_j |sum_i P_ij - b_j|, as measured; from 0 to 2. With a reach
        sum_j |sum_i P_ij - b_j exp(-g_j/rho)| over sum_j b_j exp(-g_j/rho)."""
        return self._number(self._state.error)

    @property
    def iterations(self) -> Any:
        """How many iterations it took; each is two passes, or one for x with itself."""
        return self._number(self._state.iterations)

    @property
    def converged(self) -> Any:
        """Whether the error is at most what was asked for."""
        return self._number(self._state.converged)

    @property
    def gap(self) -> Any:
        """How far `cost` can be below the optimum, with a reach: the primal objective of P less the
        dual, rho KL(columns of P | b exp(-g/rho)), in one pass. Without a reach it is inf, as the
        primal is where the columns are not quite b."""
        p, (f, g) = self._problem, self._state[:2]
        image = g if p.rho is None else p.transposed.half_step(f)
        return self._number(p.gap(g, image) * p.x.unit**2)

    def _number(self, values: Tensor) -> Any:
        return values.clone() if self._batched else values.item()

    def _out(self, values: Tensor) -> Tensor:
        return values if self._batched else values[0]

    @property
    def T(self) -> Coupling:
        """The same plan from y to x, of which `plan_matmul` multiplies by the transpose of P and
        `draw` draws from a column of P."""
        found = self._state
        swapped = found._replace(f=found.g, g=found.f)
        return Coupling(self._problem.transposed, swapped, self._batched)

    @property
    def f(self) -> Tensor:
        """The potential of x, [n], in squared units of x, in the dtype of x. Without a reach f + c
        and g - c are potentials for any c; here the weighted means of f and g are the same."""
        return self._potential(self._problem, self._state.f, self._state.g)

    @property
    def g(self) -> Tensor:
        """The potential of y, [m]; see f."""
        return self._potential(self._problem.transposed, self._state.g, self._state.f)

    @property
    def mass(self) -> Any:
        """sum_ij P_ij: 1 without a reach, but for rounding."""
        p = self._problem
        return self._number(p.x.total(p.log_share(self._state.f).exp()))

    @property
    def cost(self) -> Any:
        """sum_ij P_ij c_ij + eps KL(P | a b^T), as the dual has it: <a, f> + <b, g>.

        It is a lower bound of the optimum, below it by eps KL(b | columns of P), which is of second
        order in marginal_error. With a reach the objective is that and
        rho KL(rows | a) + rho KL(columns | b), where KL(p | q) = sum p log(p/q) - p + q, its dual
        rho <a, 1 - exp(-f/rho)> + rho <b, 1 - exp(-g/rho)> - eps (sum P - sum a sum b), and the
        optimum at most `gap` above.
        """
        return self._number(_cost(self._problem, self._state.f, self._state.g))

    def plan_matmul(self, matrix: Tensor) -> Tensor:
        """P times a matrix, in one pass.

        Args:
            matrix: ``[m, *K]`` in a dtype of `ops.average`: a row for each y.

        Returns:
            ``[n, *K]``, in the dtype of x; differentiable in the matrix.
        """
        p, (f, g) = self._problem, self._state[:2]
        check.tensor("matrix", matrix)
        check.narrow("matrix", matrix, p.x.rows)
        lead = p.y.weights.shape[0 if self._batched else 1 :]
        if matrix.shape[: len(lead)] != lead:
            want = f"shape {words.shape([*lead, '*K'])}, a row for each y"
            raise check.mismatch("matrix", want, [*matrix.shape])
        given = matrix if self._batched else matrix[None]
        y, prior = p.atoms(g)
        found = [
            ops.average(p.x.rows[k], y[k], p.y.ordered(given, k), 1.0, p.sigma, prior[k])
            for k in range(len(y))
        ]
        log_prob = torch.stack([one.log_prob.detach() for one in found])
        average = torch.stack([one.average for one in found])
        rows = p.x.weights * ((f - p.from_log_prob(log_prob, g)) / p.eps).exp()
        rows = rows.to(average.dtype).view(*rows.shape, *[1] * (average.dim() - 2))
        return self._out((rows * average).to(p.x.dtype))

    def barycentric_map(self, x: Tensor | None = None) -> Tensor:
        """The mean of y given x under the plan: where mass goes on average, in one pass.

        Args:
            x: Points ``[B, *E]`` in the dtype of x; others than those solved for too, where it is
                the softmax with the potential of y. Default: those.

        Returns:
            ``[B, *E]``. Minus the gradient of the cost in x_i is a_i times this minus x_i.
        """
        p = self._problem
        y, prior = p.atoms(self._state.g)
        found = ops.posterior(self._rows(x), y, 1.0, p.sigma, log_prior=prior, batched=True)
        return self._out(p.y.back(found.mean))

    def draw(self, x: Tensor | None = None, *, seed: int) -> Tensor:
        """One y for each x, drawn from its row of the plan, in one pass: pairs for a coupled flow.

        With a reach a row is what is left of a point; its mass plays no part here.

        Args:
            x: Points ``[B, *E]``, such as a batch, or fresh ones of the same law; as in
                `barycentric_map`. Default: all that were solved for.
            seed: From 0 to 2^63 - 1, as in `ops.draw`; a fresh one for each batch.

        Returns:
            Row numbers of y, int64 [B].
        """
        p = self._problem
        y, prior = p.atoms(self._state.g)
        found = ops.draw(self._rows(x), y, 1.0, p.sigma, log_prior=prior, seed=seed, batched=True)
        return self._out(found if p.y.order is None else p.y.order.gather(1, found))

    def _rows(self, x: Tensor | None) -> Tensor:
        own: Points = self._problem.x
        if x is None:
            return own.rows
        rows, G = checked_points("x", x, self._batched), len(own.rows)
        if rows.shape[2:] != own.shape or len(rows) != G:
            lead = [G, "B"] if self._batched else ["B"]
            want = f"shape {words.shape([*lead, *own.shape])}"
            raise check.mismatch("x", want, [*x.shape])
        if x.dtype != own.dtype or x.device != own.rows.device:
            found = f"{x.dtype} on {x.device}"
            want = f"{own.dtype} on {own.rows.device}, as the points solved for"
            raise check.mismatch("x", want, found)
        return own.into(rows.detach())

    def _potential(self, p: Problem, mine: Tensor, other: Tensor) -> Tensor:
        """The potential of p.x as the caller has it: without frames, see _points.py."""
        if p.rho is None:
            mine = mine - (p.x.total(mine) - p.y.total(other))[:, None] / 2
        return self._out(((mine + p.level()) * p.x.unit**2).to(p.x.dtype))


def _cost(p: Problem, f: Tensor, g: Tensor) -> Tensor:
    """The dual objective of f, the best for g, and g, in squared units of the points; [G]."""
    if p.rho is None:
        between = (p.x.mean - p.y.mean).square().sum(1) / 2
        return p.dual(f, g) * p.x.unit**2 + between
    return (p.dual(f, g) + p.eps * p.x.mass * (p.y.mass - 1)) * p.x.unit**2
