"""DDIM over the exact posterior of a data set, with the Jacobian of the whole map, chain by chain.

    x_s = (sigma_s/sigma_t) x_t + (alpha_s - alpha_t sigma_s/sigma_t) mean
    A <- M A,  M = dx_s/dx_t = (alpha_s/alpha_t) I + (sigma_s - sigma_t alpha_s/alpha_t) sigma_t F_t
             = (sigma_s/sigma_t) I + (alpha_s - alpha_t sigma_s/sigma_t) (alpha_t/sigma_t^2) C
    (Algorithm 2, with the discrete step's own derivative)

A is rescaled at every step by a power of
two, which is exact, and at the end to |A|_F = sqrt(d): in the Dirac setting the Jacobian itself
underflows.

The kernels, compiled and Triton's, take d <= 16: a chain in every lane, all steps in one call.
Above, and where neither runs, the steps are PyTorch, each with a call of `posterior` and one of
`covariance_matvec`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..._constants import CHAIN_MOST_D
from ..._torch import check, diagnosis, library
from ..._torch.errors import Unsupported
from ..posterior import op as posterior_op
from .reference import advance, coefficients, normalised
from .reference import transport_chain as reference

__all__ = ["Chain", "reference", "transport_chain"]


class Chain(NamedTuple):
    """Where the chains end, x ``[B, *E]``, and the map's Jacobian exp(log_norm) A: A [B, d, d] with
    |A|_F = sqrt(d), log_norm [B].
    """

    x: Tensor
    A: Tensor
    log_norm: Tensor


def _steps(x, y, alpha, sigma, log_prior, rates, transposed):
    """The reference, made of ops that bound the memory."""
    A = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)
    log_norm = x.new_zeros(x.shape[0])
    levels = torch.stack([alpha[:-1], sigma[:-1]], 1).to(x.dtype)
    for (a, s), (keep, pull, identity, spread) in zip(
        levels, torch.stack(coefficients(alpha, sigma, rates), 1).tolist(), strict=True
    ):
        at = (a.expand(x.shape[0]), s.expand(x.shape[0]), log_prior, 1.0, 0.0)
        mean = posterior_op(x, y, *at)[1]
        product = torch.ops.dfkernels.covariance_matvec(x, y, A.mT, *at).mT
        A, log_norm = normalised(advance(A, product, identity, spread, transposed), log_norm)
        x = keep * x + pull * mean
    return x.clone(memory_format=torch.contiguous_format), A.contiguous(), log_norm


def _fake(x, y, alpha, sigma, log_prior, rates, transposed):
    B, d = x.shape
    return x.new_empty(B, d), x.new_empty(B, d, d), x.new_empty(B)


def _no_derivative(*args):
    raise Unsupported(
        "transport_chain has no derivatives, but an argument requires grad or carries a tangent: "
        "detach it, or differentiate dfkernels.ops.transport_chain.reference"
    )


def _define(name: str, cuda: Callable | None = None):
    return library.define(
        name,
        "(Tensor x, Tensor y, Tensor alpha, Tensor sigma, Tensor? log_prior, Tensor? rates, "
        "bool transposed) -> (Tensor, Tensor, Tensor)",
        fallback=_steps,
        fake=_fake,
        cuda=cuda,
        differentiable=_no_derivative,
        shared=("y", "alpha", "sigma", "log_prior", "rates"),
    )


op = _define("transport_chain", library.in_triton(__name__))
stepwise = _define("transport_chain_stepwise")  # no kernel


def _levels(name: str, a, x: Tensor) -> Tensor:
    """A tensor or a NumPy array of M + 1 real numbers in float64."""
    if type(a).__module__.partition(".")[0] == "numpy" and getattr(a, "ndim", 0):
        a = check.of_numpy(name, a)
    check.tensor(name, a)
    if a.dim() != 1 or a.shape[0] == 0 or a.dtype.is_complex or a.dtype == torch.bool:
        raise check.mismatch(
            name, "a tensor of real numbers, shape [M + 1]", f"{a.dtype} {list(a.shape)}"
        )
    return a.to(x.device, torch.float64)


def transport_chain(
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_prior: Tensor | None = None,
    *,
    rates: Tensor | None = None,
    transposed: bool = False,
) -> Chain:
    """Takes M DDIM steps from the noise x to the data y, and returns the Jacobian of that map too.

    The steps use the exact posterior mean. Take care which of x and y is which: swapped, the call
    runs and returns something else.

    Args:
        x: The chains' starts, ``[B, *E]``, float32 or float64: the dtype of computation and
            results.
        y: Atoms ``[N, *E]``, of x's dtype or narrower (converted). Temporary memory on the CPU: 128
            N bytes a thread.
        alpha: Signal levels from start to end, [M + 1], a tensor or NumPy array of any real dtype,
            used in float64. On x's device, or a CUDA call waits until they are copied.
        sigma: Noise levels, likewise, positive throughout.
        log_prior: Log weights [N], as in `posterior`.
        rates: [M, 2] floating, in place of the exact derivative: A <- A + (r_0 I + r_1
            (alpha_t/sigma_t)^2 C) A, an Euler step of dA/dt = B A.
        transposed: With rates, A <- A + A^T (r_0 I + r_1 (alpha_t/sigma_t)^2 C), the printed line 6
            of Algorithm 2 (wrong, for comparison).

    Returns:
        Chain(x ``[B, *E]``, A [B, d, d], log_norm [B]), the same bits for any number of threads.

    Raises:
        TypeError, ValueError: As `posterior` does.
        NotImplementedError: An argument requires grad (outside torch.no_grad) or carries a tangent:
            there are no derivatives. It is a ValueError too.
    """
    flat, atoms, *_, log_prior, _, _ = check.points(x, y, 1.0, 1.0, log_prior, 1.0, 0.0)
    alpha, sigma = _levels("alpha", alpha, x), _levels("sigma", sigma, x)
    M = alpha.shape[0] - 1
    if sigma.shape != alpha.shape:
        raise check.mismatch("sigma", f"shape [{M + 1}] like alpha", list(sigma.shape))
    if rates is not None:
        check.tensor("rates", rates)
        if rates.shape != (M, 2):
            raise check.mismatch("rates", f"shape [{M}, 2], a row per step", list(rates.shape))
        rates = rates.to(x.device, torch.float64)
    elif transposed:
        raise check.mismatch("rates", "a tensor with transposed=True", "None")
    args = (flat, atoms.to(x.dtype), alpha, sigma, log_prior, rates, bool(transposed))
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        _no_derivative()
    run = op if flat.shape[1] <= CHAIN_MOST_D else stepwise
    end, A, log_norm = diagnosis.call(run, args, x=x, y=y)
    return Chain(end.reshape(x.shape), A, log_norm)
