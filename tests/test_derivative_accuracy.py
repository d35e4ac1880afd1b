"""First derivatives in float32: at most twice the error of plain PyTorch's autograd, by differences
or by matrix products, whichever is better, where there is little noise or much; both modes."""

from __future__ import annotations

import math

import pytest
import torch
from difference import EPS
from torch.func import jvp, vjp

from dfkernels import ops


def by_differences(x, y, alpha, sigma, log_prior, v=None):
    """All outputs; [B, N, d] is materialised."""
    d = x.shape[1]
    u = (x[:, None] - alpha[:, None, None] * y) / sigma[:, None, None]
    logits = torch.log_softmax(log_prior, 0) - 0.5 * (u * u).sum(-1)
    w = torch.softmax(logits, 1)
    r = y - (w[..., None] * y).sum(1, keepdim=True)
    variance = (w[..., None] * r * r).sum(1)
    along = w[..., None] * (r @ v.mT)
    return _outputs(x, y, alpha, sigma, v, logits, w, variance, along.mT @ r, d)


def by_products(x, y, alpha, sigma, log_prior, v=None):
    """The same by matrix products: |x|^2 + |y|^2 - 2 <x, y>, and E y^2 - (E y)^2."""
    d, a = x.shape[1], alpha[:, None]
    square = (x * x).sum(1)[:, None] + a**2 * (y * y).sum(1) - 2 * a * (x @ y.mT)
    logits = torch.log_softmax(log_prior, 0) - square / (2 * sigma[:, None] ** 2)
    w = torch.softmax(logits, 1)
    mean = w @ y
    variance = w @ (y * y) - mean * mean
    along = w[:, None] * (v @ y.mT)
    product = along @ y - (v * mean[:, None]).sum(-1, keepdim=True) * mean[:, None]
    return _outputs(x, y, alpha, sigma, v, logits, w, variance, product, d)


def _outputs(x, y, alpha, sigma, v, logits, w, variance, product, d):
    ratio, precision = (alpha / sigma) ** 2, 1 / sigma**2
    return {
        "log_prob": torch.logsumexp(logits, 1) - 0.5 * d * torch.log(2 * math.pi * sigma**2),
        "mean": w @ y,
        "fisher_trace": (d - ratio * variance.sum(1)) * precision,
        "ess": 1 / (w * w).sum(1),
        "fisher_diagonal": (1 - ratio[:, None] * variance) * precision[:, None],
        "fisher_matvec": (v - ratio[:, None, None] * product) * precision[:, None, None],
    }


def by_ops(x, y, alpha, sigma, log_prior, v):
    args = (alpha, sigma, log_prior)
    return {
        **ops.posterior(x, y, *args)._asdict(),
        "fisher_diagonal": ops.fisher_diagonal(x, y, *args),
        "fisher_matvec": ops.fisher_matvec(x, y, v, *args),
    }


NAMES = ("x", "y", "alpha", "sigma", "log_prior", "v")
OUTPUTS = ("log_prob", "mean", "fisher_trace", "ess", "fisher_diagonal", "fisher_matvec")


def problem(B, N, d, noise):
    """Atoms on a curved sheet away from the origin, four and four of them about sigma apart, so
    that several carry weight at any noise; queries noised from some."""
    generator = torch.Generator().manual_seed(d)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    sigma = noise * math.sqrt(d) * torch.linspace(0.9, 1.1, B)
    y = normal(N // 4, d) * torch.linspace(0.2, 1.5, d) + 1
    y = (y + 0.5 * y.roll(1, 1) ** 2).repeat(4, 1) + noise * normal(N, d)
    alpha = torch.linspace(0.7, 0.9, B)
    x = alpha[:, None] * y[:B] + sigma[:, None] * normal(B, d)
    return dict(x=x, y=y, alpha=alpha, sigma=sigma, log_prior=normal(N), v=normal(B, 2, d))


def derivatives(f, p, dtype):
    """(output, argument, mode) -> the gradient, or the tangent, along a fixed random direction."""
    normal = lambda t: torch.randn(t.shape, generator=torch.Generator().manual_seed(t.numel()))
    tensors = [p[name].to(dtype) for name in NAMES]
    out, pull = vjp(f, *tensors)
    found = {}
    for output in OUTPUTS:
        cotangents = {k: torch.zeros_like(o) for k, o in out.items()}
        cotangents[output] = normal(out[output]).to(dtype)
        for name, grad in zip(NAMES, pull(cotangents), strict=True):
            found[output, name, "reverse"] = grad
    for i, name in enumerate(NAMES):
        some = lambda t, i=i: f(*tensors[:i], t, *tensors[i + 1 :])
        tangents = jvp(some, (tensors[i],), (normal(tensors[i]).to(dtype),))[1]
        for output in OUTPUTS:
            found[output, name, "forward"] = tangents[output]
    return found


def errors(found, exact):
    return {
        k: float((found[k].double() - e).norm() / e.norm()) if e.norm() > 0 else 0.0
        for k, e in exact.items()
    }


FEW = 8 * EPS  # where the plain forms happen to be exact to a few roundings


def too_large(p, factor):
    """What errs more than `factor` times as much as the better of the plain forms, and a few
    roundings."""
    exact = derivatives(by_differences, p, torch.float64)
    found = [derivatives(f, p, torch.float32) for f in (by_ops, by_differences, by_products)]
    ours, *plain = (errors(f, exact) for f in found)
    better = {k: min(e[k] for e in plain) for k in exact}
    return {k: (ours[k], better[k]) for k in exact if not ours[k] <= factor * better[k] + FEW}


@pytest.mark.slow
@pytest.mark.parametrize("noise, factor", [(0.02, 2), (0.3, 16), (0.8, 2), (5.0, 2)])
def test_first_derivatives_are_as_exact_as_plain_autograd(noise, factor):
    """In between, the two passes of a derivative may round the logits differently, one about the
    centre and one by differences; that costs a digit where terms cancel, as in ess and the
    trace."""
    assert too_large(problem(4, 400, 64, noise), factor) == {}
