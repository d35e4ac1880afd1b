"""Which backend can run a call, and why another cannot."""

from __future__ import annotations

import importlib
from functools import cache
from typing import NamedTuple

import torch

from . import native as _native


class Availability(NamedTuple):
    """Whether a backend can run, and, if it cannot, why."""

    can_run: bool
    reason: str = ""


@cache
def triton(device: torch.device) -> Availability:
    """Whether Triton's kernels can run on tensors of `device`."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return Availability(False, f"triton does not load: {error}")
    if device.type != "cuda":
        return Availability(False, f"the tensors are on {device.type}")
    if torch.version.hip is not None:
        return Availability(False, "needs an NVIDIA GPU")
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
        return Availability(False, "needs compute capability 8.0")
    return Availability(True)


def reasons(device: torch.device | str = "cpu") -> dict[str, str]:
    """For each backend, in order of preference, why it cannot run a call on `device`; "" if it
    can."""
    device = torch.device(device)
    if not _native.available:
        native = _native.reason
    else:
        native = _native.isa()[1] if device.type == "cpu" else f"the tensors are on {device.type}"
    return {"native-cpu": native, "triton": triton(device).reason, "pytorch": ""}
