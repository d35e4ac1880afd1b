"""Which backend runs a call, and why another does not."""

from __future__ import annotations

import torch

from . import _native

NAMES = ("native-cpu", "pytorch")


def reasons(device: torch.device | str = "cpu") -> dict[str, str]:
    """For each backend, in order of preference, why it cannot run a call on `device`; "" if it can."""
    device = torch.device(device)
    if not _native.available:
        native = _native.reason
    else:
        native = "" if device.type == "cpu" else f"the tensors are on {device.type}"
    return {"native-cpu": native, "pytorch": ""}


def choose(device: torch.device | str = "cpu") -> str:
    """The backend that runs a call on `device`: the first without a reason against it."""
    return next(name for name, reason in reasons(device).items() if not reason)
