"""What stands at the dispatcher's Autograd key: how the ops of the package are differentiated.

PyTorch reaches that key once per level of its transforms, in eager mode as when AOTAutograd traces.
Where somebody differentiates there, an op becomes its differentiable form, which is made of ops
that know their derivatives: those of PyTorch, and those of the package with a rule of their own,
for which a single-level autograd function stands in. That makes backward, forward AD, torch.func in
any nesting and torch.compile of all of them right, for callers of ``torch.ops.dfkernels`` as well.
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
    function: Any = None
    if rules.vjp is not None and rules.jvp is not None:
        function = _function(name, run, rules.vjp, rules.jvp)

    def at_autograd(keyset, *args):
        flat = args if function is None else flatten(args)
        if rules.discrete or not _is_differentiated(flat):
            return run(keyset, args)
        if function is None:
            assert rules.differentiable is not None
            return rules.differentiable(*args)
        lengths = [len(a) if isinstance(a, (list, tuple)) else None for a in args]
        with private.enable_single_level_autograd_function():
            return list(function.apply(keyset, lengths, *flat))

    return at_autograd


def _is_differentiated(flat) -> bool:
    """Whether one of the arguments requires a gradient or carries a tangent at this level."""
    if torch.is_grad_enabled() and private.any_requires_grad(*flat):
        return True
    return private.may_carry_tangents() and any(map(_has_tangent, flat))


def with_tangents(like: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors; where `like` has a tangent, those that have none get one of zeros.

    Arithmetic between tensors with and without a tangent takes PyTorch a third of a millisecond an
    operation: it finds out by meta functions in Python what shape the missing zeros have.
    """
    if not (private.may_carry_tangents() and _has_tangent(like)) or private.is_fake(like):
        return list(tensors)
    return [
        t if _has_tangent(t) else forward_ad.make_dual(t.contiguous(), torch.zeros_like(t), level=0)
        for t in tensors  # contiguous: a tangent takes the strides, which may be 0
    ]


def _has_tangent(a) -> bool:
    return isinstance(a, Tensor) and forward_ad.unpack_dual(a, level=0).tangent is not None


def _function(name: str, run: Callable, vjp: Callable, jvp: Callable) -> type:
    """The single-level autograd function. `apply` takes the keyset, the lengths of the arguments
    that are lists (None for the others), and all arguments in a row."""

    def forward(keyset, lengths, *flat):
        # apply has switched both modes off, and the levels below this one inherit what is set here
        with torch.enable_grad(), private.forward_derivatives(True):
            return tuple(run(keyset, nest(flat, lengths)))

    def setup_context(ctx, inputs, output):
        _, ctx.lengths, *flat = inputs
        ctx.constants = [None if isinstance(a, Tensor) else (a,) for a in flat]
        tensors = [a for a in flat if isinstance(a, Tensor)]
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors, *output)
        ctx.set_materialize_grads(False)

    def backward(ctx, *cotangents):
        flat, outputs = _restore(ctx)
        if all(g is None for g in cotangents):
            return (None,) * (2 + len(flat))
        args, needs = nest(flat, ctx.lengths), nest(ctx.needs_input_grad[2:], ctx.lengths)
        return None, None, *flatten(vjp(args, needs, outputs, cotangents), ctx.lengths)

    def forward_derivative(ctx, *tangents):
        flat, outputs = _restore(ctx)
        flat = [
            forward_ad.unpack_dual(a, level=0).primal if isinstance(a, Tensor) else a for a in flat
        ]
        with torch.enable_grad(), private.forward_derivatives(True):  # as in forward
            args = nest(flat, ctx.lengths)
            return tuple(jvp(args, outputs, nest(tangents[2:], ctx.lengths)))

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(forward_derivative),
    }
    return type(name, (private.SingleLevelFunction,), members)


def _restore(ctx) -> tuple[list, tuple]:
    """(all arguments in a row, the outputs)."""
    saved = iter(private.unwrap_dead_wrappers(ctx.saved_tensors))  # in a list nobody else would
    flat = [next(saved) if c is None else c[0] for c in ctx.constants]
    return flat, tuple(saved)


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
