"""Reports and their parts as JSON, which holds every number exactly."""

from __future__ import annotations

import json
import types
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from ..._torch import words

__all__ = ["dumps", "loads", "plain", "typed"]

FORMAT = "dfkernels audit 1"


def dumps(report: object) -> str:
    """The text of a report."""
    return json.dumps({"format": FORMAT, "report": plain(report)})


def loads(kind: type, text: str) -> Any:
    """The report of type `kind` in a text.

    Raises:
        ValueError: The text is none.
    """
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError(f"its format is {found['format']!r}, not {FORMAT!r}")
        return typed(kind, found["report"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"text: expected the report of an audit as JSON: {error}") from None


def plain(value: object) -> Any:
    """A value in what JSON has: tensors and named fields become dicts."""
    if isinstance(value, Tensor):
        values = value.flatten().tolist()
        return {"dtype": words.dtype(value), "shape": list(value.shape), "values": values}
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        names = getattr(value, "_fields", None)
        entries = [plain(entry) for entry in value]
        return entries if names is None else dict(zip(names, entries, strict=True))
    return value


def typed(kind: Any, value: Any) -> Any:
    """What `plain` was given, from the annotated type of it."""
    if get_origin(kind) is types.UnionType:
        (some,) = (one for one in get_args(kind) if one is not types.NoneType)
        return None if value is None else typed(some, value)
    if kind is Tensor:
        dtype = getattr(torch, value["dtype"])
        return torch.tensor(value["values"], dtype=dtype, device="cpu").view(value["shape"])
    if get_origin(kind) is tuple:
        entries = get_args(kind)
        if entries[-1] is ...:
            entries = entries[:1] * len(value)
        return tuple(typed(*pair) for pair in zip(entries, value, strict=True))
    if is_dataclass(kind) or hasattr(kind, "_fields"):
        hints = get_type_hints(kind)
        return kind(**{name: typed(hints[name], entry) for name, entry in value.items()})
    return kind(value)
