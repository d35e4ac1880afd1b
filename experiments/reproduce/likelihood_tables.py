"""The tables of the likelihood experiment, and what their rows hold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import digits
from .section import Table


@dataclass(frozen=True)
class Row:
    """One source of the trace: bits/dim [n] of each image, the time of all, and what was
    evaluated."""

    name: str
    bits: Tensor
    seconds: float
    evaluations: int
    products: int

    def error(self, truth: Row) -> Tensor:
        return self.bits - truth.bits


@dataclass(frozen=True)
class Level:
    """Mean bits/dim of q_s, at images with noise s: by the network for held-out ones; by the
    training set for held-out and for its own, and its effective number of atoms. DF-TM: mean
    |error| of either form from s on.
    """

    s: float
    network: float
    held: float
    own: float
    ess: float
    residual: float
    paper: float


def signed(value: float, places: int = 3) -> str:
    return f"{value:+.{places}f}".replace("-", "−")


def number(value: float, places: int = 3) -> str:
    return f"{value:.{places}f}".replace("-", "−")


def traces(rows: list[Row], n: int, steps: int) -> Table:
    truth = rows[0]
    cells = [
        [
            row.name,
            number(row.bits.mean().item()),
            "" if row is truth else number(row.error(truth).abs().mean().item()),
            "" if row is truth else signed(row.error(truth).mean().item()),
            str(row.evaluations),
            str(row.products),
            f"{row.seconds:.2f} s",
        ]
        for row in rows
    ]
    return Table(
        "Bits per dimension of held-out digits by each trace",
        ["trace", "bits/dim", "mean |error|", "bias", "network calls", "Jacobian products", "time"],
        cells,
        f"{n} images that no network saw, dequantised once; RK4, {steps} steps in ln(σ/α) from"
        f" {digits.NOISE[0]:g} to {digits.NOISE[1]:g}. Errors in bits/dim, per image, against the"
        " exact divergence of the same network, the only definition of this flow's likelihood;"
        " bias is their mean. Calls are on all images at once; products are per image; the calls"
        " of the trace network, one for each of the noise network's, are not listed. Time: for all"
        " images. 1 bit/dim = 44.4 nats per image.",
    )


def solvers(rows: list[Row]) -> Table:
    truth = rows[-1]
    cells = [
        [
            row.name,
            number(row.bits.mean().item(), 4),
            "" if row is truth else f"{row.error(truth).abs().max().item():.1e}",
            str(row.evaluations),
            f"{row.seconds:.2f} s",
        ]
        for row in rows
    ]
    return Table(
        "The same by each solver",
        ["solver", "bits/dim", "largest |error|", "network calls", "time"],
        cells,
        "Hutchinson's trace with the same K = 4 probes everywhere, so that only the solver differs."
        " Errors in bits/dim against the last row; adaptive: tolerances 1e-5.",
    )


def by_level(levels: list[Level], copies: int) -> Table:
    cells = [
        [
            f"{level.s:g}",
            *(number(value, 2) for value in (level.network, level.held, level.own)),
            signed(level.held - level.own, 2),
            number(level.ess, 1),
            *(number(value) for value in (level.residual, level.paper)),
        ]
        for level in levels
    ]
    return Table(
        "By the noise level at which the density is asked for",
        [
            "σ/α",
            "network, held out",
            "data set, held out",
            "data set, its own",
            "gap",
            "ESS",
            "DF-TM, residual: |error|",
            "DF-TM, paper's: |error|",
        ],
        cells,
        "Mean bits/dim of q at images with noise σ/α, the network's by the exact divergence; the"
        f" data set: the mixture over {copies} dequantised copies of the 1500 training images,"
        " exactly. Gap: held out minus own, 0 for a law that does not memorise. ESS: median"
        " effective number of atoms at the held-out images. |error|: mean, against the exact"
        " divergence, of paths that begin at this level.",
    )
