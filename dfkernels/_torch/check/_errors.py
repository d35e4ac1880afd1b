"""The errors of the checks, in one style."""

from __future__ import annotations

from collections.abc import Sequence

from .. import words


def mismatch(name: str, expected: str, got: object) -> ValueError:
    """The error for an argument of the right type whose shape, device or value is wrong."""
    return ValueError(f"{name}: expected {expected}, got {got}")


def wrong_type(name: str, expected: str, got: object) -> TypeError:
    """The error for an argument of the wrong type or dtype."""
    return TypeError(f"{name}: expected {expected}, got {got}")


def instance(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Refuses what is not of this type; `expected` says it in words."""
    if not isinstance(value, kind):
        raise wrong_type(name, expected, type(value).__name__)


def function(name: str, value: object, expected: str) -> None:
    """Refuses what cannot be called; `expected` says how it would be, such as "a callable
    network(x, t)"."""
    if not callable(value):
        raise wrong_type(name, expected, type(value).__name__)


def unused(name: str, value: object, where: str) -> None:
    """Refuses an argument that another one leaves without effect: `where` names that one, and says
    what to do, such as "with method='dopri5', which chooses its steps itself"."""
    if value is not None:
        came = value if isinstance(value, (int, float, str)) else f"a {type(value).__name__}"
        raise mismatch(name, f"None {where}", came)


def other_event(name: str, given: Sequence[int], event: Sequence[int], to_match: str) -> ValueError:
    """The error for queries that are not [B, *E]: a single one, [*E], lacks its batch alone."""
    way_out = ": [None] makes a batch of one" if [*given] == [*event] else ""
    return mismatch(
        name, f"shape {words.shape(['B', *event])} {to_match}", f"{words.shape(given)}{way_out}"
    )
