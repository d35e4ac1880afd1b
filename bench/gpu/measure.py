"""Times by device events, the roofline's ceilings, and the exact results."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl


class Events:
    """Milliseconds of each of several runs, between device events; L2 is flushed before each.

    The flush reads: lines that it wrote would be written back during the run. It takes longer than
    the host needs to queue a run, so that the device never waits for it.
    """

    def __init__(self, least: int = 5, most: int = 100):
        size = torch.cuda.get_device_properties(0).L2_cache_size
        self.junk = torch.zeros(max(size, 2**26), device="cuda")  # at least four times L2
        self.least, self.most = least, most

    def __call__(self, function, seconds: float) -> list[float]:
        function()
        [first] = self.run(function, 1)
        return self.run(
            function, max(self.least, min(self.most, int(1000 * seconds / (first + 0.2))))
        )

    def run(self, function, count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in pairs:
            self.junk.sum()
            start.record()
            function()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


def graphed(function):
    """(replay of `function` as a CUDA graph, True), or (function, False) where it cannot be
    captured. It has run before.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # the graph has memory of its own
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = function()
    except RuntimeError:
        torch.cuda.synchronize()
        return function, False
    return partial(_replay, graph, kept), True


def kernels(function) -> list[tuple[str, int, float]]:
    """(name, calls, milliseconds) of every kernel of one run, the longest first, as the profiler
    saw them: L2 is warm."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    found = [(e.key[:60], e.count, e.self_device_time_total / 1000) for e in profile.key_averages()]
    return sorted((k for k in found if k[2] > 0), key=lambda k: -k[2])


def _replay(graph, outputs) -> None:
    """Runs the graph; ``outputs``, which it writes to, live as long as this call may be made."""
    graph.replay()


@triton.jit
def _exps(p, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    at = p + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(at)
    for _ in range(COUNT):
        t = tl.exp2(t) - 1.5
    tl.store(at, t)


def rates(timer) -> dict[str, float]:
    """copy_gbs: a device-to-device copy, bytes read and written; *_tflops: 8192 cubed; exp_gs: 1e9
    exp2/s."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy = statistics.median(timer(partial(target.copy_, source), 0.2))
    found = {"copy_gbs": 2 * 4 * 2**29 / copy / 1e6}
    del source, target
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    for name, dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("tf32", torch.float32, True),
        ("fp32", torch.float32, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
        found[f"{name}_tflops"] = (
            2 * 8192**3 / statistics.median(timer(partial(torch.mm, a, b), 0.3)) / 1e9
        )
    torch.backends.cuda.matmul.allow_tf32 = allowed
    p = torch.rand(2**24, device="cuda")
    run: Callable = _exps[(2**24 // 1024,)]
    took = statistics.median(timer(lambda: run(p, COUNT=256, BLOCK=1024), 0.1))
    found["exp_gs"] = 256 * 2**24 / took / 1e6
    return found


def exact(op: str, x, y, alpha, sigma, v=None) -> torch.Tensor:
    """The op's tensor that contenders are compared in (posterior: the mean), in float64 by
    differences."""
    x, a, s = x.double(), alpha.double()[:, None, None], sigma.double()[:, None, None]
    blocks = y.split(max(1, 2**24 // x.numel()))
    logits = [-(((x[:, None] - a * rows.double()) / s) ** 2).sum(-1) / 2 for rows in blocks]
    weights = torch.softmax(torch.cat(logits, 1), 1).split([len(rows) for rows in blocks], 1)
    means = [w @ rows.double() for w, rows in zip(weights, blocks, strict=True)]
    mean = torch.stack(means).sum(0)
    if op == "posterior":
        return mean
    vectors = x[:, None] if v is None else v.double()
    parts = []
    for w, rows in zip(weights, blocks, strict=True):
        t = a / s * (rows.double() - mean[:, None])  # [q, rows, d]
        if op == "fisher_matvec":
            dots = torch.einsum("qni,qki->qkn", t, vectors)
            parts.append(torch.einsum("qn,qni,qkn->qki", w, t, dots))
        elif op == "fisher_diagonal":
            parts.append(torch.einsum("qn,qni->qi", w, t * t))
        else:
            parts.append(torch.einsum("qni,qnj->qij", w[..., None] * t, t))
    total = torch.stack(parts).sum(0)
    if op == "fisher_dense":
        one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    else:
        one = vectors if op == "fisher_matvec" else torch.ones_like(x)
    squared = sigma.double() ** 2
    return (one - total) / squared.view(-1, *[1] * (total.dim() - 1))


def relative_error(got, want) -> float:
    want = want.double()
    return float((got.double() - want).norm() / want.norm())
