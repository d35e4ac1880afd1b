"""What the wrappers around a library's network share."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._torch import check

__all__ = ["Adapted"]


class Adapted(nn.Module):
    """A network that is called in another way: its parameters are the network's, where that is a
    Module. A subclass defines `forward(x, t, **conditions)`.
    """

    full_precision = False  # of x and t, unless the network asks for it, as Denoiser has it

    def __init__(self, network: Any, name: str) -> None:
        """`name` is that of the argument as which the network came.

        Raises:
            TypeError: The network is not callable.
        """
        check.function(name, network, "a callable")
        super().__init__()
        self.network = network
        self.training = getattr(network, "training", False)
        if getattr(network, "full_precision", False):
            self.full_precision = True
