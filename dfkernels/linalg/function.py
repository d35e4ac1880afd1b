"""Functions of a batch of symmetric matrices, times vectors, by Lanczos."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cg import power_of_two

__all__ = ["function_product"]


def function_product(
    apply: Callable[[Tensor], Tensor],
    v: Tensor,
    f: Callable[[Tensor], Tensor],
    steps: int,
) -> Tensor:
    """f(A) v for symmetric A, known by its products only: |v| V f(T) e_1 after k steps of Lanczos
    from v, V an orthonormal basis of span{v, A v, ..., A^(k-1) v} and T = V^T A V.

    It is exact for polynomials f of degree below k, and so for every f where k is at least the
    number of different eigenvalues of A. With f = sqrt it draws from N(0, A) (Chow & Saad 2014).

    Args:
        apply: v -> A v on [B, K, d].
        v: [B, K, d]; each vector has a basis of its own, and all share the products.
        f: f(l) -> f of each eigenvalue of T, [B, K, k] -> [B, K, k], finite on the range of A. It
            may differ from vector to vector.
        steps: k >= 1, the number of products; more than d are not made.

    Returns:
        [B, K, d], without a graph.
    """
    with torch.no_grad():
        scale = power_of_two(v.abs().amax(-1, keepdim=True))  # so that no square overflows
        length = (v / scale).norm(dim=-1, keepdim=True)
        basis = (v / scale / length.clamp_min(torch.finfo(v.dtype).tiny))[:, :, None]
        basis, small = _lanczos(apply, basis, min(steps, v.shape[-1]))
        values, mix = torch.linalg.eigh(small)
        weights = mix @ (f(values) * mix[:, :, 0])[..., None]
        return scale * length * (weights.mT @ basis)[:, :, 0]


def _lanczos(apply: Callable[[Tensor], Tensor], basis: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Extends a basis of one vector [B, K, 1, d] to `steps` of them, reorthogonalised in full: the
    basis [B, K, k, d], and T [B, K, k, k].

    Where the space is exhausted before, the rest of the basis is 0, and the rest of T is apart
    from its first part, with a diagonal in the range of A.
    """
    diagonal, off = [], []
    for k in range(steps):
        last = basis[:, :, k]
        image = apply(last)
        middle = (last * image).sum(-1)
        if k:
            middle = torch.where(last.any(-1), middle, diagonal[0])
        diagonal.append(middle)
        if k + 1 == steps:
            break
        size = image.norm(dim=-1)
        rest = image[:, :, None]
        for _ in range(2):
            rest = rest - (rest @ basis.mT) @ basis
        length = rest[:, :, 0].norm(dim=-1)
        # what is left of an image inside the space is its rounding
        goes_on = length > 8 * torch.finfo(length.dtype).eps * size
        off.append(torch.where(goes_on, length, 0.0))
        fresh = torch.where(goes_on[..., None, None], rest / length[..., None, None], 0.0)
        basis = torch.cat([basis, fresh], 2)
    small = torch.stack(diagonal, -1).diag_embed()
    if off:
        side = torch.stack(off, -1).diag_embed(1)
        small = small + side + side.mT
    return basis, small
