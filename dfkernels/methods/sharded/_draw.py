"""One atom per query, drawn from the posterior over all files, in one pass over them.

The draws are those of `ops.draw` over all atoms in one tensor: Gumbel-max among blocks of 64 atoms,
then among the atoms of one block, with noise that the seed, the query and the number of the block
or atom give. A block that two files share is put together first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..._constants import DRAW_BLOCK
from ...certified import heaviest
from ...ops.draw.gumbel import gumbel
from ._pass import Pass

__all__ = ["draw"]

_PAIRS = 1 << 20  # of a query and an atom whose logits are computed together
_ACCURACY = 1e-7  # of logits: less than what float32 ones are rounded by
_DEPTH = 60.0  # nats below the heaviest, where an atom is never drawn


def draw(over: Pass, x: Tensor, alpha: Tensor, sigma: Tensor, seed: int) -> Tensor:
    """The numbers of the atoms drawn, int64 [B]: for queries x ``[B, *E]`` with levels [B], and a
    seed as in `ops.draw`.
    """
    wide = x.flatten(1).double(), alpha.double(), sigma.double()
    best = torch.full_like(wide[1], -math.inf)
    drawn = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    most = max(1, _PAIRS // max(1, len(x)) // DRAW_BLOCK) * DRAW_BLOCK
    blocks = (y for _, y in over.files.blocks(over.numbers, over.count, over.pinned))
    for first, part in _whole_blocks(blocks, most):
        score, rows = _of_some(*wide, over.atoms(part, x), first, seed)
        better = score > best
        best, drawn = torch.where(better, score, best), torch.where(better, rows, drawn)
    heaviest.refuse_overflow(best)
    return drawn


def _whole_blocks(blocks: Iterable[Tensor], most: int) -> Iterator[tuple[int, Tensor]]:
    """The atoms again, with the number of the first one, a multiple of DRAW_BLOCK: as many of these
    blocks as there are, up to `most` atoms. Only the last block of all may be short.
    """
    start, left = 0, None
    for atoms in blocks:
        if left is not None:
            missing = DRAW_BLOCK - len(left)
            left, atoms = torch.cat([left, atoms[:missing]]), atoms[missing:]
            if len(left) < DRAW_BLOCK:
                continue
            yield start, left
            start += DRAW_BLOCK
        whole = len(atoms) // DRAW_BLOCK * DRAW_BLOCK
        for first in range(0, whole, most):
            part = atoms[first : min(first + most, whole)]
            yield start, part
            start += len(part)
        left = atoms[whole:].clone() if len(atoms) > whole else None
    if left is not None:
        yield start, left


def _of_some(
    x: Tensor, alpha: Tensor, sigma: Tensor, atoms: heaviest.Atoms, first: int, seed: int
) -> tuple[Tensor, Tensor]:
    """The best block's score and the atom drawn from it, [B] each, of atoms from `first` on."""
    count = {"dtype": torch.int64, "device": x.device}
    given = (x, alpha, sigma, atoms, heaviest.distances(atoms), _ACCURACY, _DEPTH)
    logits = heaviest.all_logits(*given)
    padded = torch.nn.functional.pad(logits, (0, -logits.shape[1] % DRAW_BLOCK), value=-math.inf)
    padded = padded.unflatten(1, (-1, DRAW_BLOCK))
    queries = torch.arange(len(x), **count)[:, None]
    blocks = torch.arange(padded.shape[1], **count) + first // DRAW_BLOCK
    scores = padded.logsumexp(2) + gumbel(seed, queries, blocks, 0)
    score, best = scores.max(1)
    rows = (blocks[best] * DRAW_BLOCK)[:, None] + torch.arange(DRAW_BLOCK, **count)
    inside = padded[queries[:, 0], best] + gumbel(seed, queries, rows, 1)
    return score, rows.gather(1, inside.argmax(1, keepdim=True))[:, 0]
