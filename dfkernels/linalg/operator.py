"""FisherOperator: what a Fisher information can do once its products with vectors are known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import check
from .._torch.objects import Object, Watched, ordinary, plain, unaffected

__all__ = ["FisherOperator", "Solution"]

# d columns of d numbers for the dense F; Lanczos takes 30 to 300 products with each vector of a
# block
_DENSE_D = 512
_BLOCK = 1 << 22  # numbers in the basis vectors that are applied together


class Solution(NamedTuple):
    """What `solve_ex` returns: the solution, CG iterations and |b - A x| / |b|, one each per
    system."""

    x: Tensor
    iterations: Tensor
    residual: Tensor


class FisherOperator(Object):
    """A symmetric d x d matrix F for each query x [B, *E] at noise level sigma, known by its
    products F @ v.

    A subclass gives `__matmul__` and, for the derivatives of `solve`, `_given`: the tensors on
    which F depends, and `_with`: the same operator from other values of these. Everything else
    follows; what has a closed form or a fused op is overridden. `isinstance(F, FisherOperator)`
    holds for every form of F.

    Args:
        x: [B, *E], float32 or float64; the computation follows its dtype.
        alpha, sigma: float, 0-d or [B]; sigma > 0.

    Raises TypeError / ValueError naming the argument.
    """

    x, alpha, sigma = Watched(), Watched(), Watched()

    def __init__(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> None:
        check.query("x", x)
        self.x = x
        # with its graph also under no_grad: results may be differentiated later
        with plain(x.device), torch.set_grad_enabled(True):
            self.alpha, self.sigma = check.level("alpha", alpha, x), check.level("sigma", sigma, x)

    @property
    def d(self) -> int:
        """prod(E)."""
        return self._x.shape[1:].numel()

    @property
    def shape(self) -> torch.Size:
        """(B, d, d)."""
        return torch.Size((self._x.shape[0], self.d, self.d))

    @property
    def dtype(self) -> torch.dtype:
        return self._x.dtype

    @property
    def device(self) -> torch.device:
        return self._x.device

    @property
    def _x(self) -> Tensor:
        """x for its shape, dtype and device, which a change in place leaves."""
        return FisherOperator.x.peek(self)

    @property
    def T(self) -> FisherOperator:
        """The transpose: F itself."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, {self.dtype}, {self.device})"

    def __matmul__(self, v: Tensor) -> Tensor:
        """F v for v [B, *E], or for K vectors per query, v [B, K, *E]."""
        raise NotImplementedError

    @property
    def _given(self) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _with(self, *given: Tensor) -> FisherOperator:
        raise NotImplementedError

    @unaffected
    def trace(self) -> Tensor:
        """tr F, [B]; here from d products."""
        return self.diagonal().reshape(self.shape[:2]).sum(1)

    @unaffected
    def diagonal(self) -> Tensor:
        """diag F, [B, *E]; here from d products."""
        parts = [columns.diagonal(start, 1, 2) for start, columns in self._columns()]
        return torch.cat(parts, 1).reshape(self.x.shape)

    @unaffected
    def to_dense(self) -> Tensor:
        """F as [B, d, d]; here from d products."""
        return torch.cat([columns for _, columns in self._columns()], 1).mT

    def _columns(self) -> Iterator[tuple[int, Tensor]]:
        """(i, F e_j for j = i, i + 1, ... as [B, k, d]), block by block."""
        batch, d = self.shape[:2]
        k = max(1, _BLOCK // max(1, batch * d))
        for start in range(0, d, k):
            basis = torch.eye(min(k, d - start), d, dtype=self.dtype, device=self.device).roll(
                start, 1
            )
            yield start, self._apply(basis.expand(batch, -1, -1).contiguous())

    def solve(
        self,
        b: Tensor,
        damping: float | Tensor = 0.0,
        *,
        tol: float | None = None,
        max_iter: int | None = None,
    ) -> Tensor:
        """(F + damping I)^{-1} b by conjugate gradients, b [B, *E] or [B, K, *E].

        All systems share each product.

        Args:
            damping: number or [B], >= 0. Where F <= I/sigma^2, as for the exact F, a value above
                (d - 1)/sigma^2 - tr F is always enough.
            tol: bound on |b - A x| / |b|; default eps^(2/3) of the dtype (2.4e-5, 3.7e-11).
            max_iter: default 50 + 2 d.

        Differentiable in b, damping and the tensors that F was made from: implicitly, a backward
        pass is one more solve. Forward mode raises.

        Raises ValueError if CG meets a direction of non-positive curvature (F + damping I is not
        positive definite), naming the damping that is needed; RuntimeError if max_iter steps do not
        reach tol.
        """
        solution = self.solve_ex(b, damping, tol=tol, max_iter=max_iter)
        tol = _tolerance(b.dtype, tol)
        worst = solution.residual.max().item() if solution.residual.numel() else 0.0
        if not worst <= tol:
            steps = int(solution.iterations.max())
            raise RuntimeError(
                f"solve: |b - A x|/|b| = {worst:.2e} after {steps} iterations, tol = {tol:.2e}"
            )
        return solution.x

    @unaffected
    def solve_ex(
        self,
        b: Tensor,
        damping: float | Tensor = 0.0,
        *,
        tol: float | None = None,
        max_iter: int | None = None,
    ) -> Solution:
        """As `solve`, with iterations and residuals ([B] or [B, K]), which it leaves for you to
        judge."""
        self._no_tangent("solve")
        self._unchanged()
        rhs = ordinary(check.vectors("b", b, "x", self.x, self.d))
        check.finite("b", b.detach())
        shift = check.level("damping", damping, self.x)
        usable = (shift >= 0) & shift.isfinite()
        if not bool(usable.all()):
            raise ValueError(
                f"damping: expected finite values >= 0, got {shift[~usable][0].item():g}"
            )
        tol = _tolerance(b.dtype, tol)
        max_iter = 50 + 2 * self.d if max_iter is None else check.integer("max_iter", max_iter, 1)
        with torch.no_grad():
            x, steps, residual = self._cg(rhs.detach(), shift.detach()[:, None], tol, max_iter)
        x = _Implicit.apply(x, self._with, (tol, max_iter), rhs, shift, *self._given)
        lead = b.shape[: b.ndim - self.x.ndim + 1]
        return Solution(x.view(b.shape), steps.view(lead), residual.view(lead))

    def _cg(
        self, b: Tensor, shift: Tensor, tol: float, max_iter: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """CG on [B, K, d] with a restart from the true residual whenever the recursive one has
        converged.

        It solves (u^2 F + u^2 shift) x = b/s, u = `_unit` and s the size of b: of size 1, whatever
        the units of the caller, so that no square overflows; what it returns is u^2 s x.
        """
        unit = self._unit[..., None]
        scale = _power_of_two(b.abs().amax(-1, keepdim=True))
        b, shift = b / scale, (shift * unit[..., 0]) * unit[..., 0]
        x = torch.zeros_like(b)
        size = b.norm(dim=-1).clamp_min(torch.finfo(b.dtype).tiny)
        steps = torch.zeros(b.shape[:2], dtype=torch.int64, device=b.device)
        r, p = b.clone(), b.clone()
        rr = r.square().sum(-1)
        todo = rr.sqrt() > tol * size
        residual = rr.sqrt() / size
        for _ in range(max_iter):
            if not bool(todo.any()):
                before = residual
                r = b - self._apply_in_units(x) - shift[..., None] * x
                p, rr = r.clone(), r.square().sum(-1)
                residual = rr.sqrt() / size
                todo = (residual > tol) & (
                    residual < before / 2
                )  # give up where a restart no longer helps
                if not bool(todo.any()):
                    return scale * unit * x * unit, steps, residual
            ap = self._apply_in_units(p) + shift[..., None] * p
            curvature = (p * ap).sum(-1)
            if bool((todo & ~(curvature > 0)).any()):
                self._not_positive(p, curvature, shift, todo)
            step = torch.where(todo, rr / curvature, 0.0)[..., None]
            x = x + step * p
            r = r - step * ap
            new = r.square().sum(-1)
            p = torch.where(todo[..., None], r + (new / rr)[..., None] * p, p)
            rr = torch.where(todo, new, rr)
            steps += todo
            todo = todo & (rr.sqrt() > tol * size)
        r = b - self._apply_in_units(x) - shift[..., None] * x
        return scale * unit * x * unit, steps, r.norm(dim=-1) / size

    def _not_positive(self, p: Tensor, curvature: Tensor, shift: Tensor, todo: Tensor) -> None:
        """Raises for the first system with a direction of curvature <= 0, found in units of
        1/u^2."""
        quotient = curvature / p.square().sum(-1)
        query, column = (todo & ~(curvature > 0)).nonzero()[0].tolist()
        square = self._unit[query].item() ** 2  # in double
        damping, least = shift[query, 0].item() / square, quotient[query, column].item() / square
        raise ValueError(
            "damping: F + damping I is not positive definite at query "
            f"{query} (damping = {damping:g}); more than {damping - least:.4g} is necessary"
            f"{self._enough(query)}"
        )

    def _enough(self, query: int) -> str:
        """What is known of a damping that suffices, for the message above."""
        return ""

    @torch.no_grad()
    @unaffected
    def eigsh(
        self, k: int, largest: bool = True, *, tol: float | None = None, max_iter: int = 300,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The k largest (smallest) eigenvalues [B, k], outermost first, and orthonormal vectors [B,
        k, *E].

        Up to d = 512 from the dense F (fewer operations); above by thick-restart block Lanczos on
        the product, fully reorthogonalised: one product per block of vectors. The largest values of
        a diffusion Fisher crowd below 1/sigma^2 and converge slowly. A vector's entry of largest
        modulus is positive. Start vectors come from `generator`; None is a fixed seed: a call
        repeated gives the same bits. Results carry no graph; forward mode raises.

        Args:
            tol: bound on |F v - l v| / max(1/sigma^2, |l|); default 2e-5 in float32, 1e-8 in
            float64. max_iter: blocks of vectors; for the exact F, passes over the data.

        Raises ValueError if k is not in [1, d]; RuntimeError if max_iter blocks do not reach tol.
        """
        self._no_tangent("eigsh")
        self._unchanged()
        k, max_iter = check.integer("k", k, 1, self.d), check.integer("max_iter", max_iter, 1)
        tol = _tolerance(
            self.dtype, (2e-5 if self.dtype == torch.float32 else 1e-8) if tol is None else tol
        )
        block = k + max(2, k // 2)
        room = max(4 * block, 64)
        unit = self._unit
        if self.d <= max(_DENSE_D, room):
            dense = self.to_dense() * unit[..., None] * unit[..., None]
            values, basis = torch.linalg.eigh(
                (dense + dense.mT) / 2
            )  # a network's F is not quite symmetric
            vectors = basis.mT
            if largest:
                values, vectors = values.flip(-1), vectors.flip(-2)
            return values[:, :k] / unit / unit, self._signed(vectors[:, :k])
        if generator is None:
            generator = torch.Generator(self.device).manual_seed(0)
        shape = (self.shape[0], block, self.d)
        start = torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)
        values, vectors = self._lanczos(k, largest, _orthonormal(start), room, tol, max_iter)
        return values / unit / unit, self._signed(vectors)

    def _lanczos(
        self, k: int, largest: bool, basis: Tensor, room: int, tol: float, max_iter: int
    ) -> tuple[Tensor, Tensor]:
        """Thick-restart block Lanczos for u^2 F, u = `_unit`, from an orthonormal basis [B, block,
        d], grown to at most room rows.
        """
        block = basis.shape[1]
        most = (self._unit / self.sigma[:, None]).square()  # u^2/sigma^2
        image = self._apply_in_units(basis)
        for _ in range(max_iter):
            small = basis @ image.mT
            values, mix = torch.linalg.eigh((small + small.mT) / 2)
            mix = (mix.flip(-1) if largest else mix)[..., :block].mT
            values = (values.flip(-1) if largest else values)[:, :block]
            ritz, ritz_image = mix @ basis, mix @ image
            rest = ritz_image - values[..., None] * ritz
            error = rest.norm(dim=-1) / torch.maximum(most, values.abs())
            if bool((error[:, :k] <= tol).all()):
                return values[:, :k], ritz[:, :k]
            if basis.shape[1] + block > room:
                basis, image = ritz, ritz_image
            size = rest.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rest.dtype).tiny)
            fresh = _orthonormal(rest / size, basis)
            basis = torch.cat([basis, fresh], 1)
            image = torch.cat([image, self._apply_in_units(fresh)], 1)
        raise RuntimeError(
            f"eigsh: |F v - l v| = {error[:, :k].max().item():.2e} |F| after {max_iter} passes, "
            f"tol = {tol:.2e}; raise max_iter or tol, or ask for fewer pairs"
        )

    def _signed(self, v: Tensor) -> Tensor:
        """[B, k, d] -> [B, k, *E], each vector's entry of largest modulus made positive."""
        pivot = v.gather(-1, v.abs().argmax(-1, keepdim=True))
        return (v * pivot.sign()).reshape(*v.shape[:2], *self.x.shape[1:])

    def _no_tangent(self, name: str) -> None:
        for t in self._given:
            if torch.autograd.forward_ad.unpack_dual(t).tangent is not None:
                raise NotImplementedError(f"{name} has no forward-mode derivative")

    def _apply(self, v: Tensor) -> Tensor:
        """F v on flat vectors [B, K, d]."""
        return (self @ v.view(*v.shape[:2], *self.x.shape[1:])).reshape(v.shape)

    @property
    def _unit(self) -> Tensor:
        """The power of two at sigma, [B, 1]: u^2 F is of size 1, and to multiply by u rounds
        nothing."""
        return _power_of_two(self.sigma.detach())[:, None]

    def _apply_in_units(self, v: Tensor) -> Tensor:
        """u^2 F v, u = `_unit`, on flat vectors of size 1."""
        unit = self._unit[..., None]
        return unit * self._apply(unit * v)


class _Implicit(torch.autograd.Function):
    """The solution s of A s = b, given. Cotangents: z = A^{-1} g for b, -z^T (dA) s for A's
    parameters."""

    @staticmethod
    def forward(ctx, solution, operator, how, b, shift, *given) -> Tensor:
        ctx.operator, ctx.how = operator, how
        solution = solution.clone()
        ctx.save_for_backward(solution, shift, *given)
        return solution

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        with plain(grad.device):  # of the mode in which backward was called
            return _Implicit._cotangents(ctx, grad)

    @staticmethod
    def _cotangents(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        solution, shift, *given = ctx.saved_tensors
        tol, max_iter = ctx.how
        fisher = ctx.operator(*given)
        columns = grad.reshape(*grad.shape[:2], *fisher.x.shape[1:])
        z = fisher.solve(columns, shift, tol=tol, max_iter=max_iter).reshape(grad.shape)
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            # aliases, which solution and z do not depend on
            shift, *given = aliases = [t.view_as(t) for t in (shift, *given)]
            image = ctx.operator(*given)._apply(solution) + shift[:, None, None] * solution
            wanted = [t for t in aliases if t.requires_grad]
            found = iter(
                torch.autograd.grad(image, wanted, -z, create_graph=twice) if wanted else ()
            )
        return None, None, None, z, *(next(found) if t.requires_grad else None for t in aliases)


def _tolerance(dtype: torch.dtype, tol: float | None) -> float:
    tol = torch.finfo(dtype).eps ** (2 / 3) if tol is None else check.constant("tol", tol)
    if not 0 < tol < 1:
        raise ValueError(f"tol: expected a number in (0, 1), got {tol}")
    return tol


def _power_of_two(t: Tensor) -> Tensor:
    """The largest power of two that is at most t >= 0; 1 for 0."""
    half = torch.frexp(t).mantissa * 2  # in [1, 2): t over it is exact
    return torch.where(t > 0, t / half, 1.0)


def _orthonormal(v: Tensor, basis: Tensor | None = None) -> Tensor:
    """Rows of v [B, s, d] made orthonormal, and orthogonal to those of basis.

    Three rounds: where v is short of rank, QR fills in directions that may lie in the basis; a
    round takes them out again.
    """
    for _ in range(1 if basis is None else 3):
        if basis is not None:
            v = v - (v @ basis.mT) @ basis
        v = torch.linalg.qr(v.mT).Q.mT
    return v
