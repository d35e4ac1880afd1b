"""The backends agree, and say why they do not run. The fallback has its turn in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import ALL, DATA_OPS, OPS, REFERENCES, _normal

from dfkernels import _backend, _native, ops

needs_native = pytest.mark.skipif(not _native.available, reason=f"no compiled part: {_native.reason}")
HERE = Path(__file__).parent


def _run(*args, **environment):
    return subprocess.run(
        [sys.executable, *args],
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
    )


def test_values_and_errors_are_the_same_without_the_compiled_part():
    files = "test_reference.py", "test_errors.py"
    done = _run("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, DFKERNELS_NATIVE="0")
    assert done.returncode == 0, done.stdout[-3000:]


MEMORY = """
import resource, torch
from dfkernels import ops

def step(B, N):
    x, y = torch.zeros(B, 2, requires_grad=True), torch.ones(N, 2, requires_grad=True)
    p = ops.posterior(x, y, 0.9, 0.5)
    (p.log_prob + p.mean.sum(1) + p.fisher_trace + p.ess / N).sum().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = step(2, 3)
print(step(512, 40000) - before)
"""


@pytest.mark.parametrize("native", ["0", "1"])
def test_memory_stays_bounded(native):
    """Forward and general backward with B = 512, N = 40,000: one [B, N] array alone would take 78 MB."""
    done = _run("-c", MEMORY, DFKERNELS_NATIVE=native, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 60


def test_disabled_native_says_so():
    done = _run(
        "-c",
        "from dfkernels import _backend; print(_backend.choose(), _backend.reasons())",
        DFKERNELS_NATIVE="0",
    )
    assert done.stdout == "pytorch {'native-cpu': 'DFKERNELS_NATIVE=0', 'pytorch': ''}\n", done.stderr


@needs_native
def test_native_runs_on_the_cpu_only():
    assert _backend.choose("cpu") == "native-cpu"
    assert _backend.reasons("cpu") == {"native-cpu": "", "pytorch": ""}
    assert _backend.choose("cuda") == "pytorch"
    assert _backend.reasons("cuda:0")["native-cpu"] == "the tensors are on cuda"


@needs_native
@pytest.mark.parametrize("op", OPS)
def test_native_implements(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dfkernels::{op}", "CPU")


@needs_native
@pytest.mark.parametrize("case", ALL, ids=str)
def test_native_has_the_same_bits_every_time(case):
    first, second = case.run(), case.run()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@needs_native
@pytest.mark.parametrize("op", DATA_OPS)
def test_threads_change_nothing_but_rounding(op):
    normal = _normal(70)
    x, y, v = normal(5, 7), normal(500, 7), normal(5, 2, 7)
    args = (x, y, v) if op == "fisher_matvec" else (x, y)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            out = getattr(ops, op)(*args, 0.9, 0.5)
            results.append([out] if isinstance(out, torch.Tensor) else list(out))
    finally:
        torch.set_num_threads(threads)
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            assert float((a - b).abs().max()) <= 1e-12 * (1 + float(a.abs().max()))


@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize("sigma", [1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("N, d", [(40, 3), (300, 32), (64, 512)])
def test_float32_error_is_at_most_twice_that_of_plain_pytorch(sigma, offset, N, d):
    """Queries drawn from q_t, atoms with near-duplicates, data offset up to 10 times its spread; float64 on
    the same inputs.
    The 4 roundings beside the factor 2 cover plain PyTorch being exact by luck."""
    normal = _normal(80)
    y = normal(N, d)
    y[1::2] = y[::2] + 1e-3 * normal(N // 2, d)
    y = (y + offset).float()
    x = (y[:8] + sigma * normal(8, d)).float()
    v = normal(8, 2, d).float()
    for op in DATA_OPS if d < 100 else ("posterior", "fisher_matvec"):
        args = (x, y, v) if op == "fisher_matvec" else (x, y)
        got = getattr(ops, op)(*args, 1.0, sigma)
        plain = REFERENCES[op](*args, 1.0, sigma)
        exact = REFERENCES[op](*[a.double() for a in args], 1.0, float(torch.tensor(sigma)))
        as_tuple = lambda o: (o,) if isinstance(o, torch.Tensor) else tuple(o)
        for g, p, e in zip(as_tuple(got), as_tuple(plain), as_tuple(exact), strict=True):
            error, reference = float((g - e).abs().max()), float((p - e).abs().max())
            assert error <= 2 * reference + 4 * 2**-24 * float(e.abs().max()), (op, error, reference)
