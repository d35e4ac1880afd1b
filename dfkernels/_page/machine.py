"""What ran: the line that stands under every result."""

from __future__ import annotations

import platform

import torch

from .. import __version__


def machine() -> str:
    """Versions, and what there is to compute with."""
    return (
        f"dfkernels {__version__}, torch {torch.__version__}, Python {platform.python_version()},"
        f" {platform.machine()}, {torch.get_num_threads()} threads,"
        f" {torch.backends.cpu.get_cpu_capability()}"
    )
