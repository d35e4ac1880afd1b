"""Sphinx configuration. `make docs` builds the site into build/docs; no page needs a network."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import dfkernels  # noqa: E402  after the path that finds it

project = "dfkernels"
copyright = "the dfkernels authors, Apache-2.0"
version = release = dfkernels.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "plain_docstrings",
    "repository_pages",
]

# Pages are Markdown as GitHub shows it: ```math fences, $ for inline formulas, anchors of headings.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a page may begin below the top level, as an included one does

autodoc_default_options = {"members": True, "undoc-members": True}
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # or an attribute with an annotation would have two entries
napoleon_use_param = False  # types stand in the signature

# A reference to a name that nothing documents is an error, except other libraries' names: their
# inventories would take a network.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|pathlib|collections|typing|argparse|abc)\..*"),
    (r"py:class", r"Tensor|np\..*|dfkernels\.(\w+\.)*_.*"),  # private modules
]

html_theme = "furo"
html_title = "dfkernels"
# MathJax stands in the site itself: a single file, which draws formulas without any font.
MATHJAX = Path(importlib.util.find_spec("mathjax").origin).parent / "static" / "mathjax"
mathjax_path = "tex-svg.js"
html_static_path = ["_static", str(MATHJAX / "es5" / "tex-svg.js")]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
exclude_patterns = ["requirements.txt"]
copybutton_exclude = ".linenos, .gp, .go"


def setup(app):
    def without_links_back(app, page, template, context, doctree):
        """Pages of source lose their links to the API, which name objects as their modules do."""
        if page.startswith("_modules/"):
            context["body"] = re.sub(r'<a class="viewcode-back".*?</a>', "", context["body"])

    app.connect("html-page-context", without_links_back)
