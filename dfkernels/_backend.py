"""Which backend can run a call, and why another cannot."""

from __future__ import annotations

import torch

from . import _native


def reasons(device: torch.device | str = "cpu") -> dict[str, str]:
    """For each backend, in order of preference, why it cannot run a call on `device`; "" if it can."""
    device = torch.device(device)
    if not _native.available:
        native = _native.reason
    else:
        native = _native.isa()[1] if device.type == "cpu" else f"the tensors are on {device.type}"
    return {"native-cpu": native, "pytorch": ""}
