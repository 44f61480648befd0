"""How Sphinx builds these pages: `python docs/generate.py`, then `sphinx-build -W -n docs out`."""

from __future__ import annotations

import pytest_ranks

project = "pytest-ranks"
copyright = "the pytest-ranks developers"
author = "The pytest-ranks developers"
release = version = pytest_ranks.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
source_suffix = {".md": "markdown"}

html_theme = "furo"
html_title = f"pytest-ranks {release}"

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autoclass_content = "class"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Attributes as a list of fields: else each would be documented twice, here and as a member.
napoleon_use_ivar = True

# Docstrings are written with Markdown's single backticks, which mean code.
default_role = "code"

nitpicky = True
# Types of other projects, and those that a module imports for checking types alone: the pages are
# built without a network, so there is no inventory to link them to. Our own names stay checked.
nitpick_ignore_regex = [("py:class", r"(?!pytest_ranks\b).*")]


def fence_to_block(app, what, name, obj, options, lines):  # noqa: ARG001 - autodoc's signature
    """Turn Markdown's fenced code in a docstring, which editors show, into a block of Sphinx's."""
    kept, inside = [], False
    for line in lines:
        if line.strip().startswith("```"):
            inside = not inside
            kept += [line[: line.index("`")] + ".. code-block:: python", ""] if inside else [""]
        else:
            kept.append(f"    {line}" if inside else line)
    lines[:] = kept


def setup(app):
    """Hook into autodoc, before napoleon reads the docstring."""
    app.connect("autodoc-process-docstring", fence_to_block, priority=100)
