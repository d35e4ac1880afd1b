"""What the tests with other libraries share: small data, noise, distances from the data."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

import dfkernels as df


def digits(n=200, dtype=torch.float32):
    """Digits [n, 1, 8, 8] in [-1, 1]."""
    images = torch.tensor(load_digits().images[:n] / 8 - 1, dtype=dtype)
    return df.PointCloud(images[:, None])


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def distance(x, cloud):
    """The largest distance of a sample from its nearest atom, as a root mean square."""
    between = torch.cdist(x.flatten(1).double(), cloud.y.flatten(1).double())
    return between.min(1).values.max().item() / x[0].numel() ** 0.5


def column(level, x):
    return level.to(x).view(-1, *[1] * (x.ndim - 1))
