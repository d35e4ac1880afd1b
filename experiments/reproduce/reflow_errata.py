"""Reflow: what is unsound as it is usually written, shown in numbers: a convex combination of
samples, a reversal from the atoms, and steps of Euler's method taken back.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import dfkernels as df
from dfkernels.methods import reflow
from dfkernels.methods.denoiser import Denoiser

from . import digits
from .reflow_networks import chessboard_points, energy_distance

__all__ = ["cloud", "inverses", "mixtures"]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixtures(n: int, share: float) -> dict[str, tuple[float, float]]:
    """Variance over the truth's, and energy distance from it, of n chessboard points: a mixture of
    pairs, and eq. 11 of the first version read literally, where both kinds are perfect and
    independent."""
    generator = _seeded(5)
    made, real = (
        reflow.Pairs(torch.randn(n, 2, generator=generator), chessboard_points(n, generator))
        for _ in range(2)
    )
    truth = chessboard_points(n, generator)
    found = {
        "a mixture of pairs": reflow.mix(made, real, share, generator).sample,
        "convex combinations": (1 - share) * made.sample + share * real.sample,
    }
    variance = lambda x: x.var(0).mean().item()
    return {
        name: (variance(x) / variance(truth), energy_distance(x, truth))
        for name, x in found.items()
    }


def cloud(
    atoms: int, steps: int, deltas: tuple[float, ...]
) -> dict[float, dict[str, tuple[float, float]]]:
    """Power and kurtosis of x_0 from digits by the exact flow of these digits, started at t = 1 -
    delta from y itself, from t y, and from t y + delta xi."""
    y = digits.load().train[:atoms].flatten(1).double()
    flow = Denoiser.exact(df.PointCloud(y), df.schedule.RectifiedFlow())
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:-1]

    def measured(pairs: reflow.Pairs) -> tuple[float, float]:
        return pairs.noise_power, pairs.noise_kurtosis

    found = {}
    for seed, delta in enumerate(deltas):
        nodes = torch.cat([t[t < 1 - delta], torch.tensor([1 - delta], dtype=torch.float64)])
        noised = reflow.reverse_pairs(flow, y, t, _seeded(seed), noise=delta)
        found[delta] = {
            "y": measured(reflow.Pairs(_back(flow, y, nodes), y)),
            "t y": measured(reflow.Pairs(_back(flow, (1 - delta) * y, nodes), y)),
            "t y + δ ξ": measured(noised),
        }
    return found


def _back(flow: Denoiser, x: Tensor, t: Tensor) -> Tensor:
    """Heun's method from x at t[-1] to t[0]."""
    for after, before in zip(t.flip(0).tolist(), t.flip(0).tolist()[1:], strict=False):
        h = before - after
        slope = reflow.velocity(flow, x, after)
        x = x + h / 2 * (slope + reflow.velocity(flow, x + h * slope, before))
    return x


def inverses(flow: Denoiser, n: int, steps: int = 20) -> dict[str, float]:
    """The root mean square of what is missing after a sampling and its reversal, both in `steps`
    steps, from t = 0.02 to 0.98 of a flow, computed in float64."""
    assert isinstance(flow.network, torch.nn.Module)
    wide = Denoiser(copy.deepcopy(flow.network).double(), flow.schedule, "flow")
    t = torch.linspace(0.02, 0.98, steps + 1, dtype=torch.float64)
    noise = torch.randn(n, 2, generator=_seeded(6), dtype=torch.float64)
    start = (1 - t[0]) * noise
    size = lambda x: x.square().mean().sqrt().item()
    found = {}
    with torch.no_grad():
        end = df.sample(wide, start, t, method="ddim").x[-1]
        for name, exact in (("Euler, steps taken back", False), ("Euler, fixed point", True)):
            # from `end` itself: with delta = 0 at a node of its own, the last
            found[name] = size(_undone(wide, end, t, exact) - start)
        path = df.sample(wide, start, t, method="o-belm")
        back = df.invert(wide, path.x[-1], t, second=path.x[-2])
        found["O-BELM, `df.invert`"] = size(back.x[-1] - start)
    return found


def _undone(flow: Denoiser, end: Tensor, t: Tensor, exact: bool) -> Tensor:
    """x at t[0] from x at t[-1]: reverse_pairs gets the data y with t y + delta xi = end."""
    delta = 1 - t[-1].item()
    xi = torch.randn(end.shape, dtype=end.dtype, generator=_seeded(7))
    y = (end - delta * xi) / (1 - delta)
    back = reflow.reverse_pairs(flow, y, t, _seeded(7), "ddim", noise=delta, exact=exact)
    return (1 - t[0]) * back.noise
