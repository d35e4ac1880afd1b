"""What the objects of this package share: tensors that they are made from and watch, results that
they compute once, copies of themselves, and independence of torch's global state.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def plain(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, autocast does not choose dtypes on `device`, and new tensors are no inference
    tensors, so that what is kept can be used anywhere later. The grad mode stays as it is.
    """
    autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(
        device.type
    )
    inference = torch.is_inference_mode_enabled()
    if not (autocast or inference):
        return contextlib.nullcontext()
    return _without(device.type if autocast else None, inference)


@contextlib.contextmanager
def _without(autocast: str | None, inference: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if autocast is not None:
            stack.enter_context(torch.autocast(autocast, enabled=False))
        if inference:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())  # which inference_mode(False) alone would leave
        yield


def unaffected(method: F) -> F:
    """Makes a method give the same result whatever torch's global state: it runs inside `plain`."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with plain(self.device):
            return method(self, *args, **kwargs)

    return wrapped  # pyrefly: ignore[bad-return]  # of the signature that wraps() has copied


def ordinary(t: Tensor) -> Tensor:
    """The tensor itself, or a copy of an inference tensor, which autograd could not save."""
    if not t.is_inference():
        return t
    with plain(t.device):
        return t.clone()


def _members(value: Any, name: str) -> list[tuple[str, Tensor]]:
    """The tensors of a watched value (a tensor, a NamedTuple of tensors, or None), with their
    names.
    """
    if isinstance(value, Tensor):
        return [(name, value)]
    return [] if value is None else [(f"{name}.{field}", t) for field, t in value._asdict().items()]


class Watched(Generic[T]):
    """An attribute for tensors that an object was made from or hands out itself: refused with a
    RuntimeError that names it if it has been changed in place since it was set.

    Holds a tensor, a NamedTuple of tensors or None. A change shows in the tensor's version counter,
    which all its views share; one made through NumPy or `.data` does not. Of an inference tensor,
    which has no counter, a copy is kept.
    """

    def __set_name__(self, owner: type[Object], name: str) -> None:
        self.name = name
        owner._watched = (*owner._watched, name)

    def __set__(self, obj: object, value: T) -> None:
        kept = ordinary(value) if isinstance(value, Tensor) else value
        members = [(t, t._version, name) for name, t in _members(kept, self.name.strip("_"))]
        vars(obj)[self.name] = kept, members

    @overload
    def __get__(self, obj: None, owner: type | None = None) -> Watched[T]: ...

    @overload
    def __get__(self, obj: object, owner: type | None = None) -> T: ...

    def __get__(self, obj: object | None, owner: type | None = None) -> Watched[T] | T:
        if obj is None:
            return self
        value, members = self._entry(obj)
        for t, version, name in members:
            if t._version != version:
                kind = type(obj).__name__
                raise RuntimeError(
                    f"{name}: changed in place since this {kind} was made; make another {kind}, "
                    f"from {name}.clone() where {name} goes on changing"
                )
        return value

    def peek(self, obj: object) -> T:
        """The value, changed or not: for its shape, dtype and device."""
        return self._entry(obj)[0]

    def _entry(self, obj: object) -> tuple[T, list[tuple[Tensor, int, str]]]:
        try:
            return vars(obj)[self.name]
        except KeyError:
            raise AttributeError(f"{type(obj).__name__} has no {self.name} yet") from None


class cached(Generic[T]):
    """A method without arguments that is read as an attribute and computed when first asked for, of
    an object with `parameters()` and `_unchanged()`.

    The result is the object's own: what leaves the object is a copy of it. A result that has no
    graph, since it was asked for under no_grad or before an input required a gradient, is computed
    again when one is needed.
    """

    def __init__(self, compute: Callable[[Any], T], graph: bool = True) -> None:
        self.compute, self.graph = compute, graph
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, obj: None, owner: type | None = None) -> cached[T]: ...

    @overload
    def __get__(self, obj: object, owner: type | None = None) -> T: ...

    def __get__(self, obj: Any, owner: type | None = None) -> cached[T] | T:
        if obj is None:
            return self
        obj._unchanged()
        needs_graph = (
            self.graph
            and torch.is_grad_enabled()
            and any(t.requires_grad for t in obj.parameters())
        )
        results = vars(obj).setdefault("_results", {})
        found = results.get((self.name, needs_graph))
        if found is None and not needs_graph and (self.name, True) in results:
            found = _detached(results[self.name, True])
        if found is None:
            with plain(obj.device):
                found = results[self.name, needs_graph] = self.compute(obj)
        return found


def cached_without_graph(compute: Callable[[Any], T]) -> cached[T]:
    """As `cached`, for a result that never has a graph."""
    return cached(compute, graph=False)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(*(t.detach() for t in value))


class Object:
    """Base of what has `Watched` tensors and `cached` results. Setting an attribute drops the
    results. Copies and pickles start without any; those of `copy.deepcopy` and pickle are cut from
    the graph that their tensors came from.
    """

    _watched: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: object) -> None:
        vars(self).pop("_results", None)
        super().__setattr__(name, value)

    def _unchanged(self) -> None:
        """Raises RuntimeError if a watched tensor has been changed in place."""
        for name in self._watched:
            getattr(self, name)

    def __getstate__(self) -> dict[str, object]:
        self._unchanged()
        names = [name for name in vars(self) if name != "_results"]
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, object]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)  # through Watched; some classes refuse setattr

    def __copy__(self) -> Object:
        other = type(self).__new__(type(self))
        other.__setstate__(self.__getstate__())
        return other

    def __deepcopy__(self, memo: dict) -> Object:
        other = memo[id(self)] = type(self).__new__(type(self))
        state = {name: _leaf(value) for name, value in self.__getstate__().items()}
        other.__setstate__(copy.deepcopy(state, memo))
        return other


def _leaf(value: object) -> object:
    """What deepcopy takes of a tensor inside a graph: its value, which requires a gradient as it
    does."""
    if isinstance(value, Tensor) and not value.is_leaf:
        return value.detach().requires_grad_(value.requires_grad)
    return value
