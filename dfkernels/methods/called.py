"""A network that is called in another way, and is still seen as the Module that it is."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .._torch import check

__all__ = ["Called"]


class Called(nn.Module):
    """A network that has to be called in another way than it is, for another order or sign of its
    arguments or outputs: the place for what one would write as a lambda around it.

    >>> network = Called(model, lambda model, x, t, **kw: -model(x, 1 - t, **kw).sample)
    >>> denoiser = Denoiser(network, schedule.ReversedRectifiedFlow(), "flow")

    A lambda hides its model: its parameters, their dtype, in which x has to come, train and eval
    mode, the warning for a network in train mode. Here they are the model's, and x is cast.

    Args:
        model: the network, an `nn.Module`.
        call: `call(model, *arguments, **conditions)` -> the prediction, for the arguments as the
            caller has them: x and t for a `Denoiser` and `adapt.from_diffusers`, t and x for
            `adapt.from_torchcfm`.

    Raises:
        TypeError: `model` is no Module, or `call` is not callable.
    """

    def __init__(self, model: nn.Module, call: Callable[..., object]) -> None:
        check.instance("model", model, nn.Module, "an nn.Module")
        check.function("call", call, "a callable call(model, x, t)")
        super().__init__()
        self.model, self.call = model, call
        self.training = model.training
        self.full_precision = getattr(model, "full_precision", False)  # as Denoiser looks for it

    def forward(self, *arguments: object, **conditions: object) -> object:
        return self.call(self.model, *arguments, **conditions)
