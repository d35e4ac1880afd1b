"""Every rounding term of docs/certified.md, in exact rational arithmetic, on clouds on which the
term is needed.

Everything that is stored or computed in floating point is a fraction, so that what a bound says can
be compared with the truth without any rounding of the test's own. Squares are compared, since roots
are no fractions.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction as Exact
from pathlib import Path

import pytest
import torch
from test_certified import gaussian, normal

from dfkernels._torch import native
from dfkernels.certified import rounding, select_atoms
from dfkernels.certified.bounds import Queries, Sought
from dfkernels.certified.build import build_index
from dfkernels.certified.pytorch import Search, search_in_pytorch

PATHS = {"PyTorch": search_in_pytorch} | ({"compiled": select_atoms.op} if native.available else {})
U = Exact(2) ** -53


def exact(t):
    """A tensor's numbers as fractions, nested like its dimensions."""
    return [exact(row) for row in t] if t.ndim else Exact(float(t))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def square(a):
    return dot(a, a)


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def combined(weights, rows):
    """sum_k weights[k] rows[k]"""
    return [dot(weights, column) for column in zip(*rows, strict=True)]


def line(N, d):
    """Multiples of one direction that no coordinate follows: the codes leave next to nothing
    over."""
    return normal(N, 1, seed=3, dtype=torch.float64) * normal(1, d, seed=4, dtype=torch.float64)


CLOUDS = {"gaussian": lambda N, d: gaussian(N, d).double(), "line": line}


class Truth:
    """What an index says of its atoms, and what is true of them."""

    def __init__(self, y):
        self.of = of = build_index(y, 1.0, 0.0)
        N, d = y.shape
        self.y, self.V, self.centre = exact(y), exact(of.basis), exact(of.centre)
        self.step, scales = exact(of.axis_scale), exact(of.code_scale)
        q = of.coarse_codes.transpose(1, 2).reshape(-1, len(of.basis))[:N].tolist()
        self.t = [minus(row, self.centre) for row in self.y]
        self.h = [[dot(v, t) for v in self.V] for t in self.t]
        self.code = [
            [n * step * scale for n, step in zip(row, self.step, strict=True)]
            for row, scale in zip(q, scales[0], strict=True)
        ]
        self.left = [
            minus(t, combined(code, self.V)) for t, code in zip(self.t, self.code, strict=True)
        ]
        self.levels = [(self.left, [minus(h, c) for h, c in zip(self.h, self.code, strict=True)])]
        if len(of.fine_codes):
            fine = [
                [n * scale for n in row]
                for row, scale in zip(of.fine_codes[:, :d].tolist(), scales[1], strict=True)
            ]
            left = [minus(e, row) for e, row in zip(self.left, fine, strict=True)]
            self.levels.append((left, [[dot(v, r) for v in self.V] for r in left]))


@pytest.fixture(scope="module", params=CLOUDS)
def truth(request):
    return Truth(CLOUDS[request.param](20, 130))


def test_what_the_codes_leave_over(truth):
    """`remainder_norm` and `axis_error`: rounded up, and with what sums in double may have lost."""
    for level, (left, on_axes) in enumerate(truth.levels):
        remainder_norm, axis_error = (
            exact(truth.of.remainder_norm[level]),
            exact(truth.of.axis_error[level]),
        )
        assert all(r**2 >= square(e) for r, e in zip(remainder_norm, left, strict=True))
        assert all(s**2 >= square(v) for s, v in zip(axis_error, on_axes, strict=True))


def test_what_sums_in_double_may_lose_is_in_what_the_codes_leave_over(truth):
    """Whatever the order of the sums: d products, of numbers of the size of an atom, lose up to u d
    |t|, K times; the test's own machine may be luckier than that.
    """
    d, K = len(truth.y[0]), len(truth.V)
    for level, (left, on_axes) in enumerate(truth.levels):
        remainder_norm, axis_error = truth.of.remainder_norm[level], truth.of.axis_error[level]
        for i, t in enumerate(truth.t):
            worst = float(U) * d * K**0.5 * math.sqrt(square(t))
            assert float(axis_error[i]) >= (math.sqrt(square(on_axes[i])) + worst) * (1 - 1e-9)
            if level == 0:
                assert float(remainder_norm[i]) ** 2 >= (
                    float(square(left[i])) + worst * math.sqrt(square(t))
                ) * (1 - 1e-9)
            else:
                assert float(remainder_norm[i]) >= (math.sqrt(square(left[i])) + worst) * (1 - 1e-9)


def test_rounding_up():
    """Never below, also where the nearest float would be."""
    t = normal(1000, dtype=torch.float64).abs() * (1 + 2.0**-30)
    assert bool((rounding.round_up(t).double() > t).all())


def test_the_compiled_search_has_the_same_terms():
    """Under the same names, constants of the same value and functions."""
    header = (Path(__file__).parents[1] / "csrc/certified/rounding.h").read_text()
    constants = dict(re.findall(r"constexpr \w+ (\w+) = ([^;]*?)f?;", header))
    assert constants.keys() == {"unit", "few_roundings", "float_bound", "coordinates"}
    for name, text in constants.items():
        value = float.fromhex(text) if text.startswith("0x") else sum(map(float, text.split("+")))
        assert value == getattr(rounding, name.upper())
    functions = re.findall(r"static inline \w+ (\w+)\(", header)
    assert len(functions) == 5 and all(callable(getattr(rounding, name)) for name in functions)


def test_limits(truth):
    """How far the axes are from orthonormal, and the largest sizes."""
    skew, radius, coordinate_norm, _, _ = (Exact(float(f)) for f in truth.of.limits)
    gram = [[dot(v, w) - (v is w) for w in truth.V] for v in truth.V]
    assert skew**2 >= sum(square(row) for row in gram) > 0
    assert all(radius**2 >= square(t) for t in truth.t)
    both = [math.sqrt(square(row)) + math.sqrt(square(truth.centre)) for row in truth.y]
    assert float(coordinate_norm) >= max(both) * (1 - 1e-9)


def queries_of(truth):
    """In the span of the axes, an atom, the centre, noise, and what is left of noise across the
    axes."""
    d, V = len(truth.y[0]), truth.of.basis.double()
    axis, noise = V[:1], normal(1, d, seed=8, dtype=torch.float64)
    across = noise - torch.linalg.solve(V @ V.T, V @ noise.T).T @ V
    y = torch.tensor([[float(a) for a in row] for row in truth.y], dtype=torch.float64)
    middle = truth.of.centre.double()[None]
    return torch.cat([middle + 3 * axis, y[3:4], middle, noise, middle + across]), y


def screened(truth, x, y, alpha=1.0, sigma=1.0):
    level = torch.ones(len(x), dtype=torch.float64)
    return Search(Sought(x, y, alpha * level, sigma * level, None, 1.0, 0.0), truth.of, 10.0, 1)


def upper_bounds(s, a, product):
    """`Queries.bounds` of all atoms at the coarse level."""
    of = s.index
    size = of.atom_norm.double()
    error = s.coarse_error(a).bound(size, of.remainder_norm[0].double(), of.axis_error[0].double())
    return s.bounds(s.atoms, product, size**2, error)


def test_what_is_left_of_a_query(truth):
    """`query_remainder` is at least |z - V^T a|, and `code_error` at least what two skewed axes and
    a sum of K codes may make.
    """
    x, y = queries_of(truth)
    s = screened(truth, x, y)
    a = s.z @ truth.of.basis.double().T
    error, K, d = s.coarse_error(a), len(truth.V), len(truth.y[0])
    for q, z in enumerate(exact(s.z)):
        left = square(minus(z, combined(exact(a[q]), truth.V)))
        assert Exact(float(error.query_remainder[q])) ** 2 >= left
        worst = float(U) * d * K**0.5 * math.sqrt(square(z))  # of a = V z
        assert float(error.code_error[q]) >= worst
        assert float(error.code_error[q]) >= float(truth.of.named_limits.axis_skew) * float(
            error.query_on_axes[q]
        )
        # the table's: that of a sum in any order, of each of its roundings
        most = 8 * (1 + K / d) * worst
        assert float(s.fine_error(a).code_error[q]) >= 4 * most * (1 - 1e-9)
        assert float(error.query_remainder[q]) ** 2 >= float(left) + worst * math.sqrt(square(z))


def test_upper_ends_are_above_the_logits(truth):
    """At the coarse level, rounding of |t| to float32 included."""
    x, y = queries_of(truth)
    s, of = screened(truth, x, y, alpha=0.5), truth.of
    a, K = s.z @ of.basis.double().T, len(of.basis)
    codes = of.coarse_codes.transpose(1, 2).reshape(-1, K)[: len(y)].double()
    product = (a * of.axis_scale) @ codes.T * of.code_scale[0].double()
    _, up = upper_bounds(s, a, product)
    for q, z in enumerate(exact(s.z)):
        true = [dot(z, t) / 2 - square(t) / 8 for t in truth.t]
        assert all(Exact(float(u)) >= logit for u, logit in zip(up[q], true, strict=True))


def test_exact_logits_are_below_the_truth(truth):
    x, y = queries_of(truth)
    s = Queries(Sought(x, y, torch.ones(5), torch.ones(5), None, 1.0, 0.0), truth.of, 1.0)
    found = s.exact_logits(torch.arange(len(y)).expand(5, -1))
    for q, point in enumerate(exact(x)):
        size = square(minus(point, truth.centre))
        true = [(size - square(minus(point, row))) / 2 for row in truth.y]
        assert all(
            Exact(float(f)) <= logit + Exact(float(s.coordinate_error[q])) / 4
            for f, logit in zip(found[q], true, strict=True)
        )
        worst = [float(U) * (size + square(minus(point, row))) * len(point) for row in truth.y]
        short = [float(a - Exact(float(f))) for f, a in zip(found[q], true, strict=True)]
        assert all(have >= need for have, need in zip(short, worst, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_coordinates_that_are_large_beside_their_differences(path):
    """`coordinate_error`: alpha times a centre of 2^40 is rounded by 10^-4, in every coordinate
    alike, which makes 0.01 of a logit's square of sigma; float32 holds the centre exactly, so that
    nothing else is that large.
    """
    N, d, alpha = 40, 64, 0.9
    sign = torch.where(torch.arange(N) % 2 == 0, 1.0, -1.0).double()[:, None]
    y = 2.0**40 + sign * (1 + torch.arange(N)[:, None] // 2 / 4096) * torch.ones(
        d, dtype=torch.float64
    )
    x = (
        alpha * 2.0**40
        + torch.linspace(-0.01, 0.01, 5, dtype=torch.float64)[:, None].expand(5, d).contiguous()
    )
    of, level = build_index(y, 1.0, 0.0), torch.ones(5, dtype=torch.float64)
    assert torch.equal(of.centre, torch.full((d,), 2.0**40))
    sigma, gap = 1e-3, math.log(N / 1e-6)
    atoms, counts, dropped = PATHS[path](
        x, y, alpha * level, sigma * level, None, 1.0, 0.0, *of, gap, 1
    )
    rows, points = exact(y), exact(x)
    lists = iter(atoms.split(counts.clamp_min(0).tolist()))
    a = Exact(alpha)
    for q, n in enumerate(counts.tolist()):
        distance = [
            square([p - a * c for p, c in zip(points[q], row, strict=True)]) for row in rows
        ]
        gaps = [float((distance[i] - min(distance)) / 2 / Exact(sigma) ** 2) for i in range(N)]
        selected = set(next(lists).tolist())
        if n >= 0:
            left_out = sum(math.exp(-g) for i, g in enumerate(gaps) if i not in selected)
            assert left_out <= float(dropped[q]) * sum(math.exp(-gaps[i]) for i in selected) * (
                1 + 1e-9
            )


def test_the_coordinate_error_covers_what_large_coordinates_lose():
    """As above, of the bounds themselves: upper ends and exact logits are apart by less than they
    should be."""
    N, d, alpha = 40, 64, 0.9
    sign = torch.where(torch.arange(N) % 2 == 0, 1.0, -1.0).double()[:, None]
    y = 2.0**40 + sign * torch.ones(d, dtype=torch.float64)
    x = torch.full((1, d), alpha * 2.0**40 + 0.01, dtype=torch.float64)
    of, level = build_index(y, 1.0, 0.0), torch.ones(1, dtype=torch.float64)
    s = Search(Sought(x, y, alpha * level, level, None, 1.0, 0.0), of, 1.0, 1)
    a, K, a_exact = s.z @ of.basis.double().T, len(of.basis), Exact(alpha)
    codes = of.coarse_codes.transpose(1, 2).reshape(-1, K)[:N].double()
    product = (a * of.axis_scale) @ codes.T * of.code_scale[0].double()
    _, up = upper_bounds(s, a, product)
    best = s.exact_logits(torch.arange(N)[None])
    distance = [
        square([p - a_exact * c for p, c in zip(exact(x[0]), row, strict=True)])
        for row in exact(y[:2])
    ]
    true = (distance[1] - distance[0]) / 2  # how much heavier the first is than the second
    for i, j, gap in ((0, 1, true), (1, 0, -true)):
        assert Exact(float(up[0, i] + s.coordinate_error[0, 0])) - Exact(float(best[0, j])) >= gap
        assert float(s.coordinate_error) <= 1.0
    # each of x, alpha y, and the centre's multiple may lose a unit of its own size, in both logits
    coordinates = float(x.norm() + alpha * y.norm(dim=1).max())
    assert float(s.coordinate_error) >= 4 * float(U) * coordinates * float(
        s.z_norm + alpha * of.atom_norm.max()
    )
    assert abs(float(Exact(float(best[0, 0] - best[0, 1])) - true)) > 1e-5  # rounding is at work


def test_sums_that_cancel_in_the_coarse_level():
    """Along one coordinate the axes are exact and the codes leave a 10^-14th of |t|^2, which is
    found as the difference of sums of the size of |t|^2: their rounding is the larger part of
    `remainder_norm`.
    """
    y = torch.zeros(6, 130, dtype=torch.float64)
    y[:, 0] = normal(6, seed=5, dtype=torch.float64)
    truth = Truth(y)
    d, K, skew = 130, len(truth.V), float(truth.of.named_limits.axis_skew)
    for i, t in enumerate(truth.t):
        size, code = float(square(t)), float(square(truth.code[i]))
        sums = 8 * float(U) * (d + K) * K**0.5 * (size + code)
        assert sums > float(square(truth.left[i]))
        allowed = float(square(truth.left[i])) + skew * code + sums
        # the sums themselves have lost a little
        assert float(truth.of.remainder_norm[0, i]) ** 2 >= 0.99 * allowed
