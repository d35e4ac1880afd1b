"""Declares an op once: schema, implementations, derivatives, vmap. The only file that uses
torch.library.

What happens to one call of ``torch.ops.dfkernels.posterior``:

1. The dispatcher looks at the tensors and at the transforms around the call, outermost first.
2. Under vmap, the rule of `batching` turns the call into calls on plain tensors.
3. At the Autograd key, once per level of torch.func, `autograd.kernel` looks whether anybody
   differentiates. If not, the call goes on below. Else the op becomes its differentiable form: one
   call of `sums_about_mean`, which remembers how to differentiate, and ops of PyTorch.
4. While shapes are traced (torch.compile, torch.export, meta tensors), `fake` answers.
5. Otherwise the device's implementation runs: on the CPU the compiled kernel, which registered
   itself when dfkernels._C was loaded; on CUDA Triton's, if it can run; else `fallback`.
6. If the kernel could not use a value, `autograd` makes an error of the library's own of what
   it says; the public function then finds out which value it was (diagnosis.call).

The private names of torch that this needs are in private.py.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from . import autograd, backend, batching, private
from .errors import UnusableValue
from .private import tracked

__all__ = [
    "NAMESPACE",
    "can_run",
    "declare_kernel",
    "define",
    "in_triton",
    "overload",
    "tracked",
    "unknown_size",
]

NAMESPACE = "dfkernels"
_library = torch.library.Library(NAMESPACE, "DEF")


def define(
    name: str,
    schema: str,
    *,
    fallback: Callable,
    fake: Callable,
    shared: Collection[str] = (),
    batch: Callable | None = None,
    cuda: Callable | None = None,
    differentiable: Callable | None = None,
    vjp: Callable | None = None,
    jvp: Callable | None = None,
    discrete: bool = False,
):
    """Declares ``dfkernels::name``; compiled kernels only add an implementation for the CPU.

    Args:
        name: Name of the op.
        schema: Its arguments and results, "(Tensor x, ...) -> Tensor".
        fallback: (*args), the implementation in PyTorch, for every device without a kernel.
        fake: (*args), empty outputs of the right shape.
        shared: Names of the tensors that all queries of a call share, such as the atoms, for the
            rule of vmap.
        batch: (info, in_dims, *args), a rule of vmap in place of the usual one.
        cuda: (*args), the implementation by Triton, which it imports.
        differentiable: (*args), the same function made of differentiable ops, which takes the place
            of the op where somebody differentiates. It must not call torch.func itself: it runs
            below functorch's key.
        vjp, jvp: (args, needs, outputs, cotangents) and (args, outputs, tangents), in place of a
            differentiable form, for an op that takes and returns lists of tensors. needs, tangents
            and the gradients are nested like args; None may stand for a list of Nones.
        discrete: Whether the results are whole numbers, which have no derivative: arguments that
            are differentiated are then read as they are.

    Returns:
        The op's overload.
    """
    _library.define(name + schema)
    op = overload(name)
    in_pytorch = _dense(op, _fallback(name, op, fallback, checked=vjp is None))
    _library.impl(name, in_pytorch, "CompositeExplicitAutograd")
    if cuda is not None:
        _library.impl(name, _on_cuda(op, cuda, in_pytorch), "CUDA")
    batch = batching.folded(op, shared) if batch is None else batch
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, _dense(op, fake), lib=_library)
    torch.library.register_vmap(qualified, batch, lib=_library)
    rules = autograd.Derivatives(differentiable, vjp, jvp, discrete)
    _library.impl(name, autograd.kernel(name, op, rules), "Autograd", with_keyset=True)
    if vjp is not None:
        _library.impl(name, batching.legacy(batch), "Batched")
    return op


def declare_kernel(name: str, schema: str, *, cuda: Callable | None = None):
    """Declares ``dfkernels::name``, which only kernels implement and nobody differentiates.

    It is called below autograd, from the implementation of an op that `define` has declared.

    Args:
        name: Name of the kernel.
        schema: Its arguments and results.
        cuda: (*args), the implementation by Triton, which it imports. A compiled kernel adds the
            one for the CPU.

    Returns:
        The kernel's overload.
    """
    _library.define(name + schema)
    if cuda is not None:
        _library.impl(name, cuda, "CUDA")
    return overload(name)


def can_run(kernel, device: torch.device) -> bool:
    """Whether a kernel that `declare_kernel` has declared can run on this device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    if key is None or not private.has_kernel(kernel, key):
        return False
    return device.type == "cpu" or backend.triton(device).can_run


def overload(name: str):
    """The overload of one of the package's ops."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def in_triton(package: str, **options) -> Callable:
    """The function `launch` of an op's triton.py, which is imported by the first call."""

    def implementation(*args):
        return importlib.import_module(f"{package}.triton").launch(*args, **options)

    return implementation


def unknown_size() -> torch.SymInt:
    """For a fake: a size that only the data decide."""
    return torch.library.get_ctx().new_dynamic_size()


def _on_cuda(op, cuda: Callable, in_pytorch: Callable) -> Callable:
    """Triton's implementation where it can run, else the fallback."""

    def implementation(*args):
        if not backend.triton(args[0].device).can_run:
            return in_pytorch(*args)
        backend.chosen(op, args[0].device, "triton")
        with private.without_autocast():
            return cuda(*args)

    return implementation


def _fallback(name: str, op, fallback: Callable, checked: bool) -> Callable:
    """The fallback in the dtypes that it is given, whatever autocast says.

    Checked, it raises on the CPU for values that it cannot use, as a compiled kernel does. On CUDA
    it looks at none, which would synchronise.
    """
    names = [a.name for a in op._schema.arguments]

    def implementation(*args):
        if checked:
            backend.fell_back(op, args[0].device)
        with private.without_autocast():
            if not checked or args[0].device.type != "cpu":
                return fallback(*args)
            given = dict(zip(names, args, strict=False))
            alpha, sigma = given["alpha"], given["sigma"]
            if not bool((torch.isfinite(alpha) & torch.isfinite(sigma) & (sigma > 0)).all()):
                raise UnusableValue("alpha, sigma: expected finite values, sigma > 0")
            if "y" in given:
                _expect_finite_atoms(given["y"], given["log_prior"])
            if "variance" in given:
                _expect_variances(given["variance"], given["log_prior"])
            out = fallback(*args)
        if not all(bool(torch.isfinite(o).all()) for o in autograd.as_tuple(out)):
            raise UnusableValue("result: expected finite numbers, got nan, inf or an overflow")
        return out

    return implementation


def _expect_finite_atoms(y: Tensor, log_prior: Tensor | None) -> None:
    """Raises for an atom that is not finite, unless it is masked; it would seem to be an outlier
    without weight."""
    if not y.dtype.is_floating_point:
        return
    if y.dim() == 3:  # clouds
        for g, cloud in enumerate(y):
            prior = log_prior
            if log_prior is not None and log_prior.dim() == 2:
                prior = log_prior[g]
            _expect_finite_atoms(cloud, prior)
        return
    if log_prior is not None and log_prior.dim() == 2:
        log_prior = log_prior.amax(0)  # masked is what is so in every cloud
    for start in range(0, len(y), 4096):
        rows = slice(start, start + 4096)
        finite = torch.isfinite(y[rows]).all(1)
        if log_prior is not None:
            finite |= log_prior[rows] == -torch.inf
        if not bool(finite.all()):
            raise UnusableValue("y: expected finite values, got nan or inf")


def _expect_variances(variance: Tensor, log_prior: Tensor | None) -> None:
    """Raises for a variance below 0 or not finite, unless its component is masked."""
    usable = ((variance >= 0) & torch.isfinite(variance)).all(1)
    if log_prior is not None:
        usable = usable | (log_prior == -torch.inf)
    if not bool(usable.all()):
        raise UnusableValue("variance: expected finite values >= 0")


def _dense(op, implementation: Callable) -> Callable:
    """The implementation, for dense tensors on one device.

    The dispatcher takes a fake or a fallback as soon as one tensor asks for it. Without this check,
    results could be memory that nobody wrote.
    """

    def checked(*args):
        first = None
        for argument, a in zip(op._schema.arguments, args, strict=False):
            for t in a if isinstance(a, (list, tuple)) else [a]:
                if not isinstance(t, Tensor):
                    continue
                if t.layout != torch.strided or t.is_quantized:
                    raise TypeError(
                        f"{argument.name}: expected a dense tensor, got {t.layout}, {t.dtype}"
                    )
                first = t if first is None else first
                if t.device != first.device:
                    raise ValueError(
                        f"{argument.name}: expected device {first.device} like the others, "
                        f"got {t.device}"
                    )
        return implementation(*args)

    return checked
