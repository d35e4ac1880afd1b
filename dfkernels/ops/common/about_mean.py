"""The sums of a moment kind about the posterior mean, in one pass over the atoms.

`sums_about_mean` returns, for a kind (moments.py), what its derivatives need as well:

    shift       log sum_i pi_i exp(-(|u_i|^2 - |r|^2)/2) [B], float64, so that e = w
    reference   the posterior mean [B, d], rounded to the compute dtype
    sums        of the kind, with these two

`shift` and `reference` are constants: what an op makes of the sums does not depend on them. So the
derivatives are those of the sums with both held fixed, which is `pair_gradient`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..._torch import autograd, batching, library
from . import pair_kernels
from .derivatives import Contraction, Stored, folded, pair_sums
from .moments import KINDS, PER_ATOM, Inputs, MomentKind, half_square, residual


def log_norm(sigma: Tensor, d: int) -> Tensor:
    """(d/2) log(2 pi sigma^2), where sigma^2 may overflow."""
    return d * (torch.log(sigma) + 0.5 * math.log(2 * math.pi))


def log_density(z: Inputs, weight: Tensor) -> Tensor:
    """log_prob [B] in the compute dtype, from the sum of the weights about z.reference."""
    return log_density_in_double(z, weight).to(z.x.dtype)


def log_density_in_double(z: Inputs, weight: Tensor) -> Tensor:
    """log_prob [B] in float64, whatever the compute dtype: only differences between logits are
    rounded to that."""
    d, sigma = z.x.shape[1], z.sigma.double()
    r = residual(z.x.double(), z.alpha.double(), sigma, z.reference.double())
    (shift,) = autograd.with_tangents(weight, [z.shift - log_norm(torch.ones_like(sigma), d)])
    # torch.sub multiplies by numbers as well, which have no tangents (see with_tangents)
    density = torch.sub(shift, torch.log(sigma), alpha=d)
    return torch.sub(density, (r * r).sum(1), alpha=0.5) + torch.log(weight)


def about_mean(
    kind: MomentKind,
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    log_prior: Tensor | None,
    stored: Stored,
    own: Sequence[Tensor] = (),
) -> tuple[Inputs, list[Tensor]]:
    """The inputs of a kind and its sums, differentiable to any order in every tensor.

    Args:
        kind: A registered kind.
        x, y, alpha, sigma, log_prior: As the ops have them.
        stored: How the atoms are stored.
        own: The kind's own tensors.
    """
    # normalised first: a large constant in log_prior would cost the logits their digits
    prior = None if log_prior is None else torch.log_softmax(log_prior, -1)
    shift, reference, *sums = sums_about_mean(
        x, y, list(own), alpha, sigma, prior, kind.name, *stored
    )
    reference = reference.detach()
    x, alpha, sigma, reference = autograd.with_tangents(sums[0], (x, alpha, sigma, reference))
    return Inputs(x, y, alpha, sigma, prior, shift.detach(), reference), sums


def _implementation(x, y, own, alpha, sigma, prior, kind, *stored):
    """A kernel's one pass; without one the posterior, by whatever this device has, and the sums."""
    scale, offset, atoms, counts = stored
    kernel = pair_kernels.moments_about_mean
    usable = all(t.numel() for t in (x, *own)) and library.can_run(kernel, x.device)
    if usable and kind in pair_kernels.KINDS_OF_MOMENTS:
        v = own[0] if own else None
        args = (x, y, v, alpha, sigma, prior, scale, offset, kind, atoms, counts)
        shift, reference, *sums = kernel(*args)
        shift = shift + half_square(x, alpha, sigma, reference)
        return [shift, reference, *sums[: len(KINDS[kind].shapes(x, *own))]]
    posterior = library.overload("posterior")
    log_prob, mean, _, _ = posterior(x, y, alpha, sigma, prior, scale, offset, atoms, counts)
    shift = log_prob.double() + log_norm(sigma.double(), x.shape[1])
    shift = shift + half_square(x, alpha, sigma, mean)
    average = library.overload("average")
    if kind == "average" and x.device.type == "cpu" and library.can_run(average, x.device):
        _, total = average(x, y, *own, alpha, sigma, prior, *stored)
        return [shift, mean, torch.ones_like(alpha), total]
    z = Inputs(x, y, alpha, sigma, prior, shift, mean)
    return [shift, mean, *pair_sums(KINDS[kind], [*z, *own], Stored(*stored))]


def _fake(x, y, own, alpha, sigma, prior, kind, *stored):
    shapes = KINDS[kind].shapes(x, *own)
    shift = x.new_empty(x.shape[0], dtype=torch.float64)
    return [shift, x.new_empty(x.shape), *map(x.new_empty, shapes)]


def _inputs(args, outputs) -> list[Any]:
    """z of derivatives.py."""
    x, y, own, alpha, sigma, prior = args[:6]
    shift, reference = outputs[0].detach(), outputs[1].detach()
    return [*Inputs(x, y, alpha, sigma, prior, shift, reference), *own]


def _in_order(x, y, own, alpha, sigma, prior) -> list:
    """What stands for the tensors among the arguments, in the order of z."""
    return [x, y, alpha, sigma, prior, None, None, *own]


def _vjp(args, needs, outputs, cotangents):
    kind, *stored = args[6:]
    asked = tuple(j for j, need in enumerate(_in_order(*needs[:6])) if need)
    z = _inputs(args, outputs)
    grads: list[Any] = [None] * len(z)
    if any(g is not None for g in cotangents[2:]):
        found = _without_pairs(args, z, asked, outputs[2:], cotangents[2:])
        if found is None:
            c = Contraction(KINDS[kind], (asked,))
            found = c.call([*z, *cotangents[2:]], Stored(*stored))
        for j, grad in zip(asked, found, strict=True):
            grads[j] = grad
    x, y, alpha, sigma, prior, _, _, *own = grads
    return x, y, own, alpha, sigma, prior, *[None] * 5


def _without_pairs(args, z, asked, sums, cotangents) -> list[Tensor] | None:
    """Gradients that are made of the sums, or of a second moment of `matvec`, whose derivatives
    have kernels in their turn: those of log q and the mean in x, of log q in alpha and sigma, of
    F v in v. None for all others."""
    kind, *stored = args[6:]
    names = [KINDS[kind].inputs[j] for j in asked]
    h_weight, h_first, *others = cotangents

    def second_moment(v: Tensor) -> Tensor:
        """sum e <t, v_k> t; nan where a cotangent v_k is not finite, which as an argument v would
        be refused: an overflow under a gradient scaler is no mistake."""
        x, y, _, alpha, sigma, prior = args[:6]
        finite = torch.nan_to_num(v, 0.0, 0.0, 0.0)
        sums = sums_about_mean(x, y, [finite], alpha, sigma, prior, "matvec", *stored)[-1]
        return sums + (0.0 * v).sum(-1, keepdim=True)

    if kind == "matvec" and names == ["v"]:
        return [torch.zeros_like(z[-1]) if others[0] is None else second_moment(others[0])]
    if kind != "posterior" or any(h is not None for h in others):
        return None
    if names == ["x"] and h_first is not None:
        first = second_moment(h_first[:, None])[:, 0]
        if h_weight is not None:
            first = first + h_weight[:, None] * sums[1]
    elif h_first is None and {"x", "alpha", "sigma"}.issuperset(names):
        first = h_weight[:, None] * sums[1]
    else:
        return None
    inputs = Inputs(*z)
    ratio, sigma = inputs.alpha / inputs.sigma, inputs.sigma
    r = residual(inputs.x, inputs.alpha, sigma, inputs.reference)

    def gradient(name: str) -> Tensor:
        """As pair_kernels.py has it, with m1 = first and m2."""
        if name == "x":
            return (ratio / sigma)[:, None] * first
        m2 = h_weight * sums[2]
        if name == "alpha":
            along = r - ratio[:, None] * inputs.reference
            return ((along * first).sum(1) - ratio * m2) / sigma
        return ratio * (ratio * m2 - 2 * (r * first).sum(1)) / sigma

    return [gradient(name) for name in names]


def _jvp(args, outputs, tangents):
    kind, *stored = args[6:]
    given = [(j, t) for j, t in enumerate(_in_order(*tangents[:6])) if t is not None]
    z, n = _inputs(args, outputs), len(outputs) - 2
    sums = tuple(range(len(z), len(z) + n))
    c = Contraction(KINDS[kind], (tuple(j for j, _ in given), sums))
    moved = c.call([*z, *[None] * n, *[t for _, t in given]], Stored(*stored))
    return [torch.zeros_like(outputs[0]), torch.zeros_like(outputs[1]), *moved]


def _batch(info, in_dims, x, y, own, alpha, sigma, prior, kind, *stored):
    a, size = Stored(*stored), info.batch_size
    dims = [*in_dims[:2], *in_dims[3:6], *in_dims[2], *in_dims[9:]]
    moved = batching.to_front([x, y, alpha, sigma, prior, *own, a.atoms, a.counts], dims)
    batched = [dim is not None for dim in dims]

    def call(x, y, alpha, sigma, prior, *rest):
        *own, atoms, counts = rest
        some = a._replace(atoms=atoms, counts=counts)
        return sums_about_mean(x, y, own, alpha, sigma, prior, kind, *some)

    ranks = [None, 2, None, None, 1, *map(PER_ATOM.get, KINDS[kind].own)]
    shared = [*(rank is not None for rank in ranks), True, True]
    calls = batching.Calls(size, moved[:-2], batched[:-2], ranks)
    if a.atoms is None and not calls.copy_atoms():
        outs = [calls.unfold(o) for o in call(*calls.folded(), None, None)]
    elif a.atoms is None or any(b and s for b, s in zip(batched, shared, strict=True)):
        outs = batching.one_by_one(call, moved, batched, size)
    else:
        flat = folded(moved, batched, shared, size)
        outs = [batching.unfold(o, size) for o in call(*flat)]
    return outs, [0] * len(outs)


sums_about_mean = library.define(
    "sums_about_mean",
    "(Tensor x, Tensor y, Tensor[] own, Tensor alpha, Tensor sigma, Tensor? log_pi, str kind, "
    "float scale, float offset, Tensor? atoms, Tensor? counts) -> Tensor[]",
    fallback=_implementation,
    fake=_fake,
    batch=_batch,
    vjp=_vjp,
    jvp=_jvp,
)
