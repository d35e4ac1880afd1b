"""A training loop that can be killed at any moment: it goes on from its checkpoint, with the same
bits."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .._io import files
from .._torch import check

__all__ = ["train"]

Loss = Callable[[nn.Module, torch.Generator], Tensor]


@torch.inference_mode(False)  # weights made in that mode could never be differentiated
def train(
    module: nn.Module,
    loss: Loss,
    *,
    steps: int,
    generator: torch.Generator,
    lr: float = 2e-3,
    ema: float = 0.999,
    clip: float = 1.0,
    checkpoint: Path | None = None,
    every: int = 1000,
    configuration: Mapping[str, object] | None = None,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """Adam with the rate lr (1 + cos(pi i/steps))/2 and gradients of norm at most `clip`; the
    average e <- k e + (1 - k) p of the weights, k = min(ema, (1 + i)/(10 + i)).

    Args:
        module: trained in place.
        loss: `loss(module, generator)` -> scalar tensor, one batch; all its randomness from the
        generator. generator: moved on; with the same one, thread count and torch build, the result
        is bitwise the same. checkpoint: a file written every `every` steps and at the end, whole or
            not at all. If it exists, training goes on from it, bitwise as if it had never stopped;
            a finished one is just read.
        configuration: whatever else decides the result (data, network, noise range): numbers,
            strings, lists, dicts. A checkpoint with another configuration, another module or other
            arguments is refused.
        step: called as step(done, steps) after each step, and once at the start.

    Returns a copy of the module with the averaged weights, in eval mode, frozen.

    Raises files.FileError (a ValueError) naming a checkpoint that is truncated, unwritable or of
    another run; FloatingPointError naming the step where loss or gradient is not finite (the
    checkpoint stays as it was).
    """
    steps, every = check.integer("steps", steps, 1), check.integer("every", every, 1)
    lr, ema, clip = (check.constant(*pair) for pair in (("lr", lr), ("ema", ema), ("clip", clip)))
    average = copy.deepcopy(module).requires_grad_(False)
    optimizer = torch.optim.Adam(module.parameters(), lr=lr, betas=(0.9, 0.99))
    run = {
        "steps": steps,
        "lr": lr,
        "ema": ema,
        "clip": clip,
        "module": str(module),
        **(configuration or {}),
    }
    run = json.loads(json.dumps(run))  # what a checkpoint can hold and compare
    parts = {"module": module, "average": average, "optimizer": optimizer}
    done = 0
    if checkpoint is not None and checkpoint.exists():
        done = _resume(checkpoint, run, parts, generator)
    module.train()
    step(done, steps)
    while done < steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 + math.cos(math.pi * done / steps)) / 2
        _descend(module, loss, optimizer, generator, clip, f"step {done + 1} of {steps}")
        keep = min(ema, (1 + done) / (10 + done))
        _follow(average, module, keep)
        done += 1
        if checkpoint is not None and (done % every == 0 or done == steps):
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"configuration": run, "done": done, "generator": generator.get_state()}
            files.write(checkpoint, lambda file: torch.save(state, file))  # noqa: B023, called at once
        step(done, steps)
    return average.eval()


@torch.enable_grad()
def _descend(module, loss, optimizer, generator, clip, where) -> None:
    optimizer.zero_grad(set_to_none=True)
    try:
        value = loss(module, generator)
    except ValueError as error:  # such as a Denoiser's about NaN
        raise ValueError(f"{error} (in training, {where})") from error
    if not isinstance(value, Tensor) or value.ndim:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss: expected a scalar tensor, got {got}")
    if not math.isfinite(value.item()):
        raise FloatingPointError(f"loss: expected a finite number, got {value.item()} at {where}")
    value.backward()
    norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
    if not math.isfinite(norm.item()):
        raise FloatingPointError(
            f"gradient: expected finite numbers, got norm {norm.item()} at {where}"
        )
    optimizer.step()


@torch.no_grad()
def _follow(average: nn.Module, module: nn.Module, keep: float) -> None:
    for old, new in zip(average.parameters(), module.parameters(), strict=True):
        old.lerp_(new, 1 - keep)
    for old, new in zip(average.buffers(), module.buffers(), strict=True):
        old.copy_(new)


def _resume(path: Path, run: dict, parts: dict, generator: torch.Generator) -> int:
    """Loads the parts' states; the number of steps done. Raises FileError."""
    unreadable = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        came = state["configuration"]
        missing = {*parts, "done", "generator"} - state.keys()
    except (*unreadable, TypeError, IndexError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise files.FileError(
            f"{path}: no checkpoint, or a truncated one ({why}): delete it"
        ) from None
    if missing:
        raise files.FileError(
            f"{path}: no checkpoint: it lacks {', '.join(sorted(missing))}: delete it"
        )
    for key in [*run, *(came.keys() - run.keys())]:
        there, here = (c.get(key, "nothing") for c in (came, run))
        if there != here:
            raise files.FileError(
                f"{path}: checkpoint of another configuration: {key}: {there} there, {here} here: delete it, "
                "or name another file"
            )
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError) as error:  # str(module) need not tell every size
        why = " ".join(str(error).split())
        raise files.FileError(
            f"{path}: checkpoint of another module ({why}): delete it, or name another file"
        ) from None
    generator.set_state(state["generator"])
    return state["done"]
