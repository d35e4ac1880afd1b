"""The warning of a solver that stopped before it had converged."""

from __future__ import annotations

__all__ = ["NotConverged"]


class NotConverged(UserWarning):
    """Sinkhorn's algorithm stopped at a marginal error above tol; the message says at which, why,
    and what helps."""
