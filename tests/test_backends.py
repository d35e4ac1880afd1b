"""The backends agree, and say why they do not run. The fallback has its turn in a process of its
own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import ALL, DATA_OPS, OPS, REFERENCES, _normal
from needs import needs_native

from dfkernels import ops
from dfkernels._torch import backend

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


@pytest.mark.slow
@pytest.mark.parametrize("native", ["0", "1"])
def test_memory_stays_bounded(native):
    """Forward and general backward with B = 512, N = 40,000: one [B, N] array alone would take 78
    MB."""
    done = _run("-c", MEMORY, DFKERNELS_NATIVE=native, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 60


def test_disabled_native_says_so():
    done = _run(
        "-c",
        "from dfkernels._torch import backend; print(backend.reasons())",
        DFKERNELS_NATIVE="0",
    )
    expected = backend.reasons() | {"native-cpu": "DFKERNELS_NATIVE=0"}
    assert done.stdout == f"{expected}\n", done.stderr


@needs_native
def test_native_runs_on_the_cpu_only():
    assert backend.reasons("cpu")["native-cpu"] == backend.reasons("cpu")["pytorch"] == ""
    assert backend.reasons("cuda:0")["native-cpu"] == "the tensors are on cuda"


def test_triton_runs_on_cuda_only():
    found = backend.reasons("cpu")["triton"]
    assert found == "the tensors are on cpu" or found.startswith(
        "triton does not load: No module named"
    )


def test_without_triton_cuda_takes_pytorch(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    said = backend.triton.__wrapped__(torch.device("cuda"))
    assert not said.can_run and said.reason.startswith("triton does not load: ")


@pytest.mark.parametrize("op", [o for o in [*OPS, "covariance_matvec"] if "mixture" not in o])
def test_cuda_has_an_implementation_of_its_own(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dfkernels::{op}", "CUDA")


@needs_native
def test_an_instruction_set_that_is_not_there_is_said():
    code = (
        "import torch; from dfkernels import ops; from dfkernels._torch import backend\n"
        "print(backend.reasons()['native-cpu'])\n"
        "try: ops.posterior(torch.zeros(1, 1), torch.zeros(1, 1), 1.0, 1.0)\n"
        "except RuntimeError as error: print(error)"
    )
    done = _run("-c", code, DFKERNELS_ISA="nonsense")
    said, raised = done.stdout.splitlines()
    assert said == raised, done.stderr
    assert said.startswith(
        "DFKERNELS_ISA is 'nonsense', which is none of the instruction sets that were compiled and"
        " that this CPU has: base"
    )


@needs_native
@pytest.mark.parametrize("op", [*OPS, "covariance_matvec"])
def test_native_implements(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"dfkernels::{op}", "CPU")


CONSTANT = """
import torch
from dfkernels import ops
x, y, log_prior = torch.zeros(2, 3), torch.arange(18.0).reshape(6, 3) / 18, torch.arange(6.0)
pairs = zip(*[ops.posterior(x, y, 0.9, 0.5, log_prior + shift) for shift in (0.0, 2.0**22)])
print(max(float((a - b).abs().max()) for a, b in pairs))
"""


@pytest.mark.slow
@pytest.mark.parametrize("native", ["0", "1"])
def test_a_constant_in_log_prior_costs_no_digits(native):
    """log_prior need not be normalised: 2^22 more of it, which float32 still holds, changes
    nothing."""
    done = _run("-c", CONSTANT, DFKERNELS_NATIVE=native)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("native", ["0", "1"])
def test_covariance_matvec(native):
    """The inner op behind d mean/dx is sum_i w_i t_i <t_i, v>, t_i = y_i - mean, from every storage
    type."""
    done = _run("-c", COVARIANCE, DFKERNELS_NATIVE=native)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1e-14


COVARIANCE = """
import math, torch
import dfkernels
from dfkernels.ops.posterior.reference import weights

g = torch.Generator()
draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=g.manual_seed(1))
x, v = draw(5, 7), draw(5, 3, 7)
alpha, sigma = torch.linspace(0, 1, 5).double(), torch.linspace(0.4, 2, 5).double()
prior = draw(300)
prior[::7] = -math.inf
errors = []
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.uint8):
    y = (50 * draw(300, 7) + 100).clamp(0, 255).to(dtype)
    got = torch.ops.dfkernels.covariance_matvec(x, y, v, alpha, sigma, prior, 0.02, -2.0)
    *_, w = weights(x, y, alpha, sigma, prior, scale=0.02, offset=-2.0)
    t = 0.02 * y.double() - 2
    t = t - (w @ t)[:, None]
    exact = torch.einsum("bn,bni,bnj,bkj->bki", w, t, t, v)
    errors.append(float((got - exact).abs().max() / exact.abs().max()))
print(max(errors))
"""


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
    """Queries drawn from q_t, atoms with near-duplicates, data offset up to 10 times its spread;
    float64 on the same inputs.
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
            assert error <= 2 * reference + 4 * 2**-24 * float(e.abs().max()), (
                op,
                error,
                reference,
            )


LOGGED = """
import logging, sys, torch
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
logging.getLogger("dfkernels").setLevel(logging.DEBUG)
from dfkernels import ops
x = torch.zeros(2, 3)
for _ in range(2):
    ops.posterior(x, x, 0.9, 0.5)
levels = torch.ones(3), torch.tensor([2.0, 1.0, 0.5])
ops.transport_chain(torch.zeros(2, 17), torch.ones(3, 17), *levels)
"""


def test_the_log_says_once_which_backend_runs_an_op():
    """DEBUG for a kernel, and INFO with the reason for PyTorch in its place."""
    done = _run("-c", LOGGED, DFKERNELS_NATIVE="0")
    said = done.stdout.splitlines()
    name = "runs in pytorch: DFKERNELS_NATIVE=0"
    assert said.count(f"INFO dfkernels::posterior on cpu {name}") == 1, done.stderr
    assert len(said) == len(set(said)), said


@needs_native
def test_the_log_names_the_compiled_kernel():
    said = _run("-c", LOGGED).stdout.splitlines()
    assert said.count("DEBUG dfkernels::posterior on cpu runs in native-cpu") == 1
    assert "DEBUG dfkernels::transport_chain_stepwise on cpu runs in pytorch" in said
    assert len(said) == len(set(said)), said


@pytest.mark.parametrize("op", [*OPS, "transport_chain"])
def test_a_function_carries_what_its_package_has(op):
    """df.ops.posterior is the function, and the package of that name as well."""
    package = sys.modules[f"dfkernels.ops.{op}"]
    function = getattr(ops, op)
    for name in set(package.__all__) - {op}:
        assert getattr(function, name) is getattr(package, name)
    assert callable(function.reference)
