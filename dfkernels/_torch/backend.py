"""Which backend can run a call, why another cannot, and the log of what was chosen.

The logger is called "dfkernels". Once per op and type of device it says which backend runs the op,
at level DEBUG; at level INFO, with the reason, where that is PyTorch although there is a kernel.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from typing import NamedTuple

import torch

from . import native as _native
from . import private

log = logging.getLogger("dfkernels")
_chosen: set[tuple[object, str]] = set()


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


def chosen(op, device: torch.device, backend: str, reason: str = "") -> None:
    """Logs, once per op and type of device, that `backend` runs it; reason: why no kernel does."""
    key = (op, device.type)
    if key not in _chosen:
        _chosen.add(key)
        level = logging.INFO if reason else logging.DEBUG
        why = f": {reason}" if reason else ""
        log.log(level, "%s on %s runs in %s%s", op._schema.name, device.type, backend, why)


def ran(op, args) -> bool:
    """Logs that a compiled kernel ran, unless another backend has said that it did. True once that
    is settled for the CPU."""
    like = args[0]
    if not isinstance(like, torch.Tensor) or like.device.type != "cpu" or private.is_virtual(like):
        return False
    if _native.available:
        chosen(op, like.device, "native-cpu")
    return True


def fell_back(op, device: torch.device) -> None:
    """Logs that an op runs in PyTorch, and why no kernel does."""
    if (op, device.type) in _chosen:
        return
    chosen(op, device, "pytorch", why_not(device))


def why_not(device: torch.device) -> str:
    """Why the kernels for this device cannot run; "" if they can."""
    return reasons(device)["triton" if device.type == "cuda" else "native-cpu"]
