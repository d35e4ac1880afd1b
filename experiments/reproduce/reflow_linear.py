"""Reflow where everything is linear: the collapse of a denoising autoencoder in closed form and by
simulation, and a linear flow between Gaussians with a regression that errs the same way each round.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "AUTOENCODER",
    "EARLIER",
    "ROUNDS",
    "Flow",
    "autoencoder",
    "flows",
    "simulated",
]

# Variance after 1, 5, 10, 50 rounds, by sigma^2 and the share lambda of real data, as derived
AUTOENCODER = {
    (0.01, 0.0): (0.990, 0.951, 0.901, 0.507),
    (0.01, 0.1): (0.990, 0.959, 0.936, 0.902),
    (0.01, 0.3): (0.990, 0.973, 0.968, 0.967),
    (0.01, 0.5): (0.990, 0.981, 0.980, 0.980),
    (0.1, 0.0): (0.909, 0.555, 0.163, 0.0),
    (0.1, 0.1): (0.909, 0.635, 0.435, 0.241),
    (0.1, 0.3): (0.909, 0.751, 0.711, 0.704),
    (0.1, 0.5): (0.909, 0.825, 0.820, 0.820),
    (0.5, 0.0): (0.667, 3.1e-3, 9e-72, 0.0),
    (0.5, 0.1): (0.667, 0.059, 0.024, 0.024),
    (0.5, 0.3): (0.667, 0.248, 0.213, 0.212),
    (0.5, 0.5): (0.667, 0.422, 0.414, 0.414),
}
ROUNDS = (1, 5, 10, 50)


def autoencoder(noise: float, share: float, rounds: int) -> list[float]:
    """The variance of each round's data, s_1, s_2, ..., from s_0 = 1. With S = share s_0 + (1 -
    share) s and fresh noise of variance `noise`, the best linear denoiser is S/(S + noise), and
    the next data has s' = S^2/(S + noise).
    """
    s, found = 1.0, []
    for _ in range(rounds):
        mixed = share + (1 - share) * s
        s = mixed**2 / (mixed + noise)
        found.append(s)
    return found


def simulated(
    noise: float, share: float, rounds: int, n: int, copies: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The same by n scalars a round, regressed by least squares: means and standard errors over
    `copies` independent runs, each [rounds]."""
    draw = lambda: torch.randn(copies, n, generator=generator)
    x, real, found = draw(), round(share * n), []
    for _ in range(rounds):
        x = torch.cat([draw()[:, :real], x[:, real:]], 1)
        noisy = x + noise**0.5 * draw()
        slope = (noisy * x).sum(1) / noisy.square().sum(1)
        x = slope[:, None] * (x + noise**0.5 * draw())
        order = torch.randperm(n, generator=generator)  # which are replaced by real ones next
        x = x[:, order]
        found.append(x.square().mean(1))
    of_round = torch.stack(found)
    return of_round.mean(1), of_round.std(1) / copies**0.5


# ---- a linear flow: v(x, t) = x A_t, fitted at each node of Euler's method by ridge regression

D, CORRELATION, STEPS = 10, 0.8, 50
# top eigenvalue over the truth's, of one run each: (real pairs, share) -> {round: value}; the last
# number is that of one Euler step at round 20
EARLIER: dict[tuple[str, float], tuple[dict[int, float], float]] = {
    ("none", 0.0): ({1: 0.958, 2: 0.898, 5: 0.804, 10: 0.667, 20: 0.452}, 0.447),
    ("online", 0.3): ({5: 0.810, 10: 0.686, 20: 0.487}, 0.483),
    ("anchor", 0.3): ({5: 0.861, 10: 0.863, 20: 0.835}, 0.819),
    ("fresh", 0.3): ({5: 0.917, 10: 0.905, 20: 0.850}, 0.393),
    ("online", 0.7): ({20: 0.527}, 0.523),
    ("anchor", 0.7): ({20: 0.894}, 0.878),
    ("fresh", 0.7): ({20: 0.923}, 0.084),
}


@dataclass(frozen=True)
class Flow:
    """Top eigenvalue over the truth's of independent runs: `fine` [rounds, runs] by all of Euler's
    steps, `one` [runs] by a single one at the last round."""

    fine: Tensor
    one: Tensor


def flows(
    real: str,
    share: float,
    ridge: float,
    rounds: int,
    runs: int,
    n: int,
    generator: torch.Generator,
) -> Flow:
    """Reflow for Gaussian data with unit variances and one correlation.

    Args:
        real: what the share of real pairs is: "none"; "online", data reversed by the present flow;
            "anchor", by the first round's; "fresh", data with independent noise.
        share: of real pairs.
        ridge: added to the second moments of x_t in the regression.
        rounds, runs: of reflow; independent ones.
        n: new pairs in each round.
    """
    eye = torch.eye(D, dtype=torch.float64)
    covariance = CORRELATION + (1 - CORRELATION) * eye
    top = torch.linalg.eigvalsh(covariance)[-1]
    root = torch.linalg.cholesky(covariance).T
    draw = lambda rows: torch.randn(runs, rows, D, dtype=torch.float64, generator=generator)
    ratio = lambda J: torch.linalg.eigvalsh(J.mT @ J)[:, -1] / top
    a, b = draw(n), draw(n) @ root
    first, flow, fine = None, None, []
    count = 0 if real == "none" else round(share * n)
    for _ in range(rounds):
        if flow is not None and first is not None:
            noise, data = draw(n - count), draw(count) @ root
            back = {"online": flow, "anchor": first}.get(real)
            start = draw(count) if back is None else torch.linalg.solve(back, data, left=False)
            a, b = torch.cat([noise, start], 1), torch.cat([noise @ flow, data], 1)
        velocities = _fitted(a, b, ridge)
        flow = _euler(velocities)
        first = flow if first is None else first
        fine.append(ratio(flow))
    return Flow(torch.stack(fine), ratio(eye + velocities[:, 0]))


def _fitted(a: Tensor, b: Tensor, ridge: float) -> Tensor:
    """A_t at t = 0, 1/K, ..., [runs, K, d, d]: the regression of b - a on x_t = (1 - t) a + t b."""
    aa, ab, bb = (x.mT @ y / a.shape[1] for x, y in ((a, a), (a, b), (b, b)))
    aa, ab, bb = aa[:, None], ab[:, None], bb[:, None]
    t = (torch.arange(STEPS, dtype=a.dtype) / STEPS)[:, None, None]
    second = (1 - t) ** 2 * aa + t * (1 - t) * (ab + ab.mT) + t**2 * bb
    cross = (1 - t) * (ab - aa) + t * (bb - ab.mT)
    return torch.linalg.solve(second + ridge * torch.eye(D, dtype=a.dtype), cross)


def _euler(velocities: Tensor) -> Tensor:
    """The matrix J of the whole flow, x_1 = x_0 J."""
    J = torch.eye(D, dtype=velocities.dtype) + velocities / STEPS
    while J.shape[1] > 1:  # neighbours first: few products of many matrices
        rest = J[:, J.shape[1] // 2 * 2 :]
        J = torch.cat([J[:, : J.shape[1] - rest.shape[1] : 2] @ J[:, 1::2], rest], 1)
    return J[:, 0]
