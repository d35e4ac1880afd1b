"""The likelihood of data under a network, by the exact divergence and by Hutchinson's estimator.

The network here is the ideal denoiser of a Gaussian mixture, so that every estimate can be compared
with the true log-density. Replace `network` by your own.

Run: python examples/likelihood.py (seconds on a CPU)
"""

from __future__ import annotations

import math
import time

import torch

import dfkernels as df

D, NOISE = 8, (0.05, 40.0)  # dimension; range of sigma/alpha
AXES = torch.eye(D, dtype=torch.float64)[:2]
MEANS, STD = 2 * torch.cat([AXES, -AXES]), 0.5  # of four Gaussians


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[x_0 | x] for the mixture, x = x_0 + t eps."""
    variance = STD**2 + t[:, None] ** 2
    weight = torch.softmax(-(x[:, None] - MEANS).square().sum(2) / (2 * variance), 1)
    return (STD**2 * x + t[:, None] ** 2 * (weight @ MEANS)) / variance


def log_density(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The truth: log q at noise level sigma."""
    variance = STD**2 + sigma**2
    logits = -(x[:, None] - MEANS).square().sum(2) / (2 * variance)
    normaliser = math.log(len(MEANS)) + D / 2 * math.log(2 * math.pi * variance)
    return logits.logsumexp(1) - normaliser


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    denoiser = df.Denoiser(network, df.schedule.EDM(), "sample")
    rows = torch.randint(len(MEANS), (32,), generator=generator)
    noise = torch.randn(32, D, generator=generator, dtype=torch.float64)
    x = MEANS[rows] + math.hypot(STD, NOISE[0]) * noise  # samples at the lowest noise level
    truth = log_density(x, NOISE[0])
    print(f"true log-density: {truth.mean():.3f} nats in the mean")

    hutchinson = df.Hutchinson(torch.Generator().manual_seed(1), probes=1)
    for name, trace in (("divergence", "divergence"), ("hutchinson", hutchinson)):
        begin = time.perf_counter()
        with torch.no_grad():
            result = df.log_prob(denoiser, x, noise=NOISE, trace=trace, data_std=STD)
        error = (result.log_prob - truth).abs()
        print(f"trace={name}: {result.log_prob.mean():.3f} nats", end=", ")
        print(f"{result.bits_per_dim.mean():.3f} bits/dim; error {error.mean():.4f}", end=", ")
        print(f"of which integration {result.error.mean():.4f};", end=" ")
        print(f"{result.products} Jacobian products, {time.perf_counter() - begin:.1f} s")


if __name__ == "__main__":
    main()
