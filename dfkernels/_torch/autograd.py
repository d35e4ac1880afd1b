"""What stands at the dispatcher's Autograd key: how the ops of the package are differentiated.

PyTorch reaches that key once per level of its transforms, in eager mode as when AOTAutograd traces.
A single-level autograd function there makes backward, forward AD, torch.func in any nesting and
torch.compile of all of them right by one mechanism, for callers of ``torch.ops.dfkernels`` as well.
``torch.library.register_autograd`` would not do: torch.func.grad then raises, and torch.func.jvp
silently returns zeros.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backend, private
from .errors import from_kernel


class SlowDerivativeWarning(UserWarning):
    """A derivative is summed tile by tile in PyTorch, which costs many passes over the atoms."""


class Derivatives(NamedTuple):
    """The ways to differentiate one op; `library.define` explains each."""

    differentiable: Callable | None = None
    fused_vjp: Callable | None = None
    vjp: Callable | None = None
    jvp: Callable | None = None
    discrete: bool = False


_warned: set[str] = set()


def slow_derivative(op: str, why: str) -> None:
    """Warns, once per op, that a derivative is about to take the slow way.

    Args:
        op: The op whose derivative it is.
        why: Why no kernel does it, "only ... have kernels".
    """
    if op not in _warned:
        _warned.add(op)
        warnings.warn(
            f"{op}: this derivative is summed tile by tile in PyTorch, which costs 20 to 200 "
            f"passes over the atoms: {why}.",
            SlowDerivativeWarning,
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """The stacklevel, for the function that calls this one, of the caller of the package: the
    innermost frame outside of it and of torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_globals.get("__name__", "").partition(".")[0] in ("dfkernels", "torch"):
        if frame.f_back is None:  # in a thread of the autograd engine there is nobody else
            return 1
        frame, level = frame.f_back, level + 1
    return level


def _runner(op) -> Callable:
    """The op below autograd, as a function of the keyset and the arguments.

    What a kernel says of a value becomes an error of the library. The first call that a compiled
    kernel computes is logged.
    """
    logged = False

    def run(keyset, args):
        nonlocal logged
        try:
            with private.below_autograd():
                out = op.redispatch(keyset & private.after_autograd, *args)
        except RuntimeError as error:
            known = from_kernel(error)
            if known is None:
                raise
            raise known from error
        if not logged:
            logged = backend.ran(op, args)
        return out

    return run


def kernel(name: str, op, rules: Derivatives) -> Callable:
    """The implementation of an op at the Autograd key."""
    run = _runner(op)
    function: Any = _function(name, run, rules)

    def at_autograd(keyset, *args):
        flat = args if rules.vjp is None else flatten(args)
        tracked = torch.is_grad_enabled() and private.any_requires_grad(*flat)
        dual = private.may_carry_tangents() and any(map(_has_tangent, flat))
        if rules.discrete or not (tracked or dual):
            return run(keyset, args)
        if dual and rules.differentiable is not None:
            return rules.differentiable(*args)
        lengths = [len(a) if isinstance(a, (list, tuple)) else None for a in args]
        with private.enable_single_level_autograd_function():
            out = function.apply(keyset, lengths, *flat)
        return out if rules.vjp is None else list(out)

    return at_autograd


def _has_tangent(a) -> bool:
    return isinstance(a, Tensor) and forward_ad.unpack_dual(a, level=0).tangent is not None


def _function(name: str, run: Callable, rules: Derivatives) -> type:
    """The single-level autograd function. `apply` takes the keyset, the lengths of the arguments
    that are lists (None for the others), and all arguments in a row."""

    def forward(keyset, lengths, *flat):
        # apply has switched both modes off, and the levels below this one inherit what is set here
        with torch.enable_grad(), private.forward_derivatives(True):
            out = run(keyset, nest(flat, lengths))
        return tuple(out) if isinstance(out, list) else out

    def setup_context(ctx, inputs, output):
        _, ctx.lengths, *flat = inputs
        ctx.constants = [None if isinstance(a, Tensor) else (a,) for a in flat]
        tensors = [a for a in flat if isinstance(a, Tensor)]
        uses_outputs = rules.fused_vjp is not None or rules.vjp is not None
        ctx.save_for_backward(*tensors, *(as_tuple(output) if uses_outputs else ()))
        if rules.jvp is not None:
            ctx.save_for_forward(*tensors, *output)
        ctx.set_materialize_grads(False)

    def backward(ctx, *cotangents):
        flat, outputs = _restore(ctx)
        needs = ctx.needs_input_grad[2:]
        grads = None
        if all(g is None for g in cotangents):
            grads = (None,) * len(flat)
        elif rules.vjp is not None:
            args, nested = nest(flat, ctx.lengths), nest(needs, ctx.lengths)
            grads = flatten(rules.vjp(args, nested, outputs, cotangents), ctx.lengths)
        elif rules.fused_vjp is not None:
            grads = rules.fused_vjp(needs, flat, outputs, cotangents)
        if grads is None:
            assert rules.differentiable is not None
            grads = _vjp(rules.differentiable, flat, needs, cotangents)
        return None, None, *grads

    def forward_derivative(ctx, *tangents):
        flat, outputs = _restore(ctx)
        flat = [
            forward_ad.unpack_dual(a, level=0).primal if isinstance(a, Tensor) else a for a in flat
        ]
        assert rules.jvp is not None
        with torch.enable_grad(), private.forward_derivatives(True):  # as in forward
            args = nest(flat, ctx.lengths)
            return tuple(rules.jvp(args, outputs, nest(tangents[2:], ctx.lengths)))

    members: dict[str, Any] = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
    }
    if rules.jvp is not None:
        members["jvp"] = staticmethod(forward_derivative)
    return type(name, (private.SingleLevelFunction,), members)


def _restore(ctx) -> tuple[list, tuple]:
    """(all arguments in a row, the outputs where they were saved)."""
    saved = iter(private.unwrap_dead_wrappers(ctx.saved_tensors))  # in a list nobody else would
    flat = [next(saved) if c is None else c[0] for c in ctx.constants]
    return flat, tuple(saved)


def _vjp(differentiable, args, needs, cotangents) -> tuple:
    """Gradients by torch.func.vjp of the differentiable form."""
    wanted = [i for i, need in enumerate(needs) if need]

    def outputs(*tensors):
        full = list(args)
        for i, t in zip(wanted, tensors, strict=True):
            full[i] = t
        out = as_tuple(differentiable(*full))
        return tuple(o for o, g in zip(out, cotangents, strict=True) if g is not None)

    with private.without_saved_tensors_hooks():
        pull = torch.func.vjp(outputs, *[args[i] for i in wanted])[1]
        grads = dict(zip(wanted, pull(tuple(g for g in cotangents if g is not None)), strict=True))
    return tuple(grads.get(i) for i in range(len(args)))


def as_tuple(out) -> tuple:
    """The outputs of an op that may have one."""
    return tuple(out) if isinstance(out, (list, tuple)) else (out,)


def flatten(args, lengths: Sequence[int | None] | None = None) -> list:
    """All arguments in a row. With lengths, None may stand for a list of as many Nones."""
    flat = []
    for i, a in enumerate(args):
        if isinstance(a, (list, tuple)):
            flat.extend(a)
        else:
            flat.extend([a] * (1 if lengths is None else _or_one(lengths[i])))
    return flat


def _or_one(length: int | None) -> int:
    return 1 if length is None else length


def nest(flat, lengths: Sequence[int | None]) -> list:
    """The arguments, with lists of these lengths, from all of them in a row."""
    items = iter(flat)
    return [next(items) if n is None else [next(items) for _ in range(n)] for n in lengths]
