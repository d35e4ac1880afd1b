"""endpoint_matvec and matched_trace: the launchers on CPU tensors, every plan, against the
references."""

from __future__ import annotations

import pytest
import torch
from cases import REFERENCES, _normal

from dfkernels.ops.common.triton import device as _triton
from dfkernels.ops.endpoint_matvec import triton as endpoint
from dfkernels.ops.matched_trace import triton as matched

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def device(monkeypatch, multiprocessors):
    """Few of them: several rows, or several of K vectors, for one program already at small
    sizes."""
    monkeypatch.setitem(_triton.DEVICES, 90, _triton.Device(90, multiprocessors, 227 << 10))


def near(got, plain, exact):
    """At most twice the error of plain PyTorch, and four roundings."""
    assert got.shape == plain.shape and got.dtype == plain.dtype
    if got.numel():
        largest = lambda t: float((t.double() - exact).abs().max())
        rounding = torch.finfo(got.dtype).eps * float(exact.abs().max())
        assert largest(got) <= 2 * largest(plain) + 4 * rounding


def endpoint_inputs(B, K, d, dtype):
    normal = _normal(B + K + d)
    v, x0, mean = normal(B, K, d), normal(B, d), normal(B, d)
    alpha, sigma = torch.rand(B, generator=torch.Generator().manual_seed(1)), 0.5 + normal(B).abs()
    return [t.to(dtype) for t in (v, x0, mean, alpha, sigma)]


def check_endpoint(inputs, form):
    double = [t.double() for t in inputs]
    reference = REFERENCES["endpoint_matvec"]
    exact = reference(*double, form)
    if inputs[0].dtype == torch.float64:  # the sums' order alone: a bound of their own
        got = endpoint.launch(*inputs, form)
        scale = 1 + float(exact.abs().max())
        assert float((got - exact).abs().max()) <= 1e-13 * scale
    else:
        near(endpoint.launch(*inputs, form), reference(*inputs, form), exact)


@BOTH
@pytest.mark.parametrize("form", ["paper", "centred"])
@pytest.mark.parametrize(
    "B, K, d, multiprocessors",
    [
        (3, 2, 5, 132),  # a row per program
        (70, 3, 2, 4),  # eight rows per program, the last one part empty
        (5, 7, 40, 1),  # several vectors per program
        (2, 1, 3000, 132),
    ],
)
def test_endpoint_matvec(monkeypatch, B, K, d, multiprocessors, dtype, form):
    device(monkeypatch, multiprocessors)
    check_endpoint(endpoint_inputs(B, K, d, dtype), form)


@BOTH
@pytest.mark.parametrize("form", ["paper", "centred"])
def test_endpoint_matvec_in_pieces(dtype, form):
    """A row that no program holds, in two launches; its last piece is short."""
    d = 4 * 4096 * 4 // dtype.itemsize + 1
    assert endpoint.plan(2, 2, d, dtype.itemsize, _triton.DEVICES[90], False).pieces > 1
    check_endpoint(endpoint_inputs(2, 2, d, dtype), form)


@pytest.mark.parametrize("form", ["paper", "centred"])
def test_endpoint_matvec_in_a_cluster(monkeypatch, form):
    """A row that several CTAs hold together; the interpreter knows but one."""
    monkeypatch.setattr(_triton, "CLUSTERS", True)
    assert endpoint.plan(2, 1, 20_001, 4, _triton.DEVICES[90], True).ctas == 8
    check_endpoint(endpoint_inputs(2, 1, 20_001, torch.float32), form)


def test_endpoint_matvec_with_strides_and_without_samples():
    v, x0, mean, alpha, sigma = endpoint_inputs(4, 2, 6, torch.float64)
    inputs = [
        v.mT.contiguous().mT,
        x0[:1].expand(4, 6),
        mean,
        alpha[:1].expand(4),
        sigma[::2][:1].expand(4),
    ]
    check_endpoint(inputs, "paper")
    for B, K in ((0, 1), (2, 0)):
        assert endpoint.launch(*endpoint_inputs(B, K, 3, torch.float32), "paper").shape == (B, K, 3)


def check_trace(B, d, dtype, form, alpha=None):
    normal = _normal(B + d)
    m, eps, x, sigma = normal(B), normal(B, d), normal(B, d), 0.5 + normal(B).abs()
    alpha = normal(B) if alpha is None else alpha
    inputs = [t.to(dtype) for t in (m, eps, x, alpha, sigma)]
    if form == "residual":
        inputs[2] = None
    double = [t if t is None else t.double() for t in inputs]
    exact = REFERENCES["matched_trace"](*double, form)
    got = matched.launch(*inputs, form)
    if dtype == torch.float64:
        assert got.shape == (B,) and bool(((got - exact).abs() <= 1e-13 * exact.abs()).all())
    else:
        near(got, REFERENCES["matched_trace"](*inputs, form), exact)


@BOTH
@pytest.mark.parametrize("form", ["paper", "residual"])
@pytest.mark.parametrize(
    "B, d, multiprocessors",
    [
        (3, 5, 132),  # a row per program
        (
            300,
            3,
            4,
        ),  # 32 rows per program, the last one part empty; two programs in the residual form
        (2, 5000, 1),  # several blocks of a row in turn
        (2, 30000, 132),  # in pieces, merged by a second launch
        (0, 3, 132),
    ],
)
def test_matched_trace(monkeypatch, B, d, multiprocessors, dtype, form):
    device(monkeypatch, multiprocessors)
    check_trace(B, d, dtype, form)


def test_matched_trace_in_a_cluster(monkeypatch):
    monkeypatch.setattr(_triton, "CLUSTERS", True)
    device(monkeypatch, 20)
    assert matched.plan(3, 20_001, 4, _triton.DEVICES[90], True).ctas == 8
    check_trace(3, 20_001, torch.float32, "paper")


def test_matched_trace_with_strides_and_no_signal():
    check_trace(4, 6, torch.float64, "paper", alpha=torch.zeros(1, dtype=torch.float64).expand(4))


def test_nan_stays_in_its_sample():
    v, x0, mean, alpha, sigma = endpoint_inputs(3, 1, 4, torch.float32)
    x0[1, 2] = torch.nan
    got = endpoint.launch(v, x0, mean, alpha, sigma, "paper")
    assert got.isnan().any(-1).flatten().tolist() == [False, True, False]
    trace = matched.launch(alpha, x0, mean, alpha, sigma, "paper")
    assert trace.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("wrong", ["x0", "mean", "alpha", "sigma"])
@pytest.mark.parametrize("change", [lambda t: t[1:], lambda t: t.double()], ids=["shape", "dtype"])
def test_torch_ops_read_nothing_else(wrong, change):
    """The op itself, called without the public function's checks."""
    args = dict(
        zip(
            ("v", "x0", "mean", "alpha", "sigma"),
            endpoint_inputs(3, 1, 4, torch.float32),
            strict=True,
        )
    )
    args[wrong] = change(args[wrong])
    with pytest.raises(RuntimeError, match=f"^{wrong}: expected "):
        endpoint.launch(**args, form="paper")
    m, x0, mean, alpha, sigma = args.values()
    names = {"x0": "eps", "mean": "x"}
    with pytest.raises(
        RuntimeError,
        match=": expected " if wrong == "x0" else f"^{names.get(wrong, wrong)}: expected ",
    ):
        matched.launch(m[:, 0, 0], x0, mean, alpha, sigma, "paper")
