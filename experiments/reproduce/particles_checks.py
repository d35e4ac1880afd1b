"""What holds of the particle flows exactly, and three statements of public code that do not."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkernels.methods.particles import KL, Flow, Kalman, Particles, Stein, evolve

from .particles_laws import Law, modes_in_ten
from .section import Claim, Table

F64 = torch.float64
_H = 8.0  # a fixed bandwidth


@dataclass(frozen=True)
class Found:
    """Errors that have to vanish, and what the other forms give."""

    force: float  # of "blob" against autograd of its functional, relative
    gfsd: float  # of "gfsd" against the same
    hamiltonian: dict[str, float]  # of the equations of motion, relative
    rises: int  # of F along a gradient flow with weights, in steps
    mass: float  # |sum w - 1|
    linear: float  # the smallest weight after one step by the linear factor, at a tau = .01 * 200
    exact: float  # by the exponential: the smallest log weight
    far: tuple[float, float]  # the potential of the two modes far out, by exponentials, and by ours


def run() -> Found:
    law = modes_in_ten()
    generator = torch.Generator().manual_seed(5)
    x, v = (torch.randn(40, 10, dtype=F64, generator=generator) for _ in range(2))
    p = Particles(x, torch.randn(40, dtype=F64, generator=generator), v)
    want = _by_autograd(law, p)
    blob, gfsd = (KL(law.log_density, smoothing=s, bandwidth=_H)(p) for s in ("blob", "gfsd"))
    falling = Flow(KL(law.log_density, bandwidth=_H), 0.01, None, weight_rate=1.0)
    path = evolve(falling, Particles(x), 30)
    assert blob.value is not None
    factor = 1 - 0.01 * 200 * (blob.value - p.weights @ blob.value)
    violent = Flow(KL(law.log_density, bandwidth=_H), 0.01, None, weight_rate=200.0).step(p)
    out = torch.full((1, 10), 30.0, dtype=F64)
    return Found(
        _apart(blob.gradient, want),
        _apart(gfsd.gradient, want),
        {type(m).__name__: _not_hamiltons(law, m, p) for m in (Kalman(), Stein(_H))},
        int((path.energy.diff() >= 0).sum()),
        abs(float(path.particles.weights.sum()) - 1),
        float((p.weights * factor).min()),
        float(violent.log_w.min()),
        (_by_exponentials(law, out), -float(law.log_density(out))),
    )


def _apart(found: Tensor, want: Tensor) -> float:
    return float((found - want).abs().max() / want.abs().max())


def _kernel(x: Tensor) -> Tensor:
    return torch.exp(-(x[:, None] - x[None]).square().sum(2) / _H)


def _by_autograd(law: Law, p: Particles) -> Tensor:
    """(1/w_i) d/dx_i of sum_i w_i (log q_i + U_i), on the dense kernel."""
    x = p.x.clone().requires_grad_()
    energy = (p.weights * ((_kernel(x) @ p.weights).log() - law.log_density(x))).sum()
    (found,) = torch.autograd.grad(energy, x)
    return found / p.weights[:, None]


def _not_hamiltons(law: Law, metric: Kalman | Stein, p: Particles) -> float:
    """How far the equations of motion, with weights held, no friction and the potential alone, are
    from Hamilton's, dx_i/dt = (1/w_i) dH/dv_i and dv_i/dt = -(1/w_i) dH/dx_i, by autograd of H."""
    x, v, w = p.x.clone().requires_grad_(), p.v.clone().requires_grad_(), p.weights
    if isinstance(metric, Kalman):
        off = x - w @ x
        moved = v @ ((w[:, None] * off).T @ off)
    else:
        moved = _kernel(x) * w @ v
    value = law.log_density(x)
    (score,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
    energy = (w * ((v * moved).sum(1) / 2 - value)).sum()
    in_x, in_v = (t / w[:, None] for t in torch.autograd.grad(energy, (x, v)))
    rate = score - metric.kinetic_gradient(p)
    return max(_apart(metric.position_rate(p, p.v), in_v), _apart(rate, -in_x))


def _by_exponentials(law: Law, x: Tensor) -> float:
    densities = torch.exp(-(x[:, None] - law.means).square().sum(2) / 2)
    return -float((densities @ law.shares).log())


def table(found: Found) -> Table:
    return Table(
        "In public code, and right",
        ["statement", "as coded", "right form"],
        [
            [
                "weights after a step, w (1 − aτ (Φ − ⟨Φ⟩)) against w exp(−aτΦ), aτ = 2: the least",
                f"{found.linear:.2g}",
                f"exp({found.exact:.0f})",
            ],
            [
                "potential of two modes by the log of a sum of exponentials, at (30, ..., 30)",
                f"{found.far[0]:g}",
                f"{found.far[1]:.1f}",
            ],
            [
                "force of GFSD as the gradient of Σ wᵢ (log qᵢ + Uᵢ), relative error (right:"
                " BLOB's)",
                f"{found.gfsd:.2f}",
                f"{found.force:.0e}",
            ],
        ],
        "40 particles with unequal weights, the two modes in ten dimensions, h = 8. The first two"
        " are"
        " of the DPVI code; a weight below zero ends its run. The third is no error of anybody's:"
        " GFSD's force is not the gradient of this functional, and no other is known for it.",
    )


def claims(found: Found) -> list[Claim]:
    rows = [("BLOB's force is its functional's gradient, by autograd", found.force, 1e-12)]
    for metric, drift in found.hamiltonian.items():
        rows.append((f"{metric}: the equations of motion are Hamilton's", drift, 1e-12))
    rows.append(("weights add up to 1 after 30 steps", found.mass, 1e-12))
    out = [Claim(what, f"{v:.0e}", f"< {most:.0e}", v < most, True) for what, v, most in rows]
    rises = found.rises
    out.append(Claim("BLOB: steps in which F rises", str(rises), "0 of 30", rises == 0, True))
    kept = math.isfinite(found.exact) and found.linear < 0
    out.append(
        Claim(
            "weights stay positive where the linear factor makes them negative",
            f"exp({found.exact:.0f})", "> 0", kept, True,
        )
    )  # fmt: skip
    return out
