"""The compiled kernels where they could break: odd shapes, strides, storage, every instruction set,
threads, weights that span the range of the numbers, atoms in the worst order, memory that holds
anything."""

from __future__ import annotations

import ctypes
import hashlib
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from difference import EPS, by_ops, difference_form, errors, far
from needs import needs_native
from torch_state import one_thread  # noqa: F401

from dfkernels import ops
from tools.op_table import DATA_OPS

HERE = Path(__file__).parent
pytestmark = needs_native


D = (1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 513)
N = (1, 2, 15, 16, 17, 47, 48, 49, 255, 257, 1000)
B = (1, 2, 7, 8, 9, 15, 16, 17, 33, 129)
# Several blocks of queries; many splits of the atoms; both; rows of 4 KiB, read in place by few
# queries only
MANY = [(300, 49, 2), (300, 257, 17), (270, 300, 64), (1, 20000, 2), (2, 9000, 17), (257, 3000, 3)]
MANY += [(1, 1000, 1024), (9, 49, 1024), (16, 255, 1024), (33, 17, 1024)]


def covering():
    """Shapes in which every pair of (d, N), (d, B) and (N, B) occurs, the largest with fewer
    queries; MANY."""
    shapes = [(B[(i + j) % len(B)], n, d) for i, d in enumerate(D) for j, n in enumerate(N)]
    shapes += [(b, N[(2 * i + j) % len(N)], d) for i, d in enumerate(D) for j, b in enumerate(B)]
    shapes += [(b, n, D[(i + 3 * j) % len(D)]) for i, n in enumerate(N) for j, b in enumerate(B)]
    return sorted({(min(b, 1_000_000 // (n * d) + 1), n, d) for b, n, d in shapes} | set(MANY))


def normals(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def problem(b, n, d, seed=0, *, dtype=torch.float32, K=2, sigma=(0.5, 2.0)):
    """A batch around the atoms, its noise level different for every query."""
    normal = normals(seed + 1000 * d + n + b, dtype)
    y, log_prior = normal(n, d), normal(n)
    alpha, sigma = (
        torch.linspace(0.3, 1, b, dtype=dtype),
        torch.logspace(*map(math.log10, sigma), b, dtype=dtype),
    )
    x = alpha[:, None] * y[torch.arange(b) % n] + sigma[:, None] * normal(b, d)
    return dict(x=x, y=y, alpha=alpha, sigma=sigma, log_prior=log_prior, v=normal(b, K, d))


def outputs(p, dense=True, **stored):
    return by_ops(
        p["x"], p["y"], p["alpha"], p["sigma"], p["log_prior"], p["v"], dense=dense, **stored
    )


def worst(p, got=None, dense=True):
    """The largest error of any output at any query. F and its like are differences from I/sigma^2
    and its like, and the mean can be near zero: their errors are in units of those terms."""
    got = outputs(p, dense) if got is None else got
    p = {k: t.double() if t is not None else None for k, t in p.items()}
    exact = difference_form(**p, dense=dense)
    d, precision = p["x"].shape[1], p["sigma"] ** -2
    unit = {name: math.sqrt(d) * precision for name in ("diagonal", "dense")}
    unit |= {"log_prob": 1 + exact["log_prob"].abs(), "fisher_trace": d * precision}
    unit["mean"] = (p["y"] ** 2).mean().sqrt() * math.sqrt(d)
    unit["matvec"] = p["v"].flatten(1).norm(dim=1) * precision
    found = errors(got, exact, unit)
    return max(float(e.max()) if e.isfinite().all() else math.inf for e in found.values())


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def run(*args, **environment):
    """A Python process of its own; its output."""
    done = subprocess.run(
        [sys.executable, *args],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])} | environment,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, 64 * EPS), (torch.float64, 128 * 2.0**-52)]
)
@pytest.mark.parametrize("d", [*D, 1024])
def test_every_shape(d, dtype, limit):
    found = {}
    for b, n, width in covering():
        if width == d:
            dense = b * d * d <= 300_000
            found[b, n] = worst(problem(b, n, d, dtype=dtype), dense=dense)
    assert {shape: e for shape, e in found.items() if not e <= limit} == {}


@pytest.mark.parametrize(
    "b, n, d",
    [
        (1, 1000, 64),
        (5, 700, 17),
        (40, 3000, 3),
        (300, 1500, 33),
        (600, 40, 100),
        (1, 9000, 2),
        (200, 300, 1024),
    ],
)
def test_the_number_of_threads_changes_no_bit(b, n, d):
    p, found = problem(b, n, d), []
    for count in (1, 2, 3, 1):
        torch.set_num_threads(count)  # the fixture sets it back
        found.append(outputs(p, dense=d < 64))
    for other in found[1:]:
        assert_same_bits(found[0], other)


# (B, d): atoms in the lanes; rows by rows; rows transposed; rows read in place, and transposed
PATHS = [(3, 1), (5, 2), (9, 16), (3, 17), (33, 17), (4, 64), (20, 64), (5, 100), (18, 130)]


@pytest.mark.parametrize("b, d", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strides_change_no_bit(b, d, dtype):
    p = problem(b, 300, d, dtype=dtype)
    expected = outputs(p)
    wide = torch.full((300, d + 5), math.nan, dtype=dtype)
    wide[:, 2 : 2 + d] = p["y"]
    # every second number
    spread = lambda t: torch.stack([t, torch.full_like(t, math.nan)], -1)[..., 0]
    assert_same_bits(outputs(p | {"y": wide[:, 2 : 2 + d]}), expected)
    assert_same_bits(outputs({k: spread(t) for k, t in p.items()}), expected)
    assert_same_bits(outputs(p | {k: p[k].mT.contiguous().mT for k in ("x", "y", "v")}), expected)
    negated = torch.complex(torch.zeros_like(p["x"]), -p["x"]).conj().imag
    assert negated.is_neg()
    assert_same_bits(outputs(p | {"x": negated}), expected)


@pytest.mark.parametrize("b, d", PATHS)
def test_expanded_atoms_and_levels(b, d):
    p = problem(b, 300, d)
    same = p | {
        "y": p["y"][:1].expand(300, d),
        "alpha": p["alpha"][:1].expand(b),
        "x": p["x"][:1].expand(b, d),
    }
    same |= {"sigma": p["sigma"][:1].expand(b), "log_prior": p["log_prior"][:1].expand(300)}
    dense = {k: t.contiguous() for k, t in same.items()}
    assert_same_bits(outputs(same), outputs(dense))
    assert worst(same) <= 16 * EPS


@pytest.mark.parametrize("b, d", PATHS)
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.uint8, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stored_atoms_are_the_numbers_they_stand_for(b, d, stored, dtype):
    """scale and offset such that scale * y + offset is exact: the same bits as with y in the
    compute dtype."""
    p = problem(b, 300, d, dtype=dtype)
    narrow = (
        (p["y"] * 40 + 128).clamp(0, 255).to(stored) if stored == torch.uint8 else p["y"].to(stored)
    )
    plain = narrow.to(dtype)
    assert_same_bits(outputs(p | {"y": narrow}), outputs(p | {"y": plain}))
    scale, offset = (2.0**-6, -2.0) if stored == torch.uint8 else (0.5, 0.0)
    assert_same_bits(
        outputs(p | {"y": narrow}, scale=scale, offset=offset),
        outputs(p | {"y": plain * scale + offset}),
    )


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.uint8])
def test_every_stored_number_is_read_exactly(stored):
    """One atom is its own mean."""
    bits = torch.arange(1 << (8 if stored == torch.uint8 else 16), dtype=torch.int32)
    y = (
        bits.to(torch.uint8)
        if stored == torch.uint8
        else bits.to(torch.uint16).view(torch.int16).view(stored)
    )
    y = y[y.double().abs() < 1e15]  # finite, and no square overflows
    for d in (16, y.numel()):
        atoms = y[: y.numel() // d * d].view(-1, d)
        x = torch.zeros(len(atoms), d)
        mean = torch.cat(
            [
                ops.posterior(x[:1], row[None], 1.0, 1.0).mean
                for row in atoms[:: len(atoms) // 64 + 1]
            ]
        )
        assert torch.equal(mean, atoms[:: len(atoms) // 64 + 1].float())


@pytest.mark.parametrize("b, d", PATHS)
def test_several_vectors(b, d):
    p = problem(b, 300, d, K=9)
    args = p["x"], p["y"], p["v"], p["alpha"], p["sigma"], p["log_prior"]
    all_of_them = ops.fisher_matvec(*args)
    assert worst(p, dense=False) <= 32 * EPS
    for K in (0, 1, 3):
        some = ops.fisher_matvec(*args[:2], p["v"][:, :K], *args[3:])
        assert some.shape == (b, K, d)
        far = (
            (some - all_of_them[:, :K]).norm(dim=2)
            * p["sigma"][:, None] ** 2
            / p["v"][:, :K].norm(dim=2)
        )
        assert K == 0 or float(far.max()) <= 8 * EPS


@pytest.mark.parametrize("b, d", PATHS)
def test_negative_alpha_mirrors_the_atoms(b, d):
    p = problem(b, 300, d)
    expected = outputs(p)
    expected["mean"] = -expected["mean"]
    assert_same_bits(outputs(p | {"alpha": -p["alpha"], "y": -p["y"]}), expected)


@pytest.mark.parametrize("b, d", PATHS)
@pytest.mark.parametrize("k", [-12, 12])
def test_units_change_no_bit(b, d, k):
    """Everything is homogeneous: data, queries and noise times 2^k, and no rounding happens
    elsewhere."""
    for sigma in ((1e-2, 1.0), (1.0, 1e2)):
        p = problem(b, 300, d, sigma=sigma)
        found = outputs(p | {name: 2.0**k * p[name] for name in ("x", "y", "sigma")})
        expected = outputs(p)
        for name in ("log_prob", "log_prob_alone"):
            want = expected.pop(name)
            far = (found.pop(name) - want).double() + k * d * math.log(2)
            assert float(far.abs().max()) <= 4 * EPS * (abs(k) * d + float(want.abs().max()))
        expected["mean"] *= 2.0**k
        for name in ("fisher_trace", "diagonal", "matvec", "dense"):
            expected[name] *= 4.0**-k
        assert_same_bits(found, expected)


def hostile(name, b, n, d):
    """Inputs of which plain PyTorch in float32 makes sense."""
    p = problem(b, n, d, sigma=(0.3, 1.0))
    x, y, alpha, sigma, log_prior = (p[k] for k in ("x", "y", "alpha", "sigma", "log_prior"))
    normal = normals(d + b)
    far = torch.linspace(0, n - 1, n)
    if name == "pure noise":
        alpha = torch.zeros(b)
    elif name == "almost pure noise":
        alpha = torch.full((b,), 1e-30)
    elif name == "both signs of alpha":
        alpha = alpha * (-1.0) ** torch.arange(b)
    elif name == "all noise levels":
        sigma = torch.logspace(-3, 3, b)
        x = alpha[:, None] * y[torch.arange(b) % n] + sigma[:, None] * normal(b, d)
    elif name == "steep prior":
        log_prior = 1e4 * torch.rand(n, generator=torch.Generator().manual_seed(d)) * 2 - 1e4
    elif name == "prior far from normalised":
        log_prior = log_prior + 1e4
    elif name == "prior far below":
        log_prior = log_prior - 1e4
    elif name == "masked tiles":
        log_prior = torch.where((far < 520) | (far >= n - 5), -math.inf, log_prior)
    elif name == "best last":
        order = ((x[0] - alpha[0] * y) ** 2).sum(1).sort(descending=True).indices
        y, x = y[order], x[:1].repeat(b, 1)
    elif name == "best first":
        order = ((x[0] - alpha[0] * y) ** 2).sum(1).sort().indices
        y, x = y[order], x[:1].repeat(b, 1)
    elif name == "heavier and heavier":
        log_prior = 0.3 * far
    elif name == "far outlier":
        y[n // 2] = 1e6 / math.sqrt(d)
    elif name == "outlier first":
        y[0] = 1e6 / math.sqrt(d)
    elif name == "query at the outlier":
        y[0] = 1e6 / math.sqrt(d)
        x[0], alpha[0] = y[0], 1
    elif name == "noise of the outlier's size":
        y[0] = 1e3 / math.sqrt(d)
        x, alpha, sigma = y[:1].repeat(b, 1), torch.ones(b), torch.full((b,), 300.0)
    elif name == "query far outside":
        x = x + 1e4 * sigma[:, None]
    elif name == "far clusters":
        y[::2] += 1e3
        x = alpha[:, None] * y[1 : 2 * b : 2] + sigma[:, None] * normal(b, d)
    elif name == "constant column":
        y[:, 0], x[:, 0] = 1e4, alpha * 1e4
    else:
        raise KeyError(name)
    return dict(x=x, y=y, alpha=alpha, sigma=sigma, log_prior=log_prior, v=p["v"])


HOSTILE = [
    "pure noise",
    "almost pure noise",
    "both signs of alpha",
    "all noise levels",
    "steep prior",
    "prior far from normalised",
    "prior far below",
    "masked tiles",
    "best last",
    "best first",
    "heavier and heavier",
    "far outlier",
    "outlier first",
    "query at the outlier",
    "noise of the outlier's size",
    "query far outside",
    "far clusters",
    "constant column",
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize(
    "b, d", [(5, 2), (40, 16), (5, 17), (40, 40), (12, 64), (40, 64), (3, 200)]
)
def test_hostile_inputs(name, b, d):
    """At most twice the error of plain PyTorch in float32 plus 4 roundings, RMS over the queries,
    and finite. At d = 64 twelve queries: of five with a steep prior two decide, by luck.
    """
    p = hostile(name, b, 600, d)
    got, exact = outputs(p), difference_form(**p, dense=True)
    plain = difference_form(**p, dense=True, dtype=torch.float32)
    rms = lambda e: float(e.square().mean().sqrt())
    ours, theirs = errors(got, exact), errors(plain, exact)
    bad = {
        k: (rms(ours[k]), rms(theirs[k]))
        for k in exact
        if not rms(ours[k]) <= 2 * rms(theirs[k]) + 4 * EPS
    }
    assert bad == {}


@pytest.mark.parametrize("b, d", [(5, 2), (40, 16), (5, 17), (40, 17), (5, 64), (3, 200)])
def test_one_unmasked_atom(b, d):
    """Wherever it is, the result is that atom's Gaussian, and its mean the atom to the bit."""
    p = problem(b, 600, d)
    for i in (0, 255, 300, 511, 512, 599):
        log_prior = torch.full((600,), -math.inf)
        log_prior[i] = 7e3
        found = outputs(p | {"log_prior": log_prior})
        assert torch.equal(found["mean"], p["y"][i].expand(b, d))
        assert torch.equal(found["ess"], torch.ones(b))
        assert worst(p | {"log_prior": log_prior}, found) <= 8 * EPS


@pytest.mark.parametrize("b, size", [(5, 1.0), (20, 1.0), (20, 2e17)])
def test_weights_far_above_those_that_came_first(b, size):
    """In the first tile of a split weights differ by exp(20) at most, so that nobody looks for the
    largest; in the second there is one that is exp(60) times the first atom's."""
    d, normal = 512, normals(b)
    y = normal(600, d)
    x = normal(1, d)
    x *= 11.0 / x.norm()
    y[0] = -x
    y /= y.norm(dim=1, keepdim=True)
    y[[270, 599]] = x
    p = dict(x=x + 1e-3 * normal(b, d), y=y, alpha=torch.ones(b), sigma=torch.ones(b))
    p = {k: t if k == "alpha" else size * t for k, t in p.items()}
    p |= {"log_prior": None, "v": normal(b, 2, d)}
    assert far(p, outputs(p, dense=False)) == {}


@pytest.mark.parametrize("b", [1, 20])
def test_atoms_before_a_heavier_tile_are_not_forgotten(b):
    """The first atom is exp(23) times lighter than the others of its tile, to which the weights are
    then relative; the last atom of all is heavy enough to make the first negligible, but not these.
    """
    n, d, normal = 500, 1024, normals(b)
    gap = math.log(n + 1) - math.log(EPS) + 10
    away = math.sqrt(2 * (gap - 22.8))
    along = normal(1, d)
    along /= along.norm()
    y = 1e-3 * normal(n, d)
    y[-1] = away * along
    log_prior = torch.zeros(n)
    log_prior[0] = -23.2
    p = dict(x=away * along.expand(b, d), y=y, alpha=torch.ones(b), sigma=torch.ones(b))
    p |= {"log_prior": log_prior, "v": normal(b, 2, d)}
    assert far(p, outputs(p, dense=False)) == {}


NOT_FINITE = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("op", DATA_OPS)
@pytest.mark.parametrize("b, d", [(1, 1), (3, 5), (3, 16), (20, 17), (4, 48), (20, 48), (2, 65)])
def test_one_bad_number_is_found_wherever_it_is(op, b, d):
    """In any corner of any argument, beside a masked atom too, which alone may hold anything; and
    nothing outside the slice is looked at.
    """
    n = 300
    p = problem(b, n, d)
    p["log_prior"][7] = -math.inf
    p["y"][7] = 1e20
    names = ["x", "y", "v", "alpha", "sigma", "log_prior"] if op == "fisher_matvec" else None
    names = names or ["x", "y", "alpha", "sigma", "log_prior"]
    ends = lambda size: {0, size // 2, size - 1}
    places = {
        "x": [(i, j) for i in ends(b) for j in ends(d)],
        "y": [(i, j) for i in ends(n) | {6, 255, 256} for j in ends(d)],
        "v": [(i, 1, j) for i in ends(b) for j in ends(d)],
        "alpha": [(i,) for i in ends(b)],
        "sigma": [(i,) for i in ends(b)],
        "log_prior": [(i,) for i in ends(n)],
    }
    for name in names:
        for turn, place in enumerate(places[name]):
            value = (math.nan, math.inf)[turn % 2] if name == "log_prior" else NOT_FINITE[turn % 3]
            bad = p[name].clone()
            bad[place] = value
            with pytest.raises(ValueError) as caught:
                getattr(ops, op)(*[bad if k == name else p[k] for k in names])
            assert str(caught.value).startswith(f"{name}: expected ")
            assert str(caught.value).endswith(f"got {value} at index {list(place)}")


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("b, d", [(3, 5), (20, 17), (3, 48)])
def test_one_bad_stored_number_is_found(stored, b, d):
    p = problem(b, 300, d)
    for turn, place in enumerate([(0, 0), (299, d - 1), (150, d // 2)]):
        bad = p["y"].to(stored)
        bad[place] = NOT_FINITE[turn]
        with pytest.raises(
            ValueError, match=rf"^y: .* got {NOT_FINITE[turn]} at index \[{place[0]}, {place[1]}\]$"
        ):
            ops.posterior(p["x"], bad, p["alpha"], p["sigma"])


MEMORY_SHAPES = [
    (1, 1, 1),
    (3, 5, 3),
    (7, 255, 16),
    (2, 47, 17),
    (17, 300, 31),
    (5, 257, 64),
    (20, 49, 100),
]


def guarded(t):
    """A copy that ends where an unreadable page begins."""
    page = mmap.PAGESIZE
    size = max(t.numel() * t.element_size(), 1)
    whole = (size + page - 1) // page * page
    memory = mmap.mmap(-1, whole + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + whole), ctypes.c_size_t(page), 0) == 0
    out = torch.frombuffer(
        memory, dtype=t.dtype, count=t.numel(), offset=whole - t.numel() * t.element_size()
    )
    return out.copy_(t.flatten()).view(t.shape)


def digest(wrap):
    """A hash of all outputs over shapes, stored types and compute types."""
    bits = hashlib.sha256()
    for b, n, d in MEMORY_SHAPES:
        for dtype in (torch.float32, torch.float64):
            for stored in (dtype, torch.float16, torch.bfloat16, torch.uint8):
                p = problem(b, n, d, dtype=dtype)
                p["y"] = (
                    (10 * p["y"]).clamp(0, 255).to(stored)
                    if stored == torch.uint8
                    else p["y"].to(stored)
                )
                for out in outputs({k: wrap(t) for k, t in p.items()}, scale=0.75).values():
                    bits.update(out.numpy().tobytes())
        p = problem(b, n, d)
        forms = ops.endpoint_matvec(
            *[wrap(p[k]) for k in ("v", "x")], wrap(p["x"] + 1), wrap(p["alpha"]), wrap(p["sigma"])
        )
        trace = ops.matched_trace(
            wrap(p["sigma"]), wrap(p["x"]), wrap(p["alpha"]), wrap(p["sigma"])
        )
        bits.update(forms.numpy().tobytes() + trace.numpy().tobytes())
    return bits.hexdigest()


def test_nothing_is_read_past_the_end_and_no_memory_counts_on_what_it_held():
    """Against a page that must not be read, and with the allocator filling what it gives out (and
    takes back) with 0x7f.. or 0xfe..: floats of 3.4e38 and -1.7e38, whose squares overflow. A read
    past the end kills the process, a number from memory nobody wrote changes the bits."""
    ask = "import test_kernels as t; print(t.digest(t.guarded))"
    expected = digest(torch.clone)
    tunables = "glibc.malloc.tcache_count=0"
    assert run("-c", ask, MALLOC_PERTURB_="128", GLIBC_TUNABLES=tunables).split()[-1] == expected
    assert run("-c", ask, MALLOC_PERTURB_="1").split()[-1] == expected


EXTREMES = {
    "tiny sigma": {"sigma": 1e-19},
    "tinier sigma": {"sigma": 1e-30},
    "huge sigma": {"sigma": 1e30},
    "tiny alpha and sigma": {"alpha": 1e-25, "sigma": 1e-25},
    "huge atom": {"y": 3e38},
    "huge query": {"x": 3e38},
    "huge vector": {"v": 3e38},
    "huge prior": {"log_prior": 3e38},
    "huge negative prior": {"log_prior": -3e38},
}


@pytest.mark.parametrize("name", EXTREMES)
@pytest.mark.parametrize("b, d", [(3, 2), (5, 17), (20, 64)])
def test_never_nan_or_inf_without_a_word(name, b, d):
    """Finite numbers in give finite numbers out or an error."""
    p = problem(b, 300, d)
    for k, value in EXTREMES[name].items():
        p[k] = torch.full_like(p[k], value) if k in ("alpha", "sigma") else p[k].clone()
        p[k][0] = value
    bad = []
    for op in DATA_OPS:
        names = [
            k
            for k in ("x", "y", "v", "alpha", "sigma", "log_prior")
            if k != "v" or op == "fisher_matvec"
        ]
        try:
            out = getattr(ops, op)(*[p[k] for k in names])
        except (ValueError, RuntimeError):
            continue
        out = out if isinstance(out, tuple) else (out,)
        bad += [(op, number) for number, o in enumerate(out) if not bool(o.isfinite().all())]
    assert bad == []
