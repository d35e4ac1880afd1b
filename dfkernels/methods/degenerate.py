"""The warning of methods whose results rest on weights."""

from __future__ import annotations

__all__ = ["DegenerateWeights"]


class DegenerateWeights(UserWarning):
    """So few draws or particles carry the weight, by their effective sample size, that the results
    cannot be believed; the message says where, and what helps."""
