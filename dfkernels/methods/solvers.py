"""Explicit Runge-Kutta methods: their coefficients as data, one step of any of them, and adaptive
steps.

For dy/du = f(u, y)

    k_i = f(u + c_i h, y + h sum_j a_ij k_j),  y(u + h) ~ y + h sum_i b_i k_i

A state y is a tuple of tensors, and so is a slope.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DORMAND_PRINCE",
    "EULER",
    "HEUN",
    "RK4",
    "Tableau",
    "Unfinished",
    "adaptive",
    "advanced",
    "slopes",
]

State = tuple[Tensor, ...]
Field = Callable[[float, State], State]


class Tableau(NamedTuple):
    """The coefficients c, a and b of a method, and `error` = b - b' where a method b' of one order
    less is embedded in it.
    """

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[float, ...] = ()


EULER = Tableau((0,), ((),), (1,))  # order 1; in x/alpha against sigma/alpha this is DDIM
HEUN = Tableau((0, 1), ((), (1,)), (1 / 2, 1 / 2))  # order 2; the explicit trapezoidal rule
RK4 = Tableau(
    (0, 1 / 2, 1 / 2, 1), ((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)
)

# Dormand & Prince 1980, RK5(4)7M: order 5; the last slope is the first one of the next step
DORMAND_PRINCE = Tableau(
    (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1),
    (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0),
    (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
)

_ORDER = 5
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 5.0


def advanced(y: State, h: float, coefficients: tuple[float, ...], k: list[State]) -> State:
    """The state y + h sum_i coefficients_i k_i, part by part."""
    pairs = [(c, slope) for c, slope in zip(coefficients, k, strict=False) if c]
    return tuple(part + h * sum(c * slope[i] for c, slope in pairs) for i, part in enumerate(y))


def slopes(
    tableau: Tableau, f: Field, y: State, h: float, first: State | None = None
) -> list[State]:
    """The slopes k_1, k_2, ... of a step of length h from y.

    Args:
        tableau: of the method.
        f: f(c, y) is the slope after the part c of the step.
        y, h: state and length.
        first: k_1, where it is known.
    """
    k = [f(0.0, y) if first is None else first]
    for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
        k.append(f(c, advanced(y, h, row, k)))
    return k


class Unfinished(Exception):
    """Raised by `adaptive` where it gives up; says how far it came, and why."""

    def __init__(self, u: float, evaluations: int, why: str) -> None:
        super().__init__(why)
        self.u, self.evaluations, self.why = u, evaluations, why


class Step(NamedTuple):
    """A step that `adaptive` tries: its end u, the states before and after, the estimated error of
    the latter, and the slope at u.
    """

    u: float
    before: State
    after: State
    error: State
    slope: State


def adaptive(
    f: Field,
    y: State,
    begin: float,
    end: float,
    judge: Callable[[Step], float],
    accept: Callable[[Step], None],
    max_evaluations: int,
) -> State:
    """Integrates y from `begin` to `end` by Dormand-Prince, in steps as long as `judge` allows.

    The length follows the last two errors (Gustafsson's PI controller), which rejects few steps
    where stability, not accuracy, limits it. Differentiable through the steps that are taken, at
    fixed lengths.

    Args:
        f: f(u, y), the slope.
        y: the state at `begin`.
        begin, end: begin < end.
        judge: the error of a step relative to the tolerance. Up to 1 the step is taken; otherwise,
            NaN included, a shorter one is tried.
        accept: called for each step that is taken.
        max_evaluations: of f.

    Raises:
        Unfinished: max_evaluations would be exceeded, or a step is too short to change u.
    """
    tableau, spent, u, last = DORMAND_PRINCE, 2, begin, 1e-4
    k = f(begin, y)
    h = _first_step(f, y, begin, end, k, judge)
    while u < end:
        h = end - u if u + 1.001 * h >= end else h
        if u + h == u:
            raise Unfinished(u, spent, f"a step of {h:.1g} is too short to be taken")
        if spent + len(tableau.c) - 1 > max_evaluations:
            raise Unfinished(u, spent, f"the next step would be one of {h:.1g}")
        ks = slopes(tableau, lambda c, state, u=u, h=h: f(min(u + c * h, end), state), y, h, k)
        spent += len(tableau.c) - 1
        new = advanced(y, h, tableau.b, ks)
        zero = tuple(torch.zeros_like(part) for part in y)
        step = Step(min(u + h, end), y, new, advanced(zero, h, tableau.error, ks), ks[-1])
        ratio = judge(step)
        if ratio <= 1:
            accept(step)
            # exponents 0.7 and 0.4 over the order: Hairer, Norsett & Wanner, II.4
            factor = _SAFETY * max(ratio, 1e-10) ** (-0.7 / _ORDER) * last ** (0.4 / _ORDER)
            u, y, k, last = step.u, new, ks[-1], max(ratio, 1e-4)
        else:
            factor = _SAFETY * ratio ** (-1 / _ORDER) if math.isfinite(ratio) else _SHRINK
        h *= min(_GROW, max(_SHRINK, factor))
    return y


def _first_step(
    f: Field, y: State, begin: float, end: float, k: State, judge: Callable[[Step], float]
) -> float:
    """The length of the first step, from the sizes of the slope and of its change over a short
    Euler step (Hairer, Norsett & Wanner, II.4).
    """
    h = min(1e-3, end - begin)
    new = advanced(y, h, EULER.b, [k])
    slope = f(begin + h, new)
    change = tuple((b - a) / h for a, b in zip(k, slope, strict=True))
    size = max(judge(Step(begin + h, y, new, error, slope)) for error in (k, change))
    return min(100 * h, (0.01 / size) ** (1 / _ORDER)) if 0 < size < math.inf else h
