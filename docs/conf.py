"""How Sphinx builds the pages: `sphinx-build -W -c docs . build/docs`, which start at build/docs/docs/index.html.

Pages stay where they are in the project, so their links also work on GitHub.
"""

import ast
import dataclasses
import inspect
import sys
import textwrap
from pathlib import Path

from docutils import nodes
from flax import nnx
from latex2mathml.converter import convert
from sphinx.util.inspect import stringify_signature

from posenc_jax import __version__

sys.path.insert(0, str(Path(__file__).parents[1]))  # configs and experiments

project = "posenc_jax"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/**", "experiments/README.md", "experiments/results/**/report.md"]
default_role = "code"
add_module_names = False
python_maximum_signature_line_length = 160  # with the modules of its types, which are not shown
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False  # hooks that a class overrides are described where they are declared
autodoc_typehints_format = "short"
html_math_renderer = "mathml"
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_title = f"posenc_jax {__version__}"
html_show_copyright = False


def setup(app):
    app.add_html_math_renderer("mathml", (show_inline, None), (show_block, None))
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-process-docstring", show_fields)
    app.connect("autodoc-skip-member", is_field)


def show_inline(translator, node):
    translator.body.append(mathml(node, node.astext()))
    raise nodes.SkipNode


def show_block(translator, node):
    """Parts between wide spaces go on separate lines if the page is too narrow."""
    parts = (mathml(node, rf"\displaystyle {part}") for part in node.astext().split(r"\quad"))
    translator.body.append(f'<div class="math" style="text-align: center">{" &emsp; ".join(parts)}</div>')
    raise nodes.SkipNode


def mathml(node, tex):
    """An equation in the form that browsers show without scripts, so pages need no network."""
    markup = convert(tex)
    if "\\" in markup:  # latex2mathml passes on what it does not know
        raise ValueError(f"{node.source}: latex2mathml does not know a command of {tex!r}")
    return markup


def signature(app, what, name, obj, options, arguments, returns):
    """Of a module what its `__init__` takes, which flax hides; of classes whose fields are shown, none."""
    if what == "class" and has_fields(obj):
        return "", None
    if what == "class" and issubclass(obj, nnx.Module):
        taken = inspect.signature(obj.__init__)
        without_self = taken.replace(parameters=list(taken.parameters.values())[1:])
        return stringify_signature(without_self, unqualified_typehints=True), None
    return tuple(text and text.replace("jaxlib._jax.Array", "Array") for text in (arguments, returns))


def show_fields(app, what, name, obj, options, lines):
    """Shows the fields of a class as they are written, with their types, defaults and comments."""
    if what != "class" or not has_fields(obj):
        return
    source = textwrap.dedent(inspect.getsource(obj))
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    if fields:
        written = textwrap.dedent("\n".join(source.splitlines()[fields[0].lineno - 1 : fields[-1].end_lineno]))
        lines += ["", ".. code-block:: python", "", *textwrap.indent(written, "   ").splitlines(), ""]


def has_fields(cls) -> bool:
    return dataclasses.is_dataclass(cls) or hasattr(cls, "_fields")


def is_field(app, what, name, obj, skip, options):
    """Fields of named tuples are shown by `show_fields`."""
    return skip or (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
