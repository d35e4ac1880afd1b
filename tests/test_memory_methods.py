"""What a likelihood adds to the process at image size: nothing of size [d, d], which would be 576
MiB here."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

EVENT, D = (3, 64, 64), 3 * 64 * 64
MIB = 4 * D / 2**20  # of one sample in float32
MATRIX = D * MIB

# The law is N(0, I), of which every answer is known: tr F = d/(1 + sigma^2), whose diagonal J makes
# Hutchinson's estimate exact, and untrained networks too.
CALL = """
import math, torch
import dfkernels as df
from dfkernels.methods.networks import ImageNet, Preconditioned

def resident(name):  # not ru_maxrss: a process starts with its parent's
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(name))

schedule = df.schedule.EDM()
pointwise = lambda x, t: x * (t / (1 + t**2)).to(x.dtype).view(-1, 1, 1, 1)
residual = lambda x, t: (1 / (1 + t**2)).to(x.dtype)

def unet(predicts, output):
    body = ImageNet(3, 64, output=output, width=8, resolutions=4)
    return Preconditioned(body, schedule, predicts=predicts)

def network(deep):
    return df.Denoiser(unet("epsilon", "event") if deep else pointwise, schedule)

def likelihood(B, deep, trace):
    x = torch.randn(B, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    denoiser = network(deep)
    if trace == "matched":
        trace = df.MatchedTrace(unet("residual", "scalar") if deep else residual, denoiser)
    with torch.no_grad():
        found = df.log_prob(denoiser, x, (0.1, 10.0), trace, method="rk4", steps=8, data_std=1.0)
    v, d = 1 + 0.1**2, x[0].numel()
    truth = -(x.double().square().flatten(1).sum(1) / v + d * math.log(2 * math.pi * v)) / 2
    return ((found.log_prob - truth).abs() / d).max().item()

def divergence(B, chunk, side=64):
    x = torch.randn(B, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        trace = df.Divergence(chunk=chunk).begin(network(False), x)(x, torch.tensor(0.5))[1]
    return (trace * 1.25 / x[0].numel() - 1).abs().max().item()

{small}
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak so far is forgotten
before = resident("VmRSS")
error = {call}
print(resident("VmHWM") - before, error)
"""


def added(call: str, small: str) -> tuple[float, float]:
    """MiB at the peak of a call, beyond a first small call, and the error of what it returned."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", CALL.format(call=call, small=small)],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    memory, error = map(float, done.stdout.split())
    return memory, error


@pytest.mark.parametrize("trace", ["hutchinson", "matched"])
def test_a_likelihood_of_many_images_takes_a_few_times_their_size(trace):
    """128 images. "rk4" keeps its slopes, and those of four steps for the estimate of its error:
    about 27 times x. In 8 steps its error is 9e-4 nats per dimension here."""
    memory, error = added(f"likelihood(128, False, {trace!r})", f"likelihood(1, False, {trace!r})")
    assert memory < 40 * 128 * MIB < MATRIX / 2
    assert error < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("trace", ["hutchinson", "matched"])
def test_a_likelihood_of_a_u_net_holds_its_features_and_no_matrix(trace):
    memory, error = added(f"likelihood(2, True, {trace!r})", f"likelihood(1, True, {trace!r})")
    assert memory < MATRIX / 6
    assert error < 1e-3


def test_the_divergence_keeps_one_chunk_of_products():
    """All d products of 2 images at once would be 1,152 MiB; 64 of them are 6. What is kept of each
    chunk must not lie between the large blocks either, or the next chunk finds no room in them."""
    memory, error = added("divergence(2, 64)", "divergence(2, 64, side=8)")
    assert memory < MATRIX / 6
    assert error < 1e-6  # the sum of 12,288 terms costs no digits
