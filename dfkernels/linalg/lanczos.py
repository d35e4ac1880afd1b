"""Extreme eigenpairs of a batch of symmetric matrices by thick-restart block Lanczos."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["lanczos", "orthonormal"]


def lanczos(
    apply: Callable[[Tensor], Tensor],
    start: Tensor,
    k: int,
    *,
    largest: bool,
    tol: float,
    max_iter: int,
    rows: int,
    size: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest (smallest) eigenvalues [B, k] of symmetric A, known by its products only,
    outermost first, and orthonormal vectors [B, k, d].

    Every product is with a block of vectors; the basis is reorthogonalised in full, and restarts
    from its best Ritz vectors when it is full (Wu & Simon 2000).

    Args:
        apply: v -> A v on [B, block, d].
        start: [B, block, d], k <= block, rank `block`.
        tol: bound on |A v - l v| / max(size, |l|).
        max_iter: of products after the first.
        rows: the basis has at most so many, at least 2 block.
        size: [B, 1], about |A|; None: the largest |l| found.

    Raises:
        RuntimeError: max_iter products do not reach tol.
    """
    basis, block = orthonormal(start), start.shape[1]
    image = apply(basis)
    error = basis.new_zeros(basis.shape[:2])
    for _ in range(max_iter):
        small = basis @ image.mT
        values, mix = torch.linalg.eigh((small + small.mT) / 2)
        norm = values.abs().amax(-1, keepdim=True) if size is None else size
        mix = (mix.flip(-1) if largest else mix)[..., :block].mT
        values = (values.flip(-1) if largest else values)[:, :block]
        ritz, ritz_image = mix @ basis, mix @ image
        residual = ritz_image - values[..., None] * ritz
        error = residual.norm(dim=-1) / torch.maximum(norm, values.abs())
        if bool((error[:, :k] <= tol).all()):
            return values[:, :k], ritz[:, :k]
        if basis.shape[1] + block > rows:
            basis, image = ritz, ritz_image
        length = residual.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(residual.dtype).tiny)
        fresh = orthonormal(residual / length, basis)
        basis = torch.cat([basis, fresh], 1)
        image = torch.cat([image, apply(fresh)], 1)
    raise RuntimeError(
        f"eigsh: |F v - l v| = {error[:, :k].max().item():.2e} |F| after {max_iter} passes, "
        f"tol = {tol:.2e}; raise max_iter or tol, or ask for fewer pairs"
    )


def orthonormal(v: Tensor, basis: Tensor | None = None) -> Tensor:
    """The rows of v [B, s, d] made orthonormal, and orthogonal to those of basis.

    Three rounds: where v is short of rank, QR fills in directions that may lie in the basis; a
    round takes them out again.
    """
    for _ in range(1 if basis is None else 3):
        if basis is not None:
            v = v - (v @ basis.mT) @ basis
        v = torch.linalg.qr(v.mT).Q.mT
    return v
