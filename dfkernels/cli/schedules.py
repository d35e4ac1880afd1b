"""A schedule from its text on the command line."""

from __future__ import annotations

import ast
import inspect

import torch

from .. import schedule
from .._io import arrays
from .._io.files import FileError
from . import inputs

NAMES = tuple(sorted(set(schedule.__all__) - {"Schedule"}))


def parse(text: str) -> schedule.Schedule:
    """The schedule of `VP` or `VP(beta_min=0.1, beta_max=20)`.

    Nothing is evaluated but numbers, True and False; a text stands for the array in a file, as in
    `Tabulated("alphas_cumprod.npy", discrete=True)`.

    Raises:
        FileError: It is none, or its arguments are wrong; the message says what there is.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):  # ValueError: a null byte
        tree = None
    call = tree if isinstance(tree, ast.Call) else None
    named = tree if call is None else call.func
    if not isinstance(named, ast.Name) or named.id not in NAMES:
        raise FileError(
            f"--schedule: expected a name, or a name with numbers such as VP(beta_max=20), of"
            f" {', '.join(NAMES)}, got {text!r}"
        )
    kind = getattr(schedule, named.id)
    try:
        given = [] if call is None else [_value(node) for node in call.args]
        keywords = {} if call is None else {_name(k): _value(k.value) for k in call.keywords}
        inspect.signature(kind).bind(*given, **keywords)
        return kind(*given, **keywords)
    except FileError:
        raise
    except (TypeError, ValueError) as error:
        raise FileError(
            f"--schedule {text}: expected {named.id}{_signature(kind)}: {error}"
        ) from None


def _value(node: ast.expr) -> float | bool | torch.Tensor:
    value = ast.literal_eval(node)  # ValueError for what is no literal
    if isinstance(value, str):
        return inputs.converted(value, arrays.load(value), torch.float64)
    if not isinstance(value, (int, float)):
        raise ValueError(f"got {ast.unparse(node)} where a number or a file was expected")
    return value


def _name(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise ValueError("got ** where a name was expected")
    return keyword.arg


def _signature(kind: type) -> str:
    """(beta_min=0.1, beta_max=20.0), without the types."""
    parameters = inspect.signature(kind).parameters.values()
    return f"({', '.join(str(p.replace(annotation=p.empty)) for p in parameters)})"
