"""dfkernels: exact zero-, first- and second-order information of a diffused point cloud, fast, on CPU and
CUDA.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_LAZY = {
    "PointCloud": "cloud",
    "DiffusionFisher": "fisher",
    "cloud": None,
    "fisher": None,
    "methods": None,
    "ops": None,
    "schedule": None,
}

__all__ = ["DiffusionFisher", "PointCloud", "methods", "ops", "schedule"]


def __getattr__(name):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _LAZY[name] is None:
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_LAZY})
