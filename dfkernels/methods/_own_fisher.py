"""The Fisher information that belongs to a denoiser."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .._fisher_operator import FisherOperator
from ..fisher import DiffusionFisher
from . import endpoint
from ._posterior_mean import PosteriorMean, refuse_conditions
from .denoiser import Denoiser, expect_denoiser

__all__ = ["MODES", "data_set_of", "in_units", "own_fisher"]

MODES = ("jvp", "vjp", "finite-difference")


def data_set_of(denoiser: Denoiser) -> PosteriorMean | None:
    """The data set in the place of a denoiser's network; None where there is a network.

    Raises:
        TypeError: It is no Denoiser.
        ValueError: There are conditions for a data set, which takes none.
    """
    expect_denoiser(denoiser)
    if not isinstance(denoiser.network, PosteriorMean):
        return None
    refuse_conditions(denoiser.conditions)
    return denoiser.network


def own_fisher(
    denoiser: Denoiser, x: Tensor, t: float | Tensor, mode: str
) -> tuple[Tensor, FisherOperator]:
    """The noise prediction at x [B, *E] and F: from one pass over a data set, or of a network by
    its Jacobian products, by one of MODES.
    """
    data = data_set_of(denoiser)
    if data is None:
        return denoiser.eps(x, t), endpoint.fisher(mode, x, t, denoiser)
    at: DiffusionFisher = data.fisher(x, t)
    return denoiser.eps_of(x, t, at.denoised), at


def in_units(fisher: FisherOperator) -> Callable[[Tensor], Tensor]:
    """The products of sigma^2 F, whose eigenvalues are at most 1, on flat vectors [B, K, d]."""
    variance = fisher.sigma.square()[:, None, None]
    return lambda v: variance * fisher.apply(v)
