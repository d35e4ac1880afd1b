"""A wrong argument is a TypeError or ValueError that names it, at any nesting of transforms; what
is nobody's argument's fault stays the error it was.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import DATA_OPS
from needs import needs_native
from torch.func import grad, jvp, vmap

from dfkernels import ops
from dfkernels._torch import check, diagnosis, native

x, y, v = torch.zeros(2, 3), torch.linspace(-1, 1, 15).reshape(5, 3), torch.ones(2, 3)
ones = torch.ones(2)


def run(op, **change):
    args = {
        "x": x,
        "y": y,
        "v": v,
        "alpha": ones,
        "sigma": ones,
        "log_prior": torch.zeros(5),
    } | change
    if op != "fisher_matvec":
        del args["v"]
    out = getattr(ops, op)(*args.values())
    return (out[0] if isinstance(out, tuple) else out).sum()


TRANSFORMS = {
    "vmap": lambda f, a: vmap(f)(torch.stack([torch.ones_like(a), a])),
    "vmap of vmap": lambda f, a: vmap(vmap(f))(torch.stack([a, a])[None]),
    "grad": lambda f, a: grad(f)(a),
    "jvp": lambda f, a: jvp(f, (a,), (a,)),
    "grad of grad": lambda f, a: grad(lambda b: grad(f)(b).sum())(a),
    "vmap of grad": lambda f, a: vmap(grad(f))(torch.stack([a, a])),
    "jvp of vmap": lambda f, a: jvp(lambda b: vmap(f)(torch.stack([b, b])).sum(), (a,), (a,)),
    "requires grad": lambda f, a: f(a.clone().requires_grad_()),
    "inference mode": lambda f, a: torch.inference_mode()(f)(a),
    "compile": lambda f, a: compiled(f)(a),
}


def compiled(f):
    """Anew: graphs of the ops before this one would count against the limit of recompilations."""
    torch._dynamo.reset()
    return torch.compile(f, backend="eager", fullgraph=True)


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("op", DATA_OPS)
def test_a_bare_runtime_error_under_transforms(op, name):
    bad = {"sigma": torch.tensor([1.0, 0.0]), "alpha": torch.tensor([1.0, math.nan])}
    for argument, value in bad.items():
        with pytest.raises(
            ValueError, match=rf"^[a-z, ]*{argument}[a-z, ]*: expected .*, got|^alpha, sigma: "
        ):
            TRANSFORMS[name](lambda a, argument=argument: run(op, **{argument: a}), value)


def test_the_value_seen_under_vmap_is_the_callers():
    with pytest.raises(
        ValueError, match=r"^x: expected finite values, got inf at index \[3, 1, 2\]$"
    ):
        many = torch.zeros(4, 2, 3)
        many[3, 1, 2] = math.inf
        vmap(lambda a: run("posterior", x=a))(many)
    with pytest.raises(
        ValueError, match="^log_prior: expected at least one finite value, got all -inf$"
    ):
        vmap(lambda a: run("posterior", log_prior=a))(
            torch.stack([torch.zeros(5), torch.full((5,), -math.inf)])
        )


@needs_native  # PyTorch's sums hand inf on
def test_an_error_found_in_backward():
    """The forward pass is fine; the derivative overflows."""
    q = y[:1].clone().requires_grad_()
    mean = ops.posterior(q, y, 1.0, 0.5).mean
    with pytest.raises(ValueError, match=r"^result: expected finite numbers, got an overflow"):
        mean.backward(torch.full_like(mean, 0.9 * torch.finfo(mean.dtype).max))


def fails_with(error):
    names = ("x", "y", "alpha", "sigma", "log_prior", "scale", "offset")

    def op(*args):
        raise error

    op._schema = SimpleNamespace(arguments=[SimpleNamespace(name=n) for n in names])
    return op


BAD = (x + math.nan, y, ones, ones, None, 1.0, 0.0)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError("std::bad_alloc"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("mat1 and mat2: expected m1 and m2 to have the same dtype"),
        NotImplementedError(
            "Could not run 'dfkernels::posterior' with arguments from the 'XLA' backend"
        ),
    ],
)
def test_an_error_of_others_became_that_of_an_argument(error, monkeypatch):
    """With a NaN in x, which no scan must find: none takes place."""
    monkeypatch.setattr(diagnosis, "diagnose", lambda *args: pytest.fail("looked at the arguments"))
    with pytest.raises(type(error)) as raised:
        diagnosis.call(fails_with(error), BAD)
    assert raised.value is error


def refuses(monkeypatch, kind, arguments, message):
    """An op whose kernel raises a RuntimeError and leaves this record."""
    refusal = native.Refusal(kind, arguments, message)
    monkeypatch.setattr(native, "take_refusal", lambda: refusal)
    return fails_with(RuntimeError(message))


def test_memory_that_a_kernel_did_not_get(monkeypatch):
    op = refuses(monkeypatch, "memory", "", "dfkernels: out of memory (8 bytes)")
    with pytest.raises(torch.OutOfMemoryError, match="^dfkernels: out of memory"):
        diagnosis.call(op, BAD)


def test_a_record_of_another_error_is_not_believed(monkeypatch):
    refuses(monkeypatch, "value", "x", "x: expected finite values, got nan or inf")
    with pytest.raises(RuntimeError, match="^x: expected something else$") as raised:
        diagnosis.call(fails_with(RuntimeError("x: expected something else")), BAD)
    assert type(raised.value) is RuntimeError


def test_no_values_are_looked_at_off_the_cpu(monkeypatch):
    """A kernel's word about tensors elsewhere is taken as it is."""
    op = refuses(monkeypatch, "value", "x", "x: expected finite values, got nan or inf")
    with pytest.raises(ValueError, match="^x: expected finite values, got nan or inf$"):
        diagnosis.call(op, (x.to("meta"), *BAD[1:]))


def test_values_hidden():
    assert not check.values_hidden(x, None, 1.0)
    assert not check.values_hidden(x.clone().requires_grad_())
    assert check.values_hidden(x, x.to("meta"))
    seen = []
    for transform in ("vmap", "vmap of grad", "jvp of vmap", "grad", "jvp", "requires grad"):
        TRANSFORMS[transform](lambda a: seen.append(check.values_hidden(x, a)) or a.sum(), ones)
    assert seen == [True] * 3 + [False] * 3
    assert bool(TRANSFORMS["compile"](lambda a: a * check.values_hidden(a), ones).all())
    with torch._subclasses.FakeTensorMode() as mode:
        assert check.values_hidden(mode.from_tensor(x))
    assert check.values_hidden(mode.from_tensor(x))


def _jagged():
    return torch.nested.nested_tensor([y[:2], y[:3]], layout=torch.jagged)


def _distributed():
    from torch.distributed.tensor import DTensor

    # without a process group: only its type is looked at
    return torch.Tensor._make_subclass(DTensor, y)


CONTAINERS = {
    "coo": (lambda: y.to_sparse(), "to_dense"),
    "csr": (lambda: y.to_sparse_csr(), "to_dense"),
    "csc": (lambda: y.to_sparse_csc(), "to_dense"),
    "bsr": (lambda: torch.ones(4, 4).to_sparse_bsr((2, 2)), "to_dense"),
    "mkldnn": (lambda: y.to_mkldnn(), "to_dense"),
    "jagged": (_jagged, "unbind"),
    "nested": (lambda: torch.nested.nested_tensor([y[:2], y[:3]]), "unbind"),
    "quantized": (lambda: torch.quantize_per_tensor(y, 0.1, 0, torch.qint8), "dequantize"),
    "masked": (lambda: torch.masked.masked_tensor(y, y > 0), "to_tensor"),
    "distributed": (_distributed, "full_tensor"),
    "numpy": (lambda: y.numpy(), "as_tensor"),
    "numpy masked": (lambda: np.ma.masked_less(y.numpy(), 0), "filled"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_name_the_way_out(name):
    make, way_out = CONTAINERS[name]
    for argument in ("x", "y", "v", "log_prior"):
        with pytest.raises(TypeError, match=rf"^{argument}: expected .*{way_out}"):
            run("fisher_matvec", **{argument: make()})
    with pytest.raises(TypeError, match=rf"^y: expected .*{way_out}"):
        check.stored("y", make())
    if not name.startswith("numpy"):
        with pytest.raises(TypeError, match=rf"^sigma: expected .*{way_out}"):
            run("posterior", sigma=make())


def test_tensors_without_values():
    """Enough for shapes, not to be kept."""
    assert ops.posterior(x.to("meta"), y.to("meta"), 1.0, 0.5).mean.shape == x.shape
    with torch._subclasses.FakeTensorMode() as mode:
        assert (
            ops.posterior(mode.from_tensor(x), mode.from_tensor(y), 1.0, 0.5).mean.shape == x.shape
        )
    for empty in (y.to("meta"), mode.from_tensor(y)):
        with pytest.raises(ValueError, match="^y: expected a tensor with values, got "):
            check.stored("y", empty)


def test_views_and_subclasses_are_tensors():
    # the order in which PyTorch's own sums are added depends on strides, that of the kernels not
    equal = torch.equal if native.available else torch.allclose
    right = ops.posterior(x + 1, y, 1.0, 0.5)
    for same in (
        torch.nn.Parameter(x + 1),
        torch._neg_view(-(x + 1)),
        torch.complex(x, -x - 1).conj().imag,
    ):
        for got, want in zip(ops.posterior(same, y, 1.0, 0.5), right, strict=True):
            assert equal(got, want)
    assert equal(ops.posterior(x + 1, torch._neg_view(-y), 1.0, 0.5).mean, right.mean)
