"""The call of a diffusers model, whichever its second argument is."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

from ._adapted import Adapted

__all__ = ["Timestep"]

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class Timestep(Adapted):
    """A model of diffusers as network(x, t)."""

    def __init__(self, model: Callable[..., object]) -> None:
        super().__init__(model, "model")
        called = _inside(model)
        try:
            self.named = "timestep" in inspect.signature(called).parameters
        except (TypeError, ValueError):  # a callable without a signature
            self.named = False

    def forward(self, x: Tensor, t: Tensor, **conditions: object) -> object:
        if self.named:
            return self.network(x, timestep=t, **conditions)
        return self.network(x, t, **conditions)


def _inside(model: Callable[..., object]) -> Callable[..., object]:
    """What has the names of a model's arguments: its `forward`, inside of torch.compile,
    DistributedDataParallel and their like, which pass on whatever they are given.
    """
    while isinstance(model, nn.Module):
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, _PARALLEL):
            inner = model.module
        if inner is None:
            return model.forward
        model = inner
    return model
