"""Gumbel noise that a counter gives: the same numbers on every device and in any order."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_FACTORS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(counter: list[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011).

    Args:
        counter: Four int64 tensors of numbers below 2^32, whose shapes broadcast.
        key: Two numbers below 2^32.

    Returns:
        Four int64 tensors of numbers below 2^32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(_FACTORS[0], c0), _product(_FACTORS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return [c0, c1, c2, c3]


def _product(a: int, c: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower 32 bits of a * c, of two numbers below 2^32."""
    high = (a * (c >> 16) + ((a * (c & 0xFFFF)) >> 16)) >> 16  # no term reaches 2^63
    return high, (a * c) & _LOW


def gumbel(seed: int, query: Tensor, number: Tensor, stage: int) -> Tensor:
    """g = -log(-log((word + 1/2) 2^-32)), float64: independent standard Gumbel noise.

    word is word number % 4 of Philox4x32-10 with the key (low, high 32 bits of seed) and the
    counter (low 32 bits of number // 4, low 32 bits of query, high 32 bits of query, stage).

    Args:
        seed: From 0 to 2^63 - 1.
        query: int64 numbers of queries.
        number: int64 numbers of blocks or atoms, of a shape that broadcasts with that of query.
        stage: 0 for blocks, 1 for atoms.
    """
    group, stages = (number // 4) & _LOW, torch.full_like(number, stage)
    words = philox([group, query & _LOW, query >> 32, stages], (seed & _LOW, seed >> 32))
    place, word = number % 4, words[0]
    for i in range(1, 4):
        word = torch.where(place == i, words[i], word)
    return -torch.log(-torch.log((word.double() + 0.5) * 2.0**-32))
