"""Calls of a network as it comes: the dtype in which it computes, and the ways in which it returns
its output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .._torch import check
from ._derivatives import refuse_cut
from ._raised import KINDS, with_given

__all__ = ["call", "checked", "dtype_of", "random_layers", "unpacked"]

_DROPOUT = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_COMPUTES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def dtype_of(network: Callable[..., object], x: Tensor) -> torch.dtype:
    """The dtype in which a network computes: the one that most numbers in its floating parameters
    have, x's where it has none. A table or a norm that is kept in float32 does not decide, nor do
    weights of integers or of 8 bits.
    """
    if not isinstance(network, nn.Module):
        return x.dtype
    modules: list[nn.Module | None] = [network]
    numbers: dict[torch.dtype, int] = {}
    while modules:  # network.parameters() takes several times as long, at every call
        module = modules.pop()
        if module is None:
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.dtype in _COMPUTES:
                count = parameter.nbytes // parameter.dtype.itemsize  # 0 for a lazy one
                numbers[parameter.dtype] = numbers.get(parameter.dtype, 0) + count
        modules += module._modules.values()
    return max(numbers, key=lambda dtype: numbers[dtype]) if numbers else x.dtype


def random_layers(network: Callable[..., object]) -> list[str]:
    """The layers of a network in training mode that make its output random (dropout) or dependent
    on the other samples of a batch (batch normalisation).
    """
    if not isinstance(network, nn.Module):
        return []
    found = []
    for name, layer in network.named_modules():
        rate = layer.p if isinstance(layer, _DROPOUT) else getattr(layer, "dropout", 0)
        drops = isinstance(rate, (int, float)) and rate > 0  # a rate: else a layer of its own
        if layer.training and (drops or isinstance(layer, _BATCH_NORM)):
            found.append(name or type(layer).__name__)
    return found


def call(
    network: Callable[..., object],
    x: Tensor,
    t: Tensor,
    conditions: Mapping[str, object],
    name: str = "network",
) -> Tensor:
    """A network's prediction at x [B, ...] and t [B], called in its own dtype: x is cast to it, and
    so is a t in float64, but never to half precision, where 999 is no number. A network with a true
    attribute `full_precision` is given both in their own dtypes. It is given copies, which it may
    change in place, and the result is a copy, since it may return the same memory at every call, as
    captured CUDA graphs do.

    Raises:
        TypeError: The network returned no prediction; the message names `name`.
        RuntimeError, IndexError, TypeError: The network raised it; the message says what the
            network was given.
        Unsupported: A derivative was asked for that the network cuts.
    """
    dtype, time_dtype = x.dtype, t.dtype
    if not getattr(network, "full_precision", False):
        dtype = dtype_of(network, x)
        if t.dtype == torch.float64:
            time_dtype = torch.promote_types(dtype, torch.float32)

    def prediction(x: Tensor) -> Tensor:
        given = x.to(dtype, copy=True), t.to(time_dtype, copy=True)
        if torch.compiler.is_compiling():  # which does not follow errors
            return unpacked(name, network(*given, **conditions), x)
        try:
            return unpacked(name, network(*given, **conditions), x)
        except KINDS as error:
            said = with_given(error, name, *given, conditions)
            if said is None:
                raise
            raise said from error

    out = prediction(x).clone()
    if not torch.compiler.is_compiling():
        refuse_cut(prediction, x, out)
    return out


def unpacked(name: str, out: object, x: Tensor) -> Tensor:
    """The prediction in what a network returned at x [B, C, ...]: a tensor; the attribute `sample`
    of an object; the first of a tuple or list; the entry "sample" of a dict, or its only one. Of
    exactly 2 C channels, as networks with a learned variance have them, the first C.

    Raises:
        TypeError: There is no tensor in any of these places.
    """
    found, what = out, type(out).__name__
    if isinstance(getattr(out, "sample", None), Tensor):
        found = out.sample  # pyrefly: ignore[missing-attribute]
    elif isinstance(out, Mapping):
        found = out.get("sample", next(iter(out.values())) if len(out) == 1 else None)
        what = f"{what} with the keys {list(out)}"
    elif isinstance(out, (tuple, list)):
        found = out[0] if out else None
        what = f"{what} that starts with {type(found).__name__}" if out else f"an empty {what}"
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{name}: expected a tensor, an object with a tensor as its .sample, a tuple that "
            f"starts with one, or a dict with one as 'sample', got {what}"
        )
    if x.ndim > 1 and found.shape == (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
        return found[:, : x.shape[1]]
    return found


def checked(name: str, out: Tensor, like: Tensor, t: Tensor) -> Tensor:
    """A network's output, converted to the dtype of the tensor `like` that it has to resemble.

    Raises:
        TypeError, ValueError: It is no tensor of real numbers, shape or device differ, or a value
            is not finite in that dtype; the message names `name` and the time, from t [B].
    """
    if not isinstance(out, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(out).__name__}")
    if out.shape != like.shape:
        raise ValueError(
            f"{name}: expected output of shape {list(like.shape)}, got {list(out.shape)}"
        )
    if not out.is_floating_point():
        raise TypeError(f"{name}: expected output of a floating dtype, got {out.dtype}")
    if out.device != like.device:
        raise ValueError(f"{name}: expected output on {like.device} like x, got {out.device}")
    out = out.to(like.dtype)
    if check.values_hidden(out) or not len(out):
        return out
    bad = ~out.detach().isfinite().reshape(len(out), -1).all(1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"{name}: returned NaN or inf for {int(bad.sum())} of {len(bad)} samples, "
            f"first for sample {first} at t = {t[first].item():g}"
        )
    return out
