"""What the experiments need beyond the package's own requirements."""

from __future__ import annotations

from importlib.util import find_spec


def require() -> None:
    """Raises ModuleNotFoundError, naming what is missing of the extra `demo`."""
    missing = [
        name for name in ("sklearn", "matplotlib", "PIL", "jinja2") if find_spec(name) is None
    ]
    if missing:
        raise ModuleNotFoundError(
            f'{", ".join(missing)} not installed: pip install "dfkernels[demo]"'
        )
