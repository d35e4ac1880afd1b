"""The ops: pure functions of tensors, one directory each, a plain PyTorch `reference` beside every
one."""

from __future__ import annotations

from .._torch import native  # noqa: F401  registers the compiled kernels
from .endpoint_matvec import endpoint_matvec
from .fisher_dense import fisher_dense
from .fisher_diagonal import fisher_diagonal
from .fisher_matvec import fisher_matvec
from .matched_trace import matched_trace
from .posterior import Posterior, posterior
from .transport_chain import Chain, transport_chain

__all__ = [
    "Chain",
    "Posterior",
    "endpoint_matvec",
    "fisher_dense",
    "fisher_diagonal",
    "fisher_matvec",
    "matched_trace",
    "posterior",
    "transport_chain",
]
