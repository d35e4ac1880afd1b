"""The digits of scikit-learn and the networks trained on them, for the adjoint and likelihood
experiments.

1797 images of 8 x 8 pixels with 17 levels k = 0 ... 16, in [-1, 1]: x = 2 (k + 1/2)/17 - 1. The
networks see dequantised images, x + (u - 1/2) 2/17 with u uniform in [0, 1): a density in x then
bounds the bits of k.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.networks import ImageNet, Preconditioned
from dfkernels.methods.trace_matching import MatchedTrace, denoising_loss, trace_loss
from dfkernels.methods.training import train
from dfkernels.schedule import VP

from .section import progress

SCHEDULE = VP()
NOISE = (0.01, 50.0)  # levels sigma/alpha that the networks are trained for
WIDTH = 2 / 17  # of a level, in the units of x
HELD = 297  # images that no network sees

# What one call of each function below reports to `step`, in a first run and in one that finds its
# checkpoint
DENOISER = 10 * ["training the noise network"]
TRACE = {form: 10 * [f"training the trace network ({form})"] for form in ("residual", "paper")}
CLASSIFIER = {name: [f"training the {name}"] for name in ("guide", "judge")}

_BATCH = 128
_STEPS = {"denoiser": (4000, 40), "trace": (2000, 20), "classifier": (1500, 200)}  # full, quick


class Digits(NamedTuple):
    """Images [n, 1, 8, 8] in float32 at the centres of their levels, and labels [n] (int64)."""

    train: Tensor
    train_labels: Tensor
    held: Tensor
    held_labels: Tensor

    @property
    def std(self) -> float:
        """Of a pixel of the dequantised training images, over all pixels."""
        return (self.train.var().item() + WIDTH**2 / 12) ** 0.5


@cache
def load() -> Digits:
    """1500 images to train on and 297 held out, a fixed random split; read once."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()  # a dict with attributes
    x = torch.from_numpy((data.images + 0.5) * WIDTH - 1).float()[:, None]
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:HELD], order[HELD:]
    return Digits(x[rest], labels[rest], x[held], labels[held])


def dequantised(images: Tensor, generator: torch.Generator) -> Tensor:
    """images + (u - 1/2) WIDTH, u uniform in [0, 1) for every pixel."""
    return (
        images + (torch.rand(images.shape, generator=generator, dtype=images.dtype) - 0.5) * WIDTH
    )


def denoiser(quick: bool, out: Path, step: Callable[[str], None]) -> Denoiser:
    """A U-Net that predicts eps, trained on the dequantised training images; frozen. Kept in
    `out`."""
    data = load()
    body = ImageNet(1, 8, width=16 if quick else 32)
    network = Preconditioned(body, SCHEDULE, mean=data.train.mean().item(), std=data.std)

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        x_0 = _batch(data, generator)[0]
        return denoising_loss(Denoiser(module, SCHEDULE), x_0, generator, noise=NOISE, std=data.std)

    return Denoiser(_trained("denoiser", network, loss, quick, out, DENOISER, step), SCHEDULE)


def matched_trace(
    quick: bool, out: Path, step: Callable[[str], None], eps: Denoiser, form: str = "residual"
) -> MatchedTrace:
    """tr F by a trace network of the given form, for `eps` = denoiser(...); frozen. Kept in
    `out`."""
    data = load()
    mean, std = data.train.mean().item(), data.std
    body = ImageNet(1, 8, output="scalar", width=16 if quick else 32, seed=1)
    predicts = {"mean": mean, "std": std, "predicts": form}

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        x_0 = _batch(data, generator)[0]
        how: dict[str, Any] = {"mean": mean} if form == "paper" else {}
        return trace_loss(module, eps, x_0, generator, noise=NOISE, form=form, std=std, **how)

    network = Preconditioned(body, SCHEDULE, **predicts)
    return MatchedTrace(
        _trained("trace", network, loss, quick, out, TRACE[form], step, form), eps, form
    )


def classifier(
    quick: bool, out: Path, step: Callable[[str], None], name: str = "guide"
) -> nn.Module:
    """x_0 [B, 1, 8, 8] -> logits [B, 10], frozen. "guide", to guide with, is a multilayer
    perceptron; "judge", to judge what came out, a convolutional network that shares only the data.
    Kept in `out`.
    """
    data = load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2 if name == "guide" else 3)
        if name == "guide":
            network = nn.Sequential(
                nn.Flatten(),
                nn.Linear(64, 256),
                nn.SiLU(),
                nn.Linear(256, 128),
                nn.SiLU(),
                nn.Linear(128, 10),
            )
        else:
            network = nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(32, 32, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 3, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(1024, 10),
            )

    def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
        x_0, labels = _batch(data, generator)
        # samples are not quite clean
        noisy = x_0 + 0.2 * torch.randn(x_0.shape, generator=generator)
        return nn.functional.cross_entropy(module(noisy), labels)

    return _trained("classifier", network, loss, quick, out, CLASSIFIER[name], step, name)


def _batch(data: Digits, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Training images, dequantised, and their labels."""
    pick = torch.randint(len(data.train), (_BATCH,), generator=generator)
    return dequantised(data.train[pick], generator), data.train_labels[pick]


def _trained(
    kind: str,
    network: nn.Module,
    loss: Callable[[nn.Module, torch.Generator], Tensor],
    quick: bool,
    out: Path,
    stages: list[str],
    step: Callable[[str], None],
    variant: str = "",
) -> nn.Module:
    return train(
        network,
        loss,
        steps=_STEPS[kind][quick],
        generator=torch.Generator().manual_seed(0),
        checkpoint=out / f"digits-{kind}{variant and '-'}{variant}.pt",
        every=500,
        configuration={"batch": _BATCH, "noise": NOISE, "held": HELD},
        callback=progress(stages, step),
    )
