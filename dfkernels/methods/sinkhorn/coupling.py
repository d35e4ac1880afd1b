"""An entropic transport plan, known by its potentials: no matrix of n times m numbers is kept."""

from __future__ import annotations

from torch import Tensor

from ... import ops
from ..._torch import check
from ._points import Points, checked_points
from ._problem import Problem

__all__ = ["Coupling"]


class Coupling:
    """What `solve` finds: the plan P_ij = a_i b_j exp((f_i + g_j - c_ij)/eps) between x and y.

    Its rows add up to the weights of x but for rounding, its columns to those of y but for
    `marginal_error`. Every product is a pass over the points; nothing here has a graph, except that
    `plan_matmul` can be differentiated in the matrix.

    Attributes:
        marginal_error: sum_j |sum_i P_ij - b_j|, as measured; from 0 to 2.
        iterations: How many iterations it took; each is two passes, or one for x with itself.
        converged: Whether the error is at most what was asked for.
        blur: sqrt(eps), as the dtype of x holds it.
    """

    marginal_error: float
    iterations: int
    converged: bool
    blur: float

    def __init__(
        self,
        problem: Problem,
        f: Tensor,
        g: Tensor,
        *,
        marginal_error: float,
        iterations: int,
        converged: bool,
    ) -> None:
        """For `solve`: potentials f = S(g) and g of the problem, as that has them."""
        self._problem, self._f, self._g = problem, f, g
        self.marginal_error, self.iterations, self.converged = marginal_error, iterations, converged
        self.blur = problem.sigma * problem.x.unit

    def __repr__(self) -> str:
        p, state = self._problem, "converged" if self.converged else "not converged"
        return (
            f"Coupling(n={len(p.x.rows)}, m={len(p.y.rows)}, blur={self.blur:g}, "
            f"marginal_error={self.marginal_error:.1e}, {state})"
        )

    @property
    def T(self) -> Coupling:
        """The same plan from y to x, of which `plan_matmul` multiplies by the transpose of P and
        `draw` draws from a column of P."""
        return Coupling(
            self._problem.transposed,
            self._g,
            self._f,
            marginal_error=self.marginal_error,
            iterations=self.iterations,
            converged=self.converged,
        )

    @property
    def f(self) -> Tensor:
        """The potential of x, [n], in squared units of x, in the dtype of x. f + c and g - c are
        potentials for any c; here the weighted means of f and g are the same."""
        return self._potential(self._problem, self._f, self._g)

    @property
    def g(self) -> Tensor:
        """The potential of y, [m]; see f."""
        return self._potential(self._problem.transposed, self._g, self._f)

    @property
    def cost(self) -> float:
        """sum_ij P_ij c_ij + eps KL(P | a b^T), as the dual has it: <a, f> + <b, g>.

        It is a lower bound of the optimum, below it by eps KL(b | columns of P), which is of second
        order in marginal_error.
        """
        x, y = self._problem.x, self._problem.y
        own = float(x.weights @ self._f + y.weights @ self._g) * x.unit**2
        return own + float((x.mean - y.mean).square().sum()) / 2

    def plan_matmul(self, matrix: Tensor) -> Tensor:
        """P times a matrix, in one pass.

        Args:
            matrix: ``[m, *K]`` in a dtype of `ops.average`: a row for each y.

        Returns:
            ``[n, *K]``, in the dtype of x; differentiable in the matrix.
        """
        p = self._problem
        if isinstance(matrix, Tensor) and matrix.shape[:1] != p.y.weights.shape:
            raise check.mismatch("matrix", f"{len(p.y.rows)} rows, one per y", [*matrix.shape])
        found = ops.average(
            p.x.rows, p.y.rows, matrix, 1.0, p.sigma, log_prior=p.log_prior(self._g)
        )
        image = p.from_log_prob(found.log_prob.detach(), self._g)
        rows = p.x.weights * ((self._f - image) / p.eps).exp()
        rows = rows.to(found.average.dtype).view(-1, *[1] * (found.average.dim() - 1))
        return (rows * found.average).to(p.x.dtype)

    def barycentric_map(self, x: Tensor | None = None) -> Tensor:
        """The mean of y given x under the plan: where mass goes on average, in one pass.

        Args:
            x: Points ``[B, *E]`` in the dtype of x; others than those solved for too, where it is
                the softmax with the potential of y. Default: those.

        Returns:
            ``[B, *E]``. Minus the gradient of the cost in x_i is a_i times this minus x_i.
        """
        p = self._problem
        found = ops.posterior(self._rows(x), p.y.rows, 1.0, p.sigma, log_prior=p.log_prior(self._g))
        return p.y.back(found.mean)

    def draw(self, x: Tensor | None = None, *, seed: int) -> Tensor:
        """One y for each x, drawn from its row of the plan, in one pass: pairs for a coupled flow.

        Args:
            x: Points ``[B, *E]``, such as a batch, or fresh ones of the same law; as in
                `barycentric_map`. Default: all that were solved for.
            seed: From 0 to 2^63 - 1, as in `ops.draw`; a fresh one for each batch.

        Returns:
            Row numbers of y, int64 [B].
        """
        p = self._problem
        return ops.draw(
            self._rows(x), p.y.rows, 1.0, p.sigma, log_prior=p.log_prior(self._g), seed=seed
        )

    def _rows(self, x: Tensor | None) -> Tensor:
        own: Points = self._problem.x
        if x is None:
            return own.rows
        checked_points("x", x)
        if x.shape[1:] != own.shape:
            raise check.mismatch("x", f"shape {['B', *own.shape]}".replace("'", ""), [*x.shape])
        if x.dtype != own.dtype or x.device != own.rows.device:
            found = f"{x.dtype} on {x.device}"
            want = f"{own.dtype} on {own.rows.device}, as the points solved for"
            raise check.mismatch("x", want, found)
        return own.into(x.detach())

    @staticmethod
    def _potential(p: Problem, mine: Tensor, other: Tensor) -> Tensor:
        """The potential of p.x as the caller has it: without frames, see _points.py."""
        between = p.x.mean - p.y.mean
        centred = mine - (p.x.weights @ mine - p.y.weights @ other) / 2
        out = centred * p.x.unit**2 + p.x.rows.double() @ between * p.x.unit
        return (out + between.square().sum() / 4).to(p.x.dtype)
