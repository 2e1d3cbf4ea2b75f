"""The site: `make docs`. Needs no network; with INTERSPHINX=1, types of others link to their own pages."""

from __future__ import annotations

import io
import os
import shutil
from contextlib import redirect_stdout, suppress
from importlib import metadata
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import interpolate.__main__
from applications.openvclip import __main__ as openvclip

os.environ |= {"COLUMNS": "88", "NO_COLOR": "1"}  # of the texts of --help
HERE = Path(__file__).parent
STUDY = HERE.parent / "benchmarks" / "results" / "study"

project = "interpolate"
author = "the interpolate authors"
release = metadata.version("interpolate-weights")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx"]
exclude_patterns = ["_build"]
default_role = "code"  # in docstrings, as in the pages

html_theme = "furo"
html_title = "interpolate"
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_timeout = 1800  # of a cell; a busy machine is slow
nb_execution_raise_on_error = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
if os.environ.get("INTERSPHINX") == "1":
    intersphinx_mapping = {
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "python": ("https://docs.python.org/3", None),
    }
nitpick_ignore_regex = [
    ("py:.*", r"(collections|contextlib|huggingface_hub|lightning|nn|os|pathlib|torch|transformers)\b.*"),
    ("py:.*", r"(.*\.)?(Evaluate|Path|Progress|Ratio|Recipe|Sampling|Source|T|VideoReadError|Weight)"),
]


class Help(SphinxDirective):
    """What a command says of itself with --help."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        program, *words = self.arguments[0].removeprefix("python -m ").split()
        main = {"interpolate": interpolate.__main__.main, "openvclip": openvclip.main}[program]
        printed = io.StringIO()
        with redirect_stdout(printed), suppress(SystemExit):
            main([*words, "--help"])
        text = "\n".join(line.rstrip() for line in printed.getvalue().splitlines())
        return [nodes.literal_block(text, text, language="text")]


def no_types(app: Sphinx, what: str, name: str, object: object, options: object, lines: list[str]) -> None:  # noqa: A002 - Sphinx's name
    """What stands before a colon in the first line of an attribute's docstring is no type, as napoleon takes it."""
    if what in ("attribute", "property"):
        lines.insert(0, "\\ ")


def copy_study(app: Sphinx) -> None:
    """The report of the study, where it has been run."""
    folder = HERE / "_build" / "study"
    shutil.rmtree(folder, ignore_errors=True)
    if STUDY.is_dir():
        shutil.copytree(STUDY, folder)
    else:
        folder.mkdir(parents=True)
        (folder / "report.md").write_text("Its results are not among the files of this version.\n")


def setup(app: Sphinx) -> None:
    app.add_directive("help", Help)
    app.connect("builder-inited", copy_study)
    app.connect("autodoc-process-docstring", no_types, priority=400)
