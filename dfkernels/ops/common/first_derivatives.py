"""Which contractions of `pair_gradient` (derivatives.py) have fused kernels, and the calls of them:
first derivatives of the sums of a kind, in reverse and in forward mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._torch import backend, library
from . import pair_kernels
from .moments import CONSTANTS, PER_ATOM, MomentKind, half_square

Tensors = Sequence[Any]  # as in derivatives.py
SUMS = ("weight", "first", "second", "weight_square")  # their order in every kind with kernels


def kernels(kind: MomentKind, wanted: Sequence[Sequence[int]]) -> list:
    """The kernels that compute this contraction, none where only PyTorch does.

    Args:
        kind: The moment kind.
        wanted: The sets of positions of `pair_gradient`.
    """
    inputs = kind.inputs
    if kind.name not in pair_kernels.KINDS_OF_DERIVATIVES or not wanted:
        return []
    if any(_is_constant(kind, j) for j in wanted[0]):
        return []
    if len(wanted) == 1:
        per_atom = {inputs[j] in PER_ATOM for j in wanted[0]}
        found = {False: pair_kernels.pair_vjp_queries, True: pair_kernels.pair_vjp_atoms}
        return [found[p] for p in sorted(per_atom)]
    ends = len(inputs) + len(SUMS)  # cotangents of the sums, in which psi_0 is linear
    if len(wanted) == 2 and all(len(inputs) <= j < ends for j in wanted[1]):
        return [pair_kernels.pair_jvp]
    return []


def why_not(kind: MomentKind, wanted: Sequence[Sequence[int]], device: torch.device) -> str:
    """Why no kernel computes a contraction."""
    if kind.name not in pair_kernels.KINDS_OF_DERIVATIVES:
        return "this op has no kernels of derivatives"
    if not kernels(kind, wanted):
        return "only first derivatives have kernels, and the second ones of log_prob and mean in x"
    return backend.why_not(device) or "this device has no kernels of derivatives"


def _is_constant(kind: MomentKind, j: int) -> bool:
    """Whether there is no derivative in tensor j: no input, or one that counts as constant."""
    return j >= len(kind.inputs) or kind.inputs[j] in CONSTANTS


def run(
    kind: MomentKind, wanted: Sequence[Sequence[int]], tensors: Tensors, stored
) -> list[Tensor] | None:
    """What `pair_gradient` returns, in the compute dtype, by kernels; None where none can run."""
    found = kernels(kind, wanted)
    x = tensors[0]
    if not found or x.numel() == 0 or not all(library.can_run(k, x.device) for k in found):
        return None
    return (_vjp if len(wanted) == 1 else _jvp)(kind, wanted, tensors, stored)


def _arguments(kind: MomentKind, tensors: Tensors, stored) -> tuple:
    """The arguments that all kernels have, but the lists."""
    z = dict(zip(kind.inputs, tensors, strict=False))
    x, alpha, sigma, reference = z["x"], z["alpha"], z["sigma"], z["reference"]
    shift = z["shift"] - half_square(x, alpha, sigma, reference)
    scale, offset = stored.scale, stored.offset
    return (
        *(x, z["y"], z.get("v"), alpha, sigma, z["log_pi"], scale, offset),
        *(shift, reference, kind.name),
    )


def _vjp(kind, wanted, tensors, stored) -> list[Tensor]:
    names = [kind.inputs[j] for j in wanted[0]]
    cotangents = [*tensors[len(kind.inputs) :], None][: len(SUMS)]
    arguments = _arguments(kind, tensors, stored)
    lists = stored.atoms, stored.counts
    grads = {}
    if not all(name in PER_ATOM for name in names):
        found = pair_kernels.pair_vjp_queries(*arguments, *cotangents, *lists)
        grads.update(zip(("x", "alpha", "sigma", "v"), found, strict=True))
    if any(name in PER_ATOM for name in names):
        found = pair_kernels.pair_vjp_atoms(*arguments, *cotangents, *lists, "y" in names)
        grads.update(zip(("y", "log_pi"), found, strict=True))
        if stored.scale != 1.0:
            grads["y"] *= stored.scale
    return [grads[name] for name in names]


def _jvp(kind, wanted, tensors, stored) -> list[Tensor]:
    n = len(kind.inputs)
    moved = dict(zip((kind.inputs[j] for j in wanted[0]), tensors[-len(wanted[0]) :], strict=True))
    if "y" in moved:
        moved["y"] = moved["y"].to(tensors[0].dtype)
        if stored.scale != 1.0:
            moved["y"] = moved["y"] * stored.scale
    tangents = [moved.get(name) for name in ("x", "y", "v", "alpha", "sigma", "log_pi")]
    arguments = _arguments(kind, tensors, stored)
    sums = pair_kernels.pair_jvp(*arguments, *tangents, stored.atoms, stored.counts)
    return [sums[j - n] for j in wanted[1]]
