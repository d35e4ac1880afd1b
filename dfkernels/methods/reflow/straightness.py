"""How straight the paths of a flow are, and how straight pairs allow them to be."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ..._torch import check
from ..._torch.shapes import flat
from ..denoiser import Denoiser, expect_denoiser
from .loss import residual, stratified
from .pairs import Pairs

__all__ = ["Straightness", "straightness", "straightness_of_pairs"]


class Straightness(NamedTuple):
    """A straightness, in the square of the data's unit, and its standard error over the pairs."""

    value: float
    error: float


@torch.no_grad()
def straightness(
    denoiser: Denoiser, pairs: Pairs, generator: torch.Generator, *, times: int = 8
) -> Straightness:
    """How far a flow is from going straight along pairs: the integral over t in [0, 1] of

        E|x_1 - x_0 - v(x_t, t)|^2,   x_t = (1 - t) x_0 + t x_1

    (Liu et al. 2022, section 2.2). 0 if and only if v is constant along every chord: then one step
    of Euler's method is exact. With the flow's own pairs it measures the bending of its paths; with
    the pairs that it was trained on, what their crossing leaves unexplained
    (`straightness_of_pairs`) and what the network misses.

    Args:
        denoiser: of a schedule that reaches from pure noise to data.
        pairs: n of them.
        generator: of the times.
        times: at how many each pair is looked at; stratified.

    Returns:
        Straightness(value, error); NaN without pairs, and the error for a single one.

    Raises:
        TypeError, ValueError: An argument or the network's output is wrong; the message names it.
    """
    check.instance("pairs", pairs, Pairs, "Pairs")
    times = check.integer("times", times, 1)
    expect_denoiser(denoiser)
    denoiser.warn_in_training("straightness")
    squares = [residual(denoiser, pairs, stratified(pairs, generator)) for _ in range(times)]
    return _summary(squares)


@torch.no_grad()
def straightness_of_pairs(
    pairs: Pairs, bandwidth: float, generator: torch.Generator, *, times: int = 16
) -> Straightness:
    """The straightness that the best flow on these pairs has, without a network: the integral over
    t of the variance of the chords x_1 - x_0 that pass through a point.

    The law is that of the pairs with normal noise of standard deviation h = `bandwidth` added to
    x_t, in which this is exact: with w_i of `exact` at x = x_t + h xi and u_i the chords it is the
    mean of sum_i w_i |u_i|^2 - |sum_i w_i u_i|^2 (one pass of `ops.average` for each time, in
    float64). Take h well above the distance of neighbours, and below the size of what the chords
    depend on: as h -> 0 nothing is left unexplained.

    Args:
        pairs: at least one.
        bandwidth: h > 0, in the unit of the data.
        generator: of times and xi.
        times: how many; each pair is looked at at each of them.

    Returns:
        Straightness(value, error); the error is NaN for a single pair.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
    """
    check.instance("pairs", pairs, Pairs, "Pairs")
    if not len(pairs):
        raise check.mismatch("pairs", "at least one pair", "none")
    check.generator(generator)
    h, times = check.positive("bandwidth", bandwidth), check.integer("times", times, 1)
    wide = Pairs(pairs.noise.double(), pairs.sample.double())
    chords = flat(wide.sample - wide.noise)
    chords = chords - chords.mean(0)  # a constant has no variance, and would cost digits
    values = torch.cat([chords, chords.square().sum(1, keepdim=True)], 1)
    how = {"dtype": torch.float64, "device": generator.device, "generator": generator}
    found: list[Tensor] = []
    for k in range(times):
        t = (k + torch.rand(1, **how).item()) / times
        z = wide.at(t)
        x = z + h * torch.randn(z.shape, **how).to(z.device)
        average = ops.average(x, z, values, 1.0, h).average
        found.append((average[:, -1] - average[:, :-1].square().sum(1)).clamp_min(0))
    return _summary(found)


def _summary(squares: list[Tensor]) -> Straightness:
    """Of squares [n] at several times."""
    of_pairs = torch.stack(squares).double().mean(0)
    if len(of_pairs) < 2:
        return Straightness(of_pairs.mean().item(), math.nan)
    return Straightness(of_pairs.mean().item(), (of_pairs.std() / len(of_pairs) ** 0.5).item())
