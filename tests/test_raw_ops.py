"""torch.ops.dfkernels.* called past the public functions: whatever tensor comes, the result is
right or an error says which argument is wrong. Nothing is read past its end, and nothing is read as
another type.
"""

from __future__ import annotations

import math
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from needs import needs_native

import dfkernels
from dfkernels._torch import native
from dfkernels._torch.errors import from_kernel

pytestmark = needs_native
B, N, D, K = 3, 40, 5, 2


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cloud(**more):
    """The arguments of a data-set op, by name, as its schema has them."""
    return {
        "x": normal(B, D),
        "y": normal(N, D, seed=1),
        **more,
        "alpha": torch.linspace(0.5, 1, B),
        "sigma": torch.linspace(0.5, 2, B),
        "log_prior": normal(N, seed=2),
        "scale": 1.0,
        "offset": 0.0,
    }


LISTS = {"atoms": torch.tensor([0, 3, 5, 1, 2, 39]), "counts": torch.tensor([3, 1, 2])}
VECTORS = {"v": normal(B, K, D, seed=3)}
PER_QUERY = {"alpha": torch.linspace(0.5, 1, B), "sigma": torch.linspace(0.5, 2, B)}
CHAIN = {
    "x": normal(B, D),
    "y": normal(N, D, seed=1),
    "alpha": torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64),
    "sigma": torch.tensor([0.9, 0.6, 0.2], dtype=torch.float64),
    "log_prior": normal(N, seed=2),
    "rates": torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=torch.float64),
    "transposed": False,
}


def mixture(**more):
    """Those of an op over components, in the order of its schema."""
    found = cloud() | more | {"variance": normal(N, D, seed=6).square()}
    order = ("x", *more, "y", "variance", "alpha", "sigma", "log_prior", "scale", "offset")
    return {name: found[name] for name in order}


OPS = {  # by the name of the op, and by that with "+lists"
    "posterior": cloud(),
    "fisher_matvec": cloud(**VECTORS),
    "covariance_matvec": cloud(**VECTORS),
    "fisher_diagonal": cloud(),
    "fisher_dense": cloud(),
    "log_prob": cloud(),
    "average": cloud(values=normal(N, 4, seed=5)),
    "mixture_posterior": mixture(),
    "mixture_matvec": mixture(**VECTORS),
    "mixture_diagonal": mixture(),
    "draw": cloud() | {"seed": 5, "queries": torch.arange(B), "total": B},
    "endpoint_matvec": VECTORS
    | {"x0": normal(B, D), "mean": normal(B, D, seed=1)}
    | PER_QUERY
    | {"form": "paper"},
    "matched_trace": {"m": normal(B), "eps": normal(B, D), "x": normal(B, D, seed=1)}
    | PER_QUERY
    | {"form": "paper"},
    "transport_chain": CHAIN,
}
OPS |= {
    f"{op}+lists": args | LISTS
    for op, args in OPS.items()
    if "offset" in args and "variance" not in args
}
TENSORS = [
    (op, name)
    for op, args in OPS.items()
    for name, a in args.items()
    if isinstance(a, torch.Tensor)
]


def run(op, **changed):
    args = OPS[op] | changed
    function = getattr(torch.ops.dfkernels, op.partition("+")[0])
    names = [a.name for a in function.default._schema.arguments]
    assert list(args) == names[: len(args)] and len(names) - len(args) in (0, 2)
    out = function(*args.values())
    return out if isinstance(out, tuple) else (out,)


def refused(op, name, changed):
    """An error whose words, after the place in C++, begin with the argument's name or that of what
    it must go with."""
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        run(op, **{name: changed})
    words = re.sub(r"^\w+, \S+:\d+, ", "", str(caught.value))
    return re.match(r"(\w+, )*\w+: expected .*, got ", words) and name in words.split(":")[0].split(
        ", "
    )


def test_every_compiled_op_is_in_the_table():
    """But for select_atoms, whose index has tests of its own, and the kernels that `pair_gradient`
    and `sums_about_mean` call with arguments they have checked."""
    names = {
        n.split("::")[1].split(".")[0]
        for n in torch._C._dispatch_get_all_op_names()
        if "dfkernels::" in n
    }
    compiled = {
        n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"dfkernels::{n}", "CPU")
    }
    inner = {"moments_about_mean", "pair_vjp_queries", "pair_vjp_atoms", "pair_jvp"}
    assert compiled == {op.partition("+")[0] for op in OPS} | {"select_atoms"} | inner


@pytest.mark.parametrize("op, name", TENSORS)
def test_another_dtype_is_refused_or_read_as_what_it_is(op, name):
    given = OPS[op][name]
    stored = name in ("y", "values") and op != "transport_chain"
    fine = {given.dtype} | ({torch.uint8, torch.float16, torch.bfloat16} if stored else set())
    others = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.uint8,
        torch.int8,
        torch.int16,
    ]
    others += [torch.int32, torch.int64, torch.bool, torch.complex64, torch.float8_e5m2]
    lead = next(iter(OPS[op])) if "trace" not in op else "eps"
    for dtype in others:
        other = given.to(dtype)
        if dtype not in fine:
            # the others are then of another dtype
            if name == lead and dtype in (
                torch.float32,
                torch.float64,
            ):
                with pytest.raises(
                    RuntimeError, match=r": expected float(32|64), got float(32|64)"
                ):
                    run(op, **{name: other})
            else:
                assert refused(op, name, other), (dtype, "is named")
        elif stored and dtype != given.dtype:
            for got, want in zip(
                run(op, **{name: other}), run(op, **{name: other.float()}), strict=True
            ):
                assert torch.equal(got, want), dtype


@pytest.mark.parametrize("op, name", TENSORS)
def test_another_shape_is_refused(op, name):
    given = OPS[op][name]
    wrong = [given.flatten()[0]]
    if not (
        name in ("y", "values", "log_prior") and "offset" in OPS[op] and "atoms" not in OPS[op]
    ):
        wrong += [given[None]]  # there it would be one cloud: test_clouds.py
    if (op, name) != ("transport_chain", "x"):  # nothing else there has a row for each chain
        wrong += [torch.cat([given, given[:1]]), given[:-1]]
    if given.dim() > 1 and name != "values":  # which have any width
        wrong += [
            given[..., :-1],
            torch.cat([given, given[..., :1]], -1),
            given[..., 0],
            given[..., :0],
        ]
    for other in wrong:
        with pytest.raises((RuntimeError, ValueError), match=r"(?s)\w+: expected .*got "):
            run(op, **{name: other})


@pytest.mark.parametrize("op, name", TENSORS)
def test_a_tensor_of_another_device_or_layout_is_refused(op, name):
    """On meta the dispatcher would ask for the shapes alone, and give out memory that nobody
    wrote."""
    given = OPS[op][name]
    others = [given.to("meta"), given.to_sparse()]
    if given.dtype == torch.float32:
        others += [given.to_mkldnn(), torch.quantize_per_tensor(given, 1.0, 0, torch.quint8)]
    for other in others:
        with pytest.raises(
            (TypeError, ValueError), match=r"^\w+: expected (a dense tensor|device)"
        ):
            run(op, **{name: other})


def spread(t):
    """Every second number of a wider tensor."""
    return torch.stack([t, torch.full_like(t, 77)], -1)[..., 0]


def shifted(t):
    """Not where a number of its type may start: one byte further on."""
    raw = bytearray(b"\0" + t.contiguous().numpy().tobytes())
    return torch.frombuffer(raw, dtype=t.dtype, count=t.numel(), offset=1).view(t.shape)


def behind_an_offset(t):
    return torch.cat([torch.full_like(t[:1], 77), t])[1:]


LAYOUTS = {
    "spread": spread,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else spread(t),
    "misaligned": shifted,
    "behind an offset": behind_an_offset,
    "negated": lambda t: torch._neg_view(-t),
    "conjugated": lambda t: (
        torch.complex(torch.zeros_like(t), -t).conj().imag if t.is_floating_point() else t
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op, name", TENSORS)
def test_memory_in_any_order_gives_the_same_bits(op, name, layout):
    for got, want in zip(run(op, **{name: LAYOUTS[layout](OPS[op][name])}), run(op), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("op", [op for op in OPS if "y" in OPS[op]])
def test_atoms_that_share_memory(op):
    """Expanded rows, rows that overlap, and rows that lie in a wider matrix."""
    for d in (1, D, 16, 24):
        if op == "transport_chain" and d > 16:
            continue
        flat = normal(2 * N * d + 7, seed=4)
        views = [
            flat.as_strided((N, d), strides, 3)
            for strides in ((0, 1), (1, 1), (1, 0), (2, 1), (0, 0))
        ]
        wide = {"x": normal(B, d)} | ({"v": normal(B, K, d)} if "v" in OPS[op] else {})
        if "variance" in OPS[op]:
            wide["variance"] = normal(N, d, seed=6).square()
        for y in views:
            for got, want in zip(run(op, y=y, **wide), run(op, y=y.clone(), **wide), strict=True):
                assert torch.equal(got, want), (d, y.stride())


@pytest.mark.parametrize("op", OPS)
def test_no_query_and_no_vector(op):
    empty = lambda a, n: a[:0] if isinstance(a, torch.Tensor) and len(a) == n else a
    per_query = {
        k: empty(a, B) for k, a in OPS[op].items() if k not in ("atoms", "y", "log_prior", "rates")
    }
    if op == "transport_chain":
        per_query = {"x": OPS[op]["x"][:0]}
    if "atoms" in OPS[op]:
        per_query["atoms"] = OPS[op]["atoms"][:0]
    for got, full in zip(run(op, **per_query), run(op), strict=True):
        assert got.shape == (0, *full.shape[1:])
    if "v" in OPS[op]:
        assert run(op, v=OPS[op]["v"][:, :0])[0].shape == (B, 0, D)


@pytest.mark.parametrize("op", OPS)
def test_numbers_out_of_range_are_refused(op):
    args = OPS[op]
    bad = {
        "alpha": [math.nan, math.inf],
        "sigma": [0.0, -1.0, math.nan, math.inf],
        "log_prior": [math.nan, math.inf],
    }
    bad |= {
        name: [math.nan, -math.inf] for name in ("x", "y", "v", "x0", "mean", "m", "eps", "rates")
    }
    for name, values in bad.items():
        for value in values if name in args else ():
            changed = args[name].clone()
            changed.view(-1)[-1] = value
            assert refused(op, name, changed) or name in ("v", "x0", "mean", "m", "x", "eps"), (
                name,
                value,
            )
    for name in ("scale", "offset"):
        for value in (math.nan, math.inf, 1e300) if name in args else ():
            with pytest.raises(
                RuntimeError, match=f"{name}: expected a finite number in float32, got "
            ):
                run(op, **{name: value})
    if "log_prior" in args:
        assert refused(op, "log_prior", torch.full((N,), -math.inf))


@pytest.mark.parametrize("op", [op for op in OPS if "atoms" in OPS[op]])
def test_lists_out_of_range_are_refused(op):
    right = OPS[op]["atoms"].tolist()
    for atoms in (
        [-1, *right[1:]],
        [*right[:-1], N],
        [3, 0, *right[2:]],
        [0, 0, *right[2:]],
        [1 << 40, *right[1:]],
    ):
        assert refused(op, "atoms", torch.tensor(atoms)), atoms
    for counts in ([0, 3, 3], [-1, 4, 3], [1 << 40, 1, 1], [3, 1, 3], [3, 1, 1]):
        with pytest.raises(RuntimeError, match="(atoms|counts): expected .*, got "):
            run(op, counts=torch.tensor(counts))


@pytest.mark.parametrize("op, name", TENSORS)
def test_a_tensor_without_memory_is_refused(op, name):
    gone = OPS[op][name].clone()
    gone.untyped_storage().resize_(0)
    assert refused(op, name, gone)


@pytest.mark.parametrize("public", [True, False])
def test_memory_for_a_copy_or_an_output_that_no_machine_has(public):
    """The stable ABI says that a call failed, not why; it was a RuntimeError about
    torch_call_dispatcher."""
    huge = torch.ones(1, 1, 1).expand(1, 2**50, D)
    one = torch.ones(1)
    with pytest.raises(
        torch.OutOfMemoryError, match="^dfkernels: out of memory .a contiguous copy of an argument"
    ):
        if public:
            dfkernels.ops.fisher_matvec(normal(1, D), normal(N, D), huge, 1.0, 1.0)
        else:
            torch.ops.dfkernels.fisher_matvec(
                normal(1, D), normal(N, D), huge, one, one, None, 1.0, 0.0
            )
    many = torch.ones(1, 1).expand(2**24, 1).reshape(1, -1)  # 2^50 bytes of matrix
    with pytest.raises(torch.OutOfMemoryError, match="^dfkernels: out of memory .an output"):
        if public:
            dfkernels.ops.fisher_dense(many, many, 1.0, 1.0)
        else:
            torch.ops.dfkernels.fisher_dense(many, many, one, one, None, 1.0, 0.0)


def test_what_a_kernel_refuses_is_on_record_as_data():
    """Below autograd, where nobody has taken the record. It is one thread's, and taken once."""
    bad = [*OPS["posterior"].values()]
    bad[3] = torch.zeros(B)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match="^sigma: expected positive") as e,
    ):
        torch.ops.dfkernels.posterior(*bad)
    assert from_kernel(RuntimeError("somebody else's")) is None
    with torch.inference_mode(), pytest.raises(RuntimeError, match="^sigma: expected positive"):
        torch.ops.dfkernels.posterior(*bad)
    with ThreadPoolExecutor() as pool:
        assert pool.submit(native.take_refusal).result() is None
    assert native.take_refusal() == ("value", "sigma", str(e.value))
    assert native.take_refusal() is None
