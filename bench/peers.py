"""What people use today, at its best: norms |y|^2 are handed over ready and not timed.

gemm     addmm, softmax, mm: everything that we compute, in the expanded (cancelling) form; for
log_prob addmm and logsumexp, for draw addmm, softmax and multinomial
sdpa     scaled_dot_product_attention's CPU kernel with a bias and its log-sum-exp: log_prob and
mean only, one sigma a call
compile  torch.compile of gemm
torch    transport_chain's reference: batched differences and a softmax, step by step
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from dfkernels.ops.transport_chain import reference as transport_chain_reference


def logits_gemm(x, y, alpha, sigma, y_norm):
    """Without |x|^2, which is common to all atoms."""
    precision = 1 / sigma**2
    return torch.addmm(
        -(alpha**2 * precision / 2)[:, None] * y_norm, x * (alpha * precision)[:, None], y.T
    )


def log_prob_of(logits, x, sigma):
    precision = 1 / sigma**2
    return (
        torch.logsumexp(logits, 1)
        - (x * x).sum(1) * precision / 2
        + x.shape[1] / 2 * torch.log(precision / (2 * torch.pi))
    )


def posterior_gemm(x, y, alpha, sigma, y_norm):
    logits = logits_gemm(x, y, alpha, sigma, y_norm)
    weights = torch.softmax(logits, 1)
    mean = weights @ y
    precision = 1 / sigma**2
    spread = weights @ y_norm - (mean * mean).sum(1)
    return (
        log_prob_of(logits, x, sigma),
        mean,
        (x.shape[1] - alpha**2 * precision * spread) * precision,
        1 / (weights * weights).sum(1),
    )


def log_prob_gemm(x, y, alpha, sigma, y_norm):
    return log_prob_of(logits_gemm(x, y, alpha, sigma, y_norm), x, sigma)


def draw_gemm(x, y, alpha, sigma, y_norm):
    weights = torch.softmax(logits_gemm(x, y, alpha, sigma, y_norm), 1)
    return torch.multinomial(weights, 1)[:, 0]


def average_gemm(x, y, values, alpha, sigma, y_norm):
    logits = logits_gemm(x, y, alpha, sigma, y_norm)
    return log_prob_of(logits, x, sigma), torch.softmax(logits, 1) @ values


def fisher_matvec_gemm(x, y, v, alpha, sigma, y_norm):
    precision = 1 / sigma**2
    weights = torch.softmax(logits_gemm(x, y, alpha, sigma, y_norm), 1)
    along = v @ y.T
    along = weights * (along - (weights * along).sum(1, keepdim=True))
    return (v - (alpha**2 * precision)[:, None] * (along @ y)) * precision[:, None]


GEMM = {
    "posterior": posterior_gemm,
    "log_prob": log_prob_gemm,
    "draw": draw_gemm,
    "average": average_gemm,
    "fisher_matvec": fisher_matvec_gemm,
}


def posterior_sdpa(x, y, alpha, sigma, y_norm):
    precision = 1 / sigma[0] ** 2
    bias = (-(alpha[0] ** 2) * precision / 2 * y_norm).view(1, 1, 1, -1).expand(1, 1, len(x), -1)
    query, key = (x * (alpha[0] * precision)).view(1, 1, *x.shape), y.view(1, 1, *y.shape)
    mean, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, key, attn_mask=bias, scale=1.0
    )
    return lse, mean


@cache
def contenders(op: str) -> dict:
    """name -> function of the case's inputs and y_norm."""
    if op == "transport_chain":
        return {"torch": transport_chain_reference}
    gemm = GEMM[op]
    found: dict[str, Callable] = {"gemm": gemm, "compile": torch.compile(gemm, dynamic=False)}
    if op == "posterior":
        found["sdpa"] = posterior_sdpa
    return found
