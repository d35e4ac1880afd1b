"""The ops on a GPU: values, derivatives, memory, streams, graphs. Skipped without one; bench.gpu
runs it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import ALL, DATA_OPS, ORDER, REFERENCES, floats
from difference import difference_form, errors, far, in_batches

import dfkernels as df
from dfkernels import ops
from dfkernels._torch import backend
from dfkernels.ops.draw import reference as draw_reference
from dfkernels.ops.transport_chain import reference as chain
from tools.op_table import TABLE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def cuda(case):
    """The case on the GPU, its mask in log_prior."""
    tensors = dict(case.tensors)
    if case.masked:
        tensors["log_prior"] = tensors["log_prior"].clone()
        tensors["log_prior"][list(case.masked)] = -math.inf
    move = lambda t: t.to("cuda") if isinstance(t, torch.Tensor) and t.dim() else t
    options = dict(case.options)
    options |= {k: move(options[k]) for k in ("atoms", "counts") if k in options}
    return dataclasses.replace(
        case, tensors={k: move(t) for k, t in tensors.items()}, options=options, masked=()
    )


def largest(t):
    return float(t.abs().max()) if t.numel() else 0.0


def draw(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=dtype, generator=generator)


def problem(B, N, d, K=2, sigma=1.0, dtype=torch.float32, storage=None):
    """Queries are atoms plus noise, in the values of `storage`."""
    y = draw(N, d, seed=1, dtype=dtype)
    x = y[torch.arange(B, device="cuda") * 7919 % N] + sigma * draw(B, d, seed=2, dtype=dtype)
    y = y if storage is None else (100 + 20 * y).clamp(0, 255).to(storage)
    x = x if storage is None else 100 + 20 * x
    level = torch.full((B,), sigma if storage is None else 20 * sigma, device="cuda", dtype=dtype)
    alpha = 0.8 + 0.2 * torch.rand(
        B, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(4)
    )
    return {"x": x, "y": y, "v": draw(B, K, d, seed=3, dtype=dtype), "alpha": alpha, "sigma": level}


def call_op(op, p):
    out = getattr(ops, op)(*[p[k] for k in ORDER[op] if k in p])
    return [out] if isinstance(out, torch.Tensor) else list(out)


def test_triton_runs_here():
    assert backend.reasons("cuda")["triton"] == ""


@pytest.mark.parametrize("case", ALL, ids=str)
def test_float64_equals_the_reference(case):
    for got, want in zip(cuda(case).run(), case.run(reference=True), strict=True):
        assert got.device.type == "cuda" and got.shape == want.shape and got.dtype == want.dtype
        assert largest(got.cpu() - want) <= 1e-12 * (1 + largest(want))


@pytest.mark.parametrize("case", [c for c in ALL if floats(c)], ids=str)
def test_gradients_equal_the_references(case):
    names = [k for k in floats(case) if k not in case.unused]

    def gradients(case, reference):
        tensors = {k: case.tensors[k].detach().clone().requires_grad_() for k in names}
        sum(o.sum() for o in case.run(tensors, reference=reference)).backward()
        return [tensors[k].grad for k in names]

    for name, got, want in zip(
        names, gradients(cuda(case), False), gradients(case, True), strict=True
    ):
        assert largest(got.cpu() - want) <= 1e-10 * (1 + largest(want)), name


@pytest.mark.parametrize("case", [c for c in ALL if c.op in DATA_OPS and floats(c)], ids=str)
def test_tangents_equal_the_references(case):
    """Forward mode in every tensor at once."""
    names = [k for k in floats(case) if k not in case.unused]
    tangents = {k: torch.randn_like(case.tensors[k]) for k in names}

    def moved(case, reference):
        run = lambda *t: case.run(dict(zip(names, t, strict=True)), reference=reference)
        primals = tuple(case.tensors[k] for k in names)
        along = tuple(tangents[k].to(case.tensors[k].device) for k in names)
        return torch.func.jvp(run, primals, along)[1]

    for got, want in zip(moved(cuda(case), False), moved(case, True), strict=True):
        assert largest(got.cpu() - want) <= 1e-10 * (1 + largest(want))


# Every way through the kernels of first derivatives: a query per thread, whole rows, in blocks.
@pytest.mark.parametrize(
    "B, N, d", [(1000, 3000, 2), (40, 3001, 64), (7, 5000, 1000), (1, 999, 33)]
)
@pytest.mark.parametrize("sigma", [0.3, 1.0, 30.0])
@pytest.mark.parametrize(
    "output, argument", [("fisher_trace", "x"), ("mean", "y"), ("mean", "sigma"), ("ess", "alpha")]
)
def test_first_derivatives_in_float32(output, argument, sigma, B, N, d):
    """Twice the error of autograd through the difference form of a query at a time, and 64
    roundings of the largest number: reverse mode."""
    p = problem(min(B, 40), N, d, sigma=sigma)
    p.pop("v")

    def gradient(f, p):
        leaf = p[argument].detach().clone().requires_grad_()
        out = f(**p | {argument: leaf})[output]
        h = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device="cuda").view(out.shape)
        return torch.autograd.grad(out, leaf, h)[0]

    plain = lambda **p: difference_form(**p, dtype=p["x"].dtype)
    exact = gradient(plain, {k: t.double() for k, t in p.items()})
    got = gradient(lambda **p: ops.posterior(**p)._asdict(), p)
    allowed = 2 * largest(gradient(plain, p) - exact) + 64 * 2**-24 * largest(exact)
    assert got.dtype == torch.float32 and largest(got - exact) <= allowed


@pytest.mark.parametrize("sigma", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("B, N, d", [(1, 5000, 40), (30, 5000, 40), (300, 5000, 3), (30, 70, 3000)])
def test_draws_are_the_references(B, N, d, sigma):
    """In double, where no two candidates are as close as the last bits."""
    p = problem(B, N, d, sigma=sigma, dtype=torch.float64)
    p.pop("v")
    assert torch.equal(ops.draw(**p, seed=3), draw_reference(**p, seed=3))
    single = {k: t.float() for k, t in p.items()}
    same = ops.draw(**single, seed=3) == draw_reference(**single, seed=3)
    assert float(same.double().mean()) >= 0.95


# Queries, how many go together, atoms, d: few and many, small and large d, odd sizes, a row that no
# program holds. Ten queries at least are compared, so that the RMS of their errors is not a matter
# of luck.
SHAPES = [
    (12, 1, 20_000, 1000),
    (12, 3, 70_001, 33),
    (16, 16, 3000, 4100),
    (300, 300, 3001, 64),
    (200, 200, 9001, 301),
    (2000, 2000, 3000, 2),
    (10, 5, 100, 20_011),
]


@pytest.mark.parametrize("sigma", [0.05, 1.0, 30.0])
@pytest.mark.parametrize("B, together, N, d", SHAPES)
@pytest.mark.parametrize("op", DATA_OPS)
def test_float32_is_as_accurate_as_plain_pytorch(op, B, together, N, d, sigma):
    if op == "fisher_dense" and d > 100:
        d, N = 33, min(N, 3000)
    p = problem(B, N, d, sigma=sigma)
    got = in_batches(p, together, [op], call_op)
    last = {k: a if k == "y" else a[-16:] for k, a in p.items()}
    assert far(last, {k: a[-16:] for k, a in got.items()}) == {}


@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("op", DATA_OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_narrow_storage(op, storage, dtype):
    """In float64 1e-12 of each result's own size."""
    p = problem(12, 500, 37, sigma=0.5, dtype=dtype, storage=storage)
    got = in_batches(p, 12, [op], call_op)
    p["y"] = p["y"].to(dtype)
    if dtype == torch.float32:
        assert far(p, got) == {}
    else:
        exact = difference_form(**p, dense=op == "fisher_dense")
        for name, e in errors(got, {k: exact[k] for k in got}).items():
            assert e.max() <= 1e-12, name


def close(got, plain, exact, size):
    """float32: at most twice plain PyTorch's largest error and four roundings of the largest
    result. float64, where the reference has errors of its own: 16 roundings of `size`, result by
    result.

    A sum of d terms of both signs, added up in a tree L deep, is off by about sqrt(L/12) roundings
    of their root sum of squares, which `size` has for such sums; L is at most 40 here, and the
    largest of 1e6 results is five times as far off.
    """
    if got.dtype == torch.float64:
        assert bool(((got - exact).abs() <= 16 * 2**-53 * size).all())
    else:
        assert largest(got - exact) <= 2 * largest(plain - exact) + 4 * 2**-23 * largest(exact)


@pytest.mark.parametrize("form", ["paper", "centred"])
@pytest.mark.parametrize(
    "B, K, d", [(64, 1, 65_536), (256, 1, 12_288), (2, 3, 196_611), (70_000, 2, 3), (7, 9, 784)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_endpoint_matvec(form, B, K, d, dtype):
    v, x0, mean = (
        draw(B, K, d, dtype=dtype),
        draw(B, d, seed=1, dtype=dtype),
        draw(B, d, seed=2, dtype=dtype),
    )
    alpha, sigma = (0.5 + draw(B, seed=s, dtype=dtype).abs() for s in (3, 4))
    args = [v, x0, mean, alpha, sigma]
    exact = REFERENCES["endpoint_matvec"](*[a.double() for a in args], form)
    plain = REFERENCES["endpoint_matvec"](*args, form)
    got = torch.ops.dfkernels.endpoint_matvec(*args, form)
    sides = (x0, mean) if form == "paper" else (x0 - mean,)
    dots = [(r[:, None] * (r[:, None] * v).norm(dim=-1, keepdim=True)).abs() for r in sides]
    column = lambda t: t[:, None, None].double()
    size = (
        v.abs() + exact.abs() * column(sigma) ** 2 + column(alpha / sigma) ** 2 * sum(dots)
    ) / column(sigma) ** 2
    close(got, plain, exact, size)


@pytest.mark.parametrize("form", ["paper", "residual"])
@pytest.mark.parametrize("B, d", [(64, 65_536), (256, 12_288), (2, 196_611), (70_000, 3), (7, 784)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matched_trace(form, B, d, dtype):
    m, eps, x = (
        draw(B, dtype=dtype),
        draw(B, d, seed=1, dtype=dtype),
        draw(B, d, seed=2, dtype=dtype),
    )
    alpha, sigma = (0.5 + draw(B, seed=s, dtype=dtype).abs() for s in (3, 4))
    args = [m, eps, x if form == "paper" else None, alpha, sigma]
    exact = REFERENCES["matched_trace"](*[a if a is None else a.double() for a in args], form)
    plain = REFERENCES["matched_trace"](*args, form)
    got = torch.ops.dfkernels.matched_trace(*args, form)
    size = d * (1 + m.abs()) / sigma**2
    if form == "paper":
        square = (x - sigma[:, None] * eps).square().sum(1)
        size = (d + (d * m.abs() * alpha**2 + square) / sigma**2) / sigma**2
    close(got, plain, exact, size)


@pytest.mark.parametrize(
    "B, N, d", [(4096, 3, 2), (65, 1, 1), (700, 64, 16), (33, 5000, 3), (100, 9, 7)]
)
@pytest.mark.parametrize("options", ["exact", "rates", "transposed"])
def test_transport_chain(B, N, d, options):
    """1e-12 in float64; in float32 twice the error of plain PyTorch and sixteen roundings, as on
    the CPU."""
    alpha = torch.linspace(0.3, 1.0, 8, dtype=torch.float64, device="cuda")
    rates = None if options == "exact" else 0.2 * draw(7, 2, seed=2, dtype=torch.float64)
    prior = draw(N, seed=3, dtype=torch.float64)
    prior[1::3] = -math.inf
    double = [
        draw(B, d, dtype=torch.float64),
        draw(N, d, seed=1, dtype=torch.float64),
        alpha,
        1.3 - alpha,
        prior,
    ]
    single = [a.float() if i in (0, 1, 4) else a for i, a in enumerate(double)]
    more = {"rates": rates, "transposed": options == "transposed"}
    for got, exact in zip(
        ops.transport_chain(*double, **more), chain(*double, **more), strict=True
    ):
        assert got.device.type == "cuda" and largest(got - exact) <= 1e-12
    exact = chain(*[a.double() for a in single], **more)
    for g, p, e in zip(
        ops.transport_chain(*single, **more), chain(*single, **more), exact, strict=True
    ):
        assert g.dtype == torch.float32
        assert largest(g - e) <= 2 * largest(p - e) + 16 * 2**-24 * largest(e)


CALLED = list(TABLE)


def call(op):
    """A function without arguments that computes, and the tensor it reads first."""
    if op in DATA_OPS:
        p = problem(40, 3000, 24)
        return (lambda: getattr(ops, op)(*[p[k] for k in ORDER[op] if k in p])), p["x"]
    if op == "draw":
        p = problem(40, 3000, 24)
        return (lambda: ops.draw(*[p[k] for k in ("x", "y", "alpha", "sigma")], seed=7)), p["x"]
    if op == "transport_chain":
        alpha = torch.linspace(0.3, 1.0, 6, dtype=torch.float64, device="cuda")
        x, y, sigma = draw(40, 5), draw(300, 5, seed=1), 1.3 - alpha
        return (lambda: ops.transport_chain(x, y, alpha, sigma)), x
    alpha, sigma = torch.rand(40, device="cuda"), 1 + torch.rand(40, device="cuda")
    x0, mean, v, m = draw(40, 24), draw(40, 24, seed=1), draw(40, 2, 24, seed=2), draw(40, seed=3)
    if op == "endpoint_matvec":
        return (lambda: ops.endpoint_matvec(v, x0, mean, alpha, sigma)), v
    return (lambda: ops.matched_trace(m, x0, alpha, sigma, x=mean, form="paper")), m


def flat(out):
    return torch.cat([o.flatten() for o in ([out] if isinstance(out, torch.Tensor) else out)])


@pytest.mark.parametrize("op", CALLED)
def test_same_bits_every_time(op):
    run, _ = call(op)
    first = flat(run())
    assert all(torch.equal(flat(run()), first) for _ in range(5))


@pytest.mark.parametrize("op", CALLED)
def test_nothing_synchronises(op):
    run, _ = call(op)
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", CALLED)
def test_cuda_graph(op):
    run, read = call(op)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    read.add_(0.25)
    graph.replay()
    assert torch.equal(flat(kept), flat(run()))


@pytest.mark.parametrize("op", CALLED)
def test_the_current_stream_is_used(op):
    """The input is written late on a side stream; a kernel on another one would read it too
    early."""
    run, read = call(op)
    value = read.clone()
    want = flat(run())
    busy, side = draw(4096, 4096), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        read.zero_()
        for _ in range(20):
            busy = busy @ busy / 64
        read.copy_(value)
        got = flat(run())
    side.synchronize()
    assert torch.equal(got, want)


@pytest.mark.skipif("torch.cuda.device_count() < 2", reason="one device")
@pytest.mark.parametrize("case", [c for c in ALL if c.name in ("plain", "paper plain")], ids=str)
def test_the_tensors_device_is_used(case):
    tensors = {
        k: t.to("cuda:1") if isinstance(t, torch.Tensor) else t for k, t in case.tensors.items()
    }
    for got, want in zip(dataclasses.replace(case, tensors=tensors).run(), case.run(), strict=True):
        assert got.device.index == 1 and largest(got.cpu() - want) <= 1e-12 * (1 + largest(want))


@pytest.mark.parametrize("op", [op for op in CALLED if op != "draw"])  # which gives a row
def test_nan_gives_nan(op):
    run, read = call(op)
    read.view(40, -1)[7, 0] = torch.nan
    out = run()
    first = (out if isinstance(out, torch.Tensor) else out[0]).reshape(40, -1)
    assert first.isnan().any(1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("op", CALLED)
def test_compiled(op):
    run, _ = call(op)
    got = flat(torch.compile(run, fullgraph=True)())
    assert largest(got - flat(run())) <= 1e-6 * largest(got)


def test_transforms():
    x, y, sigma = draw(3, 4, dtype=torch.float64), draw(50, 4, seed=1, dtype=torch.float64), 1.0
    log_q = lambda x: ops.posterior(x[None], y, 0.9, sigma).log_prob[0]
    hessian = torch.func.vmap(torch.func.hessian(log_q))(x)
    assert largest(hessian + ops.fisher_dense(x, y, 0.9, sigma)) <= 1e-10
    score = ops.posterior(x, y, 0.9, sigma).score(x, 0.9, sigma)
    assert largest(torch.func.vmap(torch.func.grad(log_q))(x) - score) <= 1e-10


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sigma", [0.01, 0.1, 1.0, 30.0])
def test_certified_results_lie_within_their_bounds(sigma, masked):
    """Both levels; an odd number of atoms, and of queries. Where little is needed little is
    kept."""
    N, d = 5001, 800
    y = draw(N, d) / torch.arange(1, d + 1, device="cuda") ** 0.5
    prior = draw(N, seed=1) if masked else None
    if masked:
        prior[::3] = -math.inf
    cloud = df.PointCloud(y, prior)
    cloud.index()
    x = y[torch.arange(19, device="cuda") * 263 + 1].double() + sigma * draw(19, d, seed=2)
    sparse, dense = (df.DiffusionFisher(x, cloud, 0.9, sigma, tolerance=t) for t in (1e-6, None))
    gap = dense.log_prob - sparse.log_prob
    assert bool((gap >= -1e-9).all()) and bool((gap <= sparse.log_prob_error + 1e-9).all())
    off = (dense.denoised - sparse.denoised).norm(dim=1)
    assert bool((off <= sparse.mean_error + 1e-9).all()) and bool(
        (sparse.dropped_mass <= 1e-6).all()
    )
    off = (dense @ x - sparse @ x).norm(dim=1) / x.norm(dim=1)
    assert bool((off <= sparse.fisher_error + 1e-9 / sigma**2).all())
    if sigma <= 0.1:
        assert int(sparse.atoms_read.max()) <= N // 10
    if sigma == 30:
        assert set(sparse.atoms_read.tolist()) == {N}


def test_memory_stays_bounded():
    """[B, N] alone would be 3.3 GB."""
    p = problem(4096, 200_000, 16)
    args = [p[k] for k in ORDER["posterior"] if k in p]
    ops.posterior(*args)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.posterior(*args)
    assert torch.cuda.max_memory_allocated() - before < 2**30


def test_more_than_two_to_the_31_elements():
    """The atoms that carry weight lie beyond element 2^31."""
    N, d = 2**31 // 4096 + 1000, 4096
    if torch.cuda.mem_get_info()[0] < 3 * N * d:
        pytest.skip("needs 6 GB of free GPU memory")
    y = torch.zeros(N, d, dtype=torch.uint8, device="cuda")
    whole = lambda high, rows: torch.randint(0, high, (rows, d), device="cuda")
    last = (whole(240, 1) + whole(16, 8)).to(torch.uint8)  # near each other: all eight carry weight
    y[-8:] = last
    x = last[3:4].float() + 0.1 * draw(1, d)
    found, few = ops.posterior(x, y, 1.0, 400.0), ops.posterior(x, last, 1.0, 400.0)
    shift = math.log(8 / N)
    assert abs(float(found.log_prob - few.log_prob) - shift) <= 1e-2
    assert largest(found.mean - few.mean) <= 1e-2
    v = draw(1, d, seed=5)
    assert 4 < float(few.ess) < 8
    far = ops.fisher_matvec(x, y, v, 1.0, 400.0) - ops.fisher_matvec(x, last, v, 1.0, 400.0)
    assert largest(far) * 400.0**2 <= 1e-2 * largest(v)
