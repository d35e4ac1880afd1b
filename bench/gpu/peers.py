"""What people use today on a GPU, at its best: the norms |y|^2 are handed over ready and not timed.

torch       two to three matrix products and a softmax between them, float32: the atoms as float32;
            the other ops: their references
torch-bf16  the same in the atoms' own bfloat16, where they are stored so
compile     torch.compile of the faster kind
sdpa        scaled_dot_product_attention, |y|^2 as one more feature; d < 256, mean only
keops, flash-sinkhorn, flash-sd-kde    where they can be imported; mean only
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import dfkernels as df
from tools.op_table import TABLE

from .. import derivatives
from . import ways


def mm(a, b):
    """a @ b; a float32 goes along with b's dtype, as on the tensor cores."""
    return a @ b if a.dtype == b.dtype else (a.to(b.dtype) @ b).to(a.dtype)


def softmax(x, y, alpha, sigma, y_norm):
    precision = (1 / sigma**2)[:, None]
    logits = mm(x * alpha[:, None] * precision, y.T) - alpha[:, None] ** 2 * precision / 2 * y_norm
    return logits, torch.softmax(logits, 1)


def posterior(x, y, alpha, sigma, y_norm):
    logits, weights = softmax(x, y, alpha, sigma, y_norm)
    mean, precision = mm(weights, y), 1 / sigma**2
    norm = x.shape[1] / 2 * torch.log(2 * torch.pi * sigma**2)
    log_prob = torch.logsumexp(logits, 1) - (x * x).sum(1) * precision / 2 - norm
    spread = weights @ y_norm - (mean * mean).sum(1)
    trace = (x.shape[1] - alpha**2 * precision * spread) * precision
    return mean, log_prob, trace, 1 / (weights * weights).sum(1)


def fisher_matvec(x, y, v, alpha, sigma, y_norm):
    _, weights = softmax(x, y, alpha, sigma, y_norm)
    ratio, precision = ((alpha / sigma) ** 2)[:, None], (1 / sigma**2)[:, None]
    out = []
    for u in v.unbind(1):
        along = mm(u, y.T)
        along = weights * (along - (weights * along).sum(1, keepdim=True))
        out.append((u - ratio * mm(along, y)) * precision)
    return torch.stack(out, 1)


def fisher_diagonal(x, y, alpha, sigma, y_norm):
    _, weights = softmax(x, y, alpha, sigma, y_norm)
    spread = mm(weights, y * y) - mm(weights, y) ** 2
    return (1 - ((alpha / sigma) ** 2)[:, None] * spread) / (sigma**2)[:, None]


def fisher_dense(x, y, alpha, sigma, y_norm):
    _, weights = softmax(x, y, alpha, sigma, y_norm)
    mean = mm(weights, y)
    second = torch.stack([mm(y.T * w, y) for w in weights])
    spread = second - mean[:, :, None] * mean[:, None]
    eye = torch.eye(x.shape[1], device=x.device)
    return (eye - ((alpha / sigma) ** 2)[:, None, None] * spread) / (sigma**2)[:, None, None]


def log_prob(x, y, alpha, sigma, y_norm):
    precision = (1 / sigma**2)[:, None]
    logits = mm(x * alpha[:, None] * precision, y.T) - alpha[:, None] ** 2 * precision / 2 * y_norm
    norm = x.shape[1] / 2 * torch.log(2 * torch.pi * sigma**2) + math.log(len(y))
    return torch.logsumexp(logits, 1) - (x * x).sum(1) * precision[:, 0] / 2 - norm


def draw(x, y, alpha, sigma, y_norm, seed):
    """Other draws than ours: the noise is torch's, over all atoms."""
    precision = (1 / sigma**2)[:, None]
    logits = mm(x * alpha[:, None] * precision, y.T) - alpha[:, None] ** 2 * precision / 2 * y_norm
    return (logits - torch.empty_like(logits).exponential_().log_()).argmax(1)


def derived(function, derivative: str, inputs: dict) -> Callable:
    """A function without arguments: the derivative of `function` of bench.derivatives."""
    output, argument, mode = derivative.split()
    generator = torch.Generator(inputs["x"].device).manual_seed(3)
    B, d = inputs["x"].shape
    of_queries = (B,) if output in ("log_prob", "fisher_trace", "ess") else (B, d)
    shape = of_queries if mode == "reverse" else inputs[argument].shape
    x = inputs["x"]
    along = torch.randn(shape, device=x.device, generator=generator).to(x.dtype)
    given: dict[str, Any] = {**inputs, "v": inputs["v"][:, 0] if "v" in inputs else None}

    def of(t):
        return function(output, **given | {argument: t})

    def run():
        leaf = given[argument]
        if mode == "forward":
            return torch.func.jvp(of, (leaf,), (along,))[1]
        with torch.enable_grad():
            leaf = leaf.detach().requires_grad_()
            return torch.autograd.grad(of(leaf), leaf, along)[0]

    return run


def in_float(plain, y, **rest):
    return plain(y=y.float(), **rest)


def sdpa(x, y, alpha, sigma, y_norm):
    scale = alpha / sigma**2
    d, dtype = x.shape[1], y.dtype
    pad = -(d + 1) % 8
    wide = lambda t, last: torch.nn.functional.pad(
        torch.cat([t, last[:, None].to(t.dtype)], 1), (0, pad)
    )
    query = wide((x * scale[:, None]).to(dtype), alpha * scale)[None, None]
    key = wide(y, -y_norm / 2)[None, None]
    return torch.nn.functional.scaled_dot_product_attention(query, key, key, scale=1.0)[
        0, 0, :, :d
    ].float()


def keops(x, y, alpha, sigma, y_norm):
    from pykeops.torch import LazyTensor

    def run():
        atoms = LazyTensor(y[None])
        scaled = LazyTensor((x / sigma[:, None])[:, None])
        u = scaled - LazyTensor((alpha / sigma)[:, None, None]) * atoms
        return (-(u**2).sum(-1) / 2).sumsoftmaxweight(atoms, dim=1)

    return run


def flash_sinkhorn(x, y, alpha, sigma, y_norm):
    """Transport plan times y, for one sigma and alpha = 1. The potentials that make its rows sum to
    one are ready-made, as y_norm is.
    """
    from flash_sinkhorn.kernels import apply_plan_mat_flashstyle

    eps, d = 2 * float(sigma[0]) ** 2, x.shape[1]
    log_q = df.ops.posterior(x, y, alpha, sigma).log_prob
    log_mass = log_q + math.log(len(y)) + d / 2 * torch.log(2 * torch.pi * sigma**2)
    potentials = -eps * log_mass - (x * x).sum(1), -y_norm
    zeros = x.new_zeros(len(x)), y.new_zeros(len(y))
    return lambda: apply_plan_mat_flashstyle(x, y, *potentials, *zeros, y, eps=eps, axis=1)


def flash_sd_kde(x, y, alpha, sigma, y_norm):
    """Its queries are its atoms, d = 16, one sigma: the same amount of work, another result."""
    from kernels.flash_sd_kde.empirical import emp_score_16d_flash_sd_kde

    width = float(sigma[0])

    def run():
        mass, first = emp_score_16d_flash_sd_kde(y, width, synchronize=False)
        return first / mass[:, None]

    return run


PLAIN = {
    f.__name__: f for f in (posterior, fisher_matvec, fisher_diagonal, fisher_dense, log_prob, draw)
}
REFERENCES = {op: spec.reference for op, spec in TABLE.items() if op not in PLAIN}
ELSEWHERE = {  # name: (module, what makes the function, which d)
    "keops": ("pykeops", keops, lambda d: d <= 100),
    "flash-sinkhorn": ("flash_sinkhorn", flash_sinkhorn, lambda d: d <= 1024),
    "flash-sd-kde": ("flash_sd_kde", flash_sd_kde, lambda d: d == 16),
}
INCOMPARABLE = ("flash-sd-kde",)  # its result is that of another call


FIRST = ("torch", "torch-bf16", "sdpa")  # the others compile for long, or may not be installed
LATER = ("compile", *ELSEWHERE)


def names(case) -> list[str]:
    """The peers that a case has, the quickest to start first."""
    narrow = case.storage != "float32"
    found = ["torch"]
    if case.derivative or case.way not in ("", "tolerance"):
        return found
    if narrow:
        found.append("torch-bf16")
    if case.op == "posterior" and case.d < 256:
        found.append("sdpa")
    if case.op not in ("fisher_dense", "transport_chain", "draw"):  # their loops would be unrolled
        found.append("compile")
    if case.op == "posterior" and not narrow:
        for name, (module, _, fits) in ELSEWHERE.items():
            if fits(case.d) and importlib.util.find_spec(module) is not None:
                found.append(name)
    return found


def contender(name: str, case, inputs: dict) -> Callable:
    """The function to be timed: what may be ready-made is ready."""
    if case.derivative:
        return derived(derivatives.by_gemm, case.derivative, inputs)
    if case.way not in ("", "tolerance"):
        return ways.by_torch(case, inputs)
    if case.op in REFERENCES:
        plain, given, narrow = REFERENCES[case.op], {**inputs, **case.options}, False
    else:
        plain, y = PLAIN[case.op], inputs["y"]
        y_norm = torch.cat(
            [rows.float().square().sum(1) for rows in y.split(max(1, 2**26 // case.d))]
        )
        given, narrow = {**inputs, **case.options, "y_norm": y_norm}, y.dtype != torch.float32
    if name == "torch":
        return partial(in_float, plain, **given) if narrow else partial(plain, **given)
    if name == "torch-bf16":
        return partial(plain, **given)
    if name == "compile":
        return partial(torch.compile(plain, dynamic=False), **given)
    if name == "sdpa":
        return partial(sdpa, **given)
    _, make, _ = ELSEWHERE[name]
    return make(**given)


def bytes_needed(case, name: str) -> int:
    """Of a contender beside its inputs: [B, N] arrays, and the atoms as float32, squared or
    weighted."""
    if not case.N or name not in ("torch", "torch-bf16", "compile"):
        return 0
    if case.way not in ("", "tolerance"):
        return ways.bytes_needed(case)
    if case.op == "transport_chain":
        return 3 * 4 * case.B * case.N * case.d
    arrays = {"posterior": 3, "fisher_matvec": 5}.get(case.op, 2)
    copies = (case.storage != "float32" and name == "torch") + (
        case.op in ("fisher_diagonal", "fisher_dense")
    )
    return 4 * case.N * (arrays * case.B + copies * case.d)
