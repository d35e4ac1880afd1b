"""Chains of Langevin dynamics at one noise level."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..._torch import check, diagnosis
from ..._torch.errors import UnusableValue
from ..._torch.objects import ordinary, plain
from ..._torch.shapes import flat
from .._drawn import normal, uniform
from .._own_fisher import MODES, data_set_of
from .._reporting import Callback, reporting
from ..denoiser import Denoiser
from ._metropolis import accepts, chosen, linked
from ._step import Settings, at
from .chains import Chains

__all__ = ["PRECONDITIONERS", "langevin"]

PRECONDITIONERS = ("none", "gibbs", "damped", "rank-one", "paper")
_DAMPED = ("damped", "rank-one", "paper")
_BY_LANCZOS = ("gibbs", "damped")  # without Metropolis


def langevin(
    denoiser: Denoiser,
    x: Tensor,
    t: float | Tensor,
    steps: int,
    preconditioner: str = "none",
    *,
    generator: torch.Generator,
    step_size: float = 0.5,
    metropolis: bool = False,
    damping: float | None = None,
    x0: Tensor | None = None,
    lanczos: int | None = None,
    mode: str = "jvp",
    callback: Callback | None = None,
    progress: bool = False,
    **conditions: object,
) -> Chains:
    """Runs chains of Langevin dynamics at one noise level, from x, and returns where they end.

    Use it to correct a network's samples at a noise level, and over a data set with
    metropolis=True, to see what a preconditioner does against the exact law. To draw from a data
    set, `gibbs` is exact and faster.

    Args:
        denoiser: A network, or the ideal one of a data set (`Denoiser.exact`).
        x: Where the chains start, ``[B, *E]``, float32 or float64.
        t: The noise level, a number, [] or [B].
        steps: How many steps. A call goes on where the last one stopped, bit for bit, from its
            states and with the same generator.
        preconditioner: One of PRECONDITIONERS; the package's page has the formulas.
        generator: Of the noise; moved on.
        step_size: h, in the unit in which M = sigma^2 I is 1: plain Langevin moves by h
            sigma^2 score. Unadjusted, the variance in a direction where q_t has the curvature 1/v
            is off by about the factor 1/(1 - h m/2v), m the eigenvalue of M.
        metropolis: Whether to accept or reject each step, so that q_t is the stationary law
            exactly; only for a data set. Takes a dense F and its eigenvectors for "gibbs" and
            "damped", d^3 operations for each chain and step.
        damping: > 0, for "damped", "rank-one" and "paper". Added to the eigenvalues of |S|, which
            are near 1 where single atoms explain x; for "paper" lamb.
        x0: The endpoint of each chain, like x, for "rank-one".
        lanczos: Unadjusted "gibbs" and "damped": how many products with F to take the functions of
            S with; from d on they are exact. None: 10. For other steps it has to be None.
        mode: How a network's products with F are made: "jvp", "vjp" or "finite-difference", as in
            `endpoint.fisher`.
        callback: Called as callback(done, steps) after each step.
        progress: Whether to show a bar on stderr.
        conditions: Keyword arguments of the network, such as class labels.

    Returns:
        The `Chains`, without a graph.

    Raises:
        TypeError, ValueError: An argument is wrong: a preconditioner unknown, metropolis for a
            network, a damping too small for "rank-one", which the message then gives; the message
            names it.
    """
    if isinstance(denoiser, Denoiser):
        denoiser = denoiser.bind(**conditions)
    data = data_set_of(denoiser)
    check.query("x", x)
    diagnosis.finite("x", x.detach())
    steps = check.integer("steps", steps, 0)
    check.generator(generator)
    check.choice("mode", mode, MODES)
    check.choice("metropolis", metropolis, (False, True))
    if metropolis and data is None:
        expected = "False for a network, whose log q is not known (it is for Denoiser.exact)"
        raise check.mismatch("metropolis", expected, "True")
    settings = _settings(preconditioner, step_size, damping, x0, lanczos, metropolis, x)
    denoiser.levels(x, t)
    denoiser.warn_in_training("langevin")
    bar = reporting("langevin", callback, progress, steps)
    with torch.no_grad(), plain(x.device), bar as report:
        start = ordinary(x.detach()).clone()
        if metropolis:
            return _adjusted(denoiser, start, t, steps, settings, generator, report)
        for i in range(steps):
            with _after(i, settings.step_size):
                state = at(denoiser, start, t, mode)
            proposal = settings.propose(state)
            start = proposal.draw(normal(flat(start), generator)).view(x.shape)
            report(i + 1, steps)
        return Chains(start, None)


@contextlib.contextmanager
def _after(steps: int, step_size: float) -> Iterator[None]:
    """Where chains have run away, it is not x that is wrong."""
    try:
        yield
    except UnusableValue as error:
        if not steps:
            raise
        stable = "one at which the chains stay near the data"
        came = f"{step_size:g}: they ran away in {steps} steps"
        raise check.mismatch("step_size", stable, came) from error


def _settings(
    preconditioner: str,
    step_size: float,
    damping: float | None,
    x0: Tensor | None,
    lanczos: int | None,
    metropolis: bool,
    x: Tensor,
) -> Settings:
    """The arguments that say how to step, checked."""
    check.choice("preconditioner", preconditioner, PRECONDITIONERS)
    damped = preconditioner in _DAMPED
    if damped != (damping is not None):
        expected = f"{'a number > 0' if damped else 'None'} for preconditioner {preconditioner!r}"
        raise check.mismatch("damping", expected, damping)
    if (preconditioner == "rank-one") != (x0 is not None):
        wanted = f"the end of each chain, {list(x.shape)}," if x0 is None else "None"
        came = "None" if x0 is None else "a tensor"
        raise check.mismatch("x0", f"{wanted} for preconditioner {preconditioner!r}", came)
    if metropolis:
        check.unused("lanczos", lanczos, "with metropolis=True, which decomposes a dense F")
    elif preconditioner not in _BY_LANCZOS:
        check.unused("lanczos", lanczos, f"for preconditioner {preconditioner!r}")
    if x0 is not None:
        check.like("x0", x0, "x", x)
        diagnosis.finite("x0", x0.detach())
    return Settings(
        preconditioner,
        check.positive("step_size", step_size),
        0.0 if damping is None else check.positive("damping", damping),
        None if x0 is None else ordinary(x0.detach()),
        check.integer("lanczos", 10 if lanczos is None else lanczos, 1),
        metropolis,
    )


def _adjusted(
    denoiser: Denoiser,
    x: Tensor,
    t: float | Tensor,
    steps: int,
    settings: Settings,
    generator: torch.Generator,
    report: Callback,
) -> Chains:
    """`langevin` of a data set with Metropolis."""
    taken = x.new_zeros(len(x), dtype=torch.float64)
    here = linked(denoiser, x, t, settings)
    for i in range(steps):
        drawn = here.proposal.draw(normal(here.x, generator)).view(x.shape)
        with _after(i + 1, settings.step_size):
            there = linked(denoiser, drawn, t, settings)
        accepted = accepts(here, there, uniform(x, generator))
        here = chosen(accepted, there, here)
        taken += accepted
        report(i + 1, steps)
    return Chains(here.x.view(x.shape), taken / steps)
