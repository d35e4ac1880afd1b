"""The ops: pure functions of tensors, one directory each.

Beside every op stands a `reference`, the same function in plain PyTorch: `ops.posterior.reference`.
"""

from __future__ import annotations

import sys

from .._torch import native  # noqa: F401  registers the compiled kernels
from .._torch.autograd import SlowDerivativeWarning
from .average import Average, average
from .draw import draw
from .endpoint_matvec import endpoint_matvec
from .fisher_dense import fisher_dense
from .fisher_diagonal import fisher_diagonal
from .fisher_matvec import fisher_matvec
from .log_prob import log_prob
from .matched_trace import matched_trace
from .mixture_diagonal import mixture_diagonal
from .mixture_matvec import mixture_matvec
from .mixture_posterior import MixturePosterior, mixture_posterior
from .posterior import Posterior, posterior
from .transport_chain import Chain, transport_chain

__all__ = [
    "Average",
    "Chain",
    "MixturePosterior",
    "Posterior",
    "SlowDerivativeWarning",
    "average",
    "draw",
    "endpoint_matvec",
    "fisher_dense",
    "fisher_diagonal",
    "fisher_matvec",
    "log_prob",
    "matched_trace",
    "mixture_diagonal",
    "mixture_matvec",
    "mixture_posterior",
    "posterior",
    "transport_chain",
]


def _share_names(function) -> None:
    """Gives a function what its package exports, for here one name stands for both."""
    package = sys.modules[function.__module__]
    for name in set(package.__all__) - {function.__name__}:
        setattr(function, name, getattr(package, name))


for _function in (
    average,
    draw,
    endpoint_matvec,
    fisher_dense,
    fisher_diagonal,
    fisher_matvec,
    log_prob,
    matched_trace,
    mixture_diagonal,
    mixture_matvec,
    mixture_posterior,
    posterior,
    transport_chain,
):
    _share_names(_function)
