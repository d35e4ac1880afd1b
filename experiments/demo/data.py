"""The demo's two data sets: real images that come with scikit-learn, in [-1, 1]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dfkernels.cloud import PointCloud


@dataclass(frozen=True)
class Data:
    """Atoms, the clean images that the queries are made from (Q of them), and the noise levels."""

    name: str
    source: str
    queries: str
    cloud: PointCloud
    clean: Tensor  # [Q, *E]
    sigma: Tensor  # [S]
    shown: int  # the query in the figures
    references: int  # queries per noise level that are checked against the float64 reference
    eigen: int  # queries per noise level with eigenpairs


def digits(quick: bool) -> Data:
    """N = 1797 handwritten digits, 8 x 8. The queries are noisy atoms: at low noise the ideal
    denoiser returns them.
    """
    from sklearn.datasets import load_digits

    found: Any = load_digits()  # a dict with attributes
    y = torch.from_numpy(found.images / 8 - 1).float()
    pick = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[: 8 if quick else 64]
    return Data(
        name="digits",
        source="handwritten digits, 8 × 8",
        queries="atoms + noise",
        cloud=PointCloud(y),
        clean=y[pick],
        sigma=torch.logspace(-1, 1, 7 if quick else 13),
        shown=4,
        references=len(pick),
        eigen=4 if quick else 8,
    )


def patches(quick: bool) -> Data:
    """8 x 8 x 3 patches of china.jpg and flower.jpg at even positions; the queries come from odd
    ones, so they are no atoms.
    """
    from sklearn.datasets import load_sample_images

    step = 8 if quick else 2
    images = [torch.from_numpy(np.array(image)) for image in load_sample_images().images]
    y = torch.cat([_cut(image, 0, step) for image in images]).float() * (2 / 255) - 1
    held = torch.cat([_cut(image, 1, step) for image in images]).float() * (2 / 255) - 1
    held = held[held.flatten(1, 2).std(1).mean(1) > 0.1]  # flat sky shows nothing
    pick = torch.randperm(len(held), generator=torch.Generator().manual_seed(4))[
        : 8 if quick else 32
    ]
    return Data(
        name="patches",
        source="8 × 8 × 3 patches of two photographs",
        queries="patches that are no atoms + noise",
        cloud=PointCloud(y),
        clean=held[pick],
        sigma=torch.logspace(-1, 1, 5 if quick else 13),
        shown=5,
        references=2 if quick else 4,
        eigen=2 if quick else 6,
    )


def _cut(image: Tensor, start: int, step: int) -> Tensor:
    """Patches [M, 8, 8, 3] of an image [H, W, 3] at rows and columns start, start + step, ..."""
    windows = image[start:, start:].unfold(0, 8, step).unfold(1, 8, step)  # [h, w, 3, 8, 8]
    return windows.permute(0, 1, 3, 4, 2).reshape(-1, 8, 8, 3)
