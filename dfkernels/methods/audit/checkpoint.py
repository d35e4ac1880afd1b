"""The parts of an audit, and the file that keeps those that are finished."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..._io import files
from .._reporting import Callback
from ..denoiser import Denoiser
from . import serial

__all__ = ["Parts"]


class Parts:
    """The parts of an audit, each computed once, with the calls of the network that it took.

    Args:
        path: the file of the finished ones, written whole or not at all; None keeps none.
        configuration: whatever decides the results: a file of another one is refused.
        denoiser: whose calls are counted.
        report: told of each part, out of `total`.

    Raises:
        FileError: The file is no checkpoint, damaged, of another configuration, or cannot be
            written.
    """

    def __init__(
        self,
        path: Path | None,
        configuration: Mapping[str, object],
        denoiser: Denoiser,
        report: Callback,
        total: int,
    ) -> None:
        self.path, self.denoiser, self.report, self.total = path, denoiser, report, total
        self.configuration = json.loads(json.dumps(configuration))
        self.finished: dict[str, Any] = {}
        self.done = 0
        if path is not None:
            files.prepare(path)
            if path.exists():
                self.finished = self._read(path)
        report(0, total)

    def get(self, name: str, kind: Any, make: Callable[[], object]) -> Any:
        """A part, of type `kind`: what is known of it, or else what `make` returns."""
        if name not in self.finished:
            before = self.denoiser.evaluations
            result = serial.plain(make())
            calls = self.denoiser.evaluations - before
            self.finished[name] = {"result": result, "evaluations": calls}
            self._write()
        self.done += 1
        self.report(self.done, self.total)
        try:
            return serial.typed(kind, self.finished[name]["result"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise files.FileError(
                f"{self.path}: checkpoint of another version, or a damaged one ({name}): delete it"
            ) from None

    @property
    def evaluations(self) -> int:
        """Calls of the network for all parts."""
        return sum(part["evaluations"] for part in self.finished.values())

    def _write(self) -> None:
        if self.path is None:
            return
        whole = {
            "format": serial.FORMAT,
            "configuration": self.configuration,
            "parts": self.finished,
        }
        files.write(self.path, lambda file: file.write(json.dumps(whole).encode()))

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_bytes())
            kind, saved, parts = found["format"], dict(found["configuration"]), found["parts"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = files.first_sentence(error)
            raise files.FileError(
                f"{path}: no checkpoint of an audit, or a damaged one ({why}): delete it"
            ) from None
        if kind != serial.FORMAT:
            raise files.FileError(f"{path}: expected {serial.FORMAT!r}, got {kind!r}: delete it")
        files.refuse_another(path, "checkpoint", saved, self.configuration)
        return parts
