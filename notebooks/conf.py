"""The guides as a site. CONTRIBUTING.md has the command."""

import importlib.metadata
import os
import re
import sys

from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes

# The pages below each page, by caption. Their titles are their labels.
TREE = {
    "index": {
        "": """start loops/index loops/home files_and_serving errors
            reference/index measurements/index"""
    },
    "start": {
        "": "quickstart concepts peft",
        "Choose": "rules variants initialize",
        "Project": "versions migration changelog internals",
    },
    "measurements/index": {
        "Training": "measurements/rates measurements/ranks",
        "Cost": """costs measurements/cpu measurements/accelerators
            measurements/lengths measurements/meshes
            measurements/devices""",
        "Files and serving": "measurements/vllm",
        "PyTorch": "measurements/zoo",
        "Archive": """measurements/forms measurements/paper section7
            methods""",
    },
    "loops/index": {
        "Whole runs": "loops/whole loops/data loops/chat",
        "Hugging Face": """loops/torch loops/head
            loops/vision_language loops/image_lora""",
        "JAX": """loops/plain loops/linen loops/nnx loops/keras
            loops/tunix loops/maxtext""",
        "By task": """loops/rates loops/tokens loops/dpo loops/grpo
            loops/privacy loops/mixing adapters loops/other""",
        "Several devices": "loops/sharding loops/cluster pods",
    },
    "loops/home": {"": "quantized free loops/logits"},
    "files_and_serving": {
        "": "loops/checkpoints files untrusted serve loops/export"
    },
    "reference/index": {
        "": """reference/transform reference/training
            reference/initializers reference/quantized
            reference/files reference/tables reference/meshes
            reference/many reference/arithmetic reference/analysis
            reference/frameworks reference/methods genindex"""
    },
}

# So that cells in bash find the command line.
scripts = os.path.dirname(sys.executable)
os.environ["PATH"] = scripts + os.pathsep + os.environ["PATH"]

project = "jlora"
author = "The jlora authors"
copyright = author
release = version = importlib.metadata.version("jlora")
extensions = [
    "myst_nb",
    "notfound.extension",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_reredirects",
]
# Pages that moved, and where they are, from their folder.
redirects = {
    "measurements/damage": "../untrusted.html#how-this-is-tested",
    "loops/accumulation": "whole.html#multisteps",
    "loops/evaluation": "whole.html",
    "loops/equinox": "plain.html#equinox",
    "loops/federated": "mixing.html#average-adapters-of-many-clients",
    "loops/audio": "other.html",
    "loops/graphs": "other.html#graphs-a-simulation-of-heat",
    "loops/haiku": "plain.html#haiku",
    "loops/hosts": "sharding.html#several-hosts",
    "loops/orbax": "whole.html",
    "loops/precision": "home.html#mixed-precision",
    "loops/remat": "home.html",
    "loops/stacked": "mixing.html#train-on-top-of-an-adapter",
    "loops/stopping": "whole.html",
    "loops/vision": "other.html",
    "choose": "start.html",
    "project": "start.html",
    "reference/keras": "frameworks.html#keras-models",
    "reference/nnx": "frameworks.html#nnx-modules",
    "reference/sketches": "initializers.html#sketches-and-ranks",
    "reference/torch": "frameworks.html",
}
exclude_patterns = ["*.py", "pictures/*.py"]
default_role = "py:obj"  # what docstrings have in single backticks
highlight_language = "none"

autodoc_member_order = "bysource"
autodoc_mock_imports = ["keras"]
autodoc_preserve_defaults = True
napoleon_attr_annotations = False
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 68
python_use_unqualified_type_names = True

myst_heading_anchors = 4
nb_execution_mode = "cache"  # in build/.jupyter_cache
nb_execution_raise_on_error = True
nb_execution_timeout = 3600  # for a cell, on a busy machine
nb_merge_streams = True
nb_output_stderr = "remove"  # progress

html_theme = "pydata_sphinx_theme"
html_title = f"jlora {release}"
html_logo = html_favicon = "static/logo.svg"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = html_show_sourcelink = False
html_domain_indices = False
html_theme_options = {
    "collapse_navigation": True,
    "footer_start": ["copyright"],
    "footer_end": [],
    "header_links_before_dropdown": 7,
    "github_url": "https://github.com/jlora/jlora",
    "logo": {"text": f"jlora {release}"},
    "search_as_you_type": True,
    # Contents at the right, except where there is no room or no use.
    "secondary_sidebar_items": {
        "**": ["page-toc"],
        "index": [],
        "loops/index": [],
        "measurements/paper": [],
        "start": [],
        "genindex": [],
    },
}
notfound_urls_prefix = "/jlora/"  # of the links of 404.html
notfound_context = {
    "title": "Page not found",
    "body": """<h1>Page not found</h1>
        <p>It may have moved. <a href="/jlora/">Start again</a>, or
        search.</p>""",
}


def add_tree(app, name, source):
    """Adds the pages below this one: on GitHub they would be noise."""
    for caption, pages in TREE.get(name, {}).items():
        pages = "".join(f"\n/{page}" for page in pages.split())
        caption = caption and f"\n:caption: {caption}"
        tree = f"```{{toctree}}\n:hidden:{caption}\n{pages}\n```"
        source[0] += f"\n\n{tree}\n"


def make_rst(app, what, name, obj, options, lines):
    """Makes formulas and tables of a docstring directives."""

    def display(m):
        formula = m[2].replace("\n", f"\n{m[1]}   ")
        return f"\n{m[1]}.. math:: {formula}\n"

    def table(m):
        lines = m[0].strip().split("\n")
        rows = [line.strip("| ").split(" | ") for line in lines]
        del rows[1]
        cells = ["   * - " + "\n     - ".join(r) for r in rows]
        head = "\n.. list-table::\n   :header-rows: 1\n\n"
        return head + "\n".join(cells) + "\n"

    def span(m):
        if m[3]:
            return f":math:`{' '.join(m[3].split())}`"
        return f"{m[1][:-1]}\\ {m[2]}" if m[2] else m[0]

    text = "\n".join(lines)
    text = re.sub(r"^Returns:\n +", ":returns: ", text, flags=re.M)
    text = re.sub(
        r"^( *)\$\$(.+?)\$\$", display, text, flags=re.M | re.S
    )
    text = re.sub(r"(?:^\|.*\|\n?)+", table, text, flags=re.M)
    inline = r"(`+[^`]+`+(\w?)|^ *(?:>>>|\.\.\.).*$)|\$([^$]+)\$"
    lines[:] = re.sub(inline, span, text, flags=re.M).split("\n")


def skip_fields(app, what, name, obj, skip, options):
    """Leaves out the fields of named tuples: the docstring has them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def fold_members(app, tree, name):
    """Folds what a class has: readers come for the class."""
    for whole in tree.findall(addnodes.desc):
        content = whole[-1]
        members = [n for n in content if isinstance(n, addnodes.desc)]
        if members:
            names = [n[0]["fullname"].split(".")[-1] for n in members]
            head = f"<summary>Members: {', '.join(names)}</summary>"
            for member in members:
                content.remove(member)
            content += nodes.raw("", f"<details>{head}", format="html")
            content += members
            content += nodes.raw("", "</details>", format="html")


def draw(display):
    """Formulas as MathML, which browsers draw themselves."""

    def visit(self, node):
        math = convert(node.astext(), display=display)
        block = display == "block"
        shown = f'<div class="formula">{math}</div>' if block else math
        self.body.append(shown)
        raise nodes.SkipNode

    return visit, None


def setup(app):
    """Connects the functions above."""
    app.connect("source-read", add_tree)
    app.connect("autodoc-process-docstring", make_rst, priority=400)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("doctree-resolved", fold_members)
    app.add_html_math_renderer("mathml", draw("inline"), draw("block"))
