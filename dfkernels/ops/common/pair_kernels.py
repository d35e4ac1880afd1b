"""Fused kernels for the first derivatives of a moment kind's sums (derivatives.py, README.md).

With e = exp(logit - shift), t = y - reference and u = (x - alpha y)/sigma, as in moments.py, a kind
has the sums weight = sum e, first = sum e t, and

    posterior   second = sum e |t|^2 [B],  weight_square = sum e^2 [B]
    matvec      second = sum e <t, v_k> t [B, K, d]
    diagonal    second = sum e t * t [B, d]

Reverse mode. For cotangents h of these sums, psi = sum_b <h_b, S(b)> = sum_b sum_i e f with

    posterior   f = h_weight + <h_first, t> + h_second |t|^2 + h_weight_square e
    matvec      f = h_weight + <h_first, t> + sum_k <h_second_k, t> <v_k, t>
    diagonal    f = h_weight + <h_first, t> + <h_second, t * t>

and c = e f (posterior: h_weight_square counts twice), one weight per query and atom:

    grad x       = -sum_i c u / sigma
    grad alpha   = sum_i c <u, y> / sigma
    grad sigma   = sum_i c |u|^2 / sigma
    grad v_k     = sum_i e <h_second_k, t> t
    grad y_i     = sum_b c alpha u / sigma + e df/dt      (y_i: the atom's value)
    grad log_pi_i = sum_b c

Forward mode. For tangents of the inputs (y_tangent: of the stored atoms),

    tau = -<u, dx - alpha dy - dalpha y>/sigma + |u|^2 dsigma/sigma + dlog_pi
    d weight = sum e tau     d first = sum e (tau t + dy)     d weight_square = 2 sum e^2 tau
    posterior   d second = sum e (tau |t|^2 + 2 <t, dy>)
    matvec      d second = sum e (tau <t, v> t + <t, dv> t + <dy, v> t + <t, v> dy)
    diagonal    d second = sum e (tau t * t + 2 t * dy)

`shift` is double, so that weights keep their digits where logits are large. A cotangent or tangent
that is None is zero, and its products are left out. `atoms` and `counts` are lists (lists.py).
"""

from __future__ import annotations

from ..._torch import library

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

# -> grad x [B, d], grad alpha [B], grad sigma [B], grad v [B, K, d] (no elements without v)
pair_vjp_queries = library.declare_kernel(
    "pair_vjp_queries",
    f"({_INPUTS}{_COTANGENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
# -> grad y [N, d] in the compute dtype (no elements unless want_y), grad log_pi [N]
pair_vjp_atoms = library.declare_kernel(
    "pair_vjp_atoms",
    f"({_INPUTS}{_COTANGENTS}, bool want_y) -> (Tensor, Tensor)",
)
# -> d weight [B], d first [B, d], d second, d weight_square [B] (no elements but for posterior)
pair_jvp = library.declare_kernel(
    "pair_jvp",
    f"({_INPUTS}{_TANGENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
