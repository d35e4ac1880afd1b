"""Small networks for eps and for traces, and the preconditioning that makes Gaussian data their
starting point.
"""

from __future__ import annotations

import contextlib
import itertools
import math

import torch
from torch import Tensor, nn

from .._torch import check, words
from .._torch.shapes import column, flat
from ..schedule import Schedule
from .denoiser import Denoiser

__all__ = ["PREDICTS", "ImageNet", "Preconditioned", "VectorNet", "gaussian_power"]

OUTPUTS = ("event", "scalar")
PREDICTS = ("epsilon", "residual", "noise", "paper")
_FREQUENCIES = (0.25, 0.5, 1.0, 2.0)  # of the level in radians: ln(sigma/alpha) spans about 10


class Preconditioned(nn.Module):
    """A network whose output 0 is the exact answer for Gaussian data N(mean, std^2 I).

    With v = alpha^2 std^2 + sigma^2, z = (x - alpha mean)/sqrt(v), F = body(z, ln(sigma/(alpha
    std))):

        epsilon:   eps = (sigma z + alpha std F)/sqrt(v)
        residual:  E|eps_true - eps|^2/d ~ (alpha^2 std^2/v) softplus(F)/ln 2
        noise:     E|eps|^2/d ~ p + 2 r sqrt(p/d) F
                   r = alpha std/sqrt(v), p = |sigma z|^2/(v d) + r^2
        paper:     E|x_0|^2/d ~ p + 2 r sqrt(p/d) F
                   r = std sigma/sqrt(v), p = |mean + (alpha std^2/sqrt(v)) z|^2/d + r^2
                   with a denoiser: |its mean|^2/d + r^2 softplus(F)/ln 2

    "epsilon" is Table 1 of Karras et al. 2022 for eps: F has targets of mean square 1 at every
    level. The denoiser of "paper" is frozen; with it F need not resolve |x_0|^2/d to a relative
    sigma^2.

    Args:
        body: `body(z, level)`, z [B, *E], level [B] -> [B, *E] for "epsilon", else [B]; VectorNet
            or ImageNet.
        schedule: of the t that `forward(x, t)` is given (t [B]).
        predicts: one of PREDICTS.
        mean, std: of the data, one number each.
        denoiser: for "paper" only: the Denoiser of the MatchedTrace. Its parameters are not this
            network's.

    Call it as the network of a Denoiser (prediction_type "epsilon") or of a MatchedTrace.
    """

    denoiser: Denoiser | None

    def __init__(
        self,
        body: nn.Module,
        schedule: Schedule,
        *,
        predicts: str = "epsilon",
        mean: float = 0.0,
        std: float = 1.0,
        denoiser: Denoiser | None = None,
    ) -> None:
        super().__init__()
        check.choice("predicts", predicts, PREDICTS)
        if denoiser is not None and predicts != "paper":
            raise check.mismatch(
                "denoiser", f"None with predicts={predicts!r}", type(denoiser).__name__
            )
        self.mean, self.std = check.constant("mean", mean), check.constant("std", std)
        if not std > 0:
            raise ValueError(f"std: expected a number > 0, got {std}")
        self.body, self.schedule, self.predicts = body, schedule, predicts
        vars(self)["denoiser"] = denoiser  # no submodule: it is not trained with this network

    def extra_repr(self) -> str:
        about = (
            f"{self.schedule!r}, predicts={self.predicts!r}, mean={self.mean:g}, std={self.std:g}"
        )
        return about if self.denoiser is None else f"{about}, denoiser={self.denoiser.short}"

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (a.to(x.dtype) for a in self.schedule(t))
        root = (alpha**2 * self.std**2 + sigma**2).sqrt()
        z = (x - column(alpha, x) * self.mean) / column(root, x)
        out = self.body(z, (sigma / (alpha * self.std)).log())
        if self.predicts == "epsilon":
            return column(sigma / root, x) * z + column(alpha * self.std / root, x) * out
        if self.predicts == "residual":
            return (alpha * self.std / root) ** 2 * _positive(out)
        if self.denoiser is not None:
            with torch.no_grad():
                mean = self.denoiser.denoised(x, t)
            return flat(mean).square().mean(1) + (sigma * self.std / root) ** 2 * _positive(out)
        power, deviation = gaussian_power(self.predicts, x, alpha, sigma, self.mean, self.std)
        return power + deviation * out


def _positive(out: Tensor) -> Tensor:
    """A positive function that is 1 at 0."""
    return nn.functional.softplus(out) / math.log(2)


def gaussian_power(
    of: str, x: Tensor, alpha: Tensor, sigma: Tensor, mean: float, std: float
) -> tuple[Tensor, Tensor]:
    """The mean square p of eps (of = "noise") or x_0 ("paper") given x, for data N(mean, std^2 I),
    and about the standard deviation of that square, each [B].

    With the posterior N(m, r^2 I) of eps or x_0 they are p = |m|^2/d + r^2 and 2 r sqrt(p/d).
    x: [B, *E]; alpha, sigma: [B].
    """
    variance = alpha**2 * std**2 + sigma**2
    offset = x - column(alpha, x) * mean
    if of == "noise":
        centre, r2 = column(sigma / variance, x) * offset, alpha**2 * std**2 / variance
    else:
        centre, r2 = (
            mean + column(alpha * std**2 / variance, x) * offset,
            std**2 * sigma**2 / variance,
        )
    power = flat(centre).square().mean(1) + r2
    return power, 2 * (r2 * power / x.shape[1:].numel()).sqrt()


class VectorNet(nn.Module):
    """A residual MLP for vectors: x [B, d], levels [B] -> [B, d] ("event") or [B] ("scalar").

    Args:
        width, depth: units per layer, hidden layers.
        octaves: the input is joined by sin and cos of w x, w = pi/4 2^k for k = 0 ... octaves - 1,
            each faded by exp(-(w s)^2/2) as noise of standard deviation s fades it, s^2 = sigmoid(2
            level) (that of a Preconditioned's z). For low-dimensional data with edges, which a
            plain MLP blurs.
        seed: of the initial weights; torch's global generator is neither read nor moved.

    Every hidden layer is scaled and shifted by the level. The output starts at 0.
    """

    def __init__(
        self,
        d: int,
        *,
        output: str = "event",
        width: int = 128,
        depth: int = 3,
        octaves: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check.choice("output", output, OUTPUTS)
        self.d, self.output, self.octaves = d, output, octaves
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = [d * (1 + 2 * octaves), *[width] * depth]
            self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
            self.films = nn.ModuleList(_Film(width) for _ in range(depth))
            self.head = _zero(nn.Linear(width, d if output == "event" else 1))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        if x.shape[1:] != (self.d,):
            raise check.mismatch("x", f"shape [B, {self.d}]", list(x.shape))
        code, h = _code(level), x
        if self.octaves:
            omega = torch.pi / 4 * 2 ** torch.arange(self.octaves, dtype=x.dtype, device=x.device)
            fade = torch.exp(-(omega**2) * torch.sigmoid(2 * level)[:, None] / 2)
            angle = x[:, :, None] * omega
            h = torch.cat(
                [x, *((f * fade[:, None]).flatten(1) for f in (angle.sin(), angle.cos()))], 1
            )
        for i, (layer, film) in enumerate(zip(self.layers, self.films, strict=True)):
            new = nn.functional.silu(film(layer(h), code))
            h = h + new if i else new
        out = self.head(h)
        return out if self.output == "event" else out[:, 0]


class _Stage(nn.Module):
    """What a U-Net does at one resolution and all below: x [B, width, H, W], code -> the same shape
    ("event"), or the features at the lowest resolution ("scalar").
    """

    def _build(self, width: int, resolutions: int, output: str) -> int:
        """Makes the layers; returns the width of what comes out."""
        self.output = output
        self.fine = _Block(width)
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        if resolutions == 2:
            self.coarse, out = nn.ModuleList(_Block(2 * width) for _ in range(2)), 2 * width
        else:
            below = _Below()
            out = below._build(2 * width, resolutions - 1, output)
            self.coarse = nn.ModuleList([below])
        if output == "scalar":
            return out
        self.up = nn.Conv2d(2 * width, width, 1)
        self.last = _Block(width)
        return width

    def _features(self, x: Tensor, code: Tensor) -> Tensor:
        fine = self.fine(x, code)
        coarse = self.down(fine)
        for block in self.coarse:
            coarse = block(coarse, code)
        if self.output == "scalar":
            return coarse
        up = nn.functional.interpolate(self.up(coarse), size=fine.shape[2:])
        return self.last(fine + up, code)


class _Below(_Stage):
    forward = _Stage._features


class ImageNet(_Stage):
    """A U-Net for images and latents: x [B, channels, H, W], or [B, H, W] with one channel, levels
    [B] -> x's shape ("event") or [B] ("scalar").

    Args:
        size: (H, W) or H = W, at least 2^(resolutions - 1).
        width: channels at full resolution, a multiple of 8; twice as many at each lower one.
        resolutions: how many there are, each half of the one before, at least 2. For latents of 32
            x 32 take 3, of 64 x 64 take 4: the lowest then has 8 x 8 pixels.
        seed: of the initial weights; torch's global generator is neither read nor moved.

    Every block is scaled and shifted by the noise level [B]; learned positions tell it where it is.
    The output starts at 0. There is no attention: all derivatives exist in every mode.
    """

    def __init__(
        self,
        channels: int,
        size: int | tuple[int, int],
        *,
        output: str = "event",
        width: int = 32,
        resolutions: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check.choice("output", output, OUTPUTS)
        resolutions = check.integer("resolutions", resolutions, 2)
        self.event = (channels, *((size, size) if isinstance(size, int) else size))
        if min(self.event[1:]) < 2 ** (resolutions - 1):
            least = 2 ** (resolutions - 1)
            expected = f"at least {least} pixels a side with resolutions={resolutions}"
            raise check.mismatch("size", expected, size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.first = nn.Conv2d(channels, width, 3, padding=1)
            self.position = nn.Parameter(self.first.weight.new_zeros(width, *self.event[1:]))
            wide = self._build(width, resolutions, output)
            if output == "scalar":
                self.head = _zero(nn.Linear(wide, 1))
            else:
                self.head = _zero(nn.Conv2d(wide, channels, 3, padding=1))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        if tuple(x.shape[1:]) not in (
            self.event,
            self.event[1:] if self.event[0] == 1 else self.event,
        ):
            raise check.mismatch("x", f"shape {words.shape(['B', *self.event])}", list(x.shape))
        start = self.first(x.view(-1, *self.event)) + self.position
        features = self._features(start, _code(level))
        if self.output == "scalar":
            return self.head(features.mean((2, 3)))[:, 0]
        return self.head(nn.functional.silu(features)).view(x.shape)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.film = _Film(width)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        h = self.film(self.one(nn.functional.silu(self.norm(x))), code)
        return x + self.two(nn.functional.silu(h))


class _Film(nn.Module):
    """Scales and shifts features by the noise level: h -> h exp(a) + b, a and b linear in its code,
    so that one weight is a power of sigma. Under autocast they keep the precision of the weights.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(1 + 2 * len(_FREQUENCIES), 2 * width)
        with torch.no_grad():
            self.linear.bias[:width] = 0

    def forward(self, h: Tensor, code: Tensor) -> Tensor:
        with _own_precision(h.device.type):
            a, b = self.linear(code).view(len(code), -1, *[1] * (h.ndim - 2)).chunk(2, 1)
        return h * a.exp() + b


def _own_precision(device: str) -> contextlib.AbstractContextManager[object]:
    """Inside, layers compute in the precision of their weights."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _code(level: Tensor) -> Tensor:
    """The code of a level, [B] -> [B, 9]: itself, its sines and cosines."""
    angle = level[:, None] * level.new_tensor(_FREQUENCIES)
    return torch.cat([level[:, None] / 4, angle.sin(), angle.cos()], 1)


def _zero(layer: nn.Module) -> nn.Module:
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer
