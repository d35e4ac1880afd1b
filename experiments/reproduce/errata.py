"""Errata of the paper, one by one, in float64: what is printed, what is right, and what autograd
says."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dfkernels import ops
from dfkernels.cloud import PointCloud
from dfkernels.methods.transport import asymmetry, transport_test
from dfkernels.schedule import EDM, VE, VP, Schedule, SubVP

from . import errata_bounds
from . import errata_tables as shown
from .errata_bounds import atoms, number
from .errata_tables import Formula
from .section import Picture, Section
from .table3 import NON_AFFINE, PUBLISHED, published_grid

STAGES = ["formulas", "transport", "bounds", "cost"]

_SCHEDULES: dict[str, Schedule] = {"VE": VE(), "EDM": EDM(), "VP": VP(), "sub-VP": SubVP()}
_TIMES = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)


def run(quick: bool, out: Path, step: Callable[[str], None]) -> Section:
    """The same in quick and full runs: seconds."""
    ranges = {name: _flow_errors(schedule) for name, schedule in _SCHEDULES.items()}
    formulas = [_eq10(), _eq14(), _eq15(), _eq22(ranges), _start(), _line6()]
    step("formulas")
    asymmetries = _asymmetries()
    step("transport")
    bounds = [errata_bounds.prop7(), errata_bounds.prop8()]
    step("bounds")
    costs, standing = errata_bounds.costs(), _core()
    step("cost")
    return Section(
        name="errata",
        title="Errata: what is printed, what is right",
        text=[
            (
                "Nine statements of the paper do not hold as printed. Each is evaluated here in"
                " float64 as printed and in its right form, against autograd on log q, or against"
                " the sum or integral itself. The core is right as printed, to rounding: the Fisher"
                " information and its trace (eq. 11, eq. 16) and the adjoint equation (eq. 18)."
            ),
            (
                "Four are slips of notation: eq. 10 sums N + 1 terms of weight 1/N, eq. 14 has a"
                " partial derivative where the total one along the flow is meant, eq. 15 lacks the"
                " component, and Alg. 2, line 2, the square. Four change results. In eq. 22 both g²"
                " terms have the wrong sign. Alg. 2, line 6, has AᵀB, which leads neither to the"
                " Jacobian nor to its transpose, where B A belongs, and finds optimal transport"
                " (0.00 %) for EDM where there is none. The bounds of Prop. 7 and Prop. 8 are"
                " broken by the examples below. The last is the comparison of costs: reverse mode"
                " needs d products for the exact trace, but one for an unbiased estimate."
            ),
        ],
        tables=[
            shown.forms(formulas, bounds),
            shown.values(formulas),
            shown.flow_table(ranges, _TIMES),
            shown.asymmetry_table(asymmetries),
            errata_bounds.bounds_table(bounds),
            costs[0],
            shown.standing(standing, len(_SCHEDULES)),
        ],
        pictures=[
            Picture(
                "errors",
                "Relative error against the truth, as printed and in the right form; float64."
                " Errors of zero are drawn at 10⁻¹⁷. The right form of Alg. 2, line 2, leaves out"
                " the data's own spread.",
                partial(shown.draw, formulas),
            )
        ],
        claims=[
            *map(shown.formula_claim, formulas),
            shown.asymmetry_claim(asymmetries),
            *map(errata_bounds.bound_claim, bounds),
            costs[1],
            shown.core_claim(standing),
        ],
    )


# ---- the truth


def _log_q(x: Tensor, y: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """log q_t(x) = logsumexp_i(-|x - alpha y_i|^2/(2 sigma^2)) - log N - (d/2) log(2 pi sigma^2), x
    [d]."""
    u = (x - alpha * y) / sigma
    norm = math.log(len(y)) + x.numel() / 2 * torch.log(2 * math.pi * sigma**2)
    return torch.logsumexp(-u.square().sum(-1) / 2, 0) - norm


def _drift(x: Tensor, t: Tensor, y: Tensor, schedule: Schedule) -> Tensor:
    """The probability-flow ODE, h = f x - (g^2/2) grad log q_t."""
    score = torch.func.grad(_log_q)(x, y, *schedule(t))
    return schedule.f(t) * x - schedule.g2(t) / 2 * score


def _off(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()


# ---- formulas


def _eq10() -> Formula:
    """The mass of the diffused density, by the trapezoidal rule on a line (exponentially accurate
    here)."""
    y, _ = atoms(5, 1, 0)
    sigma = torch.tensor(0.5, dtype=torch.float64)
    x = torch.linspace(-12, 12, 4801, dtype=torch.float64)
    kernels = (
        torch.exp(-((x[:, None] - y[:, 0]) ** 2) / (2 * sigma**2)) / (2 * math.pi * sigma**2).sqrt()
    )
    n = len(y) - 1  # y_0, ..., y_N
    mass, right, one = kernels.sum(1) / n, kernels[:, 1:].sum(1) / n, torch.ones((), dtype=x.dtype)
    mass, right = torch.trapezoid(mass, x), torch.trapezoid(right, x)
    return Formula(
        "eq. 10", "Σ from i = 0 to N, weight 1/N", "Σ from i = 1 to N", "mass of q, N = 4, d = 1",
        (number(one), number(mass), number(right)), (_off(mass, one), _off(right, one)),
    )  # fmt: skip


def _eq14() -> Formula:
    """d log q_t(x_t)/dt along the flow = -f d - (g^2/2) tr F; the partial derivative is another
    number."""
    y, x = atoms(6, 3, 10)
    schedule, t = VE(), torch.tensor(0.3, dtype=torch.float64)

    def log_q(x: Tensor, t: Tensor) -> Tensor:
        return _log_q(x, y, *schedule(t))

    one = torch.ones_like(t)
    total = torch.func.jvp(log_q, (x, t), (_drift(x, t, y, schedule), one))[1]
    part = torch.func.jvp(log_q, (x, t), (torch.zeros_like(x), one))[1]
    trace = ops.posterior(x[None], y, *schedule(t)).fisher_trace[0]
    right = -schedule.f(t) * len(x) - schedule.g2(t) / 2 * trace
    return Formula(
        "eq. 14", "∂ log q/∂t = −f d − (g²/2) tr F", "d log q(x_t)/dt = −f d − (g²/2) tr F",
        "rate of log q, VE, t = 0.3, d = 3", tuple(map(number, (total, part, right))),
        (_off(part, total), _off(right, total)),
    )  # fmt: skip


def _eq15() -> Formula:
    """tr F = (1/sigma) sum_i d<eps, e_i>/dx_i; without the component each term is a vector."""
    y, x = atoms(6, 3, 10)
    alpha, sigma = VP()(torch.tensor(0.3, dtype=torch.float64))
    truth = -torch.func.hessian(_log_q)(x, y, alpha, sigma).trace()

    def eps(x: Tensor) -> Tensor:
        return ops.posterior(x[None], y, alpha, sigma).eps(x[None], alpha, sigma)[0]

    jacobian = torch.func.jacrev(eps)(x)
    vector, right = jacobian.sum(1) / sigma, jacobian.trace() / sigma
    return Formula(
        "eq. 15",
        "tr F = (1/σ) Σ ∂ε/∂xᵢ",
        "tr F = (1/σ) Σ ∂⟨ε, eᵢ⟩/∂xᵢ",
        "tr F, VP, t = 0.3, d = 3",
        (number(truth), f"({', '.join(map(number, vector))})", number(right)),
        (((vector - truth).abs().min() / truth.abs()).item(), _off(right, truth)),
    )


def _flow_jacobians(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dh/dx by autograd; eq. 22 as printed; B = [f + g^2/(2 sigma^2)] I - (alpha^2 g^2/(2 sigma^4))
    C."""
    y, x = atoms(6, 3, 10)
    alpha, sigma = schedule(t)
    f, g2 = schedule.f(t), schedule.g2(t)
    w = torch.softmax(-((x - alpha * y) / sigma).square().sum(-1) / 2, 0)
    r = y - w @ y
    identity, covariance = torch.eye(len(x), dtype=x.dtype), (w[:, None] * r).T @ r
    noisy = g2 / (2 * sigma**2) * identity - alpha**2 * g2 / (2 * sigma**4) * covariance
    return torch.func.jacrev(_drift)(x, t, y, schedule), f * identity - noisy, f * identity + noisy


def _flow_errors(schedule: Schedule) -> tuple[list[float], list[float]]:
    """Errors of the printed B, and of the right one, over the times."""
    all_times = [_flow_jacobians(schedule, t) for t in _TIMES]
    printed = [_off(wrong, truth) for truth, wrong, _ in all_times]
    return printed, [_off(right, truth) for truth, _, right in all_times]


def _eq22(ranges: dict[str, tuple[list[float], list[float]]]) -> Formula:
    truth, wrong, right = _flow_jacobians(VP(), _TIMES[2])
    return Formula(
        "eq. 22",
        "B = [f − g²/2σ²] I + (α²g²/2σ⁴) C",
        "B = [f + g²/2σ²] I − (α²g²/2σ⁴) C",
        "tr B, VP, t = 0.3, d = 3; errors: |B|, all below",
        tuple(number(b.trace()) for b in (truth, wrong, right)),
        (
            min(min(wrong) for wrong, _ in ranges.values()),
            max(max(right) for _, right in ranges.values()),
        ),
    )


def _start() -> Formula:
    """The variance of x_T per dimension, from the atoms; the flow starts at N(0, sigma_T^2 I)
    instead."""
    y, _ = atoms(6, 3, 10)
    alpha, sigma = EDM()(torch.tensor(80.0, dtype=torch.float64))
    truth = alpha**2 * y.var(0, correction=0).mean() + sigma**2
    return Formula(
        "Alg. 2, line 2",
        "x_M ~ N(0, σ_T I)",
        "x_M ~ N(0, σ_T² I)",
        "variance of x_T, EDM, T = 80",
        (number(truth), number(sigma), number(sigma**2)),
        (_off(sigma, truth), _off(sigma**2, truth)),
        1e-3,
    )


def _line6() -> Formula:
    """The Jacobian of 1000 DDIM steps: A <- M A, M that of one step; A <- A + A^T B dt is another
    matrix."""
    x = torch.tensor([0.3, -0.4], dtype=torch.float64, requires_grad=True)
    schedule, t = VE(), torch.linspace(1, 1e-3, 1001, dtype=torch.float64)
    alpha, sigma = schedule(t)
    end = x
    for i in range(len(t) - 1):
        logits = -((end - alpha[i] * NON_AFFINE) / sigma[i]).square().sum(-1) / 2
        mean = torch.softmax(logits, 0) @ NON_AFFINE
        end = alpha[i + 1] * mean + sigma[i + 1] * (end - alpha[i] * mean) / sigma[i]
    truth = torch.stack([torch.autograd.grad(each, x, retain_graph=True)[0] for each in end])
    cloud, start = PointCloud(NON_AFFINE), x.detach()[None]
    wrong = transport_test(cloud, schedule, t, x=start, convention="slide").A[0]
    right = transport_test(cloud, schedule, t, x=start).A[0]
    unit = [A / A.norm() for A in (truth, wrong, right)]
    return Formula(
        "Alg. 2, line 6", "A ← A + Aᵀ B dt", "A ← M A, M of one step",
        "asymmetry, VE, one chain; errors: A/|A|", tuple(number(asymmetry(A[None])) for A in unit),
        (_off(unit[1], unit[0]), _off(unit[2], unit[0])),
    )  # fmt: skip


def _asymmetries() -> dict[str, tuple[float, float]]:
    """Mean asymmetry of A over 4096 chains, 999 steps: {schedule: (line 6 as printed, true
    Jacobian)}."""
    z = torch.randn(4096, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cloud, t = PointCloud(NON_AFFINE), published_grid(999)

    def mean(schedule: Schedule, convention: str) -> float:
        x = z * schedule.sigma(t[0])
        return (
            transport_test(cloud, schedule, t, x=x, convention=convention).asymmetry.mean().item()
        )

    return {name: (mean(s, "slide"), mean(s, "jacobian")) for name, s in PUBLISHED.items()}


# ---- what stands


def _core() -> dict[str, float]:
    """Relative errors of eq. 11, 16 and 18 as printed, the largest over schedules and times."""
    y, x = atoms(6, 3, 10)
    adjoint = torch.randn(3, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    errors = {"eq. 11": 0.0, "eq. 16": 0.0, "eq. 18": 0.0}
    for schedule in _SCHEDULES.values():
        for t in _TIMES:
            alpha, sigma = schedule(t)
            truth = -torch.func.hessian(_log_q)(x, y, alpha, sigma)
            fisher = ops.fisher_dense(x[None], y, alpha, sigma)[0]
            trace = ops.posterior(x[None], y, alpha, sigma).fisher_trace[0]
            pulled = -torch.func.vjp(lambda x, t=t, s=schedule: _drift(x, t, y, s), x)[1](adjoint)[
                0
            ]
            rate = -schedule.f(t) * adjoint - schedule.g2(t) / 2 * fisher @ adjoint
            found = _off(fisher, truth), _off(trace, truth.trace()), _off(rate, pulled)
            errors = {
                name: max(e, new) for (name, e), new in zip(errors.items(), found, strict=True)
            }
    return errors
