"""Many steps of a flow, with a trace of how it goes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ..._torch import check
from ..._torch.objects import plain
from .._reporting import Callback, reporting
from ..degenerate import DegenerateWeights
from .flow import Flow
from .state import Particles

__all__ = ["Evolution", "evolve"]


@dataclass(frozen=True, eq=False)
class Evolution:
    """What `evolve` returns.

    Attributes:
        particles: Where they are in the end; `evolve` goes on from them.
        ess: The effective sample size of the weights before each step and in the end, [steps + 1],
            float64.
        energy: The functional F then, [steps + 1], float64; NaN where it is not known.
    """

    particles: Particles
    ess: Tensor
    energy: Tensor


def evolve(
    flow: Flow,
    particles: Particles,
    steps: int,
    *,
    generator: torch.Generator | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Evolution:
    """Takes steps of a flow, and watches its energy and the weights.

    A run of hours is best done in parts: what a part returns is all that the next one needs, and
    `torch.save` takes it.

    Args:
        flow: What to do.
        particles: Where to start: `Particles(x)` for M draws x of a guess, at rest.
        steps: How many, >= 0. Each takes one evaluation of the functional; one more is for the
            energy in the end.
        generator: For weights="duplicate-kill"; the same state gives the same bits.
        callback: Called as callback(done, steps) after each step.
        progress: Whether to show a bar on stderr.

    Returns:
        Evolution(particles, ess [steps + 1], energy [steps + 1]), without a graph.

    Warns:
        DegenerateWeights: With weights="continuous", the effective sample size fell below M/2: few
            particles carry the mass.

    Raises:
        TypeError, ValueError: An argument is wrong, or what a function of the target returns, or
            step_size is too large for the flow to be stable; the message names it.
    """
    check.instance("flow", flow, Flow, "a Flow")
    steps = check.integer("steps", steps, 0)
    flow._check(particles, generator)
    ess, energy, warned = [], [], False
    bar = reporting("evolve", callback, progress, steps)
    with torch.no_grad(), plain(particles.x.device), bar as report:
        for k in range(steps + 1):
            found = flow._variation(particles)
            ess.append(particles.ess)
            energy.append(found.energy)
            if flow.weights == "continuous" and not warned and ess[-1] < len(particles) / 2:
                warned = True
                warnings.warn(
                    _degenerate(ess[-1], len(particles), k), DegenerateWeights, stacklevel=2
                )
            if k < steps:
                particles = flow._moved(particles, found, generator)
                report(k + 1, steps)
        trace = [torch.tensor(t, dtype=torch.float64, device="cpu") for t in (ess, energy)]
    return Evolution(particles, *trace)


def _degenerate(ess: float, M: int, step: int) -> str:
    return (
        f"evolve: the weights have an effective sample size of {ess:.1f} of {M} particles at step "
        f"{step}: weights='duplicate-kill' puts particles where the mass is, a smaller weight_rate "
        "leaves them time to move there"
    )
