"""A batch of symmetric linear operators that are known by their products with vectors."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from .._torch import check, diagnosis
from .._torch.objects import ordinary, plain, unaffected
from .cg import NotPositiveDefinite, Solution, conjugate_gradients
from .lanczos import lanczos

__all__ = ["LinearOperator", "Solution"]

_DENSE_D = 512  # up to here d products are cheaper than Lanczos, which takes 30 to 300 of a block
_BLOCK = 1 << 22  # numbers in the basis vectors that are applied together


class LinearOperator(abc.ABC):
    """A symmetric d x d matrix A for each of B elements, known by its products A @ v. Subclass it
    to solve systems with, or find eigenpairs of, matrices that are too large to form.

    >>> class Diagonal(LinearOperator):
    ...     def __init__(self, entries):  # [B, d]
    ...         self.entries, self.dtype, self.device = entries, entries.dtype, entries.device
    ...         self.shape = torch.Size((*entries.shape, entries.shape[1]))
    ...     def apply(self, v):
    ...         return self.entries[:, None] * v

    A subclass defines `apply` and has the attributes (or properties) `shape`, `dtype` and `device`.
    Products, `trace`, `diagonal`, `to_dense`, `solve` and `eigsh` follow; override what has a
    closed form. For derivatives of `solve` in the tensors on which A depends, define `parameters`
    and `rebuild` as well.

    Attributes:
        shape: (B, d, d).
        dtype: torch.float32 or torch.float64.
        device: of the vectors.
    """

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    _symbol, _element = "A", "element"  # what errors call the matrix, and one of the B

    @abc.abstractmethod
    def apply(self, v: Tensor) -> Tensor:
        """A v for K vectors per element: [B, K, d] -> [B, K, d]."""

    def parameters(self) -> tuple[Tensor, ...]:
        """The tensors in which `solve` is differentiable, beside the right-hand side."""
        return ()

    def rebuild(self, *parameters: Tensor) -> LinearOperator:
        """The same operator from other values of its `parameters`."""
        if parameters:
            raise NotImplementedError(f"{type(self).__name__} has parameters() but no rebuild()")
        return self

    @property
    def d(self) -> int:
        """The number of rows."""
        return self.shape[-1]

    @property
    def event_shape(self) -> torch.Size:
        """The shape of one vector: (d,), unless a subclass gives it another one of d entries."""
        return torch.Size((self.d,))

    @property
    def T(self) -> LinearOperator:
        """The transpose: the operator itself."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.shape)}, {self.dtype}, {self.device})"

    def __matmul__(self, v: Tensor) -> Tensor:
        """A v for v [B, *event_shape], or for K vectors per element, [B, K, *event_shape]."""
        return self.apply(self._rows("v", v)).reshape(v.shape)

    @unaffected
    def trace(self) -> Tensor:
        """tr A, [B]; from d products, unless overridden."""
        return self.diagonal().reshape(self.shape[:2]).sum(1)

    @unaffected
    def diagonal(self) -> Tensor:
        """diag A, [B, *event_shape]; from d products, unless overridden."""
        parts = [columns.diagonal(start, 1, 2) for start, columns in self._columns()]
        return torch.cat(parts, 1).reshape(-1, *self.event_shape)

    @unaffected
    def to_dense(self) -> Tensor:
        """A as [B, d, d]; from d products, unless overridden."""
        return torch.cat([columns for _, columns in self._columns()], 1).mT

    def _columns(self) -> Iterator[tuple[int, Tensor]]:
        """(i, A e_j for j = i, i + 1, ... as [B, k, d]), block by block."""
        batch, d = self.shape[:2]
        k = max(1, _BLOCK // max(1, batch * d))
        for start in range(0, d, k):
            basis = torch.eye(min(k, d - start), d, dtype=self.dtype, device=self.device)
            basis = basis.roll(start, 1).expand(batch, -1, -1).contiguous()
            yield start, self.apply(basis)

    def solve(
        self,
        b: Tensor,
        damping: float | Tensor = 0.0,
        *,
        tol: float | None = None,
        max_iter: int | None = None,
    ) -> Tensor:
        """(A + damping I)^{-1} b by conjugate gradients; all systems share each product.

        Args:
            b: [B, *event_shape] or [B, K, *event_shape], the right-hand sides.
            damping: number or [B], >= 0. Where A <= I/sigma^2, as for the exact Fisher information,
                a value above (d - 1)/sigma^2 - tr A is always enough.
            tol: bound on |b - A x| / |b|; default eps^(2/3) of the dtype (2.4e-5, 3.7e-11).
            max_iter: default 50 + 2 d.

        Differentiable in b, damping and `parameters`: implicitly, a backward pass is one more
        solve. Forward mode raises.

        Returns:
            The solutions, of b's shape.

        Raises:
            TypeError, ValueError: An argument is wrong, or CG meets a direction of non-positive
                curvature (A + damping I is not positive definite); the message names the damping
                that is needed.
            RuntimeError: max_iter steps do not reach tol.
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
        """As `solve`, but returns iterations and residuals ([B] or [B, K]) for the caller to judge,
        and raises no RuntimeError.
        """
        self._no_tangent("solve")
        self._unchanged()
        rows = ordinary(self._rows("b", b))
        diagnosis.finite("b", b.detach())
        shift = check.per_query("damping", damping, self._like[1])
        usable = (shift >= 0) & shift.isfinite()
        if not bool(usable.all()):
            came = shift[~usable][0].item()
            raise check.mismatch("damping", "finite values >= 0", f"{came:g}")
        tol = _tolerance(b.dtype, tol)
        max_iter = 50 + 2 * self.d if max_iter is None else check.integer("max_iter", max_iter, 1)
        with torch.no_grad():
            x, steps, residual = self._cg(rows.detach(), shift.detach(), tol, max_iter)
        x = _Implicit.apply(x, self.rebuild, (tol, max_iter), rows, shift, *self.parameters())
        lead = b.shape[: b.ndim - len(self.event_shape)]
        return Solution(x.view(b.shape), steps.view(lead), residual.view(lead))

    def _cg(self, b: Tensor, shift: Tensor, tol: float, max_iter: int) -> Solution:
        """Solves (u^2 A + u^2 shift I) x = b, u = `_unit`, and returns u^2 x."""
        unit = self._unit
        try:
            x, steps, residual = conjugate_gradients(
                self._apply_in_units,
                b,
                (shift * unit[:, 0]) * unit[:, 0],
                tol=tol,
                max_iter=max_iter,
            )
        except NotPositiveDefinite as error:
            damping = shift[error.batch].item()
            least = error.curvature / unit[error.batch].item() ** 2  # in double
            raise ValueError(
                f"damping: {self._symbol} + damping I is not positive definite "
                f"at {self._element} {error.batch} "
                f"(damping = {damping:g}); more than {damping - least:.4g} is necessary"
                f"{self._enough(error.batch)}"
            ) from None
        return Solution(unit[..., None] * x * unit[..., None], steps, residual)

    def _enough(self, element: int) -> str:
        """What is known of a damping that suffices, for the message above."""
        return ""

    @torch.no_grad()
    @unaffected
    def eigsh(
        self,
        k: int,
        largest: bool = True,
        *,
        tol: float | None = None,
        max_iter: int = 300,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The k largest (smallest) eigenvalues [B, k], outermost first, and orthonormal vectors
        [B, k, *event_shape].

        Up to d = 512 from the dense matrix (fewer operations); above by thick-restart block Lanczos
        on the product, fully reorthogonalised: one product per block of vectors. The largest values
        of a diffusion Fisher crowd below 1/sigma^2 and converge slowly. A vector's entry of largest
        modulus is positive. Results carry no graph; forward mode raises.

        Args:
            k: from 1 to d.
            largest: False for the smallest.
            tol: bound on |A v - l v| / max(|A|, |l|), |A| = 1/sigma^2 for a Fisher information;
                default 2e-5 in float32, 1e-8 in float64.
            max_iter: blocks of vectors; for the exact Fisher, passes over the data.
            generator: of the start vectors; None is a fixed seed: a call repeated gives the same
                bits.

        Returns:
            The eigenvalues and the vectors.

        Raises:
            ValueError: k is not in [1, d].
            RuntimeError: max_iter blocks do not reach tol.
        """
        self._no_tangent("eigsh")
        self._unchanged()
        k, max_iter = check.integer("k", k, 1, self.d), check.integer("max_iter", max_iter, 1)
        default = 2e-5 if self.dtype == torch.float32 else 1e-8
        tol = _tolerance(self.dtype, default if tol is None else tol)
        block = k + max(2, k // 2)
        rows = max(4 * block, 64)
        unit = self._unit
        if self.d <= max(_DENSE_D, rows):
            dense = self.to_dense() * unit[..., None] * unit[..., None]
            # a network's F is not quite symmetric
            values, basis = torch.linalg.eigh((dense + dense.mT) / 2)
            vectors = basis.mT
            if largest:
                values, vectors = values.flip(-1), vectors.flip(-2)
            return values[:, :k] / unit / unit, self._signed(vectors[:, :k])
        if generator is None:
            generator = torch.Generator(self.device).manual_seed(0)
        shape = (self.shape[0], block, self.d)
        start = torch.randn(shape, dtype=self.dtype, device=self.device, generator=generator)
        values, vectors = lanczos(
            self._apply_in_units,
            start,
            k,
            largest=largest,
            tol=tol,
            max_iter=max_iter,
            rows=rows,
            size=self._size_in_units,
        )
        return values / unit / unit, self._signed(vectors)

    def _signed(self, v: Tensor) -> Tensor:
        """[B, k, d] -> [B, k, *event_shape], each vector's entry of largest modulus made
        positive.
        """
        pivot = v.gather(-1, v.abs().argmax(-1, keepdim=True))
        return (v * pivot.sign()).reshape(*v.shape[:2], *self.event_shape)

    def _no_tangent(self, name: str) -> None:
        for t in self.parameters():
            if torch.autograd.forward_ad.unpack_dual(t).tangent is not None:
                raise NotImplementedError(f"{name} has no forward-mode derivative")

    def _unchanged(self) -> None:
        """Raises RuntimeError where a tensor that the operator was made from has been changed."""
        return

    @property
    def _like(self) -> tuple[str, Tensor]:
        """What vectors have to be like: a name, and a tensor [B, *event_shape]."""
        empty = torch.empty((), dtype=self.dtype, device=self.device)
        return "the operator", empty.expand(self.shape[0], *self.event_shape)

    def _rows(self, name: str, v: Tensor) -> Tensor:
        """[B, *event_shape] or [B, K, *event_shape], checked, as [B, K, d]."""
        return check.vectors(name, v, *self._like, self.d)

    @property
    def _unit(self) -> Tensor:
        """Powers of two u [B, 1] with which u^2 A is of size 1, where that is known: no square then
        under- or overflows, whatever the units of the caller, and multiplying by u rounds nothing.
        """
        return torch.ones((), dtype=self.dtype, device=self.device).expand(self.shape[0], 1)

    @property
    def _size_in_units(self) -> Tensor | None:
        """The size of u^2 A, [B, 1], where it is known."""
        return None

    def _apply_in_units(self, v: Tensor) -> Tensor:
        """u^2 A v, u = `_unit`, for v of size 1."""
        unit = self._unit[..., None]
        return unit * self.apply(unit * v)


class _Implicit(torch.autograd.Function):
    """The solution s of A s = b, given. Cotangents: z = A^{-1} g for b, -z^T (dA) s for A's
    parameters.
    """

    @staticmethod
    def forward(
        ctx,
        solution: Tensor,
        rebuild: Callable[..., LinearOperator],
        how: tuple[float, int],
        b: Tensor,
        shift: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.rebuild, ctx.how = rebuild, how
        solution = solution.clone()
        ctx.save_for_backward(solution, shift, *parameters)
        return solution

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        with plain(grad.device):  # of the mode in which backward was called
            return _Implicit._cotangents(ctx, grad)

    @staticmethod
    def _cotangents(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        solution, shift, *parameters = ctx.saved_tensors
        tol, max_iter = ctx.how
        operator = ctx.rebuild(*parameters)
        columns = grad.reshape(*grad.shape[:2], *operator.event_shape)
        z = operator.solve(columns, shift, tol=tol, max_iter=max_iter).reshape(grad.shape)
        twice = torch.is_grad_enabled()
        with torch.enable_grad():
            # aliases, which solution and z do not depend on
            shift, *parameters = aliases = [t.view_as(t) for t in (shift, *parameters)]
            image = ctx.rebuild(*parameters).apply(solution) + shift[:, None, None] * solution
            active = [t for t in aliases if t.requires_grad]
            found = iter(
                torch.autograd.grad(image, active, -z, create_graph=twice) if active else ()
            )
        return None, None, None, z, *(next(found) if t.requires_grad else None for t in aliases)


def _tolerance(dtype: torch.dtype, tol: float | None) -> float:
    tol = torch.finfo(dtype).eps ** (2 / 3) if tol is None else check.constant("tol", tol)
    if not 0 < tol < 1:
        raise ValueError(f"tol: expected a number in (0, 1), got {tol}")
    return tol
