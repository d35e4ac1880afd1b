"""What pages and figures share."""

from __future__ import annotations

import io
import re

import pytest

pytest.importorskip("matplotlib", reason="needs the extra: pip install dfkernels[report]")
pytest.importorskip("jinja2", reason="needs the extra: pip install dfkernels[report]")

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from dfkernels._page import extra, html, theme


def test_what_is_missing_of_an_extra_is_named(monkeypatch):
    extra.require("report", extra.REPORT)
    monkeypatch.setattr(extra, "find_spec", lambda name: object() if name == "jinja2" else None)
    message = '^matplotlib not installed: pip install "dfkernels\\[report\\]"$'
    with pytest.raises(ModuleNotFoundError, match=message):
        extra.require("report", extra.REPORT)


def drawn():
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([0, 1], [0, 1])
    return figure


def test_a_figure_has_the_theme_and_leaves_the_users_plots_alone():
    before = matplotlib.get_backend(), plt.get_fignums(), dict(matplotlib.rcParams)
    light, dark = (theme.png(drawn, each, 50) for each in (theme.LIGHT, theme.DARK))
    assert (matplotlib.get_backend(), plt.get_fignums(), dict(matplotlib.rcParams)) == before
    assert light[:8] == dark[:8] == b"\x89PNG\r\n\x1a\n" and light != dark
    assert html._width(light) == 100
    for png, each in ((light, theme.LIGHT), (dark, theme.DARK)):
        corner = plt.imread(io.BytesIO(png))[0, 0, :3]
        assert matplotlib.colors.to_hex(corner) == each.paper


def test_a_page_is_one_file_and_escapes_text(tmp_path):
    template = tmp_path / "page.html"
    template.write_text(
        '{% extends "base.html" %}{% import "macros.html" as parts %}\n'
        "{% block style %}.mine{color:red}{% endblock %}\n"
        "{% block main %}{{ parts.table(['a', 'b'], rows) }}\n"
        "{{ parts.figure(title, '`x` < y', png, png, 50) }}{% endblock %}\n"
    )
    png = theme.png(drawn, theme.LIGHT, 50)
    page = html.render(template, title="<script>", rows=[["<b>", "`c`"]], png=png)
    assert "<script>" not in page and "&lt;script&gt;" in page and "&lt;b&gt;" in page
    assert "<td><code>c</code></td>" in page and "<code>x</code> &lt; y" in page
    assert ".mine{color:red}" in page and "max-width:210px" in page
    sources = re.findall(r"(?:src|srcset|href)='([^']{5})", page)
    assert sources == ["data:", "data:"] and "http" not in page
