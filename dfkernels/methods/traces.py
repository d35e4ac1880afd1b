"""Where tr F comes from along a flow: the data set, any function, or the denoiser's own
derivatives.

tr F = tr(J)/sigma, J = d eps/dx, for what differentiates the denoiser.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch import check
from ..law import Law
from ..schedule import Schedule
from ._calls import checked
from ._derivatives import explained
from ._posterior_mean import PosteriorMean
from .denoiser import Denoiser
from .trace_matching import MatchedTrace

__all__ = [
    "KINDS",
    "MODES",
    "NAMES",
    "Divergence",
    "Exact",
    "Function",
    "Hutchinson",
    "Source",
    "exact",
    "expect_same_levels",
    "source_of",
]

NAMES = ("exact", "hutchinson", "divergence")
MODES = ("jvp", "vjp")
KINDS = ("rademacher", "gaussian")
_SAME = 1e-6  # relative, of levels that are the same but for the rounding of a table
Trace = Callable[[Tensor, Tensor], Tensor]
Both = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Source(abc.ABC):
    """A source of tr F that takes part in the flow's own evaluations. Subclasses define `begin`."""

    @abc.abstractmethod
    def begin(self, denoiser: Denoiser, x: Tensor) -> Both:
        """A function (x, t) -> (noise prediction, tr F) for one trajectory that starts at x. tr F
        is [B], or [K, B] of K independent random estimates, whose mean counts.
        """

    def estimates(self) -> int:
        """The K of random estimates; 0 where nothing is random, and tr F is [B]."""
        return 0

    def products(self, d: int) -> int:
        """How many Jacobian products a sample costs per evaluation."""
        return 0


@dataclass(frozen=True)
class Function(Source):
    """Any function trace(x, t) -> tr F [B]. A MatchedTrace is given the flow's noise prediction and
    the denoiser's conditions.
    """

    trace: Trace

    def __post_init__(self) -> None:
        check.function("trace", self.trace, "a callable trace(x, t)")

    def begin(self, denoiser: Denoiser, x: Tensor) -> Both:
        def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            expect_same_levels(self.trace, denoiser.schedule, t)
            eps = denoiser.eps(x, t)
            if isinstance(self.trace, MatchedTrace):
                return eps, self.trace(x, t, eps, **denoiser.conditions)
            return eps, self.trace(x, t)

        return both


@dataclass(frozen=True)
class Exact(Source):
    """The trace of a data set; on the flow of the same data set it comes from the pass over the
    data that gives the flow.
    """

    posterior: PosteriorMean

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        return self.posterior.fisher(x, t).trace()

    def begin(self, denoiser: Denoiser, x: Tensor) -> Both:
        if not self.posterior.equals(denoiser.network):
            return Function(self).begin(denoiser, x)

        def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            at = self.posterior.fisher(x, t)
            return denoiser.eps_of(x, t, at.denoised), at.trace()

        return both


def exact(cloud: Law, schedule: Schedule, *, tolerance: float | None = None) -> Exact:
    """The source of tr F that a data set itself is (Prop. 5).

    With `Denoiser.exact(cloud, schedule)` and the same tolerance it gives log q_t of the cloud by
    one pass over the data per evaluation.

    Args:
        cloud: the atoms.
        schedule: maps t to alpha and sigma: the denoiser's, or one with the same levels. With other
            levels log_prob raises a ValueError.
        tolerance: as in `DiffusionFisher`.
    """
    return Exact(PosteriorMean(cloud, schedule, tolerance))


@dataclass(frozen=True)
class Hutchinson(Source):
    """Hutchinson's estimator of tr F, unbiased at any number K of random probes v, E v v^T = I:

        tr F ~ mean_k <v_k, J v_k>/sigma,  J = d eps/dx

    The probes are drawn once per trajectory, as in FFJORD: the solver sees a smooth field, and
    log_prob is unbiased but for the solver's error.

    Args:
        generator: the same state gives the same bits. On x's device it costs no transfer. Or one
            for each sample of the batch, in a sequence: a sample's probes do not depend then on
            what else is in the batch.
        probes: K, the number of Jacobian products per evaluation.
        kind: "rademacher" (+-1: the least variance among independent entries) or "gaussian".
        mode: "vjp" (reverse mode) or "jvp" (forward mode: slower for small networks, keeps no
            graph, and PyTorch has none for attention).
    """

    generator: torch.Generator | Sequence[torch.Generator]
    probes: int = 1
    kind: str = "rademacher"
    mode: str = "vjp"

    def __post_init__(self) -> None:
        given = self.generator
        each = given if isinstance(given, Sequence) else [given]
        for one in each:
            check.generator(one)
        object.__setattr__(self, "probes", check.integer("probes", self.probes, 1))
        check.choice("kind", self.kind, KINDS)
        check.choice("mode", self.mode, MODES)

    def begin(self, denoiser: Denoiser, x: Tensor) -> Both:
        v = self._vectors(x)

        def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            with explained("mode", self.mode):
                eps, forms = _quadratic_forms(denoiser, x, t, self.mode, [v], summed=False)
            return eps, forms / denoiser.levels(x, t)[1]

        return both

    def _vectors(self, x: Tensor) -> Tensor:
        """The probes, [K, *x.shape]."""

        def drawn(generator: torch.Generator, n: int) -> Tensor:
            shape = (self.probes, n, *x.shape[1:])
            how = {"generator": generator, "dtype": x.dtype, "device": generator.device}
            if self.kind == "gaussian":
                return torch.randn(shape, **how)
            return torch.randint(2, shape, **how) * 2 - 1

        if isinstance(self.generator, torch.Generator):
            return drawn(self.generator, len(x)).to(x.device)
        if len(self.generator) != len(x):
            raise check.mismatch(
                "generator", f"one for each of {len(x)} samples", f"{len(self.generator)}"
            )
        return torch.cat([drawn(one, 1) for one in self.generator], 1).to(x.device)

    def estimates(self) -> int:
        return self.probes

    def products(self, d: int) -> int:
        return self.probes


@dataclass(frozen=True)
class Divergence(Source):
    """The exact tr F of a network by d Jacobian products: sum_j <e_j, J e_j>/sigma, J = d eps/dx.

    Args:
        chunk: products done together: fewer calls, more memory.
        mode: "vjp" or "jvp", as for `Hutchinson`.
    """

    chunk: int = 8
    mode: str = "vjp"

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunk", check.integer("chunk", self.chunk, 1))
        check.choice("mode", self.mode, MODES)

    def begin(self, denoiser: Denoiser, x: Tensor) -> Both:
        def axes() -> Iterator[Tensor]:
            d = x.shape[1:].numel()
            for j in torch.arange(d, dtype=torch.int64, device=x.device).split(self.chunk):
                rows = torch.nn.functional.one_hot(j, d).to(x.dtype)
                yield rows.view(len(j), 1, *x.shape[1:]).expand(-1, *x.shape)

        def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            with explained("mode", self.mode):
                eps, total = _quadratic_forms(denoiser, x, t, self.mode, axes(), summed=True)
            return eps, total / denoiser.levels(x, t)[1]

        return both

    def products(self, d: int) -> int:
        return d


def source_of(
    trace: str | Trace | Source, denoiser: Denoiser, x: Tensor, generator: torch.Generator | None
) -> Source:
    """The source that `trace` stands for: one of NAMES, a function trace(x, t), or a Source itself.

    Raises:
        TypeError, ValueError: `trace` is anything else, or "exact" with the denoiser of a network;
            a generator is given that nothing draws from.
    """
    if not (isinstance(trace, str) and trace == "hutchinson"):
        check.unused("generator", generator, "unless trace='hutchinson', whose probes it draws")
    if isinstance(trace, Source):
        return trace
    if not isinstance(trace, str):
        return Function(trace)
    check.choice("trace", trace, NAMES)
    if trace == "divergence":
        return Divergence()
    if trace == "hutchinson":
        seeded = torch.Generator(x.device).manual_seed(0) if generator is None else generator
        return Hutchinson(seeded)
    if not isinstance(denoiser.network, PosteriorMean):
        expected = "'exact' with a Denoiser.exact only, whose data set is known"
        got = "the denoiser of a network: pass df.methods.traces.exact(cloud, schedule)"
        raise check.mismatch("trace", expected, got)
    return Exact(denoiser.network)


def expect_same_levels(trace: Trace, flow: Schedule, t: Tensor) -> None:
    """Refuses a trace whose schedule, where it has one, has other levels at t than the flow that it
    is for: it would be that of another density.
    """
    if isinstance(trace, MatchedTrace):
        what, schedule = "a MatchedTrace", trace.denoiser.schedule
    elif isinstance(trace, Exact):
        what, schedule = "exact(cloud, schedule)", trace.posterior.schedule
    else:
        return
    if schedule is flow or check.values_hidden(t):
        return
    levels, off = flow(t), torch.zeros_like(t, dtype=torch.bool)
    try:
        for theirs, level in zip(schedule(t), levels, strict=True):
            off |= (theirs - level).abs() > _SAME * level.abs()
    except ValueError:  # out of its range
        off[...] = True
    if bool(off.any()):
        expected = f"{what} of the denoiser's schedule, {flow!r}"
        at = f"levels that differ from its at t = {t[off][0].item():g}"
        raise check.mismatch("trace", expected, f"one of {schedule!r}, with {at}")


def _quadratic_forms(
    denoiser: Denoiser, x: Tensor, t: Tensor, mode: str, stacks: Iterable[Tensor], *, summed: bool
) -> tuple[Tensor, Tensor]:
    """eps [B, *E] and <v, J v>, J = d eps/dx: its sum over the vectors of all stacks, [B], or, not
    summed, that of each vector of one stack, [k, B]. A stack is [k, B, *E].
    """

    def network(x: Tensor) -> Tensor:
        return denoiser.eps(x, t)

    # pyrefly: ignore[bad-unpacking]  # two values, since has_aux is False
    eps, pull = torch.func.vjp(network, x) if mode == "vjp" else (x, None)
    total = x.new_zeros(len(x), dtype=torch.float64)
    for v in stacks:
        if pull is not None:
            products = _pulled(pull, v)
        else:
            push = torch.func.vmap(
                lambda v: torch.func.jvp(network, (x,), (v,)),
                out_dims=(None, 0),  # pyrefly: ignore[bad-argument-type]  # None: not mapped
            )
            eps, products = push(v)  # pyrefly: ignore[bad-unpacking]  # as above
        # one small tensor at a time: many that stay would break up the memory of the large ones
        forms = (v * products).reshape(*v.shape[:2], v.shape[2:].numel()).sum(2)
        total = total + (forms.double().sum(0) if summed else forms.double())
    checked("network", eps, x, t.expand(len(x)))  # not looked at under torch.func
    return eps, total.to(x.dtype)


def _pulled(pull: Callable[..., tuple[Tensor, ...]], v: Tensor) -> Tensor:
    """J^T v for each of the vectors [k, B, *E], together where vmap can."""
    if len(v) > 1:
        try:
            return torch.func.vmap(pull)(v)[0]
        except RuntimeError as error:
            # as group normalisation without a graph, whose memory format it cannot ask for
            if "inside of vmap" not in str(error):
                raise
    return torch.stack([pull(one)[0] for one in v])
