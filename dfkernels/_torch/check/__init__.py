"""Checks of arguments, and their errors in one style: "name: expected what, got what".

Who checks what:

* A public op or object checks type, dtype, shape, device and plain numbers of its arguments before
  it does anything, by the functions below (`query`, `alpha`, `sigma`, `points`, `vectors`, ...). An
  object passes what it has checked to an op, which checks again: of tensors in order this takes
  about a microsecond each, and an op can be called by anybody.
* Values inside tensors (NaN, inf, sigma <= 0) are found by the kernels in what they compute, and
  named by diagnosis.py.
* A wrong sigma is refused by `sigma` if it is a number, else by the kernels and diagnosis.py.
  Inside a compiled graph, where a number may be symbolic, the kernels refuse it.
"""

from __future__ import annotations

from ._data_set import lists, narrow, points, values, variance, vectors
from ._errors import function, instance, mismatch, other_event, unused
from ._levels import alpha, given_levels, per_query, sigma
from ._numbers import (
    choice,
    constant,
    cpu_generator,
    generator,
    integer,
    nonnegative,
    of_numpy,
    positive,
)
from ._tensors import events, like, query, same, stored, tensor, unmasked, values_hidden

__all__ = [
    "alpha",
    "choice",
    "constant",
    "cpu_generator",
    "events",
    "function",
    "generator",
    "given_levels",
    "instance",
    "integer",
    "like",
    "lists",
    "mismatch",
    "narrow",
    "nonnegative",
    "of_numpy",
    "other_event",
    "per_query",
    "points",
    "positive",
    "query",
    "same",
    "sigma",
    "stored",
    "tensor",
    "unmasked",
    "unused",
    "values",
    "values_hidden",
    "variance",
    "vectors",
]
