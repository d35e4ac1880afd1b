"""The width of a kernel exp(-|x - y|^2/h) among particles."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._torch import check
from ..._torch.objects import plain

__all__ = ["Bandwidth", "bandwidth", "checked"]

Bandwidth = float | str
RULES = ("nearest", "median")

_NUMBERS = 1 << 18  # of squared distances held at once
_MEDIAN = 2048  # particles whose pairs are sorted


def bandwidth(x: Tensor, rule: Bandwidth) -> float:
    """Finds h of the kernel exp(-|x - y|^2/h) among particles; as a noise level it is sqrt(h/2).

    Args:
        x: Positions ``[M, *E]``, float32 or float64.
        rule: A number, which is h; "nearest", the mean over the particles of the squared distance
            to the nearest other one, for densities (`KL`): it falls as M grows; "median", the
            median over pairs of particles of the squared distance, divided by log M, for averages
            over neighbours (`SVGD`, `Stein`). Beyond 2,048 particles the median is that of every
            k-th one.

    Returns:
        h > 0, in squared units of x. Of a single particle 1, since nothing that it does depends on
        h.

    Raises:
        TypeError, ValueError: An argument is wrong, or all particles that the rule compares are at
            one place; the message names it.
    """
    rows, rule = check.query("x", x).detach(), checked("rule", rule)
    if not isinstance(rule, str):
        return rule
    with plain(x.device), torch.no_grad():
        if len(rows) == 1:
            return 1.0
        h = _nearest(rows) if rule == "nearest" else _median(rows)
    if not 0 < h < math.inf:
        why = "at one place" if h == 0 else f"so far apart that h is {h}"
        raise check.mismatch(
            "bandwidth", f"a number where {rule!r} finds none", f"{len(rows)} particles {why}"
        )
    return h


def checked(name: str, rule: Bandwidth) -> Bandwidth:
    """A rule's name, or a number > 0.

    Raises:
        TypeError, ValueError: It is neither.
    """
    if isinstance(rule, str):
        check.choice(name, rule, RULES)
        return rule
    return check.positive(name, rule)


def _nearest(rows: Tensor) -> float:
    """Whose neighbour is whose is told by products about the mean in float64, and the distances
    are taken by differences."""
    wide = rows.double() - rows.double().mean(0)
    half = wide.square().sum(1) / 2
    step = max(1, _NUMBERS // len(rows))
    scores = wide.new_empty(step, len(rows))  # one for all: freed blocks would leave gaps
    nearest = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    for i in range(0, len(rows), step):
        some = wide[i : i + step]
        torch.addmm(half, some, wide.T, alpha=-1, out=scores[: len(some)])
        scores.diagonal(i).fill_(math.inf)
        nearest[i : i + step] = scores[: len(some)].argmin(1)
    return float((wide - wide[nearest]).square().sum(1).mean())


def _median(rows: Tensor) -> float:
    wide = rows[:: math.ceil(len(rows) / _MEDIAN)].double()
    pairs = torch.nn.functional.pdist(wide)
    return float(pairs.median().square()) / math.log(len(rows))
