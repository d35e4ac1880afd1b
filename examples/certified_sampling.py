"""Denoising with certified sparse evaluation: the same images, far fewer atoms read.

The data set is made of patches of scikit-learn's two photographs. Each step of a sampler needs the
ideal denoiser, a sum over all atoms; with an index only those that can carry weight are read, and
what is left out is bounded.

Run: python examples/certified_sampling.py (needs scikit-learn; seconds on a CPU)
"""

from __future__ import annotations

import time

import torch
from sklearn.datasets import load_sample_images

import dfkernels as df

TOLERANCE = 1e-6


def patches(count: int, size: int = 32) -> torch.Tensor:
    """Random patches of the photographs, uint8 [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(0)
    images = (
        torch.tensor(load_sample_images().images[0]),
        torch.tensor(load_sample_images().images[1]),
    )
    found = []
    for image in images:
        rows = torch.randint(image.shape[0] - size, (count // 2,), generator=generator)
        columns = torch.randint(image.shape[1] - size, (count // 2,), generator=generator)
        found += [
            image[i : i + size, j : j + size].permute(2, 0, 1)
            for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
        ]
    return torch.stack(found)


def main(count: int = 8000) -> None:
    cloud = df.PointCloud(patches(count), scale=2 / 255, offset=-1)  # values in [-1, 1]
    begin = time.perf_counter()
    cloud.index()
    seconds = time.perf_counter() - begin
    print(f"{len(cloud):,} atoms of {cloud.d} numbers; index built in {seconds:.1f} s")

    # 1. One denoising step at several levels: atoms read, and a bound on what was left out.
    generator = torch.Generator().manual_seed(1)
    clean = cloud.y[:: count // 8].float() * cloud.scale + cloud.offset
    print("sigma   atoms read (mean)   weight left out   error of the mean   its bound")
    for sigma in (0.05, 0.2, 0.5, 1.0):
        x = clean + sigma * torch.randn(clean.shape, generator=generator)
        dense = df.DiffusionFisher(x, cloud, 1.0, sigma)
        sparse = df.DiffusionFisher(x, cloud, 1.0, sigma, tolerance=TOLERANCE)
        error = (sparse.denoised - dense.denoised).flatten(1).norm(dim=1).max()
        read, left_out = sparse.atoms_read.double().mean(), sparse.dropped_mass.max()
        print(f"{sigma:5.2f} {read:19.1f} {left_out:17.1e} ", end="")
        print(f"{error:19.1e} {sparse.mean_error.max():11.1e}")

    # 2. The low-noise part of a trajectory, dense and certified, from the same noisy images.
    schedule = df.schedule.EDM()
    t = df.time_grid(schedule, 20, (0.01, 0.3))
    x = clean + 0.3 * torch.randn(clean.shape, generator=generator)
    samples = {}
    for name, tolerance in (("dense", None), ("certified", TOLERANCE)):
        denoiser = df.Denoiser.exact(cloud, schedule, tolerance=tolerance)
        begin = time.perf_counter()
        samples[name] = df.sample(denoiser, x, t).x[-1]
        print(f"{name}: {time.perf_counter() - begin:.2f} s for 8 images in 20 steps")
    apart = (samples["dense"] - samples["certified"]).abs().max()
    print(f"images differ by at most {apart:.1e}")


if __name__ == "__main__":
    main()
