"""Rows of results in a JSON file that is written as they come, so that a run which was killed goes
on."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from .._io import files

__all__ = ["Rows"]

Row = TypeVar("Row", bound=tuple)


class Rows(Generic[Row]):
    """Rows by their key, and the file {"configuration": {...}, "rows": [{...}, ...]} of them, where
    there is one.

    Args:
        kind: the NamedTuple that a row is, of floats and integers; a NaN is null in the file.
        key: the fields that tell rows apart.
        configuration: what decides the rows beside their key.
        path: the file; None keeps the rows in memory alone.

    Raises:
        FileError: There is a file already that is no regular one, or holds something else, or rows
            of another configuration.
    """

    def __init__(
        self,
        kind: type[Row],
        key: tuple[str, ...],
        configuration: Mapping[str, object],
        path: Path | None,
    ) -> None:
        self.kind: Any = kind
        self.key, self.path = key, path
        self.configuration = json.loads(json.dumps(configuration))  # what the file can hold
        self.held: dict[tuple, Row] = {}
        if path is None:
            return
        files.prepare(path)
        if path.is_file():
            self._keep(self._read(path))
        elif path.exists():
            raise files.FileError(f"{path}: expected a regular file, which is written piecemeal")

    def __contains__(self, key: tuple) -> bool:
        return key in self.held

    def __getitem__(self, key: tuple) -> Row:
        return self.held[key]

    def add(self, rows: Iterable[Row]) -> None:
        """Takes rows, and writes the file, whole or not at all."""
        self._keep(rows)
        if self.path is None:
            return
        known = lambda value: None if isinstance(value, float) and math.isnan(value) else value
        lines = [
            json.dumps(dict(zip(self.kind._fields, map(known, row), strict=True)))
            for row in self.held.values()
        ]
        said = json.dumps(self.configuration, indent=2).replace("\n", "\n  ")
        text = f'{{\n  "configuration": {said},\n  "rows": [\n    '
        text += ",\n    ".join(lines) + "\n  ]\n}\n"
        files.write(self.path, lambda file: file.write(text.encode()))

    def _keep(self, rows: Iterable[Row]) -> None:
        for row in rows:
            self.held[tuple(getattr(row, name) for name in self.key)] = row

    def _read(self, path: Path) -> list[Row]:
        types = get_type_hints(self.kind)
        try:
            state = json.loads(path.read_bytes())
            saved = dict(state["configuration"])
            rows = [self._row(row, types) for row in state["rows"]]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            why = files.first_sentence(error)
            raise files.FileError(
                f"{path}: no results to go on from, or truncated ones ({why}): delete it, or name "
                "another file"
            ) from None
        files.refuse_another(path, "results", saved, self.configuration)
        return rows

    def _row(self, row: dict[str, Any], types: dict[str, type]) -> Row:
        missing = lambda name: math.nan if row[name] is None else row[name]
        return self.kind(*(types[name](missing(name)) for name in self.kind._fields))
