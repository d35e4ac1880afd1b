"""Ancestral sampling: random steps from noise level t to s, with the mean and the covariance that
x_s has given x_t.

In xbar = x/alpha, with noise levels t > s = sigma/alpha, q(x_s | x_t) is a mixture over the
posterior of y. Its mean and covariance are

    mean = r xbar + (1 - r) ybar,   covariance = s^2 (1 - r) I + (1 - r)^2 C,   r = (s/t)^2

with the posterior mean ybar and covariance C = t^2 (I - sigma^2 F) at x_t. The samplers differ in
what they take for C:

    "none"        0: DDPM with the smaller variance (Ho et al. 2020), DDIM at eta = 1
    "isotropic"   (tr C/d) I: Analytic-DPM (Bao et al. 2022), here for each sample by itself
    "diagonal"    diag C: as in OCM-DDPM (Ou et al. 2024, arXiv 2406.10808)
    "full"        C: LGS (arXiv 2605.22723)

As the step shrinks, the law of the path is off (Kullback-Leibler) by O(1/steps) with "none" and by
O(1/steps^2) with "full"; "isotropic" and "diagonal" lie between, as far as C is so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._fisher_operator import FisherOperator
from .._torch import check
from .._torch.objects import ordinary, plain
from .._torch.shapes import column, flat
from ..linalg.function import function_product
from ._drawn import normal
from ._own_fisher import MODES, data_set_of, in_units, own_fisher
from ._reporting import Callback, reporting
from ._start import warn_of_little_noise
from .denoiser import Denoiser
from .grid import Nodes, Trajectory, nodes

__all__ = ["COVARIANCES", "sample"]

COVARIANCES = ("none", "isotropic", "diagonal", "full")


def sample(
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor,
    covariance: str = "full",
    *,
    generator: torch.Generator,
    lanczos: int | None = None,
    mode: str = "jvp",
    keep: int | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **conditions: object,
) -> Trajectory:
    """Samples by random steps, from x = x_{t[0]} over the nodes t to x_{t[-1]}.

    >>> path = sample(denoiser, sigma * noise, t, "full", generator=generator, label=label)
    >>> x_0 = denoiser(path.x[-1], path.t[-1], label=label)

    Take it in the place of the deterministic `samplers.sample` where steps are few and products
    with the Jacobian are to be had: a step of "full" makes a few of them, and needs fewer steps.

    Args:
        denoiser: A network, or the ideal one of a data set (`Denoiser.exact`).
        x: [B, *E], float32 or float64; alpha x_0 + sigma eps at t[0].
        t: [M + 1], noisiest first, e.g. `grid.time_grid(schedule, steps, noise)`; sigma > 0 at the
            last one too.
        covariance: One of COVARIANCES. Over a data set each costs one pass, and "diagonal" one more
            and "full" `lanczos` more. Of a network "isotropic" and "diagonal" take d products with
            the Jacobian, "full" takes `lanczos`.
        generator: Of the noise; moved on.
        lanczos: How many steps of Lanczos the square root of "full" takes, a product with F each;
            from d on it is exact. None: 3. With another covariance it has to be None.
        mode: How a network's products are made: "jvp", "vjp" or "finite-difference", as in
            `endpoint.fisher`.
        keep: How many states the trajectory holds, the last ones; default all.
        callback: Called as callback(done, total) after each of the M steps.
        progress: Whether to show a bar on stderr.
        conditions: Keyword arguments of the network, such as class labels.

    A network's C may have negative eigenvalues, by its errors: they count as 0.

    Returns:
        The trajectory, without a graph; its last state, `.x[-1]`, is the sample at the lowest noise
        level.

    Raises:
        TypeError, ValueError: An argument is wrong, or the network returns another shape, NaN or
            inf; the message names it.
    """
    if isinstance(denoiser, Denoiser):
        denoiser = denoiser.bind(**conditions)
    data_set_of(denoiser)
    check.query("x", x)
    check.choice("covariance", covariance, COVARIANCES)
    check.choice("mode", mode, MODES)
    check.generator(generator)
    if covariance != "full":
        check.unused("lanczos", lanczos, f"with covariance={covariance!r}, which takes no Lanczos")
    lanczos = check.integer("lanczos", 3 if lanczos is None else lanczos, 1)
    path = nodes(denoiser.schedule, t)
    total = len(path.t) - 1
    keep = total + 1 if keep is None else check.integer("keep", keep, 1)
    denoiser.warn_in_training("ancestral.sample")
    warn_of_little_noise("ancestral.sample", x, path)
    bar = reporting("ancestral.sample", callback, progress, total)
    with torch.no_grad(), plain(x.device), bar as report:
        states = [ordinary(x.detach())]
        for i in range(total):
            eps, fisher = own_fisher(denoiser, states[-1], path.t[i], mode)
            step = _Step.of(path, i)
            noise = _coloured(fisher, covariance, step.growth, normal(x, generator), lanczos)
            state = step.scale * states[-1] + step.slope * eps + step.size * noise
            states = [*states, state][-keep:]
            report(i + 1, total)
    return Trajectory(path.t[-len(states) :], states)


class _Step(NamedTuple):
    """x_{i+1} = scale x_i + slope eps_i + size (I + growth C/s_i^2)^(1/2) xi."""

    scale: float
    slope: float
    size: float
    growth: float

    @classmethod
    def of(cls, path: Nodes, i: int) -> _Step:
        alpha, alpha_to = path.alpha[i].item(), path.alpha[i + 1].item()
        s, s_to = path.s[i].item(), path.s[i + 1].item()
        rest = (s - s_to) * (s + s_to) / s**2  # 1 - r
        return cls(
            alpha_to / alpha,
            -alpha_to * rest * s,
            alpha_to * s_to * rest**0.5,
            rest * (s / s_to) ** 2,
        )


def _coloured(
    fisher: FisherOperator, covariance: str, growth: float, xi: Tensor, lanczos: int
) -> Tensor:
    """(I + growth (I - S))^(1/2) xi with S = sigma^2 F, so that I - S = C/s^2, or with what
    `covariance` takes for it.
    """
    if covariance == "none":
        return xi

    def root(values: Tensor) -> Tensor:
        return (1 + growth * (1 - values).clamp_min(0)).sqrt()

    if covariance == "full":
        rows = flat(xi)[:, None]
        return function_product(in_units(fisher), rows, root, lanczos).view(xi.shape)
    if covariance == "diagonal":
        return root(column(fisher.sigma, xi) ** 2 * fisher.diagonal()) * xi
    return column(root(fisher.sigma**2 * fisher.trace() / fisher.d), xi) * xi
