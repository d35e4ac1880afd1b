"""Training of the NSGF experiment's networks, all of one architecture and with the same budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dfkernels.methods import nsgf, reflow
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.networks import VectorNet
from dfkernels.methods.sinkhorn import solve
from dfkernels.methods.training import train
from dfkernels.schedule import RectifiedFlow

from .nsgf_sets import Set

__all__ = [
    "BATCH",
    "ETA",
    "METHODS",
    "STEPS",
    "Effort",
    "effort",
    "fitted",
    "sample",
    "straight_denoiser",
    "straight_loss",
    "trained",
]

ETA, STEPS = 0.4, 10  # of the 2-D flows
BATCH = 256  # of training
_ROWS = 2048  # points sampled together, which fit a cache
METHODS = ("NSGF", "FM", "OT-CFM")


@dataclass(frozen=True)
class Effort:
    """What a full and a quick run spend."""

    width: int
    training: int  # steps
    batches: int  # flows of the pool
    flown: int  # points of a flow
    coupled: int  # points of either kind, of OT-CFM's plan
    seeds: int  # of the tests
    points: int  # of an assignment
    many: int  # samples of an energy distance
    target: int  # points of the target in one


def effort(quick: bool) -> Effort:
    if quick:
        return Effort(32, 12, 1, 256, 300, 2, 128, 1000, 2000)
    return Effort(256, 3600, 80, 512, 4096, 8, 1024, 20_000, 100_000)


def trained(method: str, name: str, task: Set, budget: Effort, out: Path) -> nn.Module:
    """The network of a method, kept in `out`: a velocity along the flow of the divergence, or a
    straight one."""
    loss = {"NSGF": _nsgf, "FM": _fm, "OT-CFM": _ot_cfm}[method]
    return fitted(
        VectorNet(2, width=budget.width, depth=3),
        lambda: loss(task, budget),
        out / f"nsgf-{name}-{method.lower()}.pt",
        budget.training,
        {
            "method": method,
            "set": name,
            "blur": task.blur,
            "eta": ETA,
            "pool": budget.batches,
            "flown": budget.flown,
        },
    )


def fitted(
    network: nn.Module,
    loss: Callable[[], Callable[[nn.Module, torch.Generator], Tensor]],
    path: Path,
    steps: int,
    configuration: Mapping[str, object],
) -> nn.Module:
    """The trained network. The loss, which may take a pool or a plan, is made at the first step
    only: not where a finished checkpoint is just read."""
    made: list[Callable[[nn.Module, torch.Generator], Tensor]] = []

    def value(module: nn.Module, generator: torch.Generator) -> Tensor:
        if not made:
            made.append(loss())
        return made[0](module, generator)

    return train(
        network,
        value,
        steps=steps,
        generator=torch.Generator().manual_seed(0),
        checkpoint=path,
        every=500,
        configuration=configuration,
    )


def straight_denoiser(network: nn.Module) -> Denoiser:
    return Denoiser(network, RectifiedFlow(), "flow")


def straight_loss(network: nn.Module, x_0: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Of a straight flow on a batch of pairs."""
    return reflow.loss(straight_denoiser(network), reflow.Pairs(x_0, y), generator)


@torch.no_grad()
def sample(method: str, network: nn.Module, x: Tensor) -> Tensor:
    """Points of the source [n, 2] -> samples, by STEPS evaluations of the network."""
    straight = straight_denoiser(network)

    def part(x: Tensor) -> Tensor:
        if method == "NSGF":
            return nsgf.sample(network, x, steps=STEPS, eta=ETA).x[-1]
        return nsgf.straight_flow(straight, x, 0.0, steps=STEPS)

    return torch.cat([part(rows) for rows in x.split(_ROWS)])


def _nsgf(task: Set, budget: Effort) -> Callable[[nn.Module, torch.Generator], Tensor]:
    pool = nsgf.trajectory_pool(
        task.source,
        task.target,
        task.blur,
        batches=budget.batches,
        n=budget.flown,
        steps=STEPS,
        eta=ETA,
        generator=torch.Generator().manual_seed(1),
    )
    return lambda network, generator: nsgf.velocity_loss(network, pool, generator, batch=BATCH)


def _fm(task: Set, budget: Effort) -> Callable[[nn.Module, torch.Generator], Tensor]:
    def loss(network: nn.Module, generator: torch.Generator) -> Tensor:
        x_0, y = task.source(BATCH, generator), task.target(BATCH, generator)
        return straight_loss(network, x_0, y, generator)

    return loss


def _ot_cfm(task: Set, budget: Effort) -> Callable[[nn.Module, torch.Generator], Tensor]:
    """Pairs from one plan between large samples, drawn anew for fresh points of the source."""
    own = torch.Generator().manual_seed(1)
    y = task.target(budget.coupled, own)
    plan = solve(task.source(budget.coupled, own), y, task.blur / 2)

    def loss(network: nn.Module, generator: torch.Generator) -> Tensor:
        x_0 = task.source(BATCH, generator)
        seed = int(torch.randint(2**62, (), generator=generator))
        return straight_loss(network, x_0, y[plan.draw(x_0, seed=seed)], generator)

    return loss
