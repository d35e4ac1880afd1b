"""Many data sets in one call: y [G, N, d] and log_prior [G, N] beside queries [G * B, d], and vmap
over y and log_prior, which is such a call.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import DATA_OPS, ORDER
from needs import needs_native
from torch.func import grad, jacfwd, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from dfkernels import ops

G, B, N, K = 3, 4, 70, 2
RAW = [*DATA_OPS, "covariance_matvec"]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(op, d=5, dtype=torch.float32, **changed):
    """The arguments of a raw op by name, with G clouds."""
    B_all = G * B
    args = {
        "x": normal(B_all, d, dtype=dtype),
        "y": normal(G, N, d, seed=1, dtype=dtype) + 5 * torch.arange(G)[:, None, None],
        "v": normal(B_all, K, d, seed=2, dtype=dtype),
        "alpha": torch.linspace(-1, 1, B_all, dtype=dtype),
        "sigma": torch.logspace(-1, 1, B_all, dtype=dtype),
        "log_prior": normal(G, N, seed=3, dtype=dtype),
        "scale": 1.0,
        "offset": 0.0,
    } | changed
    if "v" not in ORDER.get(op, ("v",)):
        del args["v"]
    return args


def run(op, args):
    out = getattr(torch.ops.dfkernels, op)(*args.values())
    return out if isinstance(out, tuple) else (out,)


def one_by_one(op, args):
    """A call per cloud."""
    parts = []
    for g in range(G):
        rows = slice(g * B, (g + 1) * B)
        part = {k: a[rows] if k in ("x", "v", "alpha", "sigma") else a for k, a in args.items()}
        if args["y"].dim() == 3:
            part["y"] = args["y"][g]
        if args["log_prior"] is not None and args["log_prior"].dim() == 2:
            part["log_prior"] = args["log_prior"][g]
        parts.append(run(op, part))
    return tuple(map(torch.cat, zip(*parts, strict=True)))


def same_bits(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and torch.isfinite(a).all() and torch.equal(a, b)


def masked(prior):
    return torch.where(torch.arange(N) % 3 == 1, -math.inf, prior)


LAYOUTS = {
    "each its own": {},
    "one y": {"y": normal(N, 5, seed=1)},
    "one prior": {"log_prior": normal(N, seed=3)},
    "no prior": {"log_prior": None},
    "expanded y": {"y": normal(1, N, 5, seed=1).expand(G, N, 5)},
    "expanded prior": {"log_prior": normal(N, seed=3).expand(G, N)},
    "masked": {"log_prior": masked(normal(G, N, seed=3))},
    "transposed": {"y": normal(N, G, 5, seed=1).transpose(0, 1)},
    "columns": {"y": normal(G, 5, N, seed=1).mT, "log_prior": normal(N, G, seed=3).mT},
    "overlapping": {"y": normal(N * 5 + 40, seed=1).as_strided((G, N, 5), (20, 5, 1))},
    "uint8": {"y": torch.arange(G * N * 5, dtype=torch.uint8).reshape(G, N, 5), "scale": 0.02},
    "bfloat16": {"y": normal(G, N, 5, seed=1, dtype=torch.bfloat16), "offset": 3.0},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", RAW)
def test_the_bits_of_a_call_per_cloud(op, layout):
    args = call(op, **LAYOUTS[layout])
    same_bits(run(op, args), one_by_one(op, args))


@pytest.mark.parametrize("d, dtype", [(1, torch.float64), (2, torch.float32), (40, torch.float32)])
@pytest.mark.parametrize("threads", [1, 2])
def test_any_width_on_any_number_of_threads(d, dtype, threads):
    """Clouds that are small go to a thread each, large ones are shared by all threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for N_one in (1, 70, 20_000):
            args = call("posterior", d, dtype, log_prior=None)
            args["y"] = normal(G, N_one, d, seed=4, dtype=dtype)
            same_bits(run("posterior", args), one_by_one("posterior", args))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("op", RAW)
def test_no_cloud_and_no_query(op):
    for clouds in (0, 2):
        args = call(op, y=normal(clouds, N, 5), log_prior=normal(clouds, N))
        for name in ("x", "v", "alpha", "sigma"):
            if name in args:
                args[name] = args[name][:0]
        for got, full in zip(run(op, args), run(op, call(op)), strict=True):
            assert got.shape == (0, *full.shape[1:])


WRONG = {
    "y: expected shape [N > 0, 5] or [G, N > 0, 5], got [1, 3, 70, 5]": {"y": normal(1, G, N, 5)},
    "y: expected shape [N > 0, 5] or [G, N > 0, 5], got [3, 70, 4]": {"y": normal(G, N, 4)},
    "log_prior: expected shape [70] or [G, 70], got [3, 69]": {"log_prior": normal(G, N - 1)},
    "log_prior: expected shape [70] or [3, 70] to go with the clouds of y, got [2, 70]": {
        "log_prior": normal(2, N)
    },
    "x: expected equally many queries for each of 5 clouds, got 12": {
        "y": normal(5, N, 5),
        "log_prior": None,
    },
    "atoms: expected None where y or log_prior has an axis of clouds, got a tensor": {
        "atoms": torch.zeros(12, dtype=torch.int64),
        "counts": torch.ones(12, dtype=torch.int64),
    },
    "sigma: expected positive values, got 0 at index 1, in cloud 1": {
        "sigma": torch.tensor([1.0] * 5 + [0.0] * 7)
    },
    "log_prior: expected at least one atom above -inf, got all 70 masked, in cloud 2": {
        "log_prior": torch.tensor([[0.0], [0.0], [-math.inf]]).expand(G, N)
    },
}


@needs_native
@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_kernel_refuses(message, threads):
    """The first cloud at fault is named, whichever thread met it first."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(ValueError) as caught:
            run("posterior", call("posterior", **WRONG[message]))
        assert str(caught.value) == message
    finally:
        torch.set_num_threads(before)


class Calls(TorchDispatchMode):
    """How often a kernel of the package is called."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace == "dfkernels"
        return func(*args, **(kwargs or {}))


MAPPED = [
    # the names at each level, outermost first; calls of the kernel
    ([["y"]], 1),
    ([["log_prior"]], 1),
    ([["x", "y"]], 1),
    ([["x", "y", "alpha", "sigma", "log_prior"]], 1),
    ([["y"], ["y"]], 1),
    ([["log_prior"], ["log_prior", "x"]], 1),
    ([["y", "log_prior"], ["x"]], 1),
    ([["x"], ["y"]], 1),
    ([["x"], ["y"], ["x", "y"]], 1),
    ([["log_prior"], ["y"]], 2),  # the atoms of all would have to be copied
    ([["y"], ["log_prior"]], 2),
]


@pytest.mark.parametrize("levels, calls", MAPPED, ids=lambda v: str(v).replace("'", ""))
@pytest.mark.parametrize("op", DATA_OPS)
def test_vmap_is_one_call(op, levels, calls):
    """The elements of vmap are clouds, at any nesting, whatever dimension is mapped."""
    sizes = [2, 3, 2][: len(levels)]
    tensors = {"x": (B, 5), "y": (N, 5), "alpha": (B,), "sigma": (B,), "log_prior": (N,)}
    for i, (name, shape) in enumerate(tensors.items()):
        lead = [n for n, names in zip(sizes, levels, strict=True) if name in names]
        tensors[name] = normal(*lead, *shape, seed=i).abs() + 0.5
    if op == "fisher_matvec":
        tensors["v"] = normal(B, 5, seed=9)

    def f(*values):
        given = dict(zip(tensors, values, strict=True))
        out = getattr(ops, op)(**given)
        return out if isinstance(out, tuple) else (out,)

    mapped, want = f, []
    for names in reversed(levels):
        mapped = vmap(mapped, in_dims=tuple(0 if name in names else None for name in tensors))
    with Calls() as seen:
        got = mapped(*tensors.values())
    assert seen.count == calls
    for index in itertools.product(*map(range, sizes)):
        at = {
            name: t[tuple(i for i, names in zip(index, levels, strict=True) if name in names)]
            for name, t in tensors.items()
        }
        want.append(f(*at.values()))
    same_bits(got, [torch.stack(w).unflatten(0, sizes) for w in zip(*want, strict=True)])


def test_vmap_over_the_last_dimension():
    x, y = normal(B, 5), normal(N, 5, G, seed=1)
    got = vmap(lambda a: ops.posterior(x, a, 0.8, 0.5), in_dims=-1, out_dims=-1)(y)
    want = [ops.posterior(x, y[..., g].contiguous(), 0.8, 0.5) for g in range(G)]
    same_bits(got, [torch.stack(w, -1) for w in zip(*want, strict=True)])


@pytest.mark.parametrize("shared", ["", "y", "log_prior"])
@pytest.mark.parametrize("op", RAW)
def test_derivatives(op, shared):
    """In every tensor, those that clouds share too: as those of a call per cloud."""
    args = call(op, 3, torch.float64)
    if shared:
        args[shared] = args[shared][0]
    names = [k for k, a in args.items() if isinstance(a, torch.Tensor)]

    def loss(run, *tensors):
        outs = run(op, args | dict(zip(names, tensors, strict=True)))
        return sum((torch.sin(o) * (1 + i)).sum() for i, o in enumerate(outs))

    tensors = [args[k] for k in names]
    positions = tuple(range(len(names)))
    grads = [
        grad(lambda *t, run=run: loss(run, *t), argnums=positions)(*tensors)
        for run in (run, one_by_one)
    ]
    along = [
        jvp(lambda *t, run=run: loss(run, *t), tuple(tensors), grads[0])[1]
        for run in (run, one_by_one)
    ]
    for got, want in zip((*grads[0], along[0]), (*grads[1], along[1]), strict=True):
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= 1e-11 * (1 + float(want.abs().max()))


def public(op, event, seed=0):
    """Arguments of a public function for G data sets."""
    args = {
        "x": normal(G, B, *event, seed=seed),
        "y": normal(G, N, *event, seed=seed + 1),
        "v": normal(G, B, *event, seed=seed + 2),
        "alpha": normal(G, B, seed=seed + 3),
        "sigma": normal(G, B, seed=seed + 4).abs() + 0.3,
        "log_prior": normal(G, N, seed=seed + 5).double(),
    }
    return {k: a for k, a in args.items() if k in ORDER[op]}


def apart(op, args, **options):
    """A call per data set."""
    calls = []
    for g in range(G):
        out = getattr(ops, op)(*[a[g] for a in args.values()], **options)
        calls.append(out if isinstance(out, tuple) else (out,))
    return tuple(map(torch.stack, zip(*calls, strict=True)))


def twice(f):
    return grad(lambda y, *others: torch.sin(grad(f)(y, *others)).sum())


# In PyTorch's own sums, forward mode below a dispatch mode trips an assertion of torch.
FORWARD = pytest.param(jacfwd, marks=needs_native)


@pytest.mark.parametrize("transform", [grad, twice, FORWARD])
def test_vmap_of_derivatives_is_one_call_of_each_op(transform):
    """In the atoms, which each element has or all share: their gradients are per element. Not so
    jacfwd, where the tangents are elements as well, and the atoms would have to be copied."""
    x, y = normal(G, B, 3).double(), normal(G, 5, 3, seed=1).double()
    prior = normal(G, 5, seed=2).double()

    def f(y, x, prior):
        p = ops.posterior(x, y, 0.8, 0.6, prior)
        return torch.sin(p.mean).sum() + torch.cos(p.ess * p.log_prob).sum()

    for in_dims in [(0, 0, 0), (0, None, 0), (None, 0, None), (None, None, 0)]:
        given = [a if dim == 0 else a[0] for a, dim in zip((y, x, prior), in_dims, strict=True)]
        with Calls() as seen:
            got = vmap(transform(f), in_dims=in_dims)(*given)
        calls = seen.count
        want = []
        for g in range(G):
            one = [a[g] if dim == 0 else a for a, dim in zip(given, in_dims, strict=True)]
            with Calls() as seen:
                want.append(transform(f)(*one))
        assert calls == seen.count or transform is jacfwd
        assert got.shape == (G, *want[0].shape)
        assert float((got - torch.stack(want)).abs().max()) <= 1e-11 * (1 + float(got.abs().max()))


@pytest.mark.parametrize("event", [(), (3,), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("op", DATA_OPS)
def test_batched(op, event):
    args = public(op, event)
    out = getattr(ops, op)(*args.values(), batched=True)
    got = out if isinstance(out, tuple) else (out,)
    want = apart(op, args)
    same_bits(got, want)
    per_cloud = args | {"alpha": args["alpha"][:, :1]}
    expanded = args | {"alpha": args["alpha"][:, :1].expand(G, B)}
    out = getattr(ops, op)(*per_cloud.values(), batched=True)
    same_bits(out if isinstance(out, tuple) else (out,), apart(op, expanded))
    stored = args | {"y": (args["y"] * 20 + 90).to(torch.uint8), "alpha": 0.5}
    out = getattr(ops, op)(*stored.values(), scale=0.05, offset=-4.5, batched=True)
    stored["alpha"] = torch.full((G,), 0.5)
    same_bits(out if isinstance(out, tuple) else (out,), apart(op, stored, scale=0.05, offset=-4.5))


def test_batched_vectors_and_what_all_data_sets_share():
    args = public("fisher_matvec", (2, 2))
    args["v"] = normal(G, B, K, 2, 2)
    got = ops.fisher_matvec(*args.values(), batched=True)
    same_bits((got,), apart("fisher_matvec", args))
    shared = args | {"y": args["y"][0], "log_prior": args["log_prior"][0]}
    whole = shared | {
        "y": shared["y"].expand(G, N, 2, 2),
        "log_prior": shared["log_prior"].expand(G, N),
    }
    for names in (["y"], ["log_prior"], ["y", "log_prior"]):
        some = args | {k: shared[k] for k in names}
        want = args | {k: whole[k] for k in names}
        got = ops.fisher_matvec(*some.values(), batched=True)
        same_bits((got,), apart("fisher_matvec", want))


def test_batched_draws():
    """The queries of all data sets are one batch: as separate calls of the op with their numbers
    draw."""
    x, y, alpha, sigma, prior = public("posterior", (3,)).values()
    prior = prior.float()
    got = ops.draw(x, y, alpha, sigma, prior, seed=5, batched=True)
    numbers = torch.arange(G * B).reshape(G, B)
    for g in range(G):
        one = (x[g], y[g], alpha[g], sigma[g], prior[g], 1.0, 0.0, 5, numbers[g], G * B)
        assert torch.equal(got[g], torch.ops.dfkernels.draw(*one))
    assert got.shape == (G, B)
    with pytest.raises(ValueError, match=r"^y: expected shape \[3, N, 3\] or \[N, 3\] to go with"):
        ops.draw(x, y[:2], alpha, sigma, prior, seed=5, batched=True)


def test_score_and_eps_of_a_batched_call():
    args = public("posterior", (3,))
    x, _, alpha, sigma, _ = args.values()
    got = ops.posterior(*args.values(), batched=True)
    for name in ("score", "eps"):
        want = [
            getattr(ops.posterior(*[a[g] for a in args.values()]), name)(x[g], alpha[g], sigma[g])
            for g in range(G)
        ]
        same_bits((getattr(got, name)(x, alpha, sigma),), (torch.stack(want),))


def test_batched_without_data_sets_or_queries():
    for shape in ((0, 4), (3, 0)):
        p = ops.posterior(normal(*shape, 2), normal(shape[0], N, 2), 1.0, 0.5, batched=True)
        assert p.log_prob.shape == shape and p.mean.shape == (*shape, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": normal(5)}, "x: expected shape [G, B, ...] with batched=True, got [5]"),
        (
            {"y": normal(2, N, 3)},
            "y: expected shape [3, N, 3] or [N, 3] to go with x of shape [3, 4, 3], got [2, 70, 3]",
        ),
        (
            {"y": normal(G, N, 2)},
            "y: expected shape [3, N, 3] or [N, 3] to go with x of shape [3, 4, 3], got [3, 70, 2]",
        ),
        ({"y": normal(G, 0, 3)}, "y: expected at least one atom, got shape [3, 0, 3]"),
        (
            {"log_prior": normal(N, G)},
            "log_prior: expected shape [70] or [3, 70] to go with the atoms and the clouds, "
            "got [70, 3]",
        ),
        (
            {"alpha": torch.ones(G)},
            "alpha: expected a number, shape [], [3, 4] or [3, 1] to go with x of shape [3, 4, 3], "
            "got [3]",
        ),
        (
            {"sigma": torch.tensor([[1.0], [1.0], [0.0]])},
            "sigma: expected finite values > 0, got 0.0 at index [2, 0]",
        ),
        (
            {"y": torch.where(torch.arange(G * N * 3).reshape(G, N, 3) == 250, math.nan, 1.0)},
            "y: expected finite values, got nan at index [1, 13, 1]",
        ),
        (
            {"v": normal(G, B, 2)},
            "v: expected shape [3, 4, 3] or [3, 4, K, 3], got [3, 4, 2]",
        ),
        (
            {"atoms": torch.zeros(3).long(), "counts": torch.ones(3).long()},
            "atoms: expected None with batched=True, got a tensor",
        ),
        ({"batched": 2}, "batched: expected False or True, got 2"),
    ],
)
def test_batched_refuses(change, message):
    args = public("fisher_matvec", (3,)) | {"batched": True} | change
    with pytest.raises(ValueError) as caught:
        ops.fisher_matvec(**args)
    assert str(caught.value) == message


def test_what_a_masked_atom_of_one_data_set_holds():
    args = public("posterior", (3,))
    args["y"][1, 7] = math.nan
    args["log_prior"][1, 7] = -math.inf
    same_bits(ops.posterior(*args.values(), batched=True), apart("posterior", args))


def test_a_masked_atom_is_not_blamed_where_there_are_as_many_data_sets_as_atoms():
    y = torch.zeros(3, 3, 2)
    y[0, 2] = y[2, 0] = torch.nan  # the first is masked
    log_prior = torch.tensor([0.0, 0.0, -torch.inf])
    with pytest.raises(
        ValueError, match=r"^y: expected finite values, got nan at index \[2, 0, 0\]$"
    ):
        ops.posterior(torch.zeros(3, 1, 2), y, 1.0, 1.0, log_prior, batched=True)


@pytest.mark.slow
def test_compiled_with_derivatives():
    args = public("posterior", (3,))
    x, y, alpha, sigma, prior = (a.double() for a in args.values())

    def f(x, y):
        p = ops.posterior(x, y, alpha, sigma, prior, batched=True)
        return (torch.sin(p.mean).sum(), p.log_prob.sum())

    def mapped(x, y):
        p = vmap(ops.posterior)(x, y, alpha, sigma, prior)
        return (torch.sin(p.mean).sum(), p.log_prob.sum())

    results = []
    for function in (f, mapped, torch.compile(f, backend="aot_eager", fullgraph=True)):
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        values = function(a, b)
        results.append([*values, *torch.autograd.grad(sum(values), (a, b))])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert float((got - want).detach().abs().max()) <= 1e-12 * (
                1 + float(want.detach().abs().max())
            )
