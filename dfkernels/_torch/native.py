"""Finds and loads the compiled part, dfkernels._C, and remembers why not. Nothing here raises at
import.

Importing _C registers the CPU kernels with torch's dispatcher; torch comes first because _C takes
its libtorch_cpu. DFKERNELS_NATIVE=0 leaves the compiled part out.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch  # noqa: F401


def _load() -> tuple[ModuleType | None, str]:
    """(module, "") or (None, why not)."""
    if os.environ.get("DFKERNELS_NATIVE") == "0":
        return None, "DFKERNELS_NATIVE=0"
    try:
        return importlib.import_module("dfkernels._C"), ""
    except ModuleNotFoundError:
        note = Path(__file__).parent.with_name("_no_native.txt")  # left by setup.py
        if note.is_file():
            why = note.read_text(encoding="utf-8", errors="replace")
            return None, f"not built at installation: {why.strip()}"
        return (
            None,
            "dfkernels._C is not there for this Python: install the package (pip install .)",
        )
    except ImportError as error:  # an undefined symbol, a foreign binary
        return None, f"dfkernels._C does not load: {error}"


module, reason = _load()
available: bool = module is not None


class Refusal(NamedTuple):
    """What a compiled kernel refused: kind is "value" or "memory"; arguments are those at fault."""

    kind: str
    arguments: str
    message: str


def take_refusal() -> Refusal | None:
    """What a compiled kernel last refused on this thread, which is then forgotten."""
    last = None if module is None else module.take_refusal()
    return None if last is None else Refusal(*last)


def isa() -> tuple[str, str]:
    """(instruction set in use, "") or ("", why none is: DFKERNELS_ISA names one that this CPU
    lacks)."""
    if module is None:
        return "", reason
    try:
        return module.isa(), ""
    except RuntimeError as error:
        return "", str(error)


def info() -> dict[str, object]:
    """The compiled part's compiler, flags, isa_levels, isa, built_with_torch, target_torch; {}
    without."""
    if module is None:
        return {}
    name, why = isa()
    return {**module.build_info(), "isa": name or f"none: {why}"}
