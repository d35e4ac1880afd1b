"""What is measured on a GPU, in order of importance, and the least time each case can take."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace

import torch

from tools.op_table import TABLE

from ..cases import NOISE

ITEMSIZE = {"float32": 4, "bfloat16": 2}
EXACT_QUERIES = 2  # of a case, compared with float64


@dataclass(frozen=True)
class Case:
    """One call. Data ops: B queries, N atoms in `storage`, K vectors; transport_chain: B chains of
    K steps, N atoms; the others: N = 0.
    """

    group: str  # memory, compute, small d, grid, network, chain, derivative, lists: what bounds it
    op: str
    B: int
    N: int
    d: int
    K: int = 1
    storage: str = "float32"
    noise: str = "high"
    form: str = ""
    derivative: str = ""  # "fisher_trace y reverse": one that bench.derivatives has
    way: str = ""  # "lists of 64", "tolerance", "top_k": one of ways.py

    @classmethod
    def of(cls, row: dict) -> Case:
        """The case of a row of a result; rows of earlier versions lack fields."""
        return cls(**{f.name: row[f.name] for f in fields(cls) if f.name in row})

    @property
    def name(self) -> str:
        what = self.form or f"{self.storage} {self.noise}"
        what += self.derivative and f", {self.derivative}"
        what += self.way and f", {self.way}"
        return f"{self.op} B={self.B} N={self.N} d={self.d} K={self.K} {what}"

    @property
    def options(self) -> dict[str, object]:
        if self.op == "draw":
            return {"seed": 1}
        return {"form": self.form} if self.form else {}

    @property
    def sigma(self) -> float:
        if self.op == "transport_chain":
            return 0.02  # at the end
        return NOISE[self.noise](self.d) if self.N else 0.7

    @property
    def listed(self) -> int:
        """How many atoms each query has a list of; 0 where there are none."""
        return int(self.way.removeprefix("lists of ")) if self.way.startswith("lists") else 0

    @property
    def bytes(self) -> int:
        """Every input read once, the result written once; of lists, each query's rows."""
        rows = self.B * self.listed or self.N
        return TABLE[self.op].bytes(self.B, rows, self.d, self.K, ITEMSIZE[self.storage])

    @property
    def flops(self) -> int:
        """Of products with the atoms that count; a search may do without."""
        if self.way and not self.listed:
            return 0
        return TABLE[self.op].flops(self.B, self.listed or self.N, self.d, self.K)

    @property
    def exps(self) -> int:
        if self.way and not self.listed:
            return 0
        return TABLE[self.op].exps(self.B, self.listed or self.N, self.K)

    def within(self, memory: int) -> Case:
        """With as many atoms as a quarter of the GPU's memory holds."""
        room = memory // 4 // (ITEMSIZE[self.storage] * self.d)
        return replace(self, N=room) if room < self.N else self

    def inputs(self, device) -> dict[str, torch.Tensor]:
        """Random, never zeros: queries are atoms plus noise."""
        generator = torch.Generator(device).manual_seed(1)
        normal = lambda *shape: torch.randn(*shape, device=device, generator=generator)
        alpha, sigma = (
            torch.ones(self.B, device=device),
            torch.full((self.B,), self.sigma, device=device),
        )
        if not self.N:
            sizes = {"v": (self.B, self.K, self.d), "m": (self.B,)}
            names = [n for n in TABLE[self.op].arguments if n not in ("alpha", "sigma")]
            found = {name: normal(*sizes.get(name, (self.B, self.d))) for name in names}
            return {**found, "alpha": alpha, "sigma": sigma}
        if self.op == "transport_chain":
            sigma = torch.logspace(
                0, math.log10(self.sigma), self.K + 1, dtype=torch.float64, device=device
            )
            y = 0.5 * normal(self.N, self.d)
            return {
                "x": normal(self.B, self.d),
                "y": y,
                "alpha": torch.ones_like(sigma),
                "sigma": sigma,
            }
        y = random_atoms(self, device)
        index = torch.randint(self.N, (self.B,), device=device, generator=generator)
        found = {"x": y[index].float() + self.sigma * normal(self.B, self.d), "y": y}
        if "v" in TABLE[self.op].arguments:
            found["v"] = normal(self.B, self.K, self.d)
        if "values" in TABLE[self.op].arguments:
            found["values"] = normal(self.N, 10)
        if self.listed:  # far apart, the query's own atom among them
            step = self.N // self.listed
            places = torch.arange(self.listed, device=device) * step
            found["atoms"] = ((index % step)[:, None] + places).flatten()
            found["counts"] = torch.full((self.B,), self.listed, device=device)
        return {**found, "alpha": alpha, "sigma": sigma}


def random_atoms(case: Case, device) -> torch.Tensor:
    """Standard normal, made a gigabyte at a time."""
    y = torch.empty(case.N, case.d, dtype=getattr(torch, case.storage), device=device)
    generator = torch.Generator(device).manual_seed(0)
    for rows in y.split(max(1, 2**28 // case.d)):
        rows.copy_(torch.randn(rows.shape, device=device, generator=generator))
    return y


def grid() -> list[Case]:
    network = [
        Case("network", op, B, 0, d, form=form)
        for B, d in ((64, 4 * 128 * 128), (256, 3 * 64 * 64))
        for op, form in (
            ("endpoint_matvec", "paper"),
            ("endpoint_matvec", "centred"),
            ("matched_trace", "paper"),
        )
    ]
    memory = [
        Case("memory", "posterior", B, 1_280_000, 4096, storage="bfloat16", noise=noise)
        for B in (1, 4, 16)
        for noise in ("high", "low")
    ]
    compute = [
        Case("compute", "posterior", 4096, 262_144, 1024, storage=storage, noise=noise)
        for storage in ("bfloat16", "float32")
        for noise in ("high", "low")
    ]
    small = [
        Case("small d", op, 65_536, 65_536, d)
        for op in ("posterior", "fisher_matvec")
        for d in (2, 16)
    ]
    sizes = ((64, 50_000, 3072), (1024, 50_000, 784), (1024, 10_000, 64), (1, 50_000, 3072))
    rest = [
        Case("grid", op, *size, noise=noise)
        for size in sizes
        for noise in ("high", "low")
        for op in ("posterior", "fisher_matvec")
    ]
    rest += [Case("grid", "posterior", 4096, 50_000, 128, noise=noise) for noise in ("high", "low")]
    rest += [
        Case("grid", "fisher_matvec", 16, 50_000, 3072, K=8),
        Case("grid", "fisher_matvec", 1, 1_280_000, 4096, storage="bfloat16"),
        *(Case("grid", op, *size) for op, spec in TABLE.items() for size in spec.gpu_sizes),
        Case("network", "endpoint_matvec", 64, 0, 3 * 64 * 64, K=8, form="paper"),
    ]
    sizes = ((64, 50_000, 784), (1024, 10_000, 64), (1, 50_000, 3072), (65_536, 65_536, 2))
    primitives = [Case("grid", op, *size) for op in ("log_prob", "draw") for size in sizes]
    primitives.append(Case("grid", "average", 1024, 10_000, 64))
    derivatives = [
        Case("derivative", op, *size, derivative=derivative)
        for size in sizes[:2]
        for op, derivative in (
            ("posterior", "fisher_trace x reverse"),
            ("posterior", "mean sigma reverse"),
            ("posterior", "mean y reverse"),
            ("posterior", "mean x forward"),
            ("posterior", "mean y forward"),
            ("fisher_matvec", "fisher_matvec x reverse"),
            ("fisher_diagonal", "fisher_diagonal x reverse"),
        )
    ]
    ways = [
        Case("lists", "posterior", 1024, 50_000, 3072, way="lists of 64"),
        Case("lists", "fisher_matvec", 1024, 50_000, 3072, way="lists of 64"),
        Case("lists", "posterior", 65_536, 65_536, 16, way="lists of 64"),
        Case(
            "lists", "posterior", 64, 262_144, 3072,
            storage="bfloat16", noise="low", way="tolerance",
        ),
        Case("lists", "posterior", 64, 262_144, 1024, K=8, noise="low", way="top_k"),
    ]  # fmt: skip
    chains = [Case("chain", "transport_chain", 4096, N, d, K=100) for N, d in ((3, 2), (64, 16))]
    done = [*memory, *compute, *small, *rest, *network, *chains, *ways]
    return [*done, *primitives, *derivatives]


def chosen(pattern: str) -> list[Case]:
    """The cases whose name has the regular expression in it."""
    return [case for case in grid() if re.search(pattern, case.name)]


def floor(case: Case, rates: dict[str, float]) -> tuple[float, str]:
    """(milliseconds, what bounds it): bytes, FLOPs or exps over their rates; FLOPs in the atoms'
    dtype."""
    matrix = rates["bf16_tflops" if case.storage == "bfloat16" else "fp32_tflops"]
    return max(
        (case.bytes / rates["copy_gbs"] / 1e6, "memory"),
        (case.flops / matrix / 1e9, "matrix"),
        (case.exps / rates["exp_gs"] / 1e6, "exp"),
    )


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan
