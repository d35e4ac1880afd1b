"""The errata's other half: bounds on the error of DF-TM and DF-EA that do not hold, and the cost of
a trace."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dfkernels import ops
from dfkernels.methods.endpoint import bound as endpoint_bound
from dfkernels.methods.trace_matching import bound as trace_bound
from dfkernels.ops.posterior.reference import weights as posterior_weights
from dfkernels.schedule import VP

from .section import Claim, Table

LIMIT = 1e-10  # of a right formula's relative error; float64, up to some hundred roundings
_CASES = 2000  # random ones, per bound


@dataclass(frozen=True)
class Bound:
    """An approximation's error in the counter-example, both bounds, and the largest ratio of error
    to right bound in random cases.
    """

    where: str
    printed: str
    right: str
    shown: str
    error: float
    bounds: tuple[float, float]  # printed, right
    largest: float

    @property
    def holds(self) -> bool:
        return self.bounds[0] < self.error <= self.bounds[1] and self.largest <= 1


def atoms(
    n: int, d: int, seed: int, alpha: Tensor | float = 1.0, sigma: Tensor | float = 0.5
) -> tuple[Tensor, Tensor]:
    """(y [n, d], x [d]): atoms, and the first of them in noise."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randn(n, d, dtype=torch.float64, generator=draw)
    return y, alpha * y[0] + sigma * torch.randn(d, dtype=torch.float64, generator=draw)


def number(value: Tensor | float) -> str:
    return f"{float(value):.4g}".replace("-", "−")


# ---- bounds


def _cases() -> tuple[Tensor, ...]:
    """Random x [B, 4], y [8, 4], alpha [B], sigma [B], the index of an atom [B], and errors of eps
    [B, 4]."""
    draw = torch.Generator().manual_seed(7)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(_CASES, dtype=torch.float64, generator=draw)

    y = 2 * torch.randn(8, 4, dtype=torch.float64, generator=draw)
    alpha, sigma = uniform(0.1, 1), 10 ** uniform(-1.5, 0.5)
    atom = torch.randint(8, (_CASES,), generator=draw)
    noise, shift = torch.randn(2, _CASES, 4, dtype=torch.float64, generator=draw)
    x = alpha[:, None] * y[atom] + sigma[:, None] * noise
    return x, y, alpha, sigma, atom, shift * 10 ** uniform(-4, -1)[:, None]


def _trace_error(x: Tensor, y: Tensor, alpha: Tensor, sigma: Tensor, shift: Tensor) -> Tensor:
    """Error of eq. 17, [B], with the exact t_theta = E|y|^2/d (d1 = 0) and eps_theta = eps +
    shift."""
    w = posterior_weights(x, y, alpha, sigma)[-1]
    p = ops.posterior(x, y, alpha, sigma)
    m, eps = w @ y.square().mean(1), p.eps(x, alpha, sigma) + shift
    return (ops.matched_trace(m, eps, alpha, sigma, x=x, form="paper") - p.fisher_trace).abs()


def prop7() -> Bound:
    """The printed bound on the trace's error lacks the cross term (2 alpha D_y/sigma^3) d2."""
    one = torch.ones(1, 4, dtype=torch.float64)
    alpha, sigma, delta = (
        torch.ones(2, dtype=torch.float64)[:1],
        torch.full_like(one[0, :1], 0.5),
        1e-3,
    )
    y = torch.cat([2 * one, 1.8 * one])
    error = _trace_error(1.9 * one, y, alpha, sigma, -delta * one / one.norm())
    size = {"trace_error": 0.0, "eps_error": delta}  # radius = 0 leaves the cross term out
    bounds = [trace_bound(alpha, sigma, 4, **size, form="paper", radius=r) for r in (0.0, 4.0)]
    x, y, alpha, sigma, _, shift = _cases()
    size = {
        "trace_error": 0.0,
        "eps_error": shift.norm(dim=1),
        "radius": y.norm(dim=1).max().item(),
    }
    right = trace_bound(alpha, sigma, 4, **size, form="paper")
    ratio = _trace_error(x, y, alpha, sigma, shift) / right
    return Bound(
        "Prop. 7", "(α² d/σ⁴) δ₁ + δ₂²/σ²", "(α² d/σ⁴) δ₁ + (2α D_y/σ³) δ₂ + δ₂²/σ²",
        "tr F by eq. 17; two atoms, d = 4, σ = 0.5, δ₁ = 0, δ₂ = 10⁻³",
        error.item(), (float(bounds[0]), float(bounds[1])), ratio.max().item(),
    )  # fmt: skip


def _endpoint_error(
    x: Tensor, y: Tensor, alpha: Tensor, sigma: Tensor, x0: Tensor, shift: Tensor
) -> Tensor:
    """|F - F_paper| (Hilbert-Schmidt), [B], with eps_theta = eps + shift in eq. 20."""
    mean = ops.posterior(x, y, alpha, sigma).mean - (sigma / alpha)[:, None] * shift
    columns = torch.eye(x.shape[1], dtype=x.dtype).expand(len(x), -1, -1)
    wrong = ops.endpoint_matvec(columns, x0, mean, alpha, sigma)
    return (wrong - ops.fisher_dense(x, y, alpha, sigma)).flatten(1).norm(dim=1)


def prop8() -> Bound:
    """The printed bound on eq. 20's error has the wrong power of sigma."""
    y = torch.eye(2, dtype=torch.float64)
    alpha, sigma = torch.ones_like(y[0, :1]), torch.full_like(y[0, :1], 0.05)
    error = _endpoint_error(
        y.mean(0, keepdim=True), y, alpha, sigma, y[:1], torch.zeros_like(y[:1])
    )
    right = endpoint_bound(alpha, sigma, eps_error=0.0, radius=1.0)
    x, y, a, s, atom, shift = _cases()
    most = endpoint_bound(a, s, eps_error=shift.norm(dim=1), radius=y.norm(dim=1).max().item())
    ratio = _endpoint_error(x, y, a, s, y[atom], shift) / most
    return Bound(
        "Prop. 8", "of order 1/σ³, in other units", "2α² D_y²/σ⁴ + 2α D_y δ₂/σ³ + δ₂²/σ²",
        "F by eq. 20, Hilbert–Schmidt; atoms e₁, e₂, x between them, x₀ = e₁, σ = 0.05, δ₂ = 0",
        error.item(), (2 / sigma.item() ** 3, float(right)), ratio.max().item(),
    )  # fmt: skip


# ---- cost


def costs() -> tuple[Table, Claim]:
    """tr F = tr(J_eps)/sigma by reverse mode: d products for the exact trace, 1 for an unbiased
    estimate."""
    alpha, sigma = VP()(torch.tensor(0.5, dtype=torch.float64))
    y, x = atoms(200, 64, 5, alpha, sigma)
    truth = ops.posterior(x[None], y, alpha, sigma).fisher_trace.item()
    _, product, *_ = torch.func.vjp(
        lambda x: ops.posterior(x[None], y, alpha, sigma).eps(x[None], alpha, sigma)[0], x
    )
    exact = [(product(e)[0] @ e / sigma).item() for e in torch.eye(len(x), dtype=x.dtype)]
    draw = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (400, len(x)), generator=draw).to(x.dtype) * 2 - 1
    probes = torch.stack([product(v)[0] @ v / sigma for v in signs])
    mean, error = probes.mean().item(), probes.std().item() / math.sqrt(len(probes))
    off = abs(mean - truth) / error
    rows = [
        [
            "exact: Σ ⟨eᵢ, Jᵀ eᵢ⟩/σ",
            str(len(exact)),
            number(sum(exact)),
            f"{abs(sum(exact) / truth - 1):.0e}",
        ],
        [
            "Hutchinson, one probe",
            "1",
            number(probes[0]),
            f"{100 * probes.std().item() / truth:.1f} %",
        ],
        [
            f"Hutchinson, {len(probes)} probes",
            str(len(probes)),
            number(mean),
            f"{100 * error / truth:.1f} %",
        ],
    ]
    note = (
        f"d = {len(x)}, N = {len(y)}, VP, t = 0.5; tr F = {number(truth)}. Errors: relative, of the"
        " estimates one standard deviation. The paper sets O(d²) against its own O(d); the"
        " alternative in use costs one product, and has variance instead of bias."
    )
    table = Table(
        "The trace by vector-Jacobian products", ["method", "VJPs", "tr F", "error"], rows, note
    )
    holds = len(exact) == len(x) and abs(sum(exact) / truth - 1) < LIMIT and off < 4
    reached = (
        f"d = {len(exact)} VJPs exact; one VJP off by {off:.1f} standard errors over {len(probes)}"
        " probes"
    )
    return table, Claim("cost of the trace: one VJP is unbiased", reached, "< 4", holds, check=True)


# ---- tables and claims


def bounds_table(bounds: list[Bound]) -> Table:
    rows = [
        [b.where, b.shown, *(f"{v:.2g}" for v in (b.error, *b.bounds)), f"{b.largest:.2f}"]
        for b in bounds
    ]
    head = [
        "where",
        "counter-example",
        "error",
        "printed bound",
        "right bound",
        "error/right, at most",
    ]
    note = (
        f"Last column: the largest ratio in {_CASES} random cases (8 atoms, d = 4, σ from 0.03"
        " to 3)."
    )
    return Table("Bounds against the error", head, rows, note)


def bound_claim(b: Bound) -> Claim:
    reached = f"{b.error:.2g}; printed {b.bounds[0]:.2g}, right {b.bounds[1]:.2g}"
    return Claim(
        f"{b.where}: error against the bounds",
        reached,
        "printed < error ≤ right",
        b.holds,
        check=True,
    )
