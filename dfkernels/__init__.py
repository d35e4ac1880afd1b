"""dfkernels: exact zero-, first- and second-order information of a diffused point cloud, fast, on
CPU and CUDA.

Importing it registers torch.ops.dfkernels.
"""

from __future__ import annotations

from . import methods, ops, schedule
from ._top_k import TopK, top_k
from .cloud import PointCloud
from .fisher import DiffusionFisher
from .linalg.operator import FisherOperator

__all__ = [
    "DiffusionFisher",
    "FisherOperator",
    "PointCloud",
    "TopK",
    "methods",
    "ops",
    "schedule",
    "top_k",
]

__version__ = "0.1.0"
