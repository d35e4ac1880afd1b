"""`python -m experiments public`: a network that nobody here trained, sampled and audited.

The package 21cmPSDenoiser has a diffusion model of astrophysical power spectra. Its training data
are not in the package: the network is given a mock spectrum as its condition, and is audited on its
own samples.
"""

from __future__ import annotations

import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dfkernels import adapt
from dfkernels._io.files import folder, write
from dfkernels._page.machine import machine
from dfkernels.cloud import PointCloud
from dfkernels.methods.audit import AuditReport, audit
from dfkernels.methods.convention import CheckReport, check
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.grid import time_grid
from dfkernels.methods.likelihood import Likelihood, log_prob
from dfkernels.methods.samplers import sample
from dfkernels.methods.traces import Hutchinson

from . import extra
from .progress import Progress
from .text import processor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dfkernels._page.theme import Theme

NOISE = (0.0105, 152.0)  # of the package's own sampler: t from 1e-3 to 1
SHAPE = (1, 32, 16)  # of a spectrum: channel, k perpendicular and parallel to the line of sight
COMPARED = 4  # samples that both samplers draw


class Mock(NamedTuple):
    """A spectrum in mK^2 over k in 1/Mpc, and one realisation of it, float64 [32, 16]."""

    k: Tensor
    smooth: Tensor
    realisation: Tensor


class Network(NamedTuple):
    """The package's network, and what it is given."""

    library: Any  # the module
    package: Any  # its Denoiser, with the network and the constants
    denoiser: Denoiser  # with the realisation as its condition
    condition: Tensor  # [1, 1, 32, 16]
    mock: Mock

    def spectrum(self, x: Tensor) -> Tensor:
        """log10 of the spectrum in mK^2 that x_0 [B, 1, 32, 16] stands for, float64 [B, 32, 16]."""
        constants = self.package.csts
        scale, bias = (torch.tensor(c) for c in (constants.mean_scale, constants.mean_bias))
        return (x[:, 0].double() + 1) / 2 * scale + bias


def network() -> Network:
    """The network with the condition.

    Raises ModuleNotFoundError if the package is not installed.
    """
    if find_spec("psdenoiser") is None:
        raise ModuleNotFoundError(
            "psdenoiser not installed: pip install 21cmPSDenoiser, or for this alone, without what "
            "else it asks for, pip install --no-deps 21cmPSDenoiser astropy astropy-iers-data "
            "pyerfa einops"
        )
    library = import_module("psdenoiser")
    package = library.Denoiser(device=torch.device("cpu"))
    model = package.model.requires_grad_(False)
    mock = spectrum(package.csts)
    constants = [torch.tensor(c) for c in (package.csts.noisy_scale, package.csts.noisy_bias)]
    condition = library.transform(mock.realisation.float(), *constants)[None, None]
    # it puts x and x_cdn side by side: one condition for all rows has to be repeated
    conditional = lambda x, t, x_cdn: model(x, t, x_cdn=x_cdn.expand_as(x))
    denoiser = adapt.from_score_sde(conditional, vp(library)).bind(x_cdn=condition)
    return Network(library, package, denoiser, condition, mock)


def vp(library: Any) -> Any:
    """The SDE that the network was trained on."""
    return library.VPSDE(beta_min=0.1, beta_max=20.0)


def spectrum(constants: Any) -> Mock:
    """10 mK^2 (k/0.2)^0.5, and a realisation with the sample variance of the modes in each bin."""
    across, along = (torch.tensor(k.value) for k in (constants.kperp, constants.kpar))
    k = (across[:, None] ** 2 + along**2).sqrt()
    smooth = 10 * (k / 0.2) ** 0.5
    modes = torch.tensor(constants.modes).clamp_min(4)  # a few bins have none
    noise = torch.randn(k.shape, generator=torch.Generator().manual_seed(0), dtype=k.dtype)
    return Mock(k, smooth, smooth * (1 + noise / modes.sqrt()).clamp_min(0.1))


class Study(NamedTuple):
    """What was found."""

    network: Network
    samples: Tensor  # [n, 1, 32, 16]: x_0
    differences: dict[int, float]  # Heun steps -> root mean square distance from their sampler
    evaluations: int  # of the network by their sampler
    likelihood: Likelihood  # of noisy samples at the lowest level
    checked: CheckReport
    audited: AuditReport


def study(bar: Progress, *, samples: int = 192, quick: bool = False) -> Study:
    """Everything; `quick`: few samples, probes and levels."""
    found = network()
    bar.step("loading the network")
    draw = torch.Generator().manual_seed(1)
    differences, evaluations = compared(found, (10, 20) if quick else (20, 40, 160), draw)
    bar.step("comparing samplers")
    noisy, x_0 = drawn(found.denoiser, torch.randn(samples, *SHAPE, generator=draw))
    bar.step("sampling")
    probes = Hutchinson(torch.Generator().manual_seed(2), probes=1 if quick else 4)
    with torch.no_grad():
        likelihood = log_prob(
            found.denoiser, noisy[:4], NOISE, probes, method="rk4", steps=32, data_std=1.0
        )
    bar.step("likelihood")
    cloud = PointCloud(x_0)
    checked = check(found.denoiser, cloud)
    bar.step("check")
    audited = audit(
        found.denoiser,
        None,
        cloud,
        noise=(NOISE[0], 1.0),
        levels=2 if quick else 6,
        queries=4 if quick else 64,
        points=0 if quick else 16,
    )
    bar.step("audit")
    return Study(found, x_0, differences, evaluations, likelihood, checked, audited)


STAGES = 6  # of a study


def drawn(denoiser: Denoiser, noise: Tensor, steps: int = 24) -> tuple[Tensor, Tensor]:
    """Samples at the lowest level, and of x_0, each [n, 1, 32, 16]."""
    t = time_grid(denoiser.schedule, steps, NOISE)
    with torch.no_grad():
        ends = [sample(denoiser, part, t, "heun", keep=1).x[-1] for part in noise.split(32)]
        return torch.cat(ends), torch.cat([denoiser(end, t[-1]) for end in ends])


def compared(
    found: Network, steps: tuple[int, ...], draw: torch.Generator
) -> tuple[dict[int, float], int]:
    """The root mean square distance between our samples and those of the package's sampler from the
    same noise, by the number of steps, and how often that called the network.
    """
    noise = torch.randn(COMPARED, *SHAPE, generator=draw)
    library = found.library
    sampler = library.GetODESampler(vp(library), noise.shape, device="cpu", eps=1e-3)
    theirs, evaluations = sampler.get_ode_sampler()(
        found.package.model, z=noise, x_cdn=found.condition, return_nfe=True
    )
    ours = {count: drawn(found.denoiser, noise, count)[0] for count in steps}
    return {
        count: (x - theirs).square().mean().sqrt().item() for count, x in ours.items()
    }, evaluations


def figure(found: Study, theme: Theme) -> Figure:
    """The spectrum along one line of k, and the errors of the network over the noise levels."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    drawing = Figure(figsize=(8.6, 3.3), layout="constrained")
    left, right = drawing.subplots(1, 2)
    mock, at = found.network.mock, 8  # the bin of k across, of 32
    k = mock.k[at]
    low, middle, high = (10 ** found.network.spectrum(found.samples)[:, at]).quantile(
        torch.tensor([0.16, 0.5, 0.84], dtype=torch.float64), 0
    )
    left.fill_between(k, low, high, color=theme.series[0], alpha=0.25, linewidth=0)
    left.plot(k, middle, color=theme.series[0], label="samples: median, 68 %")
    left.plot(
        k,
        mock.realisation[at],
        "o",
        color=theme.faint,
        markersize=4,
        label="condition: one realisation",
    )
    left.plot(
        k, mock.smooth[at], color=theme.series[1], linestyle="--", label="the truth of the mock"
    )
    left.set_title("Power spectrum, mK²")
    left.set_xlabel("k in 1/Mpc")
    left.set_yscale("log")
    left.set_yticks([3, 5, 10, 20], ["3", "5", "10", "20"])
    levels = found.audited.levels
    noise = [level.noise for level in levels]
    right.plot(
        noise,
        [level.calibration.actual.value for level in levels],
        color=theme.series[0],
        marker="o",
        markersize=4,
        label="mean square error",
    )
    right.plot(
        noise,
        [level.calibration.predicted.value for level in levels],
        color=theme.series[1],
        marker="s",
        markersize=4,
        label="variance by its Jacobian",
    )
    right.plot(
        noise,
        [level.baseline for level in levels],
        color=theme.faint,
        linestyle=(0, (4, 2)),
        label="best multiple of x",
    )
    right.set_title("Error of x₀ per number")
    right.set_xlabel("noise level σ/α")
    right.set_yscale("log")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.legend(fontsize=8)
        for scale in (axis.xaxis, axis.yaxis):
            scale.set_minor_formatter(NullFormatter())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return drawing


def document(found: Study, seconds: float) -> str:
    """The numbers, as Markdown."""
    spectra, truth = found.network.spectrum(found.samples), found.network.mock.smooth.log10()
    off = lambda values: f"{10 ** (values - truth).abs().median().item() - 1:.1%}"
    nats, error = found.likelihood.log_prob, found.likelihood.error
    steps = ", ".join(f"{gap:.1e} with {count}" for count, gap in found.differences.items())
    lines = [
        f"Made on {processor()}, {machine()}, in {seconds / 60:.0f} min.",
        f"- Samples: {len(found.samples)}. Their mean is off by {off(spectra.mean(0))} (median over"
        f" the bins), the condition by {off(found.network.mock.realisation.log10())}.",
        f"- Distance from samples of the package's own sampler ({found.evaluations} calls), root "
        f"mean square, by the number of Heun steps: {steps}.",
        f"- Likelihood of {len(nats)} samples: {nats.mean():.1f} nats, standard deviation "
        f"{nats.std():.1f}; error of the integration {error.max():.1g}.",
        f"```text\n{found.checked}\n```",
        f"```text\n{found.audited}\n```",
    ]
    return "\n\n".join(lines) + "\n"


def run(out: Path, *, quick: bool = False) -> int:
    """Write public.md and public.png to `out`.

    Raises ModuleNotFoundError if the package or the extra is not installed, FileError if `out`
    cannot be written.
    """
    extra.require()
    from dfkernels._page.theme import LIGHT, png

    start = time.monotonic()
    folder(out)
    with Progress("public", STAGES) as bar:
        found = study(bar, samples=8 if quick else 192, quick=quick)
    text = document(found, time.monotonic() - start)
    write(out / "public.md", lambda file: file.write(text.encode()))
    print(text)
    picture = png(lambda: figure(found, LIGHT), LIGHT, 110)
    write(out / "public.png", lambda file: file.write(picture))
    return 0
