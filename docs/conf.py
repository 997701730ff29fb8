"""Sphinx settings of the book. The reference pages are written anew at each build, see generate.py."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402

generate.write(HERE / "reference")

project = "Trainyard"
author = "the Trainyard developers"
extensions = ["myst_parser"]
myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
templates_path: list[str] = []
nitpicky = True

html_theme = "furo"
html_title = "Trainyard"
html_show_copyright = False
html_copy_source = False
