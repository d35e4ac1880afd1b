"""The roofline's denominators, measured in the run that uses them, and the least time a case can
take."""

from __future__ import annotations

import time

import torch

from dfkernels._torch import native


def measure(threads: int) -> dict[str, float]:
    """read_gbs: GB/s of reading memory; gemm_gflops: torch.mm, float32, 3072 cubed; exp_gs: 1e9
    float32 exps/s of our kernels."""
    if native.module is None:
        raise RuntimeError(f"the compiled part is not loaded: {native.reason}")
    a = torch.randn(3072, 3072)
    a @ a
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return {
        "read_gbs": native.module.read_bandwidth(threads, 2 << 30),
        "gemm_gflops": 2 * 3072**3 / min(times) / 1e9,
        "exp_gs": native.module.exp_rate(threads) / 1e9,
    }


def floor(case, rates: dict[str, float]) -> tuple[float, str]:
    """(seconds, what bounds it): the largest of bytes / bandwidth, FLOPs / GEMM rate, exps / exp
    rate."""
    return max(
        (case.bytes / rates["read_gbs"] / 1e9, "memory"),
        (case.flops / rates["gemm_gflops"] / 1e9, "GEMM"),
        (case.exps / rates["exp_gs"] / 1e9, "exp"),
    )
