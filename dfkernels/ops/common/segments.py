"""Reductions over segments: numbers of one query after those of another. Every segment is reduced
in an order of its own, so that the result is the same from run to run on every device, and all of
them take a few launches together."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _reduced(t: Tensor, kind: str, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(t, kind, lengths=lengths, unsafe=True)


def spread(t: Tensor, lengths: Tensor, size: int) -> Tensor:
    """A value of each segment for each of its numbers, `size` in all."""
    return t.repeat_interleave(lengths, output_size=size)


def sums(t: Tensor, lengths: Tensor) -> Tensor:
    """The sums of t [M, n] over the rows of every segment, [segments, n]."""
    return _reduced(t, "sum", lengths)


def logsumexp(t: Tensor, lengths: Tensor) -> Tensor:
    """log sum exp of every segment of t [M], [segments].

    Args:
        t: Floating.
        lengths: int64 [segments], each at least 1, M in all.
    """
    largest = _reduced(t, "max", lengths)
    largest = torch.where(largest == -math.inf, 0, largest)
    below = t - spread(largest, lengths, len(t))
    return _reduced(below.exp(), "sum", lengths).log() + largest


def first_largest(t: Tensor, lengths: Tensor) -> Tensor:
    """Where in t [M] the largest number of every segment stands, the first of equal ones; that of
    a NaN, if there is one. [segments], int64."""
    largest = spread(_reduced(t, "max", lengths), lengths, len(t))
    place = torch.arange(len(t), dtype=torch.float64, device=t.device)
    place = torch.where((t == largest) | t.isnan(), place, float(len(t) - 1))
    return _reduced(place, "min", lengths).long()
