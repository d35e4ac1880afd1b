"""Parts of a cloud, merged, against one pass over all of it: any split, masked and empty parts,
associativity, bits, accuracy where the log-density is thousands, derivatives and refusals."""

from __future__ import annotations

import contextlib
import itertools
import math
import pickle

import pytest
import torch
from difference import EPS, difference_form, errors
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import normal, rng
from test_global_state import STATES

import dfkernels as df
from dfkernels import Partial, PointCloud, merge

f64 = torch.float64
MOMENTS = (
    "log_weight",
    "log_mass",
    "mean",
    "variance",
    "weight_square",
    "covariance_product",
    "covariance_diagonal",
    "value_mean",
)


def problem(B, N, E, sigma, seed, dtype=f64, K=2):
    """Queries near clustered atoms that are off the origin, unequal weights, vectors, values."""
    y = (
        normal(N, *E, seed=seed)
        + 3 * normal(1 + N // 9, *E, seed=seed + 1).repeat_interleave(9, 0)[:N]
    )
    y = y + 2
    x = y[torch.arange(B) % N] + sigma * normal(B, *E, seed=seed + 2)
    p = {
        "x": x,
        "y": y,
        "v": normal(B, K, *E, seed=seed + 3),
        "values": normal(N, 3, seed=seed + 4),
    }
    p = {k: t.to(dtype) for k, t in p.items()}
    return p | {"alpha": 0.9, "sigma": sigma, "log_prior": 2 * normal(N, seed=seed + 5).to(dtype)}


def part(p, rows=slice(None), **others):
    q = p | others
    return Partial.of(
        *(q["x"], q["y"][rows], q["alpha"], q["sigma"]),
        *([] if q["log_prior"] is None else [q["log_prior"][rows]]),
        v=q["v"],
        values=q["values"][rows],
        diagonal=True,
    )


def results(merged):
    p = merged.posterior()
    return {
        **p._asdict(),
        "score": merged.score(),
        "matvec": merged.fisher_matvec(),
        "diagonal": merged.fisher_diagonal(),
        "average": merged.average(),
    }


def one_pass(p):
    """The same by the ops."""
    args = (p["x"], p["y"], p["alpha"], p["sigma"], p["log_prior"])
    whole = df.ops.posterior(*args)
    return {
        **whole._asdict(),
        "score": whole.score(p["x"], p["alpha"], p["sigma"]),
        "matvec": df.ops.fisher_matvec(*args[:2], p["v"], *args[2:]),
        "diagonal": df.ops.fisher_diagonal(*args),
        "average": df.ops.average(*args[:2], p["values"], *args[2:]).average,
    }


def close(found, want, tol):
    for name, w in want.items():
        assert found[name].shape == w.shape and found[name].dtype == w.dtype, name
        size = 1 + w.abs().flatten(1).amax(1) if w.dim() > 1 else 1 + w.abs()
        far = (found[name] - w).abs().flatten(1).amax(1) if w.dim() > 1 else (found[name] - w).abs()
        assert bool((far <= tol * size).all()), (name, float((far / size).max()))


def pieces(cuts, N):
    ends = [0, *sorted(min(c, N) for c in cuts), N]
    return [slice(a, b) for a, b in itertools.pairwise(ends)]


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    N=st.integers(1, 40),
    B=st.integers(0, 4),
    E=st.sampled_from([(1,), (2,), (3, 2), (33,), (2, 3, 4)]),
    sigma=st.sampled_from([1e-3, 0.05, 1.0, 30.0]),
    uniform=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_split_is_one_pass(data, N, B, E, sigma, uniform, seed):
    """Parts of no atom, of one, wholly masked ones and such whose mass underflows among them."""
    cuts = data.draw(st.lists(st.integers(0, N), max_size=6))
    p = problem(B, N, E, sigma, seed)
    masked = data.draw(st.sets(st.integers(0, N - 1), max_size=N - 1))
    if uniform:
        p["log_prior"] = None
    else:
        p["log_prior"][sorted(masked)] = -math.inf
        p["y"][sorted(masked)] = math.nan
    order = data.draw(st.permutations(pieces(cuts, N)))
    merged = merge(part(p, rows) for rows in order)
    whole = one_pass(p)
    # F and its trace are compared in their own unit, 1/sigma^2 a dimension
    for name in ("fisher_trace", "matvec", "diagonal"):
        whole[name] = whole[name] * sigma**2
    found = results(merged)
    for name in ("fisher_trace", "matvec", "diagonal"):
        found[name] = found[name] * sigma**2
    for out in (found, whole):
        out["score"] = out["score"] * sigma
    # a logit is rounded by 2^-52 times |u|^2/2 and |y|/sigma |u|; weights, so all, by as much
    u = ((p["x"].flatten(1).norm(dim=1).amax() if B else 0.0) + 20) / sigma
    close(found, whole, 1e-13 * (100 + 20 * float(u)))


def test_64_parts_in_float32_are_as_exact_as_one_pass():
    for sigma, E, seed in ((0.05, (64,), 0), (2.0, (64,), 1), (0.3, (2,), 2), (20.0, (300,), 3)):
        p = problem(24, 640, E, sigma, seed, torch.float32)
        merged = results(merge(part(p, rows) for rows in torch.arange(640).chunk(64)))
        whole = one_pass(p)
        wide = {k: t.double() if isinstance(t, torch.Tensor) else t for k, t in p.items()}
        exact = one_pass(wide)
        rms = lambda t: float(t.double().square().mean().sqrt())
        for name, e in exact.items():
            ours, theirs = rms(merged[name].double() - e), rms(whole[name].double() - e)
            assert ours <= 2 * theirs + 4 * EPS * rms(e), (name, sigma, ours, theirs)


def test_a_log_density_of_thousands_does_not_move_the_weights():
    """d = 3072, log q = 7,660: the parts' masses keep the digits that float32 has not, so that the
    shares of the parts are those of float64."""
    d, sigma = 3072, 0.02
    base = torch.rand(4, d, dtype=f64, generator=rng(0))
    y = (base.repeat(16, 1) + 0.03 * sigma * normal(64, d)).float()
    x = (y[:4].double() + sigma * normal(4, d, seed=1)).float()
    log_mass = [[], []]
    for rows in y.split(4):
        log_mass[0].append(Partial.of(x, rows, 1.0, sigma).log_mass)
        level = x.new_tensor(sigma).double()
        log_mass[1].append(Partial.of(x.double(), rows.double(), 1.0, level).log_mass)
    found, exact = map(torch.stack, log_mass)
    assert float(exact.min()) > 7000
    assert float((found.softmax(0) - exact.softmax(0)).abs().max()) <= 3e-5
    rounded = found.float().double().softmax(0)  # what float32 would have made of it
    assert float((rounded - exact.softmax(0)).abs().max()) >= 5e-5
    merged = merge(Partial.of(x, rows, 1.0, sigma) for rows in y.split(4)).posterior()
    p = {"x": x, "y": y, "alpha": torch.ones(4), "sigma": torch.full((4,), sigma)}
    exact = {k: t for k, t in difference_form(**p).items() if k in merged._fields}
    whole = errors(df.ops.posterior(*p.values())._asdict(), exact)
    for name, error in errors(merged._asdict(), exact).items():
        assert float(error.max()) <= 2 * float(whole[name].max()) + 4 * EPS, name


def test_merging_is_associative_and_has_a_neutral_element():
    p = problem(3, 30, (5,), 0.7, 4)
    a, b, c = (part(p, rows) for rows in torch.arange(30).split([1, 9, 20]))
    none = part(p, slice(0, 0))
    left, right = merge([merge([a, b]), c]), merge([a, merge([b, c])])
    for name in MOMENTS:
        torch.testing.assert_close(
            getattr(left, name), getattr(right, name), rtol=1e-13, atol=1e-13
        )
        for merged in (merge([a, none]), merge([none, a]), merge([none, none, a, none])):
            assert torch.equal(getattr(merged, name), getattr(a, name)), name
    assert float(none.log_weight) == -math.inf == float(merge([none, none]).log_mass.max())


def test_the_bits_are_those_of_the_order_alone():
    """In one call, in several, from a generator, or from parts that were pickled."""
    p = problem(3, 50, (6,), 0.7, 5, torch.float32)
    parts = [part(p, rows) for rows in torch.arange(50).split(7)]
    sent = [pickle.loads(pickle.dumps(part(p, rows))) for rows in torch.arange(50).split(7)]
    at_once = merge(parts)
    for other in (merge(iter(sent)), merge([merge(parts[:3]), *sent[3:]]), merge([merge(parts)])):
        for name in MOMENTS:
            assert torch.equal(getattr(other, name), getattr(at_once, name)), name


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.float32], ids=str)
def test_of_point_clouds(dtype):
    """Stored narrowly, with scale, offset and weights of their own."""
    y = (40 * normal(30, 2, 3) + 100).clamp(0, 255).to(dtype)
    prior, x = normal(30, seed=1), normal(4, 2, 3, seed=2)
    stored = {"scale": 2 / 255, "offset": -1.0}
    whole = PointCloud(y, prior, **stored)
    parts = [PointCloud(y[r], prior[r], **stored) for r in torch.arange(30).split(11)]
    merged = merge(Partial.of(x, c, 1.0, 0.4) for c in parts).posterior()
    for found, want in zip(merged, df.DiffusionFisher(x, whole, 1.0, 0.4)._posterior, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::dfkernels.ops.SlowDerivativeWarning")
def test_derivatives_are_those_of_the_whole():
    p = problem(2, 12, (3,), 0.8, 6, K=1)
    names = ("x", "y", "log_prior", "v", "values")

    def total(call):
        q = p | {k: p[k].clone().requires_grad_() for k in names}
        out = call(q)
        loss = sum(
            (out[k] * torch.cos(torch.arange(out[k].numel()).reshape(out[k].shape))).sum()
            for k in out
        )
        first = torch.autograd.grad(loss, [q[k] for k in names], create_graph=True)
        return [*first, torch.autograd.grad(first[0].square().sum(), q["x"])[0]]

    parts = lambda q: results(merge(part(q, rows) for rows in torch.arange(12).split(5)))
    for found, want in zip(total(parts), total(one_pass), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-9)


def test_layout_and_global_state_change_nothing():
    p = problem(3, 20, (4,), 0.5, 7, torch.float32)
    expected = results(part(p))
    strided = p | {k: p[k].repeat_interleave(2, -1)[..., ::2] for k in ("x", "y", "v", "values")}
    with contextlib.ExitStack() as states:
        for state in ("default dtype float64", "default device meta", "autocast bfloat16"):
            states.enter_context(STATES[state]())
        for q in (p, strided):
            found = results(merge([part(q, slice(0, 8)), part(q, slice(8, 20))]))
            close(found, expected, 1e-5)
    with STATES["inference mode"]():
        inside = merge([part(p, slice(0, 8)), part(p, slice(8, 20))])
    close(results(inside), expected, 1e-5)
    assert not inside.mean.is_inference()


X, Y = normal(2, 3), normal(5, 3, seed=1)


def test_queries_changed_in_place_are_others():
    x = X.clone()
    first = Partial.of(x, Y, 1.0, 0.7)
    x += 1
    with pytest.raises(ValueError, match="expected the same x for all of them"):
        merge([first, Partial.of(x, Y, 1.0, 0.7)])
    want = df.ops.posterior(X, Y, 1.0, 0.7).score(X, 1.0, 0.7)
    torch.testing.assert_close(first.score(), want)


def test_forward_mode():
    merged = lambda x: merge(Partial.of(x, part, 1.0, 0.7) for part in Y.split(2))
    score = df.ops.posterior(X, Y, 1.0, 0.7).score(X, 1.0, 0.7)
    dx = normal(2, 3, seed=3)
    _, tangent = torch.func.jvp(lambda x: merged(x).posterior().log_prob, (X,), (dx,))
    torch.testing.assert_close(tangent, (score * dx).sum(1))


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: merge([]), ValueError, "parts: expected at least one Partial, got none"),
        (lambda: merge([X]), TypeError, "parts: expected Partials, got Tensor"),
        (
            lambda: merge(Partial.of(X, Y, 1.0, 1.0)),
            TypeError,
            "parts: expected Partials, in a list or an iterator, got Partial",
        ),
        (
            lambda: merge(3),
            TypeError,
            "parts: expected Partials, in a list or an iterator, got int",
        ),
        (
            lambda: Partial.of(X, Y, 1.0, 1.0, [0.0] * 5),
            TypeError,
            "log_prior: expected a tensor, got list",
        ),
        (
            lambda: merge([Partial.of(X, Y, 1.0, 1.0), Partial.of(X + 1, Y, 1.0, 1.0)]),
            ValueError,
            "parts: expected the same x for all of them, got another: only parts for the same "
            "queries, on one device, can be merged",
        ),
        (
            lambda: merge([Partial.of(X, Y, 1.0, 1.0), Partial.of(X, Y, 1.0, 2.0)]),
            ValueError,
            "parts: expected the same sigma for all of them, got another: only parts for the same "
            "queries, on one device, can be merged",
        ),
        (
            lambda: merge([Partial.of(X, Y, 1.0, 1.0), Partial.of(X, Y, 1.0, 1.0, v=X)]),
            ValueError,
            "parts: expected the same v for all of them, got another: only parts for the same "
            "queries, on one device, can be merged",
        ),
        (
            lambda: merge([Partial.of(X, Y, 1.0, 1.0), Partial.of(X, Y, 1.0, 1.0, values=Y)]),
            ValueError,
            "parts: expected the same moments of all of them, got value_mean of shape None and "
            "[2, 3]",
        ),
        (
            lambda: Partial.of(X, Y[:0], 1.0, 1.0).posterior(),
            ValueError,
            "expected at least one atom with a weight, got parts without any",
        ),
        (
            lambda: Partial.of(X, Y, 1.0, 1.0).fisher_matvec(),
            ValueError,
            "this Partial was made without it: call Partial.of(..., v=...)",
        ),
        (
            lambda: Partial.of(X, Y, 1.0, 1.0).fisher_diagonal(),
            ValueError,
            "this Partial was made without it: call Partial.of(..., diagonal=True)",
        ),
        (
            lambda: Partial.of(X, Y, 1.0, 1.0).average(),
            ValueError,
            "this Partial was made without it: call Partial.of(..., values=...)",
        ),
        (
            lambda: Partial.of(X, Y[:, :2], 1.0, 1.0),
            ValueError,
            "y: expected shape [N, 3] to go with x of shape [2, 3], got [5, 2]",
        ),
        (
            lambda: Partial.of(X, Y[:0, :2], 1.0, 1.0),
            ValueError,
            "y: expected shape [N, 3] to go with x of shape [2, 3], got [1, 2]",
        ),
        (
            lambda: Partial.of(X, Y, 1.0, 0.0),
            ValueError,
            "sigma: expected a finite value > 0, got 0.0",
        ),
        (
            lambda: Partial.of(X, Y / 0, 1.0, 1.0),
            ValueError,
            "y: expected finite values, got inf at index [0, 0]",
        ),
        (
            lambda: Partial.of(X, Y, 1.0, 1.0, torch.full((5,), math.nan, dtype=f64)),
            ValueError,
            "log_prior: expected values < inf and not nan, got nan at index [0]",
        ),
        (
            lambda: Partial.of(X, Y, 1.0, 1.0, v=X[:1]),
            ValueError,
            "v: expected shape [2, 3] or [2, K, 3], got [1, 3]",
        ),
        (
            lambda: Partial.of(X, PointCloud(Y), 1.0, 1.0, scale=2.0),
            ValueError,
            "log_prior, scale, offset: expected none of them with a PointCloud, which has its own",
        ),
        (
            lambda: Partial.of(X, Y[:0], 1.0, 1.0, values=Y[:2]),
            ValueError,
            "values: expected shape [0, ...], a row for each atom, got [2, 3]",
        ),
        (
            lambda: Partial.of(X, [Y], 1.0, 1.0),
            TypeError,
            "y: expected a tensor, got list",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error) as raised:
        call()
    assert str(raised.value) == message


def test_a_part_all_of_whose_atoms_are_too_far_is_refused():
    """Beside others they would be outliers, which do not count."""
    with pytest.raises(ValueError, match="an overflow"):
        Partial.of(torch.zeros(1, 3), torch.full((4, 3), 1e25), 1.0, 1.0)
