"""The demo's tables and its page."""

from __future__ import annotations

from pathlib import Path

import torch

from dfkernels._page.html import render
from dfkernels._page.machine import machine

from .speed import PEERS, Speed
from .sweep import CHECKS, LIMIT, Sweep

_HEAD = ("σ", "log q/d", "σ|s|/√d", "σ²trF/d", "σ²λ min", "ESS")
_CAPTIONS = {
    "digits": (
        "The queries are atoms plus noise. At low noise the posterior is one atom: the ideal"
        " denoiser of a finite data set memorises, C = 0 and F = I/σ². As σ grows, other digits"
        " enter, and the leading directions show how the candidates differ: first strokes that tell"
        " two digits apart, at high noise the principal components of the whole set."
    ),
    "patches": (
        "The query is a patch that is not among the atoms. At low noise the ideal denoiser of the"
        " finite set returns the nearest atom, which is a different patch: the score of the"
        " empirical law is exact, and it is not the score of natural images. As σ grows the"
        " directions lose detail: edges, then gradients, colour and brightness, the principal"
        " components of natural patches. Colours are offsets from mid-grey."
    ),
    "noise": (
        "Median and 10–90 % band over the queries. Where ESS = 1 the trace is d/σ² and says nothing"
        " about the data. Dashed: σ² tr (S + σ²I)⁻¹ / d, exact if the data were Gaussian with the"
        " same covariance S; the curves meet it at high noise. Middle: below zero, log q is not"
        " concave at the query, which lies between atoms that compete for it."
    ),
    "accuracy": (
        "Every point is the largest error over the checked queries, all atoms included, against"
        " float64: the difference-form reference, autograd for the score, and a second derivative"
        " by autograd for F v = λv. Units: relative for log q and ESS; per √d for score (× σ) and"
        " images; per d for tr F (× σ²); of |F|₂ for eigenpairs. The dashed curve is tr F in"
        " float32 as d/σ² − (E|y|² − |Ey|²)/σ⁴ with expanded logits."
    ),
    "speed": (
        "One call at σ = 1 in float32: log q, mean, tr F and ESS by dfkernels and by plain PyTorch"
        " (addmm, softmax, mm); log q and mean only by SDPA. Numbers: time of the faster peer over"
        " ours. Medians, same inputs, same process."
    ),
}
_FORMULAS = (
    ("weights", "wᵢ ∝ πᵢ exp(−|uᵢ|²/2),  uᵢ = (x − αyᵢ)/σ"),
    ("log-density", "log q(x) = log Σᵢ πᵢ exp(−|uᵢ|²/2) − (d/2) log 2πσ²"),
    ("denoised, score", "ȳ = Σᵢ wᵢ yᵢ,   ∇ log q = (αȳ − x)/σ²"),
    ("Fisher", "F = −∇² log q = I/σ² − (α²/σ⁴) C,   C = Σᵢ wᵢ (yᵢ − ȳ)(yᵢ − ȳ)ᵀ"),
    ("trace, ESS", "tr F = (d − Σᵢ wᵢ |uᵢ − ū|²)/σ²,   ESS = 1/Σᵢ wᵢ²"),
)


def sweep_rows(sweep: Sweep) -> list[list[str]]:
    """One row per noise level: medians over the queries, then the largest errors."""
    rows = []
    for s, sigma in enumerate(sweep.data.sigma.tolist()):
        row = [
            f"{sigma:.3g}",
            f"{sweep.log_prob[s].median() / sweep.data.cloud.d:+.3f}",
            f"{sweep.score_rms[s].median():.3f}",
        ]
        row += [
            f"{sweep.trace[s].median():+.4f}",
            f"{sweep.small[s, :, 0].median():+.3f}",
            f"{sweep.ess[s].median():.1f}",
        ]
        rows.append(row + [_error(e) for e in sweep.errors[s].tolist()])
    return rows


def speed_rows(speed: Speed) -> list[list[str]]:
    """One row per batch: milliseconds of each peer, and the faster peer's time over ours."""
    rows = []
    for b, ms in zip(speed.batch, speed.ms, strict=True):
        rows.append(
            [speed.data.name, str(b), *[f"{t:.3g}" for t in ms], f"{min(ms[1:]) / ms[0]:.1f}×"]
        )
    return rows


def _error(value: float) -> str:
    shown = "<1e-9" if value < 1e-9 else f"{value:.0e}".replace("e-0", "e-")
    return shown if value <= LIMIT else f"{shown} !"  # NaN fails, too


def sweep_head() -> list[str]:
    return [*_HEAD, *CHECKS]


def speed_head() -> list[str]:
    return ["data", "queries", *[f"{name}, ms" for name in PEERS], "best peer / ours"]


def describe(sweep: Sweep) -> str:
    """What a table is about, in one line."""
    data = sweep.data
    checked = (
        "all of them"
        if data.references >= len(data.clean)
        else f"{data.references} of them at each level"
    )
    return (
        f"{data.name}: {data.source}; N = {len(data.cloud):,}, d = {data.cloud.d},"
        f" {len(data.clean)} queries ({data.queries}); {checked} checked against float64 over all N"
        f" atoms, eigenpairs on {data.eigen}"
    )


def worst(sweeps: list[Sweep]) -> float:
    """The largest error of all checks; NaN if any is."""
    return torch.cat([s.errors.flatten() for s in sweeps]).max().item()


def page(
    sweeps: list[Sweep],
    speeds: list[Speed],
    light: dict[str, bytes],
    dark: dict[str, bytes],
    seconds: float,
) -> str:
    """The whole page; figures inlined, the dark ones for readers whose system asks for dark."""
    ratios = torch.tensor([min(ms[1:]) / ms[0] for speed in speeds for ms in speed.ms])
    facts = (
        (f"{sum(len(s.data.cloud) for s in sweeps):,}", "atoms, two real data sets"),
        (f"{sum(s.ess.numel() for s in sweeps):,}", "queries, each with its own σ"),
        (
            _error(worst(sweeps)),
            f"largest error of {len(CHECKS)} quantities (limit {_error(LIMIT)})",
        ),
        (f"{ratios.log().mean().exp():.1f}×", "the speed of the best peer (geometric mean)"),
        (f"{seconds:.0f} s", "for everything on this page"),
    )
    titles = {
        "digits": "Digits",
        "patches": "Photograph patches",
        "noise": "From memory to principal components",
        "accuracy": "Accuracy",
        "speed": "Speed",
    }
    return render(
        Path(__file__).with_name("page.html"),
        title="dfkernels: the diffusion Fisher on real data",
        facts=facts,
        formulas=_FORMULAS,
        figures=[(name, titles[name], _CAPTIONS[name], light[name], dark[name]) for name in light],
        tables={each.data.name: (describe(each), sweep_rows(each)) for each in sweeps},
        sweep_head=sweep_head(),
        rule=len(_HEAD),
        speed_head=speed_head(),
        speed_rows=[row for speed in speeds for row in speed_rows(speed)],
        machine=machine(),
    )
