"""dfkernels: exact zero-, first- and second-order information of a diffused point cloud, fast, on
CPU and CUDA.

Importing it registers torch.ops.dfkernels.
"""

from __future__ import annotations

__version__ = "0.1.0"

from . import adapt, methods, ops, schedule
from ._fisher_operator import FisherOperator
from ._merge import merge
from ._top_k import TopK, top_k
from .cloud import PointCloud
from .fisher import DiffusionFisher
from .law import Drawn, Law
from .linalg.operator import LinearOperator
from .methods.adjoint import guide
from .methods.audit import AuditReport, audit
from .methods.classifier_free import ClassifierFreeGuidance
from .methods.convention import CheckedLevel, CheckReport, check
from .methods.denoiser import Denoiser
from .methods.grid import time_grid
from .methods.guided_likelihood import guided_likelihood
from .methods.latents import Latents
from .methods.likelihood import log_prob
from .methods.samplers import invert, sample
from .methods.sharded import ShardedCloud
from .methods.trace_matching import MatchedTrace, denoising_loss, trace_loss
from .methods.traces import Divergence, Hutchinson
from .methods.transport import transport_test
from .mixture import GaussianMixture
from .partial import Partial

__all__ = [
    "AuditReport",
    "CheckReport",
    "CheckedLevel",
    "ClassifierFreeGuidance",
    "Denoiser",
    "DiffusionFisher",
    "Divergence",
    "Drawn",
    "FisherOperator",
    "GaussianMixture",
    "Hutchinson",
    "Latents",
    "Law",
    "LinearOperator",
    "MatchedTrace",
    "Partial",
    "PointCloud",
    "ShardedCloud",
    "TopK",
    "adapt",
    "audit",
    "check",
    "denoising_loss",
    "guide",
    "guided_likelihood",
    "invert",
    "log_prob",
    "merge",
    "methods",
    "ops",
    "sample",
    "schedule",
    "time_grid",
    "top_k",
    "trace_loss",
    "transport_test",
]
