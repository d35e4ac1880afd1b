"""Every output of the data-set ops by the plain difference form, in any dtype, and how far two of
them are apart. In float64 it is the reference; in float32, the peer whose error the kernels may at
most double."""

from __future__ import annotations

import math

import torch

from dfkernels import ops
from tools.op_table import TABLE

EPS = 2.0**-23  # float32


def difference_form(
    x, y, alpha, sigma, log_prior=None, v=None, *, dtype=torch.float64, dense=False
):
    """u = (x - alpha y)/sigma, a softmax, F = (I - Cov_w(u))/sigma^2 (math: identities 1 to 6). x
    [B, d], y [N, d], alpha, sigma [B], v [B, K, d]. A few queries at a time: [*, N, d] is
    materialised."""
    step = max(1, (1 << 21) // y.numel())
    y = y.to(dtype)
    log_pi = torch.log_softmax(y.new_zeros(len(y)) if log_prior is None else log_prior.to(dtype), 0)
    parts = [
        _some(
            *(t[b : b + step].to(dtype) if t is not None else None for t in (x, alpha, sigma, v)),
            y,
            log_pi,
            dense,
        )
        for b in range(0, len(x), step)
    ]
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def _some(x, alpha, sigma, v, y, log_pi, dense):
    d = x.shape[1]
    u = (x[:, None] - alpha[:, None, None] * y) / sigma[:, None, None]
    logits = log_pi - 0.5 * (u * u).sum(-1)
    w = torch.softmax(logits, 1)
    out = {
        "log_prob": torch.logsumexp(logits, 1) - 0.5 * d * torch.log(2 * math.pi * sigma**2),
        "mean": w @ y,
        "ess": 1 / (w * w).sum(1),
    }
    out["log_prob_alone"] = out["log_prob"]
    u -= w[:, None] @ u
    precision = 1 / sigma**2
    variance = (w[:, None] @ (u * u))[:, 0]
    out["fisher_trace"] = (d - variance.sum(1)) * precision
    out["diagonal"] = (1 - variance) * precision[:, None]
    if v is not None:
        along = w[..., None] * (u @ v.mT)
        out["matvec"] = (v - along.mT @ u) * precision[:, None, None]
    if dense:
        covariance = (w[..., None] * u).mT @ u
        out["dense"] = (torch.eye(d, dtype=x.dtype, device=x.device) - covariance) * precision[
            :, None, None
        ]
    return out


def by_ops(x, y, alpha, sigma, log_prior=None, v=None, *, dense=False, **stored):
    """The same from dfkernels.ops; stored: scale, offset, atoms and counts."""
    out = ops.posterior(x, y, alpha, sigma, log_prior, **stored)._asdict()
    out["log_prob_alone"] = ops.log_prob(x, y, alpha, sigma, log_prior, **stored)
    out["diagonal"] = ops.fisher_diagonal(x, y, alpha, sigma, log_prior, **stored)
    if v is not None:
        out["matvec"] = ops.fisher_matvec(x, y, v, alpha, sigma, log_prior, **stored)
    if dense:
        out["dense"] = ops.fisher_dense(x, y, alpha, sigma, log_prior, **stored)
    return out


def errors(got, exact, unit=None):
    """name -> [B], in units of the output's own norm, or of unit[name] [B]."""
    unit = dict(unit or {})
    if "log_prob" in unit:
        unit["log_prob_alone"] = unit["log_prob"]
    out = {}
    for name, e in exact.items():
        far = (got[name].double() - e).reshape(len(e), -1).norm(dim=1)
        own = e.reshape(len(e), -1).norm(dim=1)
        out[name] = far / unit.get(name, own)
    return out


def far(p, got):
    """name -> (error, allowed), where allowed is exceeded: RMS over the queries of p, at most twice
    plain PyTorch's plus 4 roundings of the output, 10 for 1/sum w^2, as in test_accuracy.py. got:
    some of the outputs.
    """
    exact, plain = (
        difference_form(**p, dense="dense" in got, dtype=t) for t in (torch.float64, torch.float32)
    )
    log_prob, exact = exact["log_prob"], {k: exact[k] for k in got}
    unit = {
        "log_prob": 1 + log_prob.abs(),
        "fisher_trace": p["x"].shape[1] * p["sigma"].double() ** -2,
    }
    rms = lambda e: float(e.square().mean().sqrt())
    ours, theirs = errors(got, exact, unit), errors(plain, exact, unit)
    pairs = {k: (rms(ours[k]), 2 * rms(theirs[k]) + (10 if k == "ess" else 4) * EPS) for k in exact}
    return {k: pair for k, pair in pairs.items() if not pair[0] <= pair[1]}


NAMES = {name: spec.exact for name, spec in TABLE.items() if spec.exact}


def in_batches(p, together, ops, call):
    """name -> output of ops for all queries of p, so many of them at a time; call(op, p) ->
    outputs."""
    per_query = ("x", "alpha", "sigma", "v")
    parts = []
    for b in range(0, len(p["x"]), together):
        some = p | {k: p[k][b : b + together] for k in per_query}
        parts.append({n: o for op in ops for n, o in zip(NAMES[op], call(op, some), strict=True)})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
