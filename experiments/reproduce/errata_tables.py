"""How the errata are shown: a formula's two forms, tables, claims and the figure."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.figure import Figure
from torch import Tensor

from dfkernels._page.theme import Theme

from .errata_bounds import LIMIT, Bound
from .section import Claim, Table


@dataclass(frozen=True)
class Formula:
    """A printed formula against the right one: values, and relative errors against the truth."""

    where: str
    printed: str
    right: str
    shown: str  # the quantity, and where it is evaluated
    values: tuple[str, ...]  # truth, printed, right
    errors: tuple[float, float]  # printed, right
    limit: float = LIMIT

    @property
    def holds(self) -> bool:
        return self.errors[1] < self.limit and self.errors[0] > 0.01


def forms(formulas: list[Formula], bounds: list[Bound]) -> Table:
    return Table(
        "Printed and right",
        ["where", "printed", "right"],
        [[e.where, e.printed, e.right] for e in (*formulas, *bounds)],
        "D_y: the largest |y|; δ₁, δ₂: errors of the trace network and of ε_θ (2-norm); ε: the"
        " ideal noise prediction. Alg. 2, line 6: A is the Jacobian of the map from noise to data."
        " The printed eq. 15, Alg. 2, line 2, and Prop. 8 are given by their sense, not to the"
        " letter.",
    )


def values(formulas: list[Formula]) -> Table:
    rows = [[f.where, f.shown, *f.values, *(f"{e:.2g}" for e in f.errors)] for f in formulas]
    head = ["where", "quantity", "truth", "printed", "right", "error, printed", "error, right"]
    return Table("Formulas against the truth", head, rows, "Errors are relative.")


def flow_table(ranges: dict[str, tuple[list[float], list[float]]], times: Tensor) -> Table:
    rows = [
        [name, f"{min(wrong):.3g}", f"{max(wrong):.3g}", f"{max(right):.0e}"]
        for name, (wrong, right) in ranges.items()
    ]
    head = ["schedule", "printed, least", "printed, largest", "right, largest"]
    note = (
        f"|B − dh/dx|/|dh/dx| at t = {times[0]:.1f}, ..., {times[-1]:.1f}; h by autograd of log q."
    )
    return Table("Eq. 22: relative error of the flow's Jacobian", head, rows, note)


def asymmetry_table(asymmetries: dict[str, tuple[float, float]]) -> Table:
    rows = [
        [name, f"{100 * wrong:.2f} %", f"{100 * true:.2f} %"]
        for name, (wrong, true) in asymmetries.items()
    ]
    note = "Mean over 4096 chains of 999 steps, three atoms, the authors' schedules (see Table 3)."
    return Table(
        "Alg. 2, line 6: asymmetry of the Jacobian", ["schedule", "as printed", "true"], rows, note
    )


def asymmetry_claim(asymmetries: dict[str, tuple[float, float]]) -> Claim:
    wrong, true = max(w for w, _ in asymmetries.values()), min(t for _, t in asymmetries.values())
    what, holds = "Alg. 2, line 6: asymmetry, four schedules", wrong < 0.15 and true > 0.2
    reached = f"printed ≤ {100 * wrong:.1f} %, true ≥ {100 * true:.1f} %"
    return Claim(what, reached, "printed < 15 %, true > 20 %", holds, check=True)


def formula_claim(f: Formula) -> Claim:
    reached = f"right {f.errors[1]:.1g}, printed {f.errors[0]:.2g}"
    target = f"right < {f.limit:.0e}, printed > 0.01"
    return Claim(f"{f.where}: relative error", reached, target, f.holds, check=True)


def core_claim(errors: dict[str, float]) -> Claim:
    largest = max(errors.values())
    what = f"{', '.join(errors)} as printed: relative error"
    return Claim(what, f"{largest:.0e}", f"< {LIMIT:.0e}", largest < LIMIT, check=True)


def draw(formulas: list[Formula], theme: Theme) -> Figure:
    figure = Figure(figsize=(8.6, 2.9), layout="constrained")
    axis = figure.subplots()
    names = [f.where for f in formulas][::-1]
    for j, (label, mark) in enumerate((("as printed", "X"), ("right form", "o"))):
        errors = [max(f.errors[j], 1e-17) for f in formulas][::-1]
        axis.plot(errors, names, mark, color=theme.series[1 - j], markersize=7, label=label)
    for name, f in zip(names, formulas[::-1], strict=True):
        axis.plot(
            [max(f.errors[1], 1e-17), f.errors[0]],
            [name, name],
            color=theme.faint,
            linewidth=0.8,
            zorder=1,
        )
    axis.set_xscale("log")
    axis.set_xlim(3e-18, 1e3)
    axis.set_ylim(-0.6, len(names) - 0.4)
    axis.set_title("Relative error of the formulas")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def standing(errors: dict[str, float], schedules: int) -> Table:
    what = ["F = I/σ² − (α²/σ⁴) C", "tr F = (d − tr Cov(u))/σ²", "dλ/dt = −f λ − (g²/2) F λ"]
    truth = ["−∇² log q by autograd", "its trace", "−(∂h/∂x)ᵀ λ by autograd"]
    rows = [
        [name, *row, f"{e:.0e}"]
        for (name, e), *row in zip(errors.items(), what, truth, strict=True)
    ]
    return Table(
        "Right as printed", ["where", "formula", "truth", "error"], rows,
        f"Largest relative error over the {schedules} schedules and the times above.",
    )  # fmt: skip
