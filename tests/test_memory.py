"""What a call adds to the process, and more elements than 32-bit indices reach."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from needs import needs_native

from dfkernels import ops

pytestmark = needs_native

CALL = """
import torch
from dfkernels import ops

def resident(name):  # not ru_maxrss: a process starts with its parent's
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(name))

op, B, N, d, K = {op!r}, {B}, {N}, {d}, {K}
generator = torch.Generator().manual_seed(0)
normal = lambda *shape: torch.randn(*shape, generator=generator)
x, y, v = normal(B, d), normal(N, d), normal(B, K, d)
vectors = lambda b: (v[:b],) if op == "fisher_matvec" else ()
args = lambda b, n: (x[:b], y[:n], *vectors(b), {alpha}, {sigma})
getattr(ops, op)(*args(2, 3))
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak so far is forgotten
before = resident("VmRSS")
out = getattr(ops, op)(*args(B, N), **{lists})
print(resident("VmHWM") - before)
"""


def added(lists="{}", **call):
    """MiB at the peak of a call, beyond inputs and a first small call."""
    code = CALL.format(alpha=0.9, lists=lists, **call)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


# The posterior at full size. The others: every kind of sweep, small noise (atoms gathered one by
# one) and large.
@pytest.mark.parametrize(
    "op, B, N, d, K, sigma, limit",
    [
        ("posterior", 4096, 200_000, 16, 0, 0.5, 100),
        ("posterior", 4096, 20_000, 64, 0, 8.0, 100),
        ("posterior", 256, 4_000, 3072, 0, 0.5, 100),
        ("fisher_matvec", 1024, 20_000, 16, 4, 0.5, 100),
        ("fisher_matvec", 512, 20_000, 64, 4, 1.0, 100),
        ("fisher_diagonal", 1024, 20_000, 64, 0, 1.0, 100),
        ("fisher_dense", 64, 20_000, 64, 0, 1.0, 100),
    ],
)
def test_a_call_adds_little_to_the_process(op, B, N, d, K, sigma, limit):
    """Peak memory in MiB beyond inputs and a first small call; [B, N] alone would be 3125 MiB in
    the first case and no less than 4 in the others, outputs are at most 8."""
    assert added(op=op, B=B, N=N, d=d, K=K, sigma=sigma) < limit


@pytest.mark.slow
@pytest.mark.parametrize(
    "op, d, K, limit", [("fisher_matvec", 1024, 64, 100), ("fisher_dense", 512, 0, 130)]
)
def test_long_lists_are_not_cut_into_splits_that_fill_the_memory(op, d, K, limit):
    """32 splits would take 128 and 512 MiB of partial sums; outputs are 2 and 8."""
    lists = "{'atoms': torch.arange(N).repeat(B), 'counts': torch.full((B,), N)}"
    assert added(lists, op=op, B=8, N=4096, d=d, K=K, sigma=3.0) < limit


def available():
    """MiB that a process may still take."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) / 1024


@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    """N d = 2^31 + 4,096,000 in uint8. Rows repeat every 1021, a prime, so that a float64 reference
    needs the distances of few of them, while log_prior differs for every atom; rows on both sides
    of element 2^31, and the last, are one of a kind and carry a third of the weight."""
    if available() < 4096:
        pytest.skip(f"needs 4 GiB of memory, {available():.0f} MiB are available")
    d, period = 4096, 1021
    N = 2**31 // d + 1000
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(0, 256, (period, d), dtype=torch.uint8, generator=generator)
    y = torch.empty(N, d, dtype=torch.uint8)
    for start in range(0, N, period):
        y[start : start + period] = pattern[: N - start]
    special = torch.tensor([0, 2**30 // d, 2**31 // d - 1, 2**31 // d, N - 2, N - 1])
    own = torch.randint(0, 256, (len(special), d), dtype=torch.uint8, generator=generator)
    y[special] = own
    log_prior = torch.randn(N, generator=generator)

    scale, offset, alpha, sigma = 1 / 256, -0.5, 0.5, 2.0  # exact in float32
    kinds = torch.cat([pattern, own]).double() * scale + offset
    x = (
        alpha * kinds[-1:] + 0.01 * torch.randn(1, d, dtype=torch.float64, generator=generator)
    ).float()
    distance = ((x.double() - alpha * kinds) ** 2).sum(1)
    kind = torch.arange(N) % period
    kind[special] = period + torch.arange(len(special))
    log_prior[special] = -torch.inf
    others = torch.logsumexp(log_prior.double() - distance[kind] / (2 * sigma**2), 0)
    # log weight relative to all others
    share = torch.linspace(-3, -1.8, len(special), dtype=torch.float64)
    log_prior[special] = (others + distance[kind[special]] / (2 * sigma**2) + share).float()
    logits = torch.log_softmax(log_prior.double(), 0) - distance[kind] / (2 * sigma**2)
    log_q = torch.logsumexp(logits, 0)
    w = torch.exp(logits - log_q)
    assert 0.3 < float(w[special].sum()) < 0.4 and 0.1 < float(w[-1]) < 0.12

    found = ops.posterior(x, y, alpha, sigma, log_prior, scale=scale, offset=offset)
    each = torch.zeros(len(kinds), dtype=torch.float64).index_add_(0, kind, w)
    mean = each @ kinds
    trace = (d - alpha**2 / sigma**2 * (each @ ((kinds - mean) ** 2).sum(1))) / sigma**2
    log_prob = log_q - d / 2 * torch.log(torch.tensor(2 * torch.pi * sigma**2, dtype=torch.float64))
    far = lambda got, exact: float((got.double() - exact).norm() / exact.norm())
    assert far(found.log_prob, log_prob[None]) <= 1e-6
    assert far(found.mean, mean[None]) <= 1e-5
    assert far(found.fisher_trace, trace[None]) <= 1e-6
    assert far(found.ess, 1 / (w @ w)[None]) <= 1e-5
