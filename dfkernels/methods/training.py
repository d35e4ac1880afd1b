"""A training loop that can be killed at any moment, and goes on from its checkpoint with the same
bits.
"""

from __future__ import annotations

import contextlib
import json
import math
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .._io import files
from .._torch import check
from ._reporting import Callback, reporting

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
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    checkpoint: str | Path | None = None,
    every: int = 1000,
    configuration: Mapping[str, object] | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> nn.Module:
    """Trains a module by Adam and returns a copy with averaged weights.

    The learning rate of step i is lr (1 + cos(pi i/steps))/2, gradients are clipped to the norm
    `clip`, and the average is e <- k e + (1 - k) p, k = min(ema, (1 + i)/(10 + i)).

    Args:
        module: trained in place.
        loss: `loss(module, generator)` -> scalar tensor, one batch; all its randomness comes from
            the generator.
        accumulate: batches per step, whose losses are averaged: the step of a batch that is so many
            times as large, in the memory of one.
        autocast: torch.bfloat16 for mixed precision: the loss is computed under torch.autocast,
            where layers multiply in bfloat16. Weights, their averages and the optimizer stay in
            their own precision. It needs no scaled loss, as float16 would, which is refused.
        generator: moved on; with the same one, thread count and torch build, the result is bitwise
            the same (but for dropout, which draws from torch's global state).
        checkpoint: a file written every `every` steps and at the end, whole or not at all. If it
            exists, training goes on from it, bitwise as if it had never stopped; a finished one is
            just read.
        configuration: whatever else decides the result (data, network, noise range): numbers,
            strings, lists, dicts. A checkpoint with another configuration, another module or other
            arguments is refused.
        callback: called as callback(done, steps) after each step, and once at the start.
        progress: show a bar on stderr.

    Returns:
        A copy of the module with the averaged weights, in eval mode, frozen.

    Raises:
        ValueError: The checkpoint is truncated, unwritable or of another run (a `FileError` that
            names it), or an argument is wrong.
        TypeError: A parameter to train is in half precision, in which most steps are rounded away:
            keep it in float32, and pass autocast=torch.bfloat16.
        FloatingPointError: Loss or gradient is not finite at the step that the message names; the
            checkpoint stays as it was.
    """
    steps, every = check.integer("steps", steps, 1), check.integer("every", every, 1)
    lr, ema, clip = (check.constant(*pair) for pair in (("lr", lr), ("ema", ema), ("clip", clip)))
    accumulate = check.integer("accumulate", accumulate, 1)
    check.choice("autocast", autocast, (None, torch.bfloat16))
    device = _device_of(module)
    run = {
        "steps": steps,
        "lr": lr,
        "ema": ema,
        "clip": clip,
        "module": str(module),
        **({} if accumulate == 1 else {"accumulate": accumulate}),
        **({} if autocast is None else {"autocast": str(autocast)}),
        **(configuration or {}),
    }
    run = json.loads(json.dumps(run))  # what a checkpoint can hold and compare
    state = _State.of(module, steps, lr, ema)
    done, checkpoint = 0, None if checkpoint is None else Path(checkpoint)
    if checkpoint is not None and checkpoint.exists():
        done = _resume(checkpoint, run, state, generator)
    module.train()
    with reporting("train", callback, progress, steps) as report:
        report(done, steps)
        while done < steps:
            where = f"step {done + 1} of {steps}"
            state.optimizer.zero_grad(set_to_none=True)
            for _ in range(accumulate):
                with _precision(autocast, device):
                    value = _value(module, loss, generator, where)
                (value / accumulate).backward()
            _descend(module, state.optimizer, clip, where)
            state.rate.step()
            state.average.update_parameters(module)
            done += 1
            if checkpoint is not None and (done % every == 0 or done == steps):
                whole = {name: part.state_dict() for name, part in state._asdict().items()}
                whole |= {"configuration": run, "done": done, "generator": generator.get_state()}
                files.write(checkpoint, lambda file: torch.save(whole, file))  # noqa: B023, called at once
            report(done, steps)
    return state.average.module.eval()


class _State(NamedTuple):
    """What a checkpoint holds, beside the generator's state."""

    module: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Adam
    rate: LambdaLR

    @classmethod
    def of(cls, module: nn.Module, steps: int, lr: float, ema: float) -> _State:
        optimizer = torch.optim.Adam(module.parameters(), lr=lr, betas=(0.9, 0.99))
        cosine = LambdaLR(optimizer, lambda i: (1 + math.cos(math.pi * i / steps)) / 2)
        with torch.device("cpu"):  # of its count, whatever the default device is
            average = AveragedModel(module, multi_avg_fn=_average(ema))
        average.n_averaged.fill_(1)  # the start counts as one: the first update is no plain copy
        return cls(module, average.requires_grad_(False), optimizer, cosine)


def _average(ema: float) -> Callable[..., None]:
    """The update of AveragedModel with a decay that rises to `ema`."""

    def update(averages: list[Tensor], parameters: list[Tensor], count: Tensor) -> None:
        done = int(count) - 1
        get_ema_multi_avg_fn(min(ema, (1 + done) / (10 + done)))(averages, parameters, count)

    return update


def _device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are. Raises TypeError for those that cannot be trained."""
    device = torch.device("cpu")
    for name, parameter in module.named_parameters():
        device = parameter.device
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise TypeError(
                f"module: expected parameters in float32 or float64, got {parameter.dtype} for "
                f"{name}: keep them in float32, and pass autocast=torch.bfloat16"
            )
    return device


def _precision(
    dtype: torch.dtype | None, device: torch.device
) -> contextlib.AbstractContextManager[object]:
    """Where a loss is computed; without a dtype the caller's own autocast stays as it is."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def _value(module: nn.Module, loss: Loss, generator: torch.Generator, where: str) -> Tensor:
    """The loss of one batch, a finite scalar; `where` names the step in errors."""
    try:
        value = loss(module, generator)
    except ValueError as error:  # such as a Denoiser's about NaN
        raise ValueError(f"{error} (in training, {where})") from error
    if not isinstance(value, Tensor) or value.ndim:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss: expected a scalar tensor, got {got}")
    if not math.isfinite(value.item()):
        raise FloatingPointError(f"loss: expected a finite number, got {value.item()} at {where}")
    return value


def _descend(module: nn.Module, optimizer: torch.optim.Optimizer, clip: float, where: str) -> None:
    """One step of the optimizer by the gradients that are there."""
    norm = nn.utils.clip_grad_norm_(module.parameters(), clip)
    if not math.isfinite(norm.item()):
        raise FloatingPointError(
            f"gradient: expected finite numbers, got norm {norm.item()} at {where}"
        )
    optimizer.step()


def _resume(path: Path, run: dict[str, object], whole: _State, generator: torch.Generator) -> int:
    """Loads the state of a run and returns the number of steps done. Raises FileError."""
    parts = whole._asdict()
    unreadable = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = state["configuration"]
        missing = {*parts, "done", "generator"} - state.keys()
    except (*unreadable, TypeError, IndexError) as error:
        why = files.first_sentence(error)
        raise files.FileError(
            f"{path}: no checkpoint, or a truncated one ({why}): delete it"
        ) from None
    if missing:
        raise files.FileError(
            f"{path}: no checkpoint: it lacks {', '.join(sorted(missing))}: delete it"
        )
    files.refuse_another(path, "checkpoint", saved, run)
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
