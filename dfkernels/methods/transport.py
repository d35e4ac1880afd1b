"""Does the probability-flow ODE carry the noise to the data along the optimal-transport map?
(Algorithm 2, corrected.)

A Monge map is the gradient of a convex function, so that its Jacobian A is symmetric and positive
definite everywhere: both have to hold for every chain.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import check
from ..law import Law, checked_law
from ..schedule import Schedule
from .grid import nodes

__all__ = [
    "CONVENTIONS",
    "Summary",
    "TransportTest",
    "asymmetry",
    "printed_rates",
    "transport_test",
]

CONVENTIONS = ("jacobian", "authors", "slide")


def asymmetry(A: Tensor) -> Tensor:
    """The asymmetry of matrices A [B, d, d]: |A0 - A0^T|_F/(sqrt(2) |A0|_F), [B] in [0, sqrt(2)],
    with A0 = A without its diagonal; 0 where A0 = 0.

    The statistic of the paper's Table 3. It does not see the diagonal: a tiny A0 weighs as much as
    a large one, and turning the axes changes the value (but not whether it is 0).
    """
    A0 = A - torch.diag_embed(A.diagonal(dim1=-2, dim2=-1))
    largest = A0.abs().flatten(1).amax(1) if A0.numel() else A0.new_zeros(len(A0))
    A0 = A0 / torch.where(largest > 0, largest, 1.0)[:, None, None]  # its square may underflow
    size = torch.linalg.matrix_norm(A0)
    return torch.where(size > 0, torch.linalg.matrix_norm(A0 - A0.mT) / (math.sqrt(2) * size), 0.0)


class Summary(NamedTuple):
    """Statistics over the chains of a `TransportTest`."""

    mean: float  # of the asymmetry
    error: float  # the standard error of that mean
    median: float
    low: float  # the 5 % quantile
    high: float  # the 95 % quantile
    smallest: float  # the least of the smallest eigenvalues
    monge: float  # the share of chains whose Jacobian is symmetric and positive definite


class TransportTest(NamedTuple):
    """What `transport_test` finds for each chain; its Jacobian is exp(log_norm) A."""

    x: Tensor  # [B, *E]: where it ends
    A: Tensor  # [B, d, d], |A|_F = sqrt(d)
    log_norm: Tensor  # [B]
    asymmetry: Tensor  # [B]: of A
    smallest: Tensor  # [B]: the least eigenvalue of (A + A^T)/2, 1 for the identity

    def monge(self, tolerance: float = 1e-6) -> Tensor:
        """Which chains may follow a Monge map, bool [B]: asymmetry <= tolerance, smallest > 0."""
        return (self.asymmetry <= tolerance) & (self.smallest > 0)

    def summary(self, tolerance: float = 1e-6) -> Summary:
        """Statistics over the chains.

        Raises:
            ValueError: There is no chain.
        """
        a = self.asymmetry.double().cpu()
        if len(a) == 0:
            raise ValueError("summary: expected at least one chain, got 0")
        ordered = a.sort().values  # torch.quantile takes 2^24 elements at most
        at = lambda q: ordered[round(q * (len(a) - 1))].item()
        error = a.std(correction=0).item() / math.sqrt(len(a))
        share = self.monge(tolerance).double().mean().item()
        return Summary(
            a.mean().item(), error, at(0.5), at(0.05), at(0.95), self.smallest.min().item(), share
        )


def transport_test(
    cloud: Law,
    schedule: Schedule,
    t: Tensor,
    *,
    chains: int | None = None,
    x: Tensor | None = None,
    generator: torch.Generator | None = None,
    convention: str = "jacobian",
) -> TransportTest:
    """Tests whether the flow of a small data set is an optimal-transport map, from the Jacobians of
    DDIM chains over its exact posterior.

    Args:
        cloud: atoms [N, *E]; d = prod(E) up to 16 runs in one fused kernel on the CPU, above step
            by step, as a `GaussianMixture` does.
        schedule: maps t to alpha and sigma.
        t: [M + 1] times of the schedule, noisiest first, sigma > 0 and alpha > 0 throughout
            (`time_grid`).
        chains, generator: how many chains start from x ~ N(0, sigma^2 I) at t[0], in float64; None:
            4096, and torch's global generator.
        x: [B, *E], the starts themselves, float32 or float64: the dtype of computation. It takes
            the place of `chains` and `generator`.
        convention: how A is carried from step to step. The statistic depends on it:
            "jacobian": A <- M A with the exact derivative M of the DDIM step: this is the test.
            "authors": A <- A + (s - t) B A, as in the authors' code, B = [f - g2/(2 sigma^2)] I +
            (alpha^2 g2/(2 sigma^4)) C, eq. 22 as printed: both g2 terms have the wrong sign. With
            many steps of d = 2 its asymmetry is right all the same.
            "slide": A <- A + (s - t) A^T B, line 6 of Algorithm 2 as printed: neither a Jacobian
            nor its transpose.

    A is rescaled at every step: the statistics do not depend on its size. They depend on (x/alpha,
    sigma/alpha) only: with "jacobian" every schedule gives the same over the same grid of
    sigma/alpha.

    Returns:
        The end, the Jacobian and the statistics of each chain.

    Raises:
        TypeError, ValueError: An argument is wrong; the message names it.
        NotImplementedError: x requires grad.
    """
    checked_law("cloud", cloud)
    check.choice("convention", convention, CONVENTIONS)
    levels = nodes(schedule, t)
    if x is not None:
        for name, value in (("chains", chains), ("generator", generator)):
            check.unused(name, value, "with x, which are the starts")
    else:
        shape = (check.integer("chains", 4096 if chains is None else chains, 0), *cloud.event_shape)
        x = (
            torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            * levels.sigma[0]
        )
        x = x.to(cloud.device)
    check.query("x", x)
    rates = None if convention == "jacobian" else printed_rates(schedule, levels.t)
    chain = cloud._chain(x, levels.alpha, levels.sigma, rates, convention == "slide")
    symmetric = (chain.A + chain.A.mT) / 2
    smallest = torch.linalg.eigvalsh(symmetric)[:, 0] if len(x) else chain.log_norm
    return TransportTest(*chain, asymmetry(chain.A), smallest)


def printed_rates(schedule: Schedule, t: Tensor) -> Tensor:
    """The coefficients of I and (alpha/sigma)^2 C in (s - t) B, [M, 2], at each step from t to s:
    eq. 22 as printed, with the wrong sign of both g2 terms.
    """
    at = t[:-1]
    half = schedule.g2(at) / (2 * schedule.sigma(at) ** 2)
    return t.diff()[:, None] * torch.stack([schedule.f(at) - half, half], 1)
