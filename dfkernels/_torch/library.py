"""Declares an op once: schema, fake, fallback, derivatives, vmap. The only file that touches
torch.library.

The derivatives live at the dispatcher's Autograd key, as a single-level autograd function. PyTorch
reaches that key once per transform level, in eager as when AOTAutograd traces, so that backward,
forward AD, torch.func in any nesting and torch.compile of all of them are right by one mechanism,
for callers of torch.ops.dfkernels.* as well. `torch.library.register_autograd` would not do:
torch.func.grad then raises, and torch.func.jvp silently returns zeros. The private names of torch
that this needs are in _torch.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from . import backend, private
from .errors import UnusableValue, from_kernel
from .private import tracked

__all__ = ["NAMESPACE", "define", "fold", "folded", "tracked", "unknown_size"]

NAMESPACE = "dfkernels"
_library = torch.library.Library(NAMESPACE, "DEF")
_Tensor = torch.Tensor


def define(
    name: str,
    schema: str,
    *,
    fallback: Callable,
    fake: Callable,
    batch: Callable,
    cuda: Callable | None = None,
    twin: Callable | None = None,
    fast: Callable | None = None,
    vjp: Callable | None = None,
    jvp: Callable | None = None,
):
    """Declares `dfkernels::name` and returns its overload. Compiled kernels only add a CPU
    implementation.

    fallback(*args)              implementation in PyTorch, for every device without a kernel
    fake(*args)                  empty outputs of the right shape
    batch(info, in_dims, *args)  vmap rule
    cuda(*args)                  implementation by Triton, which it imports; used where Triton can
    run
    twin(*args)                  the same function in differentiable ops: gives both derivatives.
                                 Without torch.func: forward AD runs it below functorch's dispatch
                                 key
    fast(needs, args, outputs, cotangents)   gradients, or None to leave them to the twin
    vjp(args, needs, cotangents), jvp(args, tangents)   instead of a twin, for an op that takes a
                                 list of tensors: needs, cotangents and tangents are flat, args are
                                 not
    """
    _library.define(name + schema)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    in_pytorch = _alike(op, _fallback(name, op, fallback, vjp is None))
    _library.impl(name, in_pytorch, "CompositeExplicitAutograd")
    if cuda is not None:
        _library.impl(name, _on_cuda(cuda, in_pytorch), "CUDA")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, _alike(op, fake), lib=_library)
    torch.library.register_vmap(qualified, batch, lib=_library)
    function = _function(name, op, twin, fast, vjp, jvp)

    def kernel(keyset, *args):
        flat = args if vjp is None else _flat(args)
        tracks = torch.is_grad_enabled() and private.any_requires_grad(*flat)
        dual = private.may_carry_tangents() and any(
            isinstance(a, _Tensor) and forward_ad.unpack_dual(a, level=0).tangent is not None
            for a in flat
        )
        if not (tracks or dual):
            return _run(op, keyset, args)
        if dual and twin is not None:
            return twin(*args)
        lengths = [len(a) if isinstance(a, (list, tuple)) else None for a in args]
        with private.enable_single_level_autograd_function():
            out = function.apply(keyset, lengths, *flat)
        return out if vjp is None else list(out)

    _library.impl(name, kernel, "Autograd", with_keyset=True)
    if vjp is not None:
        _library.impl(name, lambda *args: _legacy_batch(batch, *args), "Batched")
    return op


def _run(op, keyset, args):
    """The op below autograd. What a kernel says of a value becomes an error of the library's
    own."""
    try:
        with private.below_autograd():
            return op.redispatch(keyset & private.after_autograd, *args)
    except RuntimeError as error:
        known = from_kernel(error)
        if known is None:
            raise
        raise known from error


def unknown_size() -> torch.SymInt:
    """For a fake: a size that only the data decide."""
    return torch.library.get_ctx().new_dynamic_size()


class _Info(NamedTuple):
    batch_size: int


def _legacy_batch(batch, text, tensors, *rest):
    """The vmap rule under the older vmap of torch.autograd.grad(is_grads_batched=True), whose own
    fallback knows no lists.
    """
    level = private.legacy_vmap_level()
    # [1, ...] where a tensor has no such dimension
    views = [private.remove_batch_dim(t, level, 1, 0) for t in tensors]
    size = max(v.shape[0] for v in views)
    dims = [0 if v.shape[0] == size else None for v in views]
    views = [v[0] if dim is None else v for v, dim in zip(views, dims, strict=True)]
    outs, _ = batch(_Info(size), (None, dims, *[None] * len(rest)), text, views, *rest)
    return [private.add_batch_dim(o, 0, level) for o in outs]


def _fallback(name, op, fallback, loud):
    """The fallback in the dtypes that it is given, whatever autocast says. If loud, it raises for
    values that it cannot use, as a compiled kernel does; on CUDA it looks at none: no
    synchronisation.
    """
    names = [a.name for a in op._schema.arguments]

    def implementation(*args):
        with private.without_autocast():
            if not loud or args[0].device.type != "cpu":
                return fallback(*args)
            given = dict(zip(names, args, strict=False))
            alpha, sigma = given["alpha"], given["sigma"]
            if not bool((torch.isfinite(alpha) & torch.isfinite(sigma) & (sigma > 0)).all()):
                raise UnusableValue("alpha, sigma: expected finite values, sigma > 0")
            if "y" in given:
                _expect_finite_atoms(given["y"], given["log_prior"])
            out = fallback(*args)
        if not all(bool(torch.isfinite(o).all()) for o in _tuple(out)):
            raise UnusableValue(f"{name}: expected a finite result, got nan, inf or an overflow")
        return out

    return implementation


def _expect_finite_atoms(y, log_prior):
    """An infinite atom would be without weight, as one that is merely far; only a masked atom may
    hold anything."""
    if not y.dtype.is_floating_point:
        return
    for rows in range(0, len(y), 4096):
        some = slice(rows, rows + 4096)
        finite = torch.isfinite(y[some]).all(1)
        if log_prior is not None:
            finite |= log_prior[some] == -torch.inf
        if not bool(finite.all()):
            raise UnusableValue("y: expected finite values, got nan or inf")


def _alike(op, implementation):
    """The implementation, for dense tensors on one device. The dispatcher takes a fake or a
    fallback for a call as soon as one tensor asks for it: without a word, results would be memory
    that nobody wrote.
    """

    def checked(*args):
        first = None
        for argument, a in zip(op._schema.arguments, args, strict=False):
            for t in a if isinstance(a, (list, tuple)) else [a]:
                if not isinstance(t, _Tensor):
                    continue
                if t.layout != torch.strided or t.is_quantized:
                    raise TypeError(
                        f"{argument.name}: expected a dense tensor, got {t.layout}, {t.dtype}"
                    )
                first = t if first is None else first
                if t.device != first.device:
                    raise ValueError(
                        f"{argument.name}: expected device {first.device} like the others, got {t.device}"
                    )
        return implementation(*args)

    return checked


def _on_cuda(cuda, in_pytorch):
    def implementation(*args):
        if not backend.triton(args[0].device).can_run:
            return in_pytorch(*args)
        with private.without_autocast():
            return cuda(*args)

    return implementation


def _tuple(out):
    return out if isinstance(out, tuple) else (out,)


def _flat(args):
    flat = []
    for a in args:
        flat.extend(a) if isinstance(a, (list, tuple)) else flat.append(a)
    return flat


def _nested(flat, lengths):
    items = iter(flat)
    return [next(items) if n is None else [next(items) for _ in range(n)] for n in lengths]


def _function(name, op, twin, fast, vjp, jvp):
    def forward(keyset, lengths, *flat):
        # apply() has switched both modes off, and the levels below this one inherit what stands
        # here
        with torch.enable_grad(), private.forward_derivatives(True):
            out = _run(op, keyset, _nested(flat, lengths))
        return tuple(out) if isinstance(out, list) else out

    def setup_context(ctx, inputs, output):
        _, ctx.lengths, *flat = inputs
        ctx.constants = [None if isinstance(a, _Tensor) else (a,) for a in flat]
        ctx.count = len(flat)
        outputs = () if fast is None else _tuple(output)
        tensors = [a for a in flat if isinstance(a, _Tensor)]
        ctx.save_for_backward(*tensors, *outputs)
        if jvp is not None:
            ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    def restore(ctx):
        saved = iter(
            private.unwrap_dead_wrappers(ctx.saved_tensors)
        )  # in a list the dispatcher would not
        flat = [next(saved) if c is None else c[0] for c in ctx.constants]
        return flat, tuple(saved)

    def backward(ctx, *cotangents):
        flat, outputs = restore(ctx)
        needs = ctx.needs_input_grad[2:]
        grads = None
        if all(g is None for g in cotangents):
            grads = (None,) * ctx.count
        elif fast is not None:
            grads = fast(needs, flat, outputs, cotangents)
        if grads is None:
            grads = (
                vjp(_nested(flat, ctx.lengths), needs, cotangents)
                if vjp is not None
                else _twin_vjp(twin, flat, needs, cotangents)
            )
        return None, None, *grads

    def forward_derivative(ctx, *tangents):
        flat, _ = restore(ctx)
        flat = [
            forward_ad.unpack_dual(a, level=0).primal if isinstance(a, _Tensor) else a for a in flat
        ]
        with torch.enable_grad(), private.forward_derivatives(True):  # as in forward
            return tuple(jvp(_nested(flat, ctx.lengths), tangents[2:]))

    members = {"forward": forward, "setup_context": setup_context, "backward": backward}
    if jvp is not None:
        members["jvp"] = forward_derivative
    return type(
        name, (private.SingleLevelFunction,), {k: staticmethod(f) for k, f in members.items()}
    )


def _twin_vjp(twin, args, needs, cotangents):
    wanted = [i for i, need in enumerate(needs) if need]

    def outputs(*tensors):
        full = list(args)
        for i, t in zip(wanted, tensors, strict=True):
            full[i] = t
        out = twin(*full)
        return tuple(o for o, g in zip(_tuple(out), cotangents, strict=True) if g is not None)

    with private.without_saved_tensors_hooks():
        _, pull = torch.func.vjp(outputs, *[args[i] for i in wanted])
        grads = dict(zip(wanted, pull(tuple(g for g in cotangents if g is not None)), strict=True))
    return tuple(grads.get(i) for i in range(len(args)))


def folded(op_name: str, sides: str) -> Callable:
    """vmap rule for an op whose outputs are all per query. `sides` says of each argument: q per
    query (the new dimension is folded into the batch), a per atom (one call per element), - not a
    tensor.
    """

    def rule(info, in_dims, *args):
        op = getattr(getattr(torch.ops, NAMESPACE), op_name).default
        args = [
            a if dim is None else a.movedim(dim, 0) for a, dim in zip(args, in_dims, strict=True)
        ]
        batched = [dim is not None for dim in in_dims]
        if any(b and side == "a" for b, side in zip(batched, sides, strict=True)):
            outs = [
                op(*[a[i] if b else a for a, b in zip(args, batched, strict=True)])
                for i in range(info.batch_size)
            ]
            if isinstance(outs[0], _Tensor):
                return torch.stack(outs), 0
            return tuple(torch.stack(o) for o in zip(*outs, strict=True)), (0,) * len(outs[0])
        out = op(
            *[
                fold(a, b, info.batch_size) if side == "q" else a
                for a, b, side in zip(args, batched, sides, strict=True)
            ]
        )
        unfold = lambda o: (
            o.unflatten(0, (info.batch_size, -1))
            if o.numel()
            else o.reshape(info.batch_size, o.shape[0] // info.batch_size, *o.shape[1:])
        )
        if isinstance(out, _Tensor):
            return unfold(out), 0
        return tuple(map(unfold, out)), (0,) * len(out)

    return rule


def fold(tensor, batched: bool, size: int):
    """[size, B, ...] (or [B, ...], repeated) -> [size * B, ...]."""
    if tensor is None:
        return None
    return (tensor if batched else tensor.expand(size, *tensor.shape)).flatten(0, 1)
