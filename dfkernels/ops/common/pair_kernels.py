"""Fused kernels for moments about the mean and for the first derivatives of a moment kind's sums
(derivatives.py, README.md).

With e = exp(logit - shift), t = y - reference, u = (x - alpha y)/sigma and a = alpha/sigma, as in
moments.py (whose shift is |r|^2/2 more, the `constant` below), a kind has the sums weight = sum e,
first = sum e t, and

    posterior   second = sum e |t|^2 [B],  weight_square = sum e^2 [B]
    matvec      second = sum e <t, v_k> t [B, K, d]
    diagonal    second = sum e t * t [B, d]

Derivatives are taken of e without a factor that all atoms of a query share, that of the reference:
with r = (x - alpha reference)/sigma,

    e = exp(log_pi + a <t, r> - a^2 |t|^2/2 - constant),  constant = shift + |r|^2/2

No result depends on that factor but log_prob, which adds its part itself. Left in, it would be a
large number times sum c (below), which is often 0 but for rounding.

Reverse mode. For cotangents h of these sums, psi = sum_b <h_b, S(b)> = sum_b sum_i e f with

    posterior   f = h_weight + <h_first, t> + h_second |t|^2 + h_weight_square e
    matvec      f = h_weight + <h_first, t> + sum_k <h_second_k, t> <v_k, t>
    diagonal    f = h_weight + <h_first, t> + <h_second, t * t>

and c = e f (posterior: h_weight_square counts twice), one weight per query and atom, whose moments
about the reference are m1 = sum_i c t and m2 = sum_i c |t|^2:

    grad x       = a m1 / sigma                                (= -sum_i c (u - r) / sigma)
    grad alpha   = (<r - a reference, m1> - a m2) / sigma
    grad sigma   = (a^2 m2 - 2 a <r, m1>) / sigma              (= sum_i c (|u|^2 - |r|^2) / sigma)
    grad v_k     = sum_i e <h_second_k, t> t
    grad y_i     = sum_b c a u + e df/dt                       (y_i: the atom's value)
    grad log_pi_i = sum_b c

Forward mode. For tangents of the inputs (dy: of the atoms' values, in the compute dtype),

    tau = <p, t> + q |t|^2 + a <u, dy> + dlog_pi
    p = (a dx + dalpha (r - a reference) - 2 a dsigma r) / sigma
    q = a (a dsigma - dalpha) / sigma
    d weight = sum e tau     d first = sum e (tau t + dy)     d weight_square = 2 sum e^2 tau
    posterior   d second = sum e (tau |t|^2 + 2 <t, dy>)
    matvec      d second = sum e (tau <t, v> t + <t, dv> t + <dy, v> t + <t, v> dy)
    diagonal    d second = sum e (tau t * t + 2 t * dy)

`shift` is double, so that weights keep their digits where logits are large. A cotangent or tangent
that is None is zero, and its products are left out. `log_pi` None is -log N for every atom. `atoms`
and `counts` are lists (lists.py). The shift is at most log sum exp(logit), up to rounding: an atom
counts as negligible beside sum e = 1. dy is in the compute dtype.

`moments_about_mean` gives all of a kind in one pass: shift = log sum_i exp(logit_i), so that e is
the posterior weight; the reference, the mean rounded to the compute dtype; the sums about it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

from ..._torch import library

KINDS_OF_MOMENTS = ("posterior", "matvec", "diagonal", "dense")
KINDS_OF_DERIVATIVES = ("posterior", "matvec", "diagonal")
_INPUTS = (
    "Tensor x, Tensor y, Tensor? v, Tensor alpha, Tensor sigma, Tensor? log_pi, float scale, "
    "float offset, Tensor shift, Tensor reference, str kind, "
)
_COTANGENTS = (
    "Tensor? h_weight, Tensor? h_first, Tensor? h_second, Tensor? h_weight_square, "
    "Tensor? atoms, Tensor? counts"
)
_TANGENTS = (
    "Tensor? dx, Tensor? dy, Tensor? dv, Tensor? dalpha, Tensor? dsigma, Tensor? dlog_pi, "
    "Tensor? atoms, Tensor? counts"
)


def _in_triton(file: str, name: str) -> Callable:
    """The launcher in triton/, which is imported by the first call."""

    def implementation(*args):
        return getattr(importlib.import_module(f"{__package__}.triton.{file}"), name)(*args)

    return implementation


# -> shift [B], double; reference [B, d]; weight [B], first [B, d], second (dense: sum e t t^T),
# weight_square [B] (no elements but for posterior)
moments_about_mean = library.declare_kernel(
    "moments_about_mean",
    "(Tensor x, Tensor y, Tensor? v, Tensor alpha, Tensor sigma, Tensor? log_pi, float scale, "
    "float offset, str kind, Tensor? atoms, Tensor? counts)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    cuda=_in_triton("about_mean", "moments_about_mean"),
)
# -> grad x [B, d], grad alpha [B], grad sigma [B], grad v [B, K, d] (no elements without v)
pair_vjp_queries = library.declare_kernel(
    "pair_vjp_queries",
    f"({_INPUTS}{_COTANGENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    cuda=_in_triton("pair", "vjp_queries"),
)
# -> grad y [N, d] in the compute dtype (no elements unless want_y), grad log_pi [N]
pair_vjp_atoms = library.declare_kernel(
    "pair_vjp_atoms",
    f"({_INPUTS}{_COTANGENTS}, bool want_y) -> (Tensor, Tensor)",
    cuda=_in_triton("pair", "vjp_atoms"),
)
# -> d weight [B], d first [B, d], d second, d weight_square [B] (no elements but for posterior)
pair_jvp = library.declare_kernel(
    "pair_jvp",
    f"({_INPUTS}{_TANGENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    cuda=_in_triton("pair", "jvp"),
)
