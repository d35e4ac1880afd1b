"""Pairs of noise and sample: of a flow, of real data, and mixtures of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..._torch import check
from ..._torch.objects import ordinary
from .._reporting import Callback, reporting
from ..denoiser import Denoiser, expect_denoiser
from ._straight import (
    TABLEAUS,
    Path,
    advance,
    inverted,
    mixed,
    path_of,
    time_at,
    velocity,
)

__all__ = ["Pairs", "mix", "pairs", "reverse_pairs"]


@dataclass(frozen=True, eq=False)
class Pairs:
    """n pairs of noise x_0 and sample x_1, `noise` and `sample`, each [n, *E] in float32 or
    float64.

    `pairs[rows]` are the pairs of these rows, `len(pairs)` is n.

    Raises:
        TypeError, ValueError: The two are no tensors of one shape, dtype and device.
    """

    noise: Tensor
    sample: Tensor

    def __post_init__(self) -> None:
        check.query("noise", self.noise)
        check.like("sample", self.sample, "noise", self.noise)
        for name in ("noise", "sample"):
            object.__setattr__(self, name, ordinary(getattr(self, name).detach()))

    def __len__(self) -> int:
        return len(self.noise)

    def __getitem__(self, rows: Tensor | slice | list[int]) -> Pairs:
        noise = self.noise[rows]
        if noise.dim() != self.noise.dim():  # its coordinates would be taken for pairs
            raise TypeError(
                f"rows: expected a slice, a list or a tensor [m] of rows, got {type(rows).__name__}"
            )
        return Pairs(noise, self.sample[rows])

    def at(self, t: float | Tensor) -> Tensor:
        """The points (1 - t) x_0 + t x_1 on the chords, [n, *E], at t in [0, 1], a number or
        [n]."""
        return mixed(t, self.noise, self.sample)

    @property
    def noise_power(self) -> float:
        """The mean of |x_0|^2/d: 1 for normal noise. NaN without pairs."""
        return self.noise.double().square().mean().item()

    @property
    def noise_kurtosis(self) -> float:
        """The fourth moment of all numbers in x_0 about their mean, over the square of the second:
        3 for normal noise, 1 for two values. NaN without pairs, or if all numbers are the same.
        """
        centred = self.noise.double() - self.noise.double().mean()
        return (centred.pow(4).mean() / centred.square().mean().square()).item()


@torch.no_grad()
def pairs(
    denoiser: Denoiser,
    noise: Tensor,
    t: Tensor,
    method: str = "heun",
    *,
    callback: Callback | None = None,
    progress: bool = False,
    **conditions: object,
) -> Pairs:
    """The synthetic pairs of a flow: each noise with the sample that the flow carries it to.

    >>> made = pairs(denoiser, torch.randn(5000, 2), torch.linspace(0, 1, 21))

    Args:
        denoiser: the flow. On its own pairs a network learns to be straight.
        noise: x_0, [n, *E], float32 or float64, normal.
        t: nodes, [M + 1], noisiest first; sigma = 0 at the last one (t = 1 of RectifiedFlow) is
            legal where the denoiser has a result there, and so is alpha = 0 at the first. Where
            alpha > 0 at the first, the path starts from sigma x_0 as in `df.sample`: keep it small.
            Where sigma > 0 at the last, a step of Euler's goes on to the data: the sample is the
            posterior mean there. `Denoiser.exact` needs that.
        method: "heun" (second order in alpha/(alpha + sigma), 2 evaluations a step) or "ddim"
            (Euler's method).
        callback: called as callback(done, total) after each step.
        progress: show a bar on stderr.
        conditions: keyword arguments of the network, such as class labels.

    Raises:
        TypeError, ValueError: An argument is wrong, or the network returns another shape, NaN or
            inf; the message names it.
    """
    expect_denoiser(denoiser)
    check.query("noise", noise)
    check.choice("method", method, tuple(TABLEAUS))
    path = path_of(denoiser.schedule, t)
    denoiser.warn_in_training("pairs")
    denoiser = denoiser.bind(**conditions)
    z, last = (1 - path.tau[0]) * noise, len(path.t) - 1
    total = last + (path.tau[-1] < 1)
    with reporting("pairs", callback, progress, total) as report:
        for i in range(last):
            z = advance(denoiser, path, TABLEAUS[method], z, i, i + 1)
            report(i + 1, total)
        if total > last:
            z = z + (1 - path.tau[-1]) * velocity(denoiser, path.scale[-1] * z, path.t[-1])
            report(total, total)
    return Pairs(noise, z)


@torch.no_grad()
def reverse_pairs(
    denoiser: Denoiser,
    real: Tensor,
    t: Tensor,
    generator: torch.Generator,
    method: str = "heun",
    *,
    noise: float = 0.01,
    exact: bool = False,
    callback: Callback | None = None,
    progress: bool = False,
    **conditions: object,
) -> Pairs:
    """The pairs of real data: each with the noise that the flow takes it back to.

    The data y is noised a little, (1 - delta) y + delta xi with xi normal, and goes back from
    there: of an exact flow x_0 is then normal, up to the error of the solver. From y itself it is
    not: on a finite data set the flow cannot be undone at the atoms (x_0 is y again), and a network
    was never trained to undo it. `noise_power` and `noise_kurtosis` of the result tell: 1 and 3.

    Args:
        denoiser: the flow that is reversed. The first round's, frozen, anchors later ones to the
            data; the present one's own map repeats what it knows.
        real: y, [n, *E], float32 or float64.
        t: nodes, [M + 1], noisiest first, as those of `pairs`; those with less noise than delta are
            left out.
        generator: of xi, on any device.
        method: "heun" or "ddim", as for `pairs`.
        noise: delta = sigma/(alpha + sigma), in [0, 1). 0: from y itself.
        exact: False: integrate back. True: undo the steps that `pairs` takes by a fixed point, to
            rounding, in five to ten times the evaluations: `pairs` from x_0 then passes through the
            noised y. Steps back differ from that by the error of the solver. (`df.invert` undoes a
            sampling by O-BELM in one evaluation a step, but carries two states, and x_0 alone does
            not lead back.)
        callback, progress, conditions: as for `pairs`.

    Raises:
        TypeError, ValueError: As `pairs` does; or a step is too long to be undone.
    """
    expect_denoiser(denoiser)
    check.query("real", real)
    check.choice("method", method, tuple(TABLEAUS))
    check.generator(generator)
    noise = check.constant("noise", noise)
    if not 0 <= noise < 1:
        raise check.mismatch("noise", "a number in [0, 1)", noise)
    denoiser.warn_in_training("reverse_pairs")
    path = _down_to(denoiser, path_of(denoiser.schedule, t), noise)
    denoiser = denoiser.bind(**conditions)
    xi = torch.randn(real.shape, dtype=real.dtype, device=generator.device, generator=generator).to(
        real.device
    )
    z, total = mixed(path.tau[-1], xi, real), len(path.t) - 1
    tableau = TABLEAUS[method]
    with reporting("reverse_pairs", callback, progress, total) as report:
        for i in reversed(range(total)):
            back = advance(denoiser, path, tableau, z, i + 1, i)
            if exact:
                what = f"t = {path.t[i].item():g} to {path.t[i + 1].item():g}"
                step = lambda z, i=i: advance(denoiser, path, tableau, z, i, i + 1)
                back = inverted(step, z, back, what)
            z = back
            report(total - i, total)
    return Pairs(z / (1 - path.tau[0]), real)


def _down_to(denoiser: Denoiser, path: Path, noise: float) -> Path:
    """The nodes that are noisier than delta, and one at delta."""
    last = time_at(denoiser.schedule, torch.tensor(1 - noise, dtype=torch.float64, device="cpu"))
    alpha, sigma = denoiser.schedule(last)
    end = (alpha / (alpha + sigma)).item()
    kept = [i for i, tau in enumerate(path.tau) if tau < end]
    if not kept:
        raise check.mismatch(
            "t", f"a node with more noise than {noise:g}", f"{path.t[0].item():g} for the first"
        )
    return path_of(denoiser.schedule, torch.cat([path.t[kept], last[None]]))


def mix(made: Pairs, real: Pairs, ratio: float, generator: torch.Generator) -> Pairs:
    """A mixture of pairs: as many as there are synthetic ones, of which the share `ratio` are real.

    Each result is a pair of one kind or the other; nothing is added to anything. (A sum of
    independent pairs has another law than either: of two normal ones, halved, half the variance.)

    Args:
        made, real: of one event shape, dtype and device.
        ratio: in [0, 1].
        generator: of which rows are taken, and of their order. A row is taken again only after all
            others of its kind.

    Raises:
        TypeError, ValueError: An argument is wrong, or there are no real pairs to take.
    """
    for name, given in (("made", made), ("real", real)):
        check.instance(name, given, Pairs, "Pairs")
    check.like("real.noise", real.noise[:0], "made.noise", made.noise[:0])
    check.generator(generator)
    ratio = check.constant("ratio", ratio)
    if not 0 <= ratio <= 1:
        raise check.mismatch("ratio", "a number in [0, 1]", ratio)
    count = round(ratio * len(made))
    if count and not len(real):
        raise check.mismatch("real", "at least one pair", "none")
    parts = [made[_rows(made, len(made) - count, generator)], real[_rows(real, count, generator)]]
    noise = torch.cat([part.noise for part in parts])
    sample = torch.cat([part.sample for part in parts])
    order = _rows(made, len(made), generator)
    return Pairs(noise[order], sample[order])


def _rows(of: Pairs, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows in random order, each once before any comes again."""
    wide = {"dtype": torch.int64, "device": generator.device}
    rounds = -(-count // max(1, len(of)))
    orders = [torch.randperm(len(of), generator=generator, **wide) for _ in range(rounds)]
    rows = torch.cat([torch.empty(0, **wide), *orders])[:count]
    return rows.to(of.noise.device)
