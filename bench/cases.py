"""What is measured: problem sizes, the data, and the least work each case can be done with.

Every size runs at two noise levels. low: sigma = 0.2 with data of unit spread, one atom carries all
the weight. high: more than half of the atoms do; nothing can be skipped, which is the worst case
for us and the same to the peers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from dfkernels import ops
from tools.op_table import TABLE

SIZES = [
    (1, 50_000, 3072),
    (8, 50_000, 3072),
    (64, 50_000, 3072),
    (1, 100_000, 4096),
    (256, 50_000, 784),
    (1024, 10_000, 64),
    (4096, 10_000, 2),
    (64, 20_000, 192),
]
OPS = ("posterior", "log_prob", "draw", "average", "fisher_matvec")
# the op in whose time an op's is given too
OTHER = {"log_prob": "posterior", "draw": "log_prob", "average": "log_prob"}
VALUES = 10  # of an atom, in average: few beside d, as labels are
AVERAGED = 10**9  # multiplications of queries and atoms up to which average has a row
NOISE = {"low": lambda d: 0.2, "high": lambda d: 3.0 * d**0.5}
CHAINS = [(4096, 3, 2), (4096, 64, 16)]
STEPS = 1000


@dataclass
class Case:
    """Float32 standard normal atoms; queries are atoms plus noise; alpha = 1."""

    op: str
    B: int
    N: int
    d: int
    noise: str
    y: torch.Tensor  # shared by the cases of one size

    @property
    def sigma_value(self) -> float:
        return NOISE[self.noise](self.d)

    @cached_property
    def points(self) -> dict[str, Any]:
        """What every op over a data set takes."""
        generator = torch.Generator().manual_seed(1)
        sigma = torch.full((self.B,), self.sigma_value)
        x = self.y[torch.randint(self.N, (self.B,), generator=generator)]
        x = x + self.sigma_value * torch.randn(self.B, self.d, generator=generator)
        return {"x": x, "y": self.y, "alpha": torch.ones(self.B), "sigma": sigma}

    @cached_property
    def own(self) -> dict[str, torch.Tensor]:
        """What this op takes besides, and its peers too."""
        shapes = {"fisher_matvec": ("v", self.B, self.d), "average": ("values", self.N, VALUES)}
        if self.op not in shapes:
            return {}
        name, *shape = shapes[self.op]
        return {name: torch.randn(*shape, generator=torch.Generator().manual_seed(2))}

    @property
    def inputs(self) -> dict[str, Any]:
        seed = {"seed": 0} if self.op == "draw" else {}
        return self.points | self.own | seed

    @cached_property
    def peer_inputs(self) -> dict[str, torch.Tensor]:
        return {**self.points, **self.own, "y_norm": self.y.square().sum(1)}

    @property
    def ess(self) -> float:
        return float(ops.posterior(**self.points).ess.median())

    @property
    def bytes(self) -> int:
        if self.op == "average":
            return TABLE["log_prob"].bytes(self.B, self.N, self.d, 1) + 4 * self.N * VALUES
        return TABLE[self.op].bytes(self.B, self.N, self.d, 1)

    @property
    def flops(self) -> int:
        if self.op == "average":
            return TABLE["log_prob"].flops(self.B, self.N, self.d + VALUES, 1)
        return TABLE[self.op].flops(self.B, self.N, self.d, 1)

    @property
    def exps(self) -> int:
        return TABLE[self.op].exps(self.B, self.N, 1)


@dataclass
class ChainCase:
    """Float32 chains of STEPS steps at sigma from 1 to 0.02 over normal atoms of spread 0.5; alpha
    = 1."""

    B: int
    N: int
    d: int
    op: str = "transport_chain"
    noise: str = f"{STEPS} steps"
    sigma_value: float = 0.02
    ess: float = 1.0

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        x = torch.randn(self.B, self.d, generator=torch.Generator().manual_seed(1))
        sigma = torch.logspace(0, math.log10(self.sigma_value), STEPS + 1, dtype=torch.float64)
        return {
            "x": x,
            "y": 0.5 * atoms(self.N, self.d),
            "alpha": torch.ones_like(sigma),
            "sigma": sigma,
        }

    @property
    def peer_inputs(self) -> dict[str, torch.Tensor]:
        return self.inputs

    @property
    def bytes(self) -> int:
        return TABLE[self.op].bytes(self.B, self.N, self.d, STEPS)

    @property
    def flops(self) -> int:
        return TABLE[self.op].flops(self.B, self.N, self.d, STEPS)

    @property
    def exps(self) -> int:
        return TABLE[self.op].exps(self.B, self.N, STEPS)


def atoms(N: int, d: int) -> torch.Tensor:
    return torch.randn(N, d, generator=torch.Generator().manual_seed(0))
