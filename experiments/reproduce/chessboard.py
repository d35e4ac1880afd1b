"""The 2-D chessboard diffused, in closed form: uniform squares convolved with a Gaussian.

x_1 = 4 U - 2;  x_2 = U - 2 randint{0, 1} + (floor(x_1) mod 2);  data = 2 (x_1, x_2): 8 squares of
side 2 in [-4, 4]^2. With A_i(x) = (Phi((x - alpha a_i)/sigma) - Phi((x - alpha b_i)/sigma))/(2
alpha) the density of a uniform variable on [a_i, b_i] = [2 i - 4, 2 i - 2] after diffusion, E = A_0
+ A_2 and O = A_1 + A_3:

    q_t(x) = (E(x_1) E(x_2) + O(x_1) O(x_2))/8
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["STD", "Truth", "sample", "truth"]

STD = 4 / math.sqrt(3)  # of either coordinate, uniform on [-4, 4]; the mean is 0


class Truth(NamedTuple):
    """log q_t [B], its gradient [B, 2] and F = -Hessian [B, 2, 2]."""

    log_prob: Tensor
    score: Tensor
    fisher: Tensor

    @property
    def trace(self) -> Tensor:
        """tr F, [B]."""
        return self.fisher.diagonal(dim1=1, dim2=2).sum(1)


def sample(n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """n points, [n, 2]."""
    u = torch.rand(n, 2, generator=generator, dtype=dtype)
    x_1 = 4 * u[:, 0] - 2
    down = torch.randint(2, (n,), generator=generator)
    return 2 * torch.stack([x_1, u[:, 1] - 2 * down + x_1.floor() % 2], 1)


def truth(x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Truth:
    """Exact log q_t, score and Fisher at x [B, 2] (float64), alpha and sigma > 0 numbers or [B].

    score_k = d_k q/q;  F_kl = score_k score_l - d_k d_l q/q. Within about 35 sigma of the squares:
    beyond, q_t underflows.
    """
    alpha, sigma = (
        torch.as_tensor(a, dtype=x.dtype).expand(len(x))[:, None, None] for a in (alpha, sigma)
    )
    left = torch.arange(-4, 4, 2, dtype=x.dtype)
    near, far = ((x[..., None] - alpha * (left + shift)) / sigma for shift in (0, 2))  # [B, 2, 4]
    # the tail in which a difference of Phi does not cancel
    side = torch.where(near + far > 0, -1, 1)
    mass = side * (torch.special.ndtr(side * near) - torch.special.ndtr(side * far))
    bell = [torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) for z in (near, far)]
    slope = (bell[0] - bell[1]) / sigma
    bend = (far * bell[1] - near * bell[0]) / sigma**2
    # [B, 2 (coordinate), 2 (even, odd)], a sum over the two intervals of either parity
    a, da, dda = ((f[..., :2] + f[..., 2:]) / (2 * alpha) for f in (mass, slope, bend))
    q = a.prod(1).sum(1)
    score = (da * a.flip(1)).sum(2) / q[:, None]
    own = (dda * a.flip(1)).sum(2) / q[:, None]
    cross = da.prod(1).sum(1) / q
    hessian = torch.stack([own[:, 0], cross, cross, own[:, 1]], 1).view(-1, 2, 2)
    return Truth((q / 8).log(), score, score[:, :, None] * score[:, None, :] - hessian)
