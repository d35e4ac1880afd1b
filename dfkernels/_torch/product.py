"""A matrix product whose derivatives do not depend on autocast either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .objects import plain

__all__ = ["product"]


def product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix, for rows [..., n] and a matrix [n, m] that is a constant, in their dtype.

    Autograd would compute the derivative of a plain product by products of the mode in which
    backward is called: in bfloat16, if that is inside autocast.
    """
    return _Product.apply(rows, matrix)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, matrix: Tensor) -> Tensor:
        with plain(rows.device):
            return rows @ matrix

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        matrix = inputs[1]
        ctx.save_for_backward(matrix)
        ctx.save_for_forward(matrix)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (matrix,) = ctx.saved_tensors
        return product(grads[0], matrix.mT), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (matrix,) = ctx.saved_tensors
        return product(tangents[0], matrix)
