"""How good is tr F of a network that was trained for a minute on a folder of latents?

2,000 fields of four textures, a Gaussian mixture whose tr F has a closed form, lie in shards in
units of their own, as an encoder leaves latents. Compared with it: both networks of DF-TM.

Run: python examples/latents.py (one to two minutes on a CPU)
"""

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import dfkernels as df
from dfkernels.methods.networks import ImageNet, Preconditioned
from dfkernels.methods.training import train

EVENT, SCHEDULE = (4, 32, 32), df.schedule.EDM()  # EDM: alpha = 1, t = sigma
LEVELS = {"noise": (0.1, 20.0), "std": 1.0}  # trained for; of the data, normalised
MEAN, STD = torch.tensor([5.8, 3.2, 0.1, -2.2]), torch.tensor([4.2, 4.6, 3.7, 3.3])  # as stored
RADIUS = 32 * torch.fft.fftfreq(32)[:, None].hypot(torch.fft.fftfreq(32))
POWER = torch.stack([(1 + (RADIUS / cut) ** 2) ** -1.5 for cut in (1, 2, 4, 8)]) + 1e-3
POWER = (POWER / POWER.mean((1, 2), keepdim=True))[:, None].expand(-1, *EVENT)  # of each texture


def hartley(x: torch.Tensor) -> torch.Tensor:
    """Coefficients in an orthonormal basis in which those of a texture are independent."""
    return torch.view_as_real(torch.fft.fft2(x, norm="ortho")) @ torch.tensor([1, -1]).to(x)


def draw(n: int, generator: torch.Generator) -> torch.Tensor:
    texture = torch.randint(len(POWER), (n,), generator=generator)
    return hartley(POWER[texture].sqrt() * torch.randn(n, *EVENT, generator=generator))


def true_trace(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """-div grad log q of the mixture of N(0, V), V = power + sigma^2."""
    c, v = hartley(x.double())[:, None], POWER.double() + sigma**2
    w = torch.softmax(-(c.square() / v + v.log()).sum((2, 3, 4)) / 2, 1)[:, :, None, None, None]
    apart = (w * (1 / v - (c / v).square())).sum((1, 2, 3, 4))
    return apart + (w * c / v).sum(1).square().sum((1, 2, 3))


def trained(latents: df.Latents, steps: int) -> df.MatchedTrace:
    how = {"steps": steps, "lr": 6e-3, "ema": 0.98, "generator": torch.Generator().manual_seed(0)}
    batch = lambda g: latents[torch.randint(len(latents), (16,), generator=g)]

    def network(predicts: str, output: str) -> Preconditioned:
        body = ImageNet(4, 32, output=output, width=16, resolutions=3)
        return Preconditioned(body, SCHEDULE, predicts=predicts)

    denoising = lambda m, g: df.denoising_loss(df.Denoiser(m, SCHEDULE), batch(g), g, **LEVELS)
    denoiser = df.Denoiser(train(network("epsilon", "event"), denoising, **how), SCHEDULE)
    matching = lambda m, g: df.trace_loss(m, denoiser, batch(g), g, **LEVELS)
    return df.MatchedTrace(train(network("residual", "scalar"), matching, **how), denoiser)


def main(steps: int = 600) -> None:
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(4):
            z = draw(500, generator) * STD.view(-1, 1, 1) + MEAN.view(-1, 1, 1)
            save_file({"latents": z}, Path(folder) / f"latents_rank00_shard{shard:03d}.safetensors")
        torch.save({"mean": MEAN, "std": STD}, Path(folder) / "latents_stats.pt")
        matched = trained(df.Latents(folder), steps)
    print("sigma     tr F   error: untrained     matched trace     Hutchinson's")
    for sigma in (0.2, 0.5, 1.0, 2.0, 5.0):
        x = draw(64, generator) + sigma * torch.randn(64, *EVENT, generator=generator)
        truth, t = true_trace(x, sigma), torch.tensor(sigma)
        with torch.no_grad():
            probed = df.Hutchinson(generator, probes=1).begin(matched.denoiser, x)(x, t)[1]
            found = (torch.tensor(4096 / (1 + sigma**2)), matched(x, t), probed)
        errors = [f"{((tr - truth).abs() / truth).mean():18.2%}" for tr in found]
        print(f"{sigma:5.1f} {truth.mean():8.0f}", *errors)


if __name__ == "__main__":
    main()
