"""What flows of particles say to bad input."""

from __future__ import annotations

import math

import pytest
import torch
from tensors import normal
from test_particles import mixture

from dfkernels.methods.particles import (
    KL,
    KSD,
    SVGD,
    Flow,
    Kalman,
    Particles,
    SinkhornDivergence,
    Stein,
    Variation,
    evolve,
)
from dfkernels.methods.particles import bandwidth as bandwidth_of

f64 = torch.float64


def test_a_step_that_is_too_large_is_named():
    """Where the particles overflow, and where the target does first."""
    x = 3 * normal(10, 2, seed=0)
    far = Flow(lambda p: Variation(1e300 * p.x), 1e20, None, weights=None)
    said = (
        "step_size: expected one at which the flow is stable, got 1e\\+20, at which particle 0 is"
    )
    with pytest.raises(ValueError, match=said):
        far.step(Particles(x))
    quartic = Flow(KL(lambda x: -x.square().square().sum(1)), 1.0, None, weights=None)
    said = r"log_target: expected finite values, got NaN or inf for \d+ of 10 particles, first for "
    said += (
        r"particle \d, where \|x\| is up to \d\.\de\+\d+; of particles that have run away the step"
    )
    with pytest.raises(ValueError, match=said):
        evolve(quartic, Particles(x), 30)


X = torch.zeros(4, 2, dtype=f64) + torch.arange(4)[:, None]
REFUSED = [
    (lambda: Particles([1.0]), TypeError, "x: expected a tensor, got list"),
    (
        lambda: Particles(torch.zeros(3, 2).long()),
        TypeError,
        r"x: expected float32 or float64, got int64: .float\(\) converts it",
    ),
    (lambda: Particles(torch.zeros(0, 2)), ValueError, r"x: expected shape \[M, \*E\] with M >= 1"),
    (
        lambda: Particles(X * math.nan),
        ValueError,
        r"x: expected finite values, got nan at index \[0, 0\]",
    ),
    (
        lambda: Particles(X, torch.zeros(3, dtype=f64)),
        ValueError,
        r"log_w: expected shape \[4\], one per particle, got \[3\]",
    ),
    (
        lambda: Particles(X, torch.zeros(4)),
        TypeError,
        "log_w: expected float64 like x, got float32",
    ),
    (
        lambda: Particles(X, torch.full((4,), -math.inf, dtype=f64)),
        ValueError,
        "log_w: expected at least one finite value, got all -inf",
    ),
    (
        lambda: Particles(X, X[:, 0] * math.nan),
        ValueError,
        r"log_w: expected values < inf and not nan, got nan at index \[0\]",
    ),
    (lambda: Particles(X, v=X[:2]), ValueError, r"v: expected shape \[4, 2\] like x, got \[2, 2\]"),
    (lambda: KL(), TypeError, "log_target: expected it or grad_log_target, got None for both"),
    (lambda: KL(3), TypeError, "log_target: expected a callable, got int"),
    (
        lambda: KL(mixture, smoothing="blub"),
        ValueError,
        "smoothing: expected 'blob' or 'gfsd', got 'blub'",
    ),
    (
        lambda: KL(mixture, bandwidth="nei"),
        ValueError,
        "bandwidth: expected 'nearest' or 'median', got 'nei'",
    ),
    (
        lambda: KL(mixture, bandwidth=-1.0),
        ValueError,
        "bandwidth: expected a finite value > 0, got -1.0",
    ),
    (lambda: Stein("x"), ValueError, "bandwidth: expected 'nearest' or 'median', got 'x'"),
    (lambda: Kalman(-1), ValueError, "ridge: expected a finite value >= 0, got -1"),
    (lambda: SinkhornDivergence(X, 0), ValueError, "blur: expected a finite value > 0, got 0"),
    (
        lambda: Flow(None, 0.1),
        TypeError,
        "functional: expected a function of Particles, got NoneType",
    ),
    (lambda: Flow(KL(mixture), 0), ValueError, "step_size: expected a finite value > 0, got 0"),
    (
        lambda: Flow(KL(mixture), 0.1, metric=Kalman),
        TypeError,
        r"metric: expected Wasserstein\(\), Kalman\(\) or Stein\(\), got Kalman",
    ),
    (
        lambda: Flow(KL(mixture), 0.1, weights="dk"),
        ValueError,
        "weights: expected 'continuous' or 'duplicate-kill' or None, got 'dk'",
    ),
    (
        lambda: Flow(KL(mixture), 0.5, friction=3),
        ValueError,
        "friction: expected None or a value from 0 to 1/step_size = 2, got 3",
    ),
    (
        lambda: Flow(KL(mixture), 0.5, weight_rate=0),
        ValueError,
        "weight_rate: expected a finite value > 0, got 0",
    ),
    (
        lambda: Flow(KL(mixture), 0.5, weights="duplicate-kill", copy_noise=-1),
        ValueError,
        "copy_noise: expected a finite value >= 0, got -1",
    ),
    (
        lambda: Flow(KL(mixture), 0.5, copy_noise=0.1),
        ValueError,
        "copy_noise: expected None with weights='continuous': weights='duplicate-kill' makes "
        "copies, got 0.1",
    ),
    (
        lambda: Flow(KL(mixture), 0.5, weights=None, weight_rate=0.2),
        ValueError,
        "weight_rate: expected None with weights=None, which moves no mass, got 0.2",
    ),
    (
        lambda: Flow(KL(mixture), 0.5).step(X),
        TypeError,
        "particles: expected Particles, got Tensor",
    ),
    (
        lambda: Flow(KL(mixture), 0.5, weights="duplicate-kill").step(Particles(X)),
        TypeError,
        "generator: expected a torch.Generator for weights='duplicate-kill', got NoneType",
    ),
    (
        lambda: Flow(SVGD(mixture), 0.5).step(Particles(X)),
        ValueError,
        "weights: expected None for a functional without a first variation",
    ),
    (
        lambda: Flow(lambda p: 1, 0.5).step(Particles(X)),
        TypeError,
        "functional: expected it to return a Variation, got int",
    ),
    (
        lambda: Flow(lambda p: Variation(p.x[:1]), 0.5).step(Particles(X)),
        ValueError,
        r"functional: gradient: expected shape \[4, 2\] like x",
    ),
    (
        lambda: KL(lambda x: x.sum())(Particles(X)),
        ValueError,
        r"log_target: expected a result of shape \[4\], got \[\]",
    ),
    (
        lambda: KL(lambda x: x.detach().sum(1))(Particles(X)),
        TypeError,
        "log_target: expected a function of x that autograd can differentiate, got a result "
        "without a graph, and grad_log_target is not given",
    ),
    (
        lambda: KL(lambda x: x.sum(1).log())(Particles(X)),
        ValueError,
        "log_target: expected finite values, got NaN or inf for 1 of 4 particles, first for "
        "particle 0",
    ),
    (
        lambda: KL(lambda x: x.sqrt().sum(1))(Particles(X)),
        ValueError,
        "log_target: expected finite values, got a gradient that has NaN or inf for 1 of 4 "
        "particles, first for particle 0",
    ),
    (
        lambda: KL(mixture, lambda x: x[0])(Particles(X)),
        ValueError,
        r"grad_log_target: expected a result of shape \[4, 2\], got \[2\]",
    ),
    (
        lambda: KL(mixture, lambda x: x.float())(Particles(X)),
        TypeError,
        "grad_log_target: expected float64 like x, got float32",
    ),
    (
        lambda: KSD(grad_log_target=lambda x: -x.detach())(Particles(X)),
        TypeError,
        "grad_log_target: expected a function of x that autograd can differentiate",
    ),
    (lambda: evolve(KL(mixture), Particles(X), 3), TypeError, "flow: expected a Flow, got KL"),
    (
        lambda: evolve(Flow(KL(mixture), 0.1), Particles(X), -1),
        ValueError,
        "steps: expected an integer of at least 0, got -1",
    ),
    (lambda: bandwidth_of(X, True), TypeError, "rule: expected a number, got bool"),
]


@pytest.mark.parametrize("call, kind, message", REFUSED, ids=[m for _, _, m in REFUSED])
def test_bad_input_is_named(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
