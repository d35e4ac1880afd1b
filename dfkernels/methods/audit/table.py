"""The tables of a report, as text."""

from __future__ import annotations

from collections.abc import Iterator

from .parts import Errors, Estimate, LevelAudit, LikelihoodAudit, SampleAudit

__all__ = ["text"]


def text(
    levels: tuple[LevelAudit, ...],
    likelihood: LikelihoodAudit | None,
    samples: SampleAudit | None,
) -> str:
    """The tables of what was measured."""
    parts = [_errors(levels), _jacobian(levels)]
    if likelihood is not None:
        parts.append("\n".join(_likelihood(likelihood)))
    if samples is not None:
        parts.append("\n".join(_samples(samples)))
    return "\n\n".join(parts)


def _errors(levels: tuple[LevelAudit, ...]) -> str:
    head = [
        *("sigma/alpha", "t", "ESS"),
        *("train: network", "exact", "held-out: network", "exact", "gap", "memorised"),
        "linear",
    ]
    rows = [
        [
            f"{level.noise:.4g}",
            f"{level.t:.4g}",
            "-" if level.errors.ess is None else f"{level.errors.ess:.3g}",
            *_of_kind(level.train),
            *_of_kind(level.held_out),
            _number(level.gap),
            _number(level.memorised),
            f"{level.baseline:.3g}",
        ]
        for level in levels
    ]
    table = "Mean square errors of x_0 per number\n" + _aligned(head, rows)
    if any(level.gap for level in levels):
        table += (
            "\ngap: held-out - train of the network, without what a multiple of x explains of it, "
            "which is chance; memorised: its part of the exact mean's"
        )
    return table


def _of_kind(errors: Errors | None) -> tuple[str, str]:
    return ("-", "-") if errors is None else (_number(errors.network), _number(errors.exact))


def _jacobian(levels: tuple[LevelAudit, ...]) -> str:
    head = [
        *("sigma/alpha", "trace: network", "exact", "asymmetry", "eigenvalue"),
        *("variance: predicted", "actual", "ratio"),
    ]
    rows = [
        [
            f"{level.noise:.4g}",
            _number(level.jacobian.trace),
            _number(level.jacobian.exact_trace),
            _number(level.jacobian.asymmetry),
            f"{level.jacobian.eigenvalue:.3f}",
            *(_number(estimate) for estimate in level.calibration),
        ]
        for level in levels
    ]
    return "Jacobian of the network, and the posterior variance by it\n" + _aligned(head, rows)


def _likelihood(found: LikelihoodAudit) -> Iterator[str]:
    yield f"Likelihood of {found.points} points of a kind, nats per number"
    for name, nats, bits in (
        ("train", found.train, found.train_bits),
        ("held-out", found.held_out, found.held_out_bits),
    ):
        if nats is not None:
            yield f"{name:>10}: {nats}" + ("" if bits is None else f"; bits per dimension: {bits}")
    if found.gap is not None:
        yield f"{'difference':>10}: {found.gap}"
    yield f"Estimated error of the integration: {found.integration:.1g}"


def _samples(found: SampleAudit) -> Iterator[str]:
    yield f"{found.count} samples beside the training data, shares"
    yield f"  nearest atom at less than 1/3 of the second's distance: {found.ratio}"
    yield f"    by chance: {found.chance_ratio}"
    if found.closer is not None and found.expected is not None:
        most = f"{1 - found.expected:.1%}"
        yield f"  nearer to an atom than {most} of held-out points: {found.closer}"
    if found.train_side is not None:
        yield f"  nearer to training than to held-out data: {found.train_side}; by chance 0.5"
    beside = found.held_out_distance
    other = "" if beside is None else f"; of held-out points: {beside:.3g}"
    yield f"  median distance to the nearest atom: {found.distance:.3g}{other}"


def _number(estimate: Estimate | None) -> str:
    return "-" if estimate is None else str(estimate)


def _aligned(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(entry.rjust(width) for entry, width in zip(row, widths, strict=True))
        for row in (head, *rows)
    )
