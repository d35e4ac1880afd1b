"""The Metropolis step of Langevin chains whose log q is known."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch.shapes import flat
from ..denoiser import Denoiser
from ._proposals import Krylov, Proposal
from ._step import Settings, at

__all__ = ["Link", "accepts", "chosen", "linked", "log_ratio"]


class Link(NamedTuple):
    """A state of each chain, and the proposal of its next one."""

    x: Tensor  # [B, d]
    log_prob: Tensor  # log q [B], float64
    proposal: Proposal


def linked(denoiser: Denoiser, x: Tensor, t: float | Tensor, settings: Settings) -> Link:
    """The link at states x [B, *E] of a data set."""
    state = at(denoiser, x, t, "jvp")
    proposal = settings.propose(state)
    assert not isinstance(proposal, Krylov)
    return Link(flat(x), state.log_prob, proposal)


def log_ratio(here: Link, there: Link) -> Tensor:
    """log [q(x') p(x | x')] - log [q(x) p(x' | x)], [B]: both proposals count, since their
    covariances differ.
    """
    back = there.proposal.log_density(here.x) - here.proposal.log_density(there.x)
    return there.log_prob - here.log_prob + back


def accepts(here: Link, there: Link, u: Tensor) -> Tensor:
    """Which chains move, bool [B], by uniform numbers u [B]."""
    return u.log() < log_ratio(here, there)


def chosen(taken: Tensor, one: Link, other: Link) -> Link:
    """Chain by chain, the first where taken [B], else the second."""

    def at(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(taken.view(-1, *[1] * (a.ndim - 1)), a, b)

    kind = type(one.proposal)
    fields = zip(one.proposal, other.proposal, strict=True)
    return Link(
        at(one.x, other.x),
        at(one.log_prob, other.log_prob),
        kind(*(at(a, b) for a, b in fields)),
    )
