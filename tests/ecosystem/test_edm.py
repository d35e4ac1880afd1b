"""EDM's sampler and k-diffusion over a data set, and our methods over k-diffusion's wrappers."""

from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
import torch
from small_data import digits, distance, noise

import dfkernels as df


def heun(net, latents, steps=18, low=0.002, high=80.0, rho=7.0):
    """Karras et al. 2022, Algorithm 1, with the time steps of eq. 5, as EDM's generate.py runs it:
    float64 states, sigma 0-d, the network's own range and rounding.
    """
    low, high = max(low, net.sigma_min), min(high, net.sigma_max)
    ramp = torch.linspace(1, 0, steps, dtype=torch.float64)
    sigma = (low ** (1 / rho) + ramp * (high ** (1 / rho) - low ** (1 / rho))) ** rho
    sigma = torch.cat([net.round_sigma(sigma), sigma.new_zeros(1)])
    x = latents.double() * sigma[0]
    for now, then in pairwise(sigma):
        slope = (x - net(x, now, None).double()) / now
        end = x + (then - now) * slope
        if then > 0:
            slope = (slope + (end - net(end, then, None).double()) / then) / 2
            end = x + (then - now) * slope
        x = end
    return x, sigma


@pytest.mark.covers("EDM", "exact")
def test_edm_s_sampler_over_the_data_set_is_ours():
    cloud = digits(dtype=torch.float64)
    net = df.adapt.as_edm(cloud)
    x = noise(4, 1, 8, 8)
    theirs, sigma = heun(net, x)
    denoiser = df.Denoiser.exact(cloud, df.schedule.EDM())
    path = df.sample(denoiser, x.double() * sigma[0], sigma[:-1], method="heun")
    ours = denoiser(path.x[-1], sigma[-2])  # the last step, to sigma = 0
    assert (theirs - ours).abs().max() < 1e-9
    assert distance(theirs, cloud) < 1e-6
    assert (net.img_channels, net.img_resolution, net.label_dim) == (1, 8, 0)


@pytest.mark.parametrize(
    "sampler",
    [
        "sample_euler",
        "sample_heun",
        "sample_lms",
        "sample_dpm_2",
        "sample_dpmpp_2m",
        "sample_dpmpp_2s_ancestral",
        "sample_euler_ancestral",
    ],
)
@pytest.mark.covers("k-diffusion", "exact")
def test_k_diffusion_s_samplers_end_on_atoms(sampler, k_diffusion):
    cloud = digits()
    sigmas = k_diffusion.sampling.get_sigmas_karras(25, 0.01, 40.0)
    torch.manual_seed(0)
    x = getattr(k_diffusion.sampling, sampler)(
        df.adapt.as_edm(cloud), 40 * noise(4, 1, 8, 8), sigmas, disable=True
    )
    assert distance(x, cloud) < 1e-3


@pytest.mark.covers("k-diffusion", "exact")
def test_k_diffusion_s_likelihood_of_the_data_set_is_ours(k_diffusion):
    """Of one atom: F is a multiple of the identity, so that their one probe has no variance."""
    cloud = df.PointCloud(noise(1, 2, dtype=torch.float64))
    x = cloud.y + 0.3 * noise(3, 2, dtype=torch.float64, seed=1)
    torch.manual_seed(0)
    theirs, _ = k_diffusion.sampling.log_likelihood(
        df.adapt.as_edm(cloud), x, 0.3, 1e4, atol=1e-8, rtol=1e-8
    )
    ours = df.ops.log_prob(x, cloud.y, 1.0, 0.3)
    # their prior is N(0, sigma_max^2), without the mean: y x/sigma_max^2 is left, some 1e-4
    assert (theirs - ours).abs().max() < 1e-3


def networks(k_diffusion):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))

    class Timed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x + t.float()[:, None] / 1000)

    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    external = k_diffusion.external
    return {
        "eps": external.DiscreteEpsDDPMDenoiser(Timed(), table, quantize=False),
        "quantized eps": external.DiscreteEpsDDPMDenoiser(Timed(), table, quantize=True),
        "v": external.DiscreteVDDPMDenoiser(Timed(), table, quantize=False),
        "continuous v": external.VDenoiser(Timed()),
    }


@pytest.mark.parametrize("name", ["eps", "quantized eps", "v", "continuous v"])
@pytest.mark.covers("k-diffusion", "sample")
def test_our_sampler_over_their_wrappers_is_their_sampler(name, k_diffusion):
    model = networks(k_diffusion)[name].requires_grad_(False)
    denoiser = df.adapt.from_k_diffusion(model)
    sigmas = k_diffusion.sampling.get_sigmas_karras(10, 0.05, 20.0)
    x = 20 * noise(3, 4)
    seen = []
    k_diffusion.sampling.sample_heun(
        model, x, sigmas, disable=True, callback=lambda at: seen.append(at["x"])
    )
    ours = df.sample(denoiser, x, sigmas[:-1].double(), method="heun").x
    for a, b in zip(ours, seen, strict=True):
        assert (a - b).abs().max() < 1e-5 * 20
    if name != "continuous v":
        low, high = denoiser.schedule.t_range
        assert low == float(model.sigma_min) and high == float(model.sigma_max)
        with pytest.raises(ValueError, match=r"^t: expected values in \[0.0100"):
            denoiser(x, 1e-3)


def k_diffusion_log_prob(k_diffusion, model, x, high):
    """Their log_likelihood, whose one probe is exact in the mean over all sign patterns."""
    values = []
    for pattern in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3):  # v and -v are one
        v = torch.cat([pattern, torch.ones(1)]).expand(2, 4)
        with mock.patch.object(torch, "randint_like", lambda x, n, v=v: (v + 1) / 2):
            found, _ = k_diffusion.sampling.log_likelihood(
                model, x, 0.3, high, atol=1e-6, rtol=1e-6
            )
        values.append(found)
    return torch.stack(values).mean(0)


@pytest.mark.parametrize("name", ["eps", "v"])
@pytest.mark.covers("k-diffusion", "likelihood")
def test_the_likelihood_of_a_wrapper_is_their_likelihood(name, k_diffusion):
    model = networks(k_diffusion)[name].requires_grad_(False)
    denoiser = df.adapt.from_k_diffusion(model)
    x = noise(2, 4, seed=3)
    ours = df.log_prob(denoiser, x, (0.3, 100.0), "divergence", rtol=1e-6, atol=1e-6).log_prob
    assert (ours - k_diffusion_log_prob(k_diffusion, model, x, 100.0)).abs().max() < 1e-2


class Precond(torch.nn.Module):
    """EDM's preconditioning (Karras et al. 2022, Table 1) as its networks have it: float32 inside
    and out, whatever comes.
    """

    sigma_min, sigma_max, sigma_data = 0.002, 80.0, 0.5

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(5, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)
        )

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        x, sigma = x.float(), sigma.float().reshape(-1, 1)
        total = sigma**2 + self.sigma_data**2
        noise = (sigma.log() / 4).expand(len(x), 1)
        out = self.net(torch.cat([x / total.sqrt(), noise], 1))
        return self.sigma_data**2 / total * x + sigma * self.sigma_data / total.sqrt() * out

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma)


@pytest.mark.covers("EDM", "sample")
def test_our_heun_over_an_edm_network_is_theirs():
    net, x = Precond().requires_grad_(False), noise(5, 4)
    theirs, sigma = heun(net, x)
    denoiser = df.adapt.from_edm(net)
    path = df.sample(denoiser, x.double() * sigma[0], sigma[:-1], method="heun")
    ours = denoiser(path.x[-1], sigma[-2])
    assert ours.dtype == torch.float64
    # float32 networks; their states and ours are rounded to it at other places
    assert (theirs - ours).abs().max() < 1e-5 * 80


@pytest.mark.covers("EDM", "likelihood")
def test_the_likelihood_of_an_edm_network_is_k_diffusion_s(k_diffusion):
    net, x = Precond().requires_grad_(False), noise(2, 4, seed=3)
    ours = df.log_prob(df.adapt.from_edm(net), x, (0.3, 80.0), "divergence").log_prob
    assert (ours - k_diffusion_log_prob(k_diffusion, net, x, 80.0)).abs().max() < 1e-2
