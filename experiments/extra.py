"""What the experiments need beyond the package's own requirements."""

from __future__ import annotations

from dfkernels._page import extra


def require() -> None:
    """Raises ModuleNotFoundError, naming what is missing of the extra `demo`."""
    extra.require("demo", ("sklearn", *extra.REPORT, "PIL"))
