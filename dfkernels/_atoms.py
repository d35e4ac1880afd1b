"""Atoms and their weights as they are given, tensors or NumPy arrays: every value is looked at
once.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from numpy import ma
from torch import Tensor

from ._torch import check, dtypes, words

__all__ = ["as_tensor", "checked_log_prior", "checked_stored", "finite", "masked"]

# elements looked at together; bounds the memory of a check on a memory-mapped array
_BLOCK = 1 << 22


def checked_stored(name: str, value: Tensor | np.ndarray) -> Tensor:
    """Atoms [N, *E] in a dtype in which they may be stored, with N >= 1 and E not empty."""
    y = as_tensor(name, value)
    if y.dtype not in dtypes.STORED:
        way_out = ".float()" if isinstance(value, Tensor) else '.astype("float32")'
        got = words.other_dtype(y, way_out)
        raise TypeError(f"{name}: expected {dtypes.STORED_IN_WORDS}, got {got}")
    if y.ndim < 1 or y.numel() == 0:
        raise ValueError(
            f"{name}: expected shape [N, *E] with N >= 1 and no empty dimension, got "
            f"{list(y.shape)}"
        )
    return y


def masked(log_prior: Tensor | None) -> Tensor | None:
    """The masked atoms, bool [N]; None where there are none."""
    if log_prior is None:
        return None
    masked = log_prior == -math.inf
    return masked if bool(masked.any()) else None


def as_tensor(name: str, value: Tensor | np.ndarray) -> Tensor:
    """A dense tensor with the values of a tensor or numpy array, on the same memory where that is
    possible.
    """
    if isinstance(value, Tensor):
        check.stored(name, value)
        return value
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"{name}: expected a torch.Tensor or numpy.ndarray, got {type(value).__name__}; "
            f"convert it: {_conversion(name, value)}"
        )
    if ma.is_masked(value):
        raise ValueError(
            f"{name}: expected an array without masked entries, got {ma.count_masked(value)} of "
            f"{value.size} masked; fill them (np.ma.filled({name}, ...)), or leave out atoms by "
            "log_prior = -inf"
        )
    array = np.asarray(ma.getdata(value))
    if array.dtype.names is not None:
        raise TypeError(
            f"{name}: expected an array of numbers, got a structured one with fields "
            f"{list(array.dtype.names)}; "
            f'take one field, {name}["{array.dtype.names[0]}"], or '
            f"numpy.lib.recfunctions.structured_to_unstructured({name})"
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    with warnings.catch_warnings():
        # we never write to it
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        try:
            return torch.from_numpy(array)
        except ValueError:
            # strides that torch does not have: negative, or no multiple of an element
            return torch.from_numpy(np.ascontiguousarray(array))
        except TypeError as error:
            raise TypeError(
                f"{name}: numpy array of dtype {array.dtype} cannot become a tensor: {error} "
                f"Convert it: {name}.astype(np.float32)"
            ) from None


def _conversion(name: str, value: object) -> str:
    """The expression that makes an array of something array-like, for an error."""
    for method in ("to_numpy", "toarray"):  # pandas and polars; scipy.sparse
        if hasattr(value, method):
            return f"{name}.{method}()"
    return f"np.asarray({name})" if hasattr(value, "__array__") else f"torch.tensor({name})"


def finite(name: str, y: Tensor, masked: Tensor | None) -> None:
    """Raises ValueError for the first value that is not finite in an atom that is not masked."""
    if not y.is_floating_point():
        return
    flat, d = y.view(-1), y[0].numel()
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK]
        lo, hi = torch.aminmax(block)  # one pass, no temporary; NaN propagates
        if math.isfinite(lo) and math.isfinite(hi):
            continue
        bad = start + (~torch.isfinite(block)).nonzero()[:, 0]
        if masked is not None:
            bad = bad[~masked[bad // d]]
        if len(bad):
            at = int(bad[0])
            place = [int(i) for i in np.unravel_index(at, tuple(y.shape))]
            raise check.mismatch(name, "finite values", f"{flat[at].item()} at index {place}")


def checked_log_prior(log_prior: Tensor | np.ndarray | None, name: str, y: Tensor) -> Tensor | None:
    """Log weights [N] of the atoms `name`, at least one of them finite; None stays None."""
    if log_prior is None:
        return None
    log_prior = as_tensor("log_prior", log_prior)
    if not log_prior.is_floating_point():
        raise TypeError(f"log_prior: expected a floating dtype, got {log_prior.dtype}")
    if log_prior.shape != y.shape[:1]:
        raise ValueError(
            f"log_prior: expected shape [{y.shape[0]}] (one weight per atom), got "
            f"{list(log_prior.shape)}"
        )
    if log_prior.device != y.device:
        expected = f"device {y.device} as {name}'s"
        raise check.mismatch("log_prior", expected, log_prior.device)
    log_prior = log_prior.detach().resolve_neg().contiguous()
    largest = log_prior.max().item()
    if not math.isfinite(largest):  # the maximum is NaN if any is
        raise ValueError(
            f"log_prior: expected values below +inf, no NaN and at least one finite, got a "
            f"maximum of {largest}"
        )
    _warn_of_probabilities(log_prior, largest)
    return log_prior


def _warn_of_probabilities(log_prior: Tensor, largest: float) -> None:
    """Warns of weights that are probabilities in place of their logarithms: in [0, 1), not all the
    same, with the sum 1. Logarithms that are so by chance, or on purpose, are yet to be seen, while
    equal ones mean the same either way.
    """
    if not 0 < largest < 1:
        return
    total, least = log_prior.sum(dtype=torch.float64).item(), log_prior.min().item()
    rounding = max(1e-6, 4 * torch.finfo(log_prior.dtype).eps)
    if 0 <= least < largest and abs(total - 1) <= rounding:
        warnings.warn(
            "log_prior: expected logarithms of weights, got numbers in [0, 1) whose sum is 1, as "
            "of probabilities: pass log_prior=weights.log()",
            RuntimeWarning,
            stacklevel=4,  # of who makes the cloud
        )
