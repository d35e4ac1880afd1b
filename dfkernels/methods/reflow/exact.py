"""The next flow of stored pairs, without a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ... import ops
from ..._torch import check
from ...schedule import RectifiedFlow
from ..denoiser import Denoiser
from .pairs import Pairs

__all__ = ["PairVelocity", "exact"]


class PairVelocity(nn.Module):
    """v(x, t) = sum_i w_i (b_i - a_i),  w_i = softmax_i(-|x - (1 - t) a_i - t b_i|^2/(2 h^2)): the
    network of `exact`."""

    noise: Tensor
    sample: Tensor

    def __init__(self, pairs: Pairs, bandwidth: float) -> None:
        super().__init__()
        self.bandwidth = bandwidth
        self.register_buffer("noise", pairs.noise)
        self.register_buffer("sample", pairs.sample)

    def extra_repr(self) -> str:
        return f"{len(self.noise)} pairs, bandwidth={self.bandwidth:g}"

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        pairs = Pairs(self.noise.to(x.dtype), self.sample.to(x.dtype))
        chords = pairs.sample - pairs.noise
        out = torch.empty_like(x)
        for level in t.unique().tolist():  # the atoms of each time are others
            rows = t == level
            found = ops.average(x[rows], pairs.at(level), chords, 1.0, self.bandwidth)
            out[rows] = found.average
        return out


def exact(pairs: Pairs, bandwidth: float) -> Denoiser:
    """The rectified flow of stored pairs in closed form: what a network that is trained on them
    approaches, with a kernel in place of its smoothness.

    v(x, t) is the mean of the chords b_i - a_i of the pairs (a_i, b_i), weighted by normal kernels
    of standard deviation `bandwidth` about (1 - t) a_i + t b_i (`ops.average`). A pass over all
    pairs for each call and time.

    Args:
        pairs: at least one.
        bandwidth: h > 0, in the unit of the data; below the distance of neighbours each pair goes
            its own way.

    Returns:
        A Denoiser with RectifiedFlow, of prediction type "flow", for `df.sample`, `pairs`, ...;
        differentiable in x, not in the pairs.

    Raises:
        TypeError, ValueError: An argument is wrong.
    """
    check.instance("pairs", pairs, Pairs, "Pairs")
    if not len(pairs):
        raise check.mismatch("pairs", "at least one pair", "none")
    network = PairVelocity(pairs, check.positive("bandwidth", bandwidth))
    return Denoiser(network.eval(), RectifiedFlow(), "flow")
