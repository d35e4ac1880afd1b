"""The trained time predictor of NSGF++."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..._torch import check
from ..reflow import Pairs
from ..reflow.loss import stratified

__all__ = ["TimePredictor", "time_loss"]


class TimePredictor(nn.Module):
    """tau(x) in (0, 1): the time that a point looks like on the straight paths.

    It is trained (`time_loss`) on points of these paths, and used on the end of an NSGF flow, which
    follows another law; t is no function of x on either. `time_posterior` has the exact mean.

    Args:
        body: `body(z, level)` -> [B], which is given level 0, such as
            `networks.VectorNet(d, output="scalar")` or `networks.ImageNet`; 1/2 at the start.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.body(x, x.new_zeros(len(x))))


def time_loss(predictor: nn.Module, pairs: Pairs, generator: torch.Generator) -> Tensor:
    """The training loss of a time predictor on a batch of pairs, a scalar: the mean of
    (tau(x_t) - t)^2, for x_t = (1 - t) x_0 + t y and t uniform in [0, 1] (Algorithm 3).

    Args:
        predictor: `predictor(x)` -> [n], such as a `TimePredictor`.
        pairs: A batch of n pairs of noise and data, independent ones.
        generator: Of the times, one in each of n equal parts of [0, 1].

    Raises:
        TypeError, ValueError: An argument or the predictor's output is wrong; the message names it.
    """
    check.instance("pairs", pairs, Pairs, "Pairs")
    t = stratified(pairs, generator)
    out = predictor(pairs.at(t))
    if not isinstance(out, Tensor) or out.shape != t.shape:
        got = f"shape {[*out.shape]}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"predictor: expected times of shape [{len(t)}], got {got}")
    return (out - t.to(out.dtype)).square().mean()
