"""Self-contained pages, light and dark as the reader's system asks: one file, nothing outside is
referred to."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape


def render(template: Path, **values: object) -> str:
    """A page.

    Args:
        template: A file that extends ``base.html`` and may import ``macros.html``, both of this
            folder.
        values: What the template names; text is escaped. Templates have the filters ``code``, for
            text in which backticks mark code, and ``inlined`` and ``width`` for a PNG.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"code": _code, "inlined": _inlined, "width": _width}
    return environment.get_template(template.name).render(**values)


def _code(text: str) -> Markup:
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _inlined(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _width(png: bytes) -> int:
    return int.from_bytes(png[16:20], "big")  # the header's first field
