"""What is imported only where it is used, and may be missing."""

from __future__ import annotations

from importlib.util import find_spec

REPORT = ("matplotlib", "jinja2")


def require(extra: str, modules: tuple[str, ...]) -> None:
    """Raises ModuleNotFoundError, naming what is missing of the extra; call it before long work."""
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'{", ".join(missing)} not installed: pip install "dfkernels[{extra}]"'
        )
