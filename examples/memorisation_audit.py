"""Which samples are copies of the training set, and at which noise level is that decided?

Half of the samples here are training digits with a little noise, as a model that memorises would
return them; the others are held-out digits. `df.top_k` finds the training digit that each may come
from, and the distance to it, compared with held-out data, tells copies from the rest.

Run: python examples/memorisation_audit.py (needs scikit-learn; seconds on a CPU)
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

import dfkernels as df


def main() -> None:
    images, _ = load_digits(return_X_y=True)
    digits = torch.as_tensor(images, dtype=torch.float32) / 8 - 1  # 1,797 of 8 x 8, in [-1, 1]
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    train, held_out, calibration = digits[order].split([1400, 20, 377])
    generator = torch.Generator().manual_seed(1)
    copied = torch.arange(0, 1400, 70)
    copies = train[copied] + 0.05 * torch.randn(20, 64, generator=generator)
    samples = torch.cat([copies, held_out])
    cloud = df.PointCloud(train)

    # 1. The nearest training digit, and how far it is for data that cannot be a copy.
    def nearest(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        index = df.top_k(x, cloud, alpha=1.0, sigma=0.1, k=1).index[:, 0]
        return index, (x - train[index]).square().mean(1).sqrt()

    index, distance = nearest(samples)
    threshold = nearest(calibration)[1].quantile(0.01)
    flagged = distance < threshold
    print(f"distance to the nearest training digit: copies {distance[:20].mean():.2f}", end=", ")
    print(f"held-out digits {distance[20:].mean():.2f}; threshold {threshold:.2f}")
    print(f"flagged as copies: {int(flagged[:20].sum())} of 20 copies", end=", ")
    print(f"{int(flagged[20:].sum())} of 20 held-out digits")
    print(f"copies traced to their source: {int((index[:20] == copied).sum())} of 20")

    # 2. How many training digits a noisy digit may still come from, by noise level.
    print("sigma   effective number of atoms (median)   weight of the heaviest (median)")
    for sigma in (0.25, 0.5, 1.0, 2.0, 4.0):
        x = held_out + sigma * torch.randn(20, 64, generator=generator)
        ess = df.DiffusionFisher(x, cloud, 1.0, sigma).ess.median()
        heaviest = df.top_k(x, cloud, 1.0, sigma, k=1).weight.median()
        print(f"{sigma:5.2f} {ess:24.1f} {heaviest:35.3f}")


if __name__ == "__main__":
    main()
