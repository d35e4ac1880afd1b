"""Classifier-free guidance, as a network made of a conditional one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .._torch import check
from ._calls import call

__all__ = ["ClassifierFreeGuidance"]


class ClassifierFreeGuidance(nn.Module):
    """A conditional network under classifier-free guidance (Ho & Salimans 2022), to be sampled:

        out = out_null + scale (out_condition - out_null)

    whatever the network predicts, since x_0, eps, velocity and score are each linear in any other
    at the same x and t.

    >>> guided = ClassifierFreeGuidance(unet, 7.5, {"class_labels": 1000})
    >>> denoiser = Denoiser(guided, schedule)
    >>> path = sample(denoiser, x, t, "heun", class_labels=labels)

    What it is not. At any scale but 0 and 1 the result is the score of no density: not of p(x |
    condition), nor of p(x) p(condition | x)^scale once diffused, and its x_0 is no posterior mean.
    The flow is a flow all the same, so that `log_prob` gives the density of that flow's own
    samples, which is no likelihood under the model that was trained. The Jacobian is as linear as
    the output, F = F_null + scale (F_condition - F_null), and automatic differentiation gives it,
    but it is no Fisher information and need not be symmetric. The same holds of networks that are
    distilled with guidance inside, which look like any other.

    Args:
        network: `network(x, t, **conditions)`, as for Denoiser.
        scale: of the guidance: 1 is the conditional network, 0 the unconditional one, each by one
            evaluation; above 1 it exaggerates the condition.
        null: the keyword arguments that stand for "no condition", each in the place of one given
            at a call: a tensor [B, ...] or [1, ...], a number that fills a tensor of the
            condition's shape, or anything that the network takes. What null does not name goes to
            both evaluations.

    The two evaluations are one call of the network on 2 B samples where null has tensors or numbers
    for tensors [B, ...] only, and no other tensor is given; else two calls. Either counts as one in
    `Denoiser.evaluations`.

    Raises:
        TypeError, ValueError: An argument is wrong; a call lacks a condition that null names.
    """

    full_precision = True  # the difference is formed in x's dtype

    def __init__(
        self, network: Callable[..., object], scale: float, null: Mapping[str, object]
    ) -> None:
        super().__init__()
        check.function("network", network, "a callable network(x, t)")
        if not isinstance(null, Mapping) or not null:
            raise TypeError(f"null: expected a dict of keyword arguments, got {null!r:.80}")
        self.network, self.scale = network, check.constant("scale", scale)
        self.null = dict(null)
        self.training = getattr(network, "training", False)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}, null={list(self.null)}"

    def forward(self, x: Tensor, t: Tensor, **conditions: object) -> Tensor:
        null = dict(conditions)
        for name, value in self.null.items():
            if name not in conditions:
                raise check.mismatch("conditions", f"{name}=..., as null has it", [*conditions])
            null[name] = _in_place_of(conditions[name], value, len(x))
        if self.scale in (0, 1):
            return call(self.network, x, t, conditions if self.scale else null)
        stacked = self._stacked(conditions, null, len(x))
        if stacked is None:
            with_condition = call(self.network, x, t, conditions).to(x.dtype)
            without = call(self.network, x, t, null).to(x.dtype)
        else:
            both = call(self.network, torch.cat([x, x]), torch.cat([t, t]), stacked)
            with_condition, without = both.to(x.dtype).tensor_split(2)
        return without + self.scale * (with_condition - without)

    def _stacked(
        self, conditions: Mapping[str, object], null: Mapping[str, object], n: int
    ) -> dict[str, object] | None:
        """The keyword arguments of one call with both, on 2 n samples; None where it takes two."""
        stacked: dict[str, object] = {}
        for name, given in conditions.items():
            other = null[name]
            if name not in self.null:
                if not (given is None or isinstance(given, (bool, int, float, str))):
                    return None
                stacked[name] = given
            elif isinstance(given, Tensor) and isinstance(other, Tensor):
                if given.shape != other.shape or given.shape[:1] != (n,):
                    return None
                stacked[name] = torch.cat([given, other])
            else:
                return None
        return stacked


def _in_place_of(condition: object, value: object, n: int) -> object:
    """What null has in the place of a condition of n samples."""
    if not isinstance(condition, Tensor):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.full_like(condition, value)
    if not isinstance(value, Tensor):
        return value
    value = value.to(condition.device)
    one = value.shape[:1] == (1,) and condition.shape[:1] == (n,)
    return value.expand(n, *value.shape[1:]) if one else value
