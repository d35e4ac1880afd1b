"""Adjoint guidance by every form of the Fisher, measured: its gradients, and its quality against
time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dfkernels.cloud import PointCloud
from dfkernels.methods.adjoint import Guided, adjoint, guide
from dfkernels.methods.denoiser import Denoiser
from dfkernels.methods.endpoint import fisher
from dfkernels.methods.grid import Trajectory, time_grid
from dfkernels.methods.samplers import sample
from dfkernels.methods.trace_matching import MatchedTrace

from . import digits

NOISE = (0.02, 40.0)
ENDS = (0.02, 0.1, 0.2, 0.5)  # noise levels at which the paths of the last table end
LR = 0.05


@dataclass(frozen=True)
class Setting:
    """What is guided: a denoiser, the classifiers, the start x [B, 1, H, W] and the wanted classes
    [B]."""

    name: str
    data: digits.Digits
    denoiser: Denoiser
    guide: nn.Module
    judge: nn.Module
    trace: MatchedTrace | None
    x: Tensor
    wanted: Tensor
    t: Tensor
    steps: int

    def loss(self, x0: Tensor) -> Tensor:
        """-log p(wanted class) by the guide, [B]."""
        return nn.functional.cross_entropy(self.guide(x0), self.wanted, reduction="none")

    @torch.no_grad()
    def verdict(self, x0: Tensor) -> Tensor:
        """log p(wanted class) by the judge, [B]."""
        return -nn.functional.cross_entropy(self.judge(x0), self.wanted, reduction="none")

    def form(self, row: str) -> tuple[str | Callable, dict]:
        """The row's form and what it needs, as `adjoint` and `guide` take them."""
        if row in ("identity", "random"):  # r = 0: F = I/sigma^2
            return lambda x, t: fisher("centred", x, t, self.denoiser, x0=x, mean=x), {}
        needs = {
            "exact": {"cloud": PointCloud(self.data.train)},
            "isotropic": {"trace": self.trace},
            "centred (capped)": {"trace": self.trace},
        }
        return row.split()[0], needs.get(row, {})


@dataclass
class Outcome:
    """One row: its gradient against autograd's at the start, then the guidance."""

    cosine: Tensor  # [B]
    length: Tensor  # [B], relative to autograd's
    calls: int  # of the network, per gradient
    gradient_seconds: float
    guided: Guided
    seconds: list[float] = field(default_factory=list)  # before each step and at the end
    verdicts: list[Tensor] = field(default_factory=list)  # [B] each: the judge's at these times

    @property
    def best(self) -> Tensor:
        """[steps + 1, B]: the judge on each sample's best state so far, best by the guide."""
        losses, verdicts = self.guided.losses, torch.stack(self.verdicts)
        pick = torch.stack([losses[: i + 1].argmin(0) for i in range(len(losses))])
        return verdicts.gather(0, pick)


@dataclass
class Study:
    setting: Setting
    before: Tensor  # x_0 without guidance
    autograd: Tensor  # dL/dx
    autograd_seconds: float
    vjp_error: float
    outcomes: dict[str, Outcome]

    def right(self) -> dict[str, float]:
        """Per row, the per cent of the guided images in which the judge sees the wanted class."""
        setting = self.setting
        with torch.no_grad():
            seen = {row: setting.judge(o.guided.x0).argmax(1) for row, o in self.outcomes.items()}
        return {row: 100 * (s == setting.wanted).float().mean().item() for row, s in seen.items()}


def prepare(name, data, denoiser, guide_net, judge, trace, quick: bool) -> Setting:
    draw = torch.Generator().manual_seed(1)
    count, levels, steps = (16, 8, 4) if quick else (64, 20, 15)
    t = time_grid(denoiser.schedule, levels, NOISE, "edm")
    x = denoiser.schedule.sigma(t[0]).float() * torch.randn(
        count, *data.train.shape[1:], generator=draw
    )
    wanted = torch.randint(10, (count,), generator=draw)
    return Setting(name, data, denoiser, guide_net, judge, trace, x, wanted, t, steps)


def measure(setting: Setting, rows: tuple[str, ...], step: Callable[[str], None]) -> Study:
    for _ in range(2):  # the first one warms up
        leaf, start = setting.x.clone().requires_grad_(), time.perf_counter()
        trajectory = sample(setting.denoiser, leaf, setting.t)
        (truth,) = torch.autograd.grad(setting.loss(trajectory.x[-1]).sum(), leaf)
        seconds = time.perf_counter() - start
    path = Trajectory(trajectory.t, [x.detach() for x in trajectory.x])
    study = Study(setting, path.x[-1], truth, seconds, 0.0, {})
    for row in rows:
        study.outcomes[row], gradient = _outcome(setting, row, path, truth)
        if row == "vjp":
            study.vjp_error = ((gradient - truth).norm() / truth.norm()).item()
        step(f"{setting.name}: {row}")
    return study


def _outcome(setting: Setting, row: str, path: Trajectory, truth: Tensor) -> tuple[Outcome, Tensor]:
    draw = torch.Generator().manual_seed(2)

    def loss(x0: Tensor) -> Tensor:
        value = setting.loss(x0)
        if row != "random":
            return value
        noise = torch.randn(x0.shape, generator=draw)  # the same values, but with a random gradient
        return value.detach() + (noise * (x0 - x0.detach())).flatten(1).sum(1)

    form, needs = setting.form(row)
    x0 = path.x[-1].clone().requires_grad_()
    (end,) = torch.autograd.grad(loss(x0).sum(), x0)
    for _ in range(2):  # the first one warms up
        calls, start = setting.denoiser.evaluations, time.perf_counter()
        gradient = adjoint(path, end, setting.denoiser, form, **needs).x[0]
        calls, gradient_seconds = setting.denoiser.evaluations - calls, time.perf_counter() - start
    cosine = torch.cosine_similarity(gradient.flatten(1), truth.flatten(1), 1)
    length = gradient.flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)
    seconds, verdicts, judging = [], [], 0.0

    def watched(x0: Tensor) -> Tensor:
        nonlocal judging
        now = time.perf_counter()
        seconds.append(now - start - judging)
        verdicts.append(setting.verdict(x0))
        judging += time.perf_counter() - now
        return loss(x0)

    start = time.perf_counter()
    guided = guide(
        watched, setting.x, setting.t, setting.denoiser, form, steps=setting.steps, lr=LR, **needs
    )
    outcome = Outcome(cosine, length, calls, gradient_seconds, guided, seconds, verdicts)
    return outcome, gradient


def cosines_on_paths_to(study: Study, low: float) -> dict[str, float]:
    """Median cosine to vjp of each other row's gradient, on paths that end at the noise level
    `low`."""
    setting = study.setting
    t = time_grid(setting.denoiser.schedule, len(setting.t) - 1, (low, NOISE[1]), "edm")
    with torch.no_grad():
        path = sample(setting.denoiser, setting.x, t)
    x0 = path.x[-1].clone().requires_grad_()
    (end,) = torch.autograd.grad(setting.loss(x0).sum(), x0)
    truth = adjoint(path, end, setting.denoiser).x[0].flatten(1)
    found = {}
    for row in study.outcomes.keys() - {"vjp", "jvp", "random"}:
        form, needs = setting.form(row)
        gradient = (
            adjoint(path, end, setting.denoiser, form, normalise=True, **needs).x[0].flatten(1)
        )
        found[row] = torch.cosine_similarity(gradient, truth, 1).median().item()
    return found


def stretch(setting: Setting) -> float:
    """Largest over smallest singular value of dx_0/dx_T, the median of four samples."""
    with torch.no_grad():
        path = sample(setting.denoiser, setting.x[:4], setting.t)
    d = path.x[0][0].numel()
    copies = Trajectory(path.t, [x.repeat_interleave(d, 0) for x in path.x])
    rows = torch.eye(d).repeat(4, 1).view(-1, *path.x[0].shape[1:])
    jacobian = adjoint(copies, rows, setting.denoiser).x[0].view(4, d, d)
    values = torch.linalg.svdvals(jacobian)
    return (values[:, 0] / values[:, -1]).median().item()


def ideal_error(setting: Setting) -> float:
    """Of the exact F along a path of the training set's own ideal denoiser, against autograd."""
    cloud = PointCloud(setting.data.train.double())
    denoiser = Denoiser.exact(cloud, setting.denoiser.schedule)
    leaf = setting.x[:8].double().requires_grad_()
    path = sample(denoiser, leaf, setting.t)
    end = path.x[-1].detach()
    (truth,) = torch.autograd.grad((path.x[-1] * end).sum(), leaf)
    gradient = adjoint(path, end, denoiser, "exact", cloud=cloud).x[0]
    return ((gradient - truth).norm() / truth.norm()).item()
