"""The site, by Sphinx: ``make docs``."""

import re
from importlib.metadata import version as version_of

project = "iresnet_fast"
author = "The iresnet_fast developers"
copyright = "The iresnet_fast developers, MIT licence"
release = version_of("iresnet_fast")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["results/*/findings.md"]
nitpicky = True
# Types of other packages, and what napoleon reads as a type, have no page here.
nitpick_ignore_regex = [
    ("py:.*", r"^(?!iresnet_fast).*"),
    (
        "py:class",
        r"iresnet_fast\.(nn\.(fuse|weights)\._Module|reference\.conv_operator\.ConvGeometry|estimators\.products\.Evaluation)",
    ),
]

myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing_local"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"iresnet_fast {release}"
html_theme_options = {"top_of_page_buttons": []}
copybutton_exclude = ".linenos, .gp, .go"


def escape_shapes(app, what, name, obj, options, lines):
    """(B, *shape) is no emphasis."""
    lines[:] = [re.sub(r"(?<=[( ])\*(?=\w+[,)])", r"\\*", line) for line in lines]


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", escape_shapes)
