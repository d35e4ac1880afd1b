"""Two networks that differ in nothing but their training data: all of them, and a few.

The few are so few that the network has the time to learn them by heart. Both are U-Nets for eps,
trained for the same number of steps from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.networks import ImageNet, Preconditioned
from dfkernels.methods.trace_matching import denoising_loss
from dfkernels.methods.training import train
from dfkernels.schedule import VP

from ..reproduce.section import progress
from .data import Images

SCHEDULE = VP()
NOISE = (0.02, 40.0)  # levels sigma/alpha that the networks are trained for
TRAINING = 10  # stages of one training

_BATCH = 64


class Size(NamedTuple):
    """How large a run is."""

    few: int  # images that the overfitted network is trained on
    width: int  # channels of the U-Net
    steps: int  # of Adam


FULL, QUICK = Size(few=32, width=32, steps=7000), Size(few=60, width=16, steps=650)


class Trained(NamedTuple):
    """A network, and the images that it was trained on."""

    name: str  # of its files
    denoiser: Denoiser
    train: Tensor

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.denoiser.parameters())


def trained(
    name: str, count: int | None, data: Images, size: Size, out: Path, step: Callable[[str], None]
) -> Trained:
    """The network trained on the first `count` images (all if None), frozen; its checkpoint is kept
    in `out`, and a finished one is read. Calls step(stage) TRAINING times.
    """
    images = data.train[:count]
    # of all the data, so that the networks differ in nothing else
    mean, std = data.train.mean().item(), data.train.std().item()
    network = Preconditioned(ImageNet(1, data.size, width=size.width), SCHEDULE, mean=mean, std=std)

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(images), (_BATCH,), generator=generator)
        x_0 = images[pick]
        return denoising_loss(Denoiser(module, SCHEDULE), x_0, generator, noise=NOISE, std=std)

    network = train(
        network,
        loss,
        steps=size.steps,
        generator=torch.Generator().manual_seed(0),
        checkpoint=out / f"{name}.pt",
        every=500,
        configuration={
            "data": data.name,
            "images": len(images),
            "batch": _BATCH,
            "noise": NOISE,
        },
        callback=progress(TRAINING * [f"training the network on {len(images):,} images"], step),
    )
    return Trained(name, Denoiser(network, SCHEDULE), images)
