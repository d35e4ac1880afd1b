"""Tables of reflow."""

from __future__ import annotations

from .reflow_linear import AUTOENCODER, EARLIER, ROUNDS, Flow
from .reflow_networks import KINDS, NOISE, SHARE, SOLVERS, Study
from .section import Table


def autoencoders(closed, trials, sizes: tuple[int, int]) -> Table:
    rows = []
    for (noise, share), values in closed.items():
        mean, error = trials[noise, share]
        cells = [f"{noise:g}", f"{share:.0%}"]
        for i, k in enumerate(ROUNDS):
            derived, value = AUTOENCODER[noise, share][i], values[k - 1]
            cells += [f"{derived:.3g}", f"{value:.3g}" if value < 1e-3 else f"{value:.4f}"]
            cells += [f"{mean[k - 1]:.3f} ± {error[k - 1]:.3f}"]
        rows.append(cells)
    head = ["σ²", "real"]
    for k in ROUNDS:
        head += [f"{k}: derived", "closed form", "simulated"]
    return Table(
        "Variance of a linear denoising autoencoder's data after 1, 5, 10, 50 rounds",
        head,
        rows,
        "s' = S²/(S + σ²), S = λ + (1 − λ) s, from s = 1: each eigenvalue by itself. Simulated:"
        f" least squares on {sizes[0]:,} scalars a round, mean and standard error of {sizes[1]}"
        " runs.",
    )


def linear_flows(linear: dict[tuple[str, float], Flow], runs: int, pairs: int) -> Table:
    rows = []
    for (real, share), flow in linear.items():
        earlier, earlier_one = EARLIER[real, share]
        cells = [real, f"{share:.0%}" if share else "–"]
        for k in (1, 2, 5, 10, 20):
            found = f"{flow.fine[k - 1].mean():.3f} ± {flow.fine[k - 1].std():.3f}"
            cells.append(f"{found} ({earlier[k]:.3f})" if k in earlier else found)
        cells.append(f"{flow.one.mean():.3f} ± {flow.one.std():.3f} ({earlier_one:.3f})")
        rows.append(cells)
    return Table(
        "Linear flow between Gaussians, ridge 0.05: top eigenvalue over the truth's, by round",
        ["real pairs", "share", "1", "2", "5", "10", "20", "20, one step"],
        rows,
        f"d = 10, unit variances, correlation 0.8, {pairs:,} new pairs a round, 50 steps of Euler's"
        f" method. Mean and standard deviation of {runs} runs; in brackets the numbers of one"
        " earlier run, of one seed in all rows.",
    )


def network_rounds(name: str, s: Study) -> Table:
    rows = []
    for kind, rounds in s.rounds.items():
        for k, found in enumerate(rounds, 1):
            if k == 1 and kind != KINDS[0]:
                continue
            law = found.laws["Heun"]
            rows.append(
                [
                    "first round" if k == 1 else kind,
                    str(k),
                    f"{1e3 * law.energy:.2f}",
                    f"{law.top:.3f}",
                    f"{law.recall:.1%}",
                    f"{found.straight.value:.4f} ± {found.straight.error:.4f}",
                ]
            )
    real = s.real
    rows.append(["the truth", "", f"{1e3 * real.energy:.2f}", f"{real.top:.3f}",
                 f"{real.recall:.1%}", ""])  # fmt: skip
    return Table(
        f"Networks, {name}: the law and the paths by round",
        ["real pairs", "round", "energy distance ×10³", "top eigenvalue", "recall", "straightness"],
        rows,
        "Samples by Heun's method, 20 steps, from the same noise throughout. Energy distance:"
        " without a point's distance to itself, so that two samples of one law have 0 on average."
        " The truth's row, the floor of what can be told: the mean of eight other draws; of the"
        " digits, the training images. Top eigenvalue: of the covariance, over the truth's. Recall:"
        " share of held-out points with a sample nearer than the median distance of held-out points"
        " to as many of the truth. Straightness: of the flow's own pairs, with its standard error;"
        " 0 is straight.",
    )


def solvers(studies: dict[str, Study]) -> Table:
    rows = []
    for name, s in studies.items():
        for label, found in [("first round", s.rounds[KINDS[0]][0])] + [
            (kind, rounds[-1]) for kind, rounds in s.rounds.items()
        ]:
            laws = [found.laws[solver] for solver in SOLVERS]
            cells = [f"{1e3 * law.energy:.2f}" for law in laws]
            cells += [f"{law.recall:.1%}" for law in laws]
            rows.append([name, label, *cells])
    return Table(
        "Networks, last round: by a fine solver, by 10 steps of Euler's method and by one",
        ["set", "real pairs", *[f"energy ×10³, {s}" for s in SOLVERS],
         *[f"recall, {s}" for s in SOLVERS]],
        rows,
        "Of the first round: before any reflow.",
    )  # fmt: skip


def reversals(atoms, studies: dict[str, Study]) -> Table:
    show = lambda power, kurtosis: f"{power:.3f}, {kurtosis:.2f}"
    rows = [
        [f"digits, exact flow, δ = {delta:g}", *[show(*atoms[delta][start]) for start in
         ("y", "t y", "t y + δ ξ")]] for delta in atoms
    ]  # fmt: skip
    rows += [
        [f"{name}, network", show(*s.reversed["from y itself"]), "–",
         show(*s.reversed["re-noised"])] for name, s in studies.items()
    ]  # fmt: skip
    return Table(
        "x₀ of reversed data: |x₀|²/d and kurtosis (normal: 1 and 3)",
        ["flow", "from y", "from t y", "from t y + δ ξ"],
        rows,
        "Digits: 200 of them are all the data (d = 64), Heun, 60 steps, from t = 1 − δ. Networks:"
        f" δ = {NOISE:g} where re-noised, otherwise from y at t = 1.",
    )


def unsound(mixed, undone: dict[str, float], n: int) -> Table:
    rows = [
        [f"{name}: variance, energy distance ×10³", f"{v:.3f}, {1e3 * e:.1f}"]
        for name, (v, e) in mixed.items()
    ]
    rows += [
        [f"round trip on the chessboard's network: {name}", f"{error:.0e}"]
        for name, error in undone.items()
    ]
    return Table(
        "Mixtures and inverses",
        ["what", "found"],
        rows,
        f"Mixtures of perfect pairs, {n:,} chessboard points, λ = {SHARE}; variance over the"
        " truth's. Round trip: root mean square of what is missing in x at t = 0.02 after 20 steps"
        " to t = 0.98 and 20 back, in float64.",
    )
