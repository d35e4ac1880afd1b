"""The search for what is wrong: one mistake after another is undone, and the error measured.

First what the same outputs say when they are read in another way; then calls of the network with
other times and scaled states; then other data and other noise levels, for which the exact answers
are computed anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...law import Law
from ..classifier_free import ClassifierFreeGuidance
from ..denoiser import PREDICTION_TYPES, Denoiser
from .data_map import DataMap, fit, over
from .levels import any_levels, other_schedules
from .outputs import altered, clocks, output, read, scales, with_network
from .queries import Queries, Rng, make_queries, noise_range_of
from .report import Explanation, explains, judged

__all__ = ["explanations"]

Outputs = Sequence[Tensor]
_PROMISING = 4.0  # an error that falls by this factor at one level is looked at everywhere
_CLEAR = 0.4  # an error of this part of what is allowed leaves nothing to look for
_FACTOR = 600.0  # a map of the data by more than this is no map of units


def explanations(
    denoiser: Denoiser,
    cloud: Law,
    queries: list[Queries],
    outs: Outputs,
    rng: Rng,
    conditions: dict[str, object],
) -> list[Explanation]:
    """What was tried. What comes later is tried only if nothing explains the error,
    and other times only if there is more of it than is allowed.
    """
    start = judged("", "", queries, _read(denoiser, queries, outs, denoiser.prediction_type))
    steps = (
        lambda: [*_readings(denoiser, queries, outs), *_output_scale(denoiser, queries, outs)],
        lambda: [
            *_without_guidance(denoiser, queries, conditions),
            *other_schedules(denoiser, cloud, queries, outs),
            *_other_data(denoiser, cloud, queries, outs, rng, conditions),
            *_other_calls(denoiser, queries, outs, conditions, start.ratio > _CLEAR),
        ],
        lambda: any_levels(denoiser, cloud, queries, outs),
    )
    tried: list[Explanation] = []
    for step in steps:
        if any(explains(found, start) and found.ratio <= _CLEAR for found in tried):
            break
        tried += step()
    return tried


def _read(denoiser: Denoiser, queries: list[Queries], outs: Outputs, kind: str) -> list[Tensor]:
    pairs = zip(queries, outs, strict=True)
    return [read(kind, denoiser.schedule, q, out) for q, out in pairs]


def _readings(denoiser: Denoiser, queries: list[Queries], outs: Outputs) -> Iterator[Explanation]:
    """The outputs read as any prediction type, of either sign; not as they are."""
    own = denoiser.prediction_type
    for kind, sign in _ways(own)[1:]:
        means = _read(denoiser, queries, [sign * out for out in outs], kind)
        changes = (kind != own) + (sign < 0)
        yield judged(*_reading(own, kind, sign), queries, means, changes)


def _ways(own: str) -> list[tuple[str, int]]:
    """The prediction types and signs in which an output may be read, first as it is. Nobody returns
    the negative score, but it looks like noise at other levels.
    """
    kinds = (own, *(kind for kind in PREDICTION_TYPES if kind != own))
    ways = [(kind, sign) for kind in kinds for sign in (1, -1)]
    return [way for way in ways if way != ("score", -1) or own == "score"]


def _reading(own: str, kind: str, sign: int) -> tuple[str, str]:
    """The cause, and the change, of reading the output as another kind."""
    negated = "the output negated"
    if kind == own:
        return "flow sign" if kind == "flow" else "sign", negated
    change = f"prediction_type={kind!r}"
    return "prediction type", change if sign > 0 else f"{change} and {negated}"


def _output_scale(
    denoiser: Denoiser, queries: list[Queries], outs: Outputs
) -> Iterator[Explanation]:
    """The output times the factor that makes the error least: the mean is affine in the output."""
    kind = denoiser.prediction_type
    start = _read(denoiser, queries, [torch.zeros_like(out) for out in outs], kind)
    there = _read(denoiser, queries, outs, kind)
    product = square = 0.0
    for q, a, b in zip(queries, start, there, strict=True):
        slope = (b - a).double() / q.std
        product += (slope * (q.mean - a).double() / q.std).sum().item()
        square += slope.square().sum().item()
    factor = product / square if square > 0 else 1.0
    if abs(math.log(max(factor, 1e-30))) > 0.1 and factor > 0:
        means = _read(denoiser, queries, [factor * out for out in outs], kind)
        yield judged("output scale", f"the output times {factor:.3g}", queries, means, 1, 1)


def _without_guidance(
    denoiser: Denoiser, queries: list[Queries], conditions: dict[str, object]
) -> Iterator[Explanation]:
    """A guided network without its guidance."""
    guided = denoiser.network
    if isinstance(guided, ClassifierFreeGuidance) and guided.scale != 1:
        plain = with_network(denoiser, ClassifierFreeGuidance(guided.network, 1.0, guided.null))
        outs = [output(plain, q, conditions) for q in queries]
        means = _read(denoiser, queries, outs, denoiser.prediction_type)
        change = f"guidance of scale 1 in place of {guided.scale:g}"
        yield judged("guidance", change, queries, means)


class _Call(NamedTuple):
    """A way to call the network at each level: with which time (None: as it is), and with what
    factor of x.
    """

    cause: str
    change: str
    time: list[float | None]
    scale: list[float]


def _calls(denoiser: Denoiser, queries: list[Queries], with_times: bool) -> Iterator[_Call]:
    """The ways to call a network that are worth a try, each once."""
    times = [dict(clocks(denoiser.schedule, q.t) if with_times else ()) for q in queries]
    factors = [dict(scales(q)) for q in queries]
    own = [_time(denoiser, q) for q in queries]
    ones = [1.0] * len(queries)
    seen = [(own, ones)]
    for name in (*times[0], *factors[0]):
        clock = name in times[0]
        time = [t[name] for t in times] if clock else own
        scale = ones if clock else [f[name] for f in factors]
        if any(_same(time, old[0]) and _same(scale, old[1]) for old in seen):
            continue
        seen.append((time, scale))
        if clock:
            yield _Call("clock", f"{name} as the network's time", [*time], scale)
        else:
            as_it_is: list[float | None] = [None] * len(queries)
            yield _Call("input scale", f"{name} given to the network", as_it_is, scale)


def _time(denoiser: Denoiser, q: Queries) -> float:
    """The time that the network is given at a level as the denoiser is."""
    t = torch.full((1,), q.t, dtype=torch.float64, device=q.x.device)
    return denoiser._clocked(t).item()


def _same(a: list[float], b: list[float]) -> bool:
    return all(math.isclose(x, y, rel_tol=1e-4) for x, y in zip(a, b, strict=True))


def _other_calls(
    denoiser: Denoiser,
    queries: list[Queries],
    outs: Outputs,
    conditions: dict[str, object],
    with_times: bool,
) -> Iterator[Explanation]:
    """The network given other times, or scaled states, and its outputs read in every way. A change
    is tried at the level where the error is worst, and at the others only if it helps there.
    """
    own = denoiser.prediction_type
    base = judged("", "", queries, _read(denoiser, queries, outs, own))
    worst = max(range(len(queries)), key=lambda i: base.errors[i] / queries[i].allowed)
    for call in _calls(denoiser, queries, with_times):
        if not _is_safe(denoiser, call.time, queries[0].x.device):
            continue
        made: dict[int, Tensor] = {}

        def of(i: int, call: _Call = call, made: dict[int, Tensor] = made) -> Tensor:
            if i not in made:
                changed = altered(denoiser, call.time[i], call.scale[i])
                made[i] = output(changed, queries[i], conditions)
            return made[i]

        try:
            yield from _read_call(denoiser, queries, worst, base.ratio, call, of)
        except Exception:  # whatever a network raises that cannot take such a time or state
            continue


def _read_call(
    denoiser: Denoiser,
    queries: list[Queries],
    worst: int,
    before: float,
    call: _Call,
    outputs: Callable[[int], Tensor],
) -> Iterator[Explanation]:
    """What the outputs of one way to call the network say, read in every way."""
    own = denoiser.prediction_type
    for kind, sign in _ways(own):
        means = lambda i, kind=kind, sign=sign: read(
            kind, denoiser.schedule, queries[i], sign * outputs(i)
        )
        change = call.change
        if (kind, sign) != (own, 1):
            change += f" and {_reading(own, kind, sign)[1]}"
        found = judged(call.cause, change, [queries[worst]], [means(worst)])
        if found.ratio <= max(1.0, before / _PROMISING):
            everywhere = [means(i) for i in range(len(queries))]
            changes = 1 + (kind != own) + (sign < 0)
            yield judged(call.cause, change, queries, everywhere, changes)


def _is_safe(denoiser: Denoiser, time: list[float | None], device: torch.device) -> bool:
    """Whether the network may be called at these times: on an accelerator an index that is not in
    an embedding's table ends the process's use of the device; on the CPU it raises. The largest
    table is taken for that of the times, since a smaller one may be of classes.
    """
    network = denoiser.network
    if device.type == "cpu" or not isinstance(network, nn.Module):
        return True
    rows = [m.num_embeddings for m in network.modules() if isinstance(m, nn.Embedding)]
    return not rows or all(t is None or 0 <= t <= max(rows) - 1 for t in time)


def _other_data(
    denoiser: Denoiser,
    cloud: Law,
    queries: list[Queries],
    outs: Outputs,
    rng: Rng,
    conditions: dict[str, object],
) -> Iterator[Explanation]:
    """Other data: the cloud's, scaled and shifted. What a fit finds is fitted again, and judged,
    with queries made of the mapped data, since a network is sound only on what it was trained on.
    """
    kind, schedule = denoiser.prediction_type, denoiser.schedule
    means = _read(denoiser, queries, outs, kind)
    start = judged("", "", queries, means)
    for data in fit(cloud, queries, means):
        there = [over(cloud, data, q) for q in queries]
        if not _is_of_units(data) or judged("", "", there, means).ratio > start.ratio / 2:
            continue
        for again in (True, False):
            mapped = data.applied(cloud)
            try:
                noise = noise_range_of(mapped, schedule, rng)
            except ValueError:  # the schedule ends before
                break
            there = make_queries(mapped, schedule, noise, len(queries[0].x), rng)
            found = [read(kind, schedule, q, output(denoiser, q, conditions)) for q in there]
            if again:
                data = data.then(fit(mapped, there, found, len(data.a))[0])
        else:
            fitted = 2 * len(data.a)
            yield judged("data scale", f"the data y mapped to {data}", there, found, 1, fitted)


def _is_of_units(data: DataMap) -> bool:
    return bool((data.a.log().abs() <= math.log(_FACTOR)).all())
