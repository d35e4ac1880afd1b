"""python -m bench.derivatives: every first derivative of the ops over a data set, on the CPU.

Each output in each argument, in reverse and in forward mode, beside PyTorch's autograd through the
GEMM form, in turn, round after round, in this process. A row has medians: of the pass, one call of
`posterior` on the same input; in reverse mode of the gradient alone, given the result of a forward
pass of its own, which has a column to itself; in forward mode of the whole call, which also
computes the result. `passes` is of these; `speedup` compares with autograd the result and its
derivative together, since autograd is quick only with the arrays [B, N] that its forward pass
leaves; `speedup_alone` leaves the forward pass out. Errors are relative to float64, of the last
queries: ours, the GEMM form's and the difference form's, both by autograd in float32. Writes
bench/results/derivatives-avx512.csv or derivatives-avx2.csv and the tables of the documents, and
prints which rows miss their target.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

import dfkernels as df
from dfkernels._torch import native

from . import derivatives_table, machine, table
from .cases import atoms

OF_POSTERIOR = ("log_prob", "mean", "fisher_trace", "ess")
OUTPUTS = (*OF_POSTERIOR, "fisher_matvec", "fisher_diagonal")
ARGUMENTS = ("x", "y", "alpha", "sigma", "log_prior", "v")
MODES = ("reverse", "forward")
PER_ATOM = ("y", "log_prior")
DIFFERENCES = 2**24  # elements up to which the difference form computes a case
CHECKED = 8  # queries of which the errors are, or fewer where the difference form says so
TIMES = ("posterior", "dfkernels", "gemm", "dfkernels_forward", "gemm_forward")
BUDGET = 4.0  # seconds of a row's timed rounds


@dataclass
class Case:
    """Float32 standard normal atoms, alpha near 1, queries that are atoms plus noise of a level."""

    name: str
    B: int
    N: int
    d: int
    sigma_value: float

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """All that the ops take."""
        generator = torch.Generator().manual_seed(1)
        draw = partial(torch.randn, generator=generator)
        y, sigma = atoms(self.N, self.d), torch.full((self.B,), self.sigma_value)
        alpha = 0.9 + 0.1 * torch.rand(self.B, generator=generator)
        x = alpha[:, None] * y[torch.randint(self.N, (self.B,), generator=generator)]
        x += sigma[:, None] * draw(self.B, self.d)
        v, prior = draw(self.B, self.d), 0.5 * draw(self.N)
        return {"x": x, "y": y, "v": v, "alpha": alpha, "sigma": sigma, "log_prior": prior}

    @cached_property
    def tangents(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(2)
        return {k: torch.randn(t.shape, generator=generator) for k, t in self.inputs.items()}

    @property
    def checked(self) -> int:
        """The number of queries at the end of which the errors are."""
        return min(CHECKED, max(2, DIFFERENCES // (self.N * self.d)))

    @cached_property
    def last(self) -> dict[str, Tensor]:
        """The inputs with these queries alone."""
        first = self.B - self.checked
        return {k: t if k in PER_ATOM else t[first:] for k, t in self.inputs.items()}

    @cached_property
    def last_exact(self) -> dict[str, Tensor]:
        return {k: t.double() for k, t in self.last.items()}

    @property
    def by_differences(self) -> bool:
        return self.checked * self.N * self.d <= DIFFERENCES


CASES = (
    Case("high", 32, 20_000, 256, 0.8 * 256**0.5),
    Case("many queries", 256, 10_000, 64, 3.0 * 64**0.5),
    Case("long atoms", 8, 5_000, 3072, 3.0 * 3072**0.5),
    Case("low", 64, 20_000, 64, 0.25 * 64**0.5),
    Case("plane", 1024, 10_000, 2, 0.3),
)


def ours(output: str, x, y, v, alpha, sigma, log_prior=None) -> Tensor:
    if output in OF_POSTERIOR:
        return getattr(df.ops.posterior(x, y, alpha, sigma, log_prior), output)
    if output == "fisher_matvec":
        return df.ops.fisher_matvec(x, y, v, alpha, sigma, log_prior)
    return df.ops.fisher_diagonal(x, y, alpha, sigma, log_prior)


def by_gemm(output: str, x, y, v, alpha, sigma, log_prior=None, y_norm=None) -> Tensor:
    """The expanded form: what one writes in PyTorch, and only what the output needs."""
    precision, d = 1 / sigma**2, x.shape[1]
    y_norm = y.square().sum(1) if y_norm is None else y_norm
    bias = -(alpha**2 * precision / 2)[:, None] * y_norm
    bias = bias - math.log(len(y)) if log_prior is None else bias + log_prior.log_softmax(0)
    logits = torch.addmm(bias, x * (alpha * precision)[:, None], y.T)
    if output == "log_prob":
        constant = d / 2 * (precision / (2 * math.pi)).log() - x.square().sum(1) * precision / 2
        return logits.logsumexp(1) + constant
    w = logits.softmax(1)
    if output == "ess":
        return 1 / w.square().sum(1)
    ratio = alpha**2 * precision
    if output == "fisher_matvec":
        along = v @ y.T
        along = w * (along - (w * along).sum(1, keepdim=True))
        return (v - ratio[:, None] * (along @ y)) * precision[:, None]
    mean = w @ y
    if output == "mean":
        return mean
    if output == "fisher_trace":
        return (d - ratio * (w @ y_norm - mean.square().sum(1))) * precision
    return (1 - ratio[:, None] * (w @ y.square() - mean.square())) * precision[:, None]


def by_differences(output: str, x, y, v, alpha, sigma, log_prior=None) -> Tensor:
    """With u = (x - alpha y)/sigma and its mean taken off: accurate, through arrays [B, N, d]."""
    u = (x[:, None] - alpha[:, None, None] * y) / sigma[:, None, None]
    log_pi = -math.log(len(y)) if log_prior is None else log_prior.log_softmax(0)
    logits = log_pi - u.square().sum(-1) / 2
    if output == "log_prob":
        return logits.logsumexp(1) - x.shape[1] / 2 * (2 * math.pi * sigma**2).log()
    w = logits.softmax(1)
    if output == "mean":
        return w @ y
    if output == "ess":
        return 1 / w.square().sum(1)
    u = u - w[:, None] @ u
    if output == "fisher_matvec":
        along = w * (u @ v[..., None])[..., 0]
        return (v - (along[:, None] @ u)[:, 0]) / sigma[:, None] ** 2
    spread = (w[:, None] @ u.square())[:, 0]
    if output == "fisher_trace":
        return (x.shape[1] - spread.sum(1)) / sigma**2
    return (1 - spread) / sigma[:, None] ** 2


@dataclass
class Derivative:
    """Of one output in one argument in one mode, on the inputs of a case."""

    case: Case
    output: str
    argument: str
    mode: str

    @cached_property
    def inputs(self) -> dict[str, Tensor]:
        """With a prior only where the derivative is in it."""
        found = dict(self.case.inputs)
        if self.argument != "log_prior":
            del found["log_prior"]
        return found

    @cached_property
    def gemm_inputs(self) -> dict[str, Tensor]:
        """With |y|^2 at hand where it is no part of the derivative."""
        if self.argument == "y":
            return self.inputs
        return self.inputs | {"y_norm": self.case.inputs["y"].square().sum(1)}

    @cached_property
    def cotangent(self) -> Tensor:
        per_query = self.output in OF_POSTERIOR and self.output != "mean"
        shape = (self.case.B,) if per_query else (self.case.B, self.case.d)
        return torch.randn(shape, generator=torch.Generator().manual_seed(3))

    def along(self, function: Callable[..., Tensor], inputs, direction: Tensor) -> Tensor:
        """The derivative: the gradient against a cotangent, or what a tangent of the argument
        gives."""
        found, _, _ = self.timed(function, inputs, direction)
        return found

    def timed(self, function, inputs, direction: Tensor) -> tuple[Tensor, float, float]:
        """(the derivative, seconds that it took, seconds of the forward pass before it)."""
        stamps = [time.perf_counter()]
        leaf = inputs[self.argument]
        if self.mode == "forward":
            of = lambda t: function(self.output, **inputs | {self.argument: t})
            found = torch.func.jvp(of, (leaf,), (direction,))[1]
            return found, time.perf_counter() - stamps[0], 0.0
        leaf = leaf.detach().requires_grad_()
        out = function(self.output, **inputs | {self.argument: leaf})
        stamps.append(time.perf_counter())
        (found,) = torch.autograd.grad(out, leaf, direction)
        stamps.append(time.perf_counter())
        return found, stamps[2] - stamps[1], stamps[1] - stamps[0]

    @property
    def direction(self) -> Tensor:
        return self.cotangent if self.mode == "reverse" else self.case.tangents[self.argument]

    def errors(self) -> dict[str, float]:
        """name -> relative error, of the last queries and what they give to the atoms."""
        Q, per_atom = self.case.checked, self.argument in PER_ATOM
        last = slice(self.case.B - Q, None)
        few, exactly = (
            {k: inputs[k] for k in self.inputs} for inputs in (self.case.last, self.case.last_exact)
        )
        everywhere = self.mode == "forward" and per_atom
        direction = self.direction if everywhere else self.direction[last]
        exact = self.along(by_gemm, exactly, direction.double())
        masked = self.direction
        if self.mode == "reverse":
            masked = torch.zeros_like(masked)
            masked[last] = direction
        mine = self.along(ours, self.inputs, masked)
        if not (self.mode == "reverse" and per_atom):
            mine = mine[last]
        found = {"": mine, "gemm_": self.along(by_gemm, few, direction)}
        if self.case.by_differences:
            parts = []
            for b in range(Q):
                one = {k: t if k in PER_ATOM else t[b : b + 1] for k, t in few.items()}
                along = direction if everywhere else direction[b : b + 1]
                parts.append(self.along(by_differences, one, along))
            summed = self.mode == "reverse" and per_atom
            found["difference_"] = sum(parts[1:], parts[0]) if summed else torch.cat(parts)
        size = exact.norm()
        return {f"{k}error": float((t.double() - exact).norm() / size) for k, t in found.items()}


def in_turn(derivative: Derivative, rounds: int) -> dict[str, float]:
    """Median seconds of the pass, of ours and of the GEMM form's, and of the forward passes before
    them. The first round is warm-up, unless it takes all the time that a row may have."""
    arguments = ("x", "y", "alpha", "sigma", "log_prior")
    given = [derivative.inputs[k] for k in arguments if k in derivative.inputs]
    times: dict[str, list[float]] = {name: [] for name in TIMES}
    started = time.perf_counter()
    for _ in range(1 + rounds):
        start = time.perf_counter()
        with torch.no_grad():
            df.ops.posterior(*given)
        times["posterior"].append(time.perf_counter() - start)
        for name, function, inputs in (
            ("dfkernels", ours, derivative.inputs),
            ("gemm", by_gemm, derivative.gemm_inputs),
        ):
            _, took, before = derivative.timed(function, inputs, derivative.direction)
            times[name].append(took)
            if derivative.mode == "reverse":
                times[f"{name}_forward"].append(before)
        if time.perf_counter() - started > BUDGET:
            break
    return {name: statistics.median(t[1:] or t) for name, t in times.items() if t}


def measured(derivative: Derivative, rounds: int) -> dict:
    """A row of the results, without errors."""
    case, median = derivative.case, in_turn(derivative, rounds)
    whole = {
        name: median[name] + median.get(f"{name}_forward", 0.0) for name in ("dfkernels", "gemm")
    }
    return {
        "case": case.name,
        "B": case.B,
        "N": case.N,
        "d": case.d,
        "sigma": f"{case.sigma_value:.3g}",
        "output": derivative.output,
        "argument": derivative.argument,
        "mode": derivative.mode,
        **{f"{name}_ms": f"{median[name] * 1e3:.3f}" if name in median else "" for name in TIMES},
        "passes": f"{median['dfkernels'] / median['posterior']:.3f}",
        "whole_passes": f"{whole['dfkernels'] / median['posterior']:.3f}",
        "speedup": f"{whole['gemm'] / whole['dfkernels']:.3f}",
        "speedup_alone": f"{median['gemm'] / median['dfkernels']:.3f}",
    }


def row_of(derivative: Derivative, rounds: int) -> dict:
    names = ("error", "gemm_error", "difference_error")
    errors = derivative.errors()
    row = measured(derivative, rounds)
    return row | {k: f"{errors[k]:.2e}" if k in errors else "" for k in names}


def wanted(args: argparse.Namespace) -> Iterator[Derivative]:
    for case in CASES:
        if case.name not in args.cases:
            continue
        for key in itertools.product(args.outputs, args.arguments, args.modes):
            if key[1] != "v" or key[0] == "fisher_matvec":
                yield Derivative(case, *key)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python -m bench.derivatives", description=__doc__.splitlines()[0]
    )
    found.add_argument("--rounds", type=int, default=3, help="timed rounds of a row (default 3)")
    found.add_argument("--threads", type=int, default=torch.get_num_threads())
    found.add_argument("--isa", choices=("base", "v3"), help="hold the CPU to it, peers included")
    for name, all_ in (
        ("cases", tuple(case.name for case in CASES)),
        ("outputs", OUTPUTS),
        ("arguments", ARGUMENTS),
        ("modes", MODES),
    ):
        found.add_argument(
            f"--{name}", nargs="+", choices=all_, default=all_, help="some; no document changes"
        )
    found.add_argument("--out", type=Path, help="a CSV to write instead; no document changes")
    return found


def main() -> None:
    args = parser().parse_args()
    if not native.available:
        sys.exit(f"the compiled part is not loaded: {native.reason}")
    isa = machine.hold(args.isa)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", df.ops.SlowDerivativeWarning)
    about, rows = machine.columns(args.threads, {}), []
    derivatives = list(wanted(args))
    for derivative in derivatives:
        rows.append(row_of(derivative, args.rounds) | about)
        print(derivatives_table.shown(rows[-1]), flush=True)
    print("\n".join(derivatives_table.summary(rows)))
    whole = len(derivatives) == len(list(wanted(parser().parse_args([]))))
    if args.out or whole:
        table.write_rows(args.out or machine.results("derivatives", isa), rows)
    if whole and not args.out:
        table.write_pages()


if __name__ == "__main__":
    main()
