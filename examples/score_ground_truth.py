"""How far is a trained score network from the exact score of its data set?

Trains a small network on points of two moons, then compares it with the exact denoiser of the
training set at several noise levels. At high noise they agree. At low noise the exact denoiser
returns training points, and a network that generalises does not.

Run: python examples/score_ground_truth.py (needs scikit-learn; some ten seconds on a CPU)
"""

from __future__ import annotations

import torch
from sklearn.datasets import make_moons

import dfkernels as df
from dfkernels.methods import networks, training


def main(steps: int = 600) -> None:
    y = torch.tensor(make_moons(2000, noise=0.05, random_state=0)[0], dtype=torch.float32)
    y = (y - y.mean(0)) / y.std()
    cloud, schedule = df.PointCloud(y), df.schedule.EDM()  # EDM: alpha = 1, t = sigma
    exact = df.Denoiser.exact(cloud, schedule)

    # 1. Train. `Preconditioned` starts from the exact answer for Gaussian data.
    body = networks.VectorNet(2, width=64, depth=2, octaves=4, seed=0)
    network = networks.Preconditioned(body, schedule)

    def loss(network: torch.nn.Module, generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(y), (256,), generator=generator)
        denoiser = df.Denoiser(network, schedule, "epsilon")
        return df.denoising_loss(denoiser, y[rows], generator, noise=(0.02, 20.0))

    generator = torch.Generator().manual_seed(0)
    trained = training.train(network, loss, steps=steps, generator=generator, ema=0.99)
    denoiser = df.Denoiser(trained, schedule, "epsilon")
    untrained = df.Denoiser(
        lambda x, t: x / (1 + t[:, None] ** 2) * t[:, None], schedule, "epsilon"
    )

    # 2. Compare: the root mean square of the error in the noise, whose entries have variance 1.
    print("sigma   effective atoms   error, untrained   error, trained")
    for sigma in (0.02, 0.1, 0.5, 2.0):
        rows = torch.randint(len(y), (500,), generator=generator)
        x = y[rows] + sigma * torch.randn(500, 2, generator=generator)
        truth = exact.eps(x, sigma)
        ess = df.DiffusionFisher(x, cloud, 1.0, sigma).ess.median()
        with torch.no_grad():
            errors = [
                (d.eps(x, sigma) - truth).square().mean().sqrt() for d in (untrained, denoiser)
            ]
        print(f"{sigma:5.2f} {ess:17.1f} {errors[0]:18.3f} {errors[1]:16.3f}")


if __name__ == "__main__":
    main()
