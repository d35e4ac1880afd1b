"""The private names of torch that dfkernels needs, all of them: no other file of the package uses
one.

They may move with any release of torch. Where one is missing, importing this module, and so
dfkernels, fails with one ImportError that says what to do.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack

import torch

# the first and the last release of torch that dfkernels has been tried with
KNOWN = ("2.10", "2.14")

try:
    from torch._C import (
        DispatchKey,
        DispatchKeySet,
        _after_autograd_keyset,
        _any_requires_grad,
        _AutoDispatchBelowAutograd,
        _DisableAutocast,
        _DisableFuncTorch,
        _dispatch_has_kernel_for_dispatch_key,
        _dispatch_tls_local_exclude_set,
        _dispatch_tls_local_include_set,
        _ForceDispatchKeyGuard,
        _len_torch_dispatch_stack,
        _vmapmode_decrement_nesting,
        _vmapmode_increment_nesting,
    )
    from torch._C._functorch import (
        get_unwrapped,
        is_batchedtensor,
        is_functorch_wrapped_tensor,
        maybe_current_level,
    )
    from torch._functorch.utils import enable_single_level_autograd_function, unwrap_dead_wrappers
    from torch._guards import detect_fake_mode
    from torch.autograd import forward_ad
    from torch.autograd.forward_ad import _set_fwd_grad_enabled
    from torch.autograd.function import _SingleLevelFunction

    add_batch_dim, remove_batch_dim = torch._add_batch_dim, torch._remove_batch_dim
    forward_ad._current_level  # noqa: B018  read at every call, below
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"dfkernels needs torch {KNOWN[0]} to {KNOWN[1]}, with which it has been tried; this is "
        f"torch {torch.__version__}, where something it relies on is missing ({error}). "
        f"Install one of those, or a release of dfkernels that knows this torch."
    ) from error

after_autograd = _after_autograd_keyset
any_requires_grad = _any_requires_grad
below_autograd = _AutoDispatchBelowAutograd
without_autocast = _DisableAutocast
forward_derivatives = _set_fwd_grad_enabled
SingleLevelFunction = _SingleLevelFunction

__all__ = [
    "KNOWN",
    "SingleLevelFunction",
    "add_batch_dim",
    "after_autograd",
    "any_requires_grad",
    "below_autograd",
    "enable_single_level_autograd_function",
    "forward_derivatives",
    "fully_unwrapped",
    "has_kernel",
    "in_legacy_vmap",
    "is_differentiated",
    "is_dtensor",
    "is_fake",
    "is_virtual",
    "is_vmapped",
    "legacy_vmap_level",
    "may_carry_tangents",
    "remove_batch_dim",
    "tracked",
    "unwrap_dead_wrappers",
    "without_autocast",
]


def has_kernel(op, key: str) -> bool:
    """Whether somebody has registered a kernel of an op's overload for a dispatch key."""
    return _dispatch_has_kernel_for_dispatch_key(op._schema.name, key)


class tracked:
    """Lets ordinary autograd work inside a kernel, where the dispatcher has switched it off."""

    _keys = None

    def __enter__(self):
        if tracked._keys is None:
            tracked._keys = DispatchKeySet(DispatchKey.ADInplaceOrView)
            for device in ("CPU", "CUDA", "Other", "Meta"):
                tracked._keys = tracked._keys | DispatchKeySet(
                    getattr(DispatchKey, f"Autograd{device}")
                )
        self.contexts = ExitStack()
        # in inference mode nothing can require a gradient
        self.contexts.enter_context(torch.inference_mode(False))
        excluded = _dispatch_tls_local_exclude_set() - tracked._keys
        self.contexts.enter_context(
            _ForceDispatchKeyGuard(_dispatch_tls_local_include_set(), excluded)
        )
        self.contexts.enter_context(torch.enable_grad())

    def __exit__(self, *error):
        self.contexts.__exit__(*error)


def legacy_vmap_level() -> int:
    """The level of the vmap behind torch.autograd.grad(is_grads_batched=True), within it."""
    level = _vmapmode_increment_nesting() - 1
    _vmapmode_decrement_nesting()
    return level


def in_legacy_vmap() -> bool:
    """Whether this is within torch.autograd.grad(is_grads_batched=True), and no torch.func.vmap."""
    return legacy_vmap_level() > 0 and maybe_current_level() is None


def may_carry_tangents() -> bool:
    """False if no tensor can carry a tangent: no dual level, no torch.func transform, nothing
    traced."""
    return (
        forward_ad._current_level >= 0
        or maybe_current_level() is not None
        or _len_torch_dispatch_stack() > 0
    )


def is_fake(*tensors) -> bool:
    """Whether one of the tensors has a shape but no values, or all that is computed now has
    none."""
    return (
        any(t.device.type == "meta" for t in tensors) or detect_fake_mode(list(tensors)) is not None
    )


def is_virtual(t: torch.Tensor) -> bool:
    """Whether t is a stand-in for a tensor: fake, or wrapped by a transform of torch.func."""
    return is_functorch_wrapped_tensor(t) or is_fake(t)


def is_vmapped(t: torch.Tensor) -> bool:
    """Whether t stands for many tensors, at any level of the transforms around."""
    while is_functorch_wrapped_tensor(t):
        if is_batchedtensor(t):
            return True
        t = get_unwrapped(t)
    return False


def is_differentiated(t: torch.Tensor) -> bool:
    """Whether a derivative with respect to t is asked for, in reverse or in forward mode, at any
    level of the transforms around.
    """
    while True:
        if t.requires_grad and torch.is_grad_enabled():
            return True
        inside = is_batchedtensor(t)  # there unpack_dual has no rule
        if (
            not inside
            and may_carry_tangents()
            and forward_ad.unpack_dual(t, level=0).tangent is not None
        ):
            return True
        if not is_functorch_wrapped_tensor(t):
            return False
        t = get_unwrapped(t)


def is_tracked(t: torch.Tensor) -> bool:
    """Whether the innermost derivative of torch.func around, in either mode, follows t."""
    if not is_functorch_wrapped_tensor(t):
        return False
    if t.requires_grad:
        return True
    if is_vmapped(t) or not may_carry_tangents():  # of the former unpack_dual has no rule
        return False
    return forward_ad.unpack_dual(t, level=0).tangent is not None


def fully_unwrapped(t: torch.Tensor) -> torch.Tensor:
    """The plain tensor behind what vmap, grad and jvp hand on; vmap's dimensions are where they
    lie."""
    with _DisableFuncTorch():
        while is_functorch_wrapped_tensor(t):
            t = get_unwrapped(t)
    return t


def is_dtensor(t) -> bool:
    """Whether t is distributed; torch.distributed is not imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(t, module.DTensor)
