"""Sphinx: `make docs` builds the site into docs/_build/html, with warnings as errors and without a network.

Pages are the Markdown files of this folder, wherever they are named here or not (`pages`). What is made from elsewhere,
the API reference, the gallery and the files at the root of the repository, goes into docs/auto, which is made anew.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

# Examples and docstrings are run: the same on every machine.
os.environ.setdefault("MPLBACKEND", "Agg")

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
AUTO = DOCS / "auto"

import fastbn  # noqa: E402

project = "fastbn"
author = "fastbn developers"
copyright = author
version = release = fastbn.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "auto/examples", "auto/gallery/*.ipynb", "**/sg_execution_times.rst"]
smartquotes = False  # which makes dashes of the options of commands
toc_object_entries_show_parents = "hide"
default_role = "py:obj"  # what docstrings write in single backticks; what is not found is shown as code
templates_path = ["_templates"]

myst_enable_extensions = ["deflist", "attrs_inline"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"  # numpydoc has them in words
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_theme = "pydata_sphinx_theme"
html_title = f"fastbn {release}"
html_static_path = ["_static"]
html_css_files = ["fastbn.css"]
html_show_sourcelink = False
html_theme_options: dict[str, Any] = {
    "logo": {"text": "fastbn"},
    "navbar_end": ["theme-switcher"],
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "secondary_sidebar_items": {"**": ["page-toc"], "features": []},  # its table needs the room
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars: dict[str, list[str]] = {"index": [], "performance": []}

# Public modules beside fastbn itself, and what each needs.
MODULES = {
    "fastbn.sklearn": "scikit-learn",
    "fastbn.torch": "PyTorch",
    "fastbn.dask": "Dask",
    "fastbn.mpi": "mpi4py",
    "fastbn.synchronized": "NumPy",
    "fastbn.plot": "Matplotlib",
    "fastbn.compat": "NumPy",
    "fastbn.compat.keras": "NumPy",
    "fastbn.compat.tf_layers": "NumPy",
    "fastbn.compat.tf_contrib": "NumPy",
    "fastbn.compat.tf_nn": "NumPy",
}
GROUPS = {
    "Operations": [
        "batch_norm",
        "batch_norm_forward",
        "batch_norm_backward",
        "normalize",
        "denormalize",
        "update_moving",
        "fold",
    ],
    "The layer": ["BatchNorm"],
    "Statistics": ["moments", "Moments", "recompute_statistics"],
    "Threads and configuration": ["threads", "set_num_threads", "get_num_threads", "show_config"],
}


def public(module: Any) -> list[str]:
    """Return the names a module offers."""
    names = getattr(module, "__all__", None)
    if names is None:  # not what it imported itself
        mine = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
        names = sorted(name for name in mine if not name.startswith("_"))
    return [name for name in names if callable(getattr(module, name, None))]


def summary(module: str, names: list[str]) -> str:
    return "\n".join(
        ["```{eval-rst}", f".. currentmodule:: {module}", "", ".. autosummary::", "   :toctree: ../api/", ""]
        + [f"   {name}" for name in names]
        + ["```", ""]
    )


def reference_of_fastbn() -> str:
    """Return the page of what `import fastbn` offers."""
    parts = ["# fastbn", "", "`import fastbn` needs NumPy only, and offers:", ""]
    grouped = {name for names in GROUPS.values() for name in names}
    rest = [name for name in public(fastbn) if name not in grouped]
    warnings = [
        name for name in rest if isinstance(getattr(fastbn, name), type) and name.endswith(("Warning", "Error"))
    ]
    groups = GROUPS | {"More": [name for name in rest if name not in warnings], "Warnings and errors": warnings}
    for title, names in groups.items():
        there = [name for name in names if hasattr(fastbn, name)]
        if there:
            parts += [f"## {title}", "", summary("fastbn", there)]
    return "\n".join(parts)


def reference_of(name: str, needs: str) -> str:
    """Return the page of a module, which says so where the module cannot be imported."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return f"# {name}\n\nNeeds {needs}, and is not described here: it was not installed where this was made.\n"
    about = f"```{{eval-rst}}\n.. automodule:: {name}\n```\n"  # no more than its docstring
    return "\n".join([f"# {name}", "", about, summary(name, public(module))])


def write_reference() -> None:
    """Write the API reference: a page for fastbn, one for each other public module, and a table of them."""
    folder = AUTO / "reference"
    folder.mkdir()
    (folder / "fastbn.md").write_text(reference_of_fastbn())
    rows = ["| [`fastbn`](reference/fastbn.md) | Operations, the layer, statistics, threads | NumPy |"]
    names = ["fastbn"]
    for name, needs in MODULES.items():
        path = Path(fastbn.__file__).parent.joinpath(*name.split(".")[1:])
        source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if not source.exists():
            continue  # not in this version
        about = re.match(r'"""(.+?)[.\n]?(\n|""")', source.read_text())[1].replace("``", "`")
        rows.append(f"| [`{name}`](reference/{name}.md) | {about} | {needs} |")
        names.append(name)
        (folder / f"{name}.md").write_text(reference_of(name, needs))
    table = ["| module | | needs |", "|---|---|---|", *rows]
    tree = [
        "```{toctree}",
        ":hidden:",
        ":maxdepth: 2",
        "",
        *(f"{name} <reference/{name}>" for name in names),
        "```",
        "",
    ]
    about = "`import fastbn` loads the first of these modules and NumPy, nothing else."
    (AUTO / "api.md").write_text("\n".join(["# API reference", "", about, "", *table, "", *tree, ""]))


def from_root(text: str) -> str:
    """Return the text of a file at the root of the repository with its links as they are from docs/auto."""
    links = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
    links["docs"] = "../index.md"

    def relink(match: re.Match[str]) -> str:
        target = match[1]
        if target.startswith("docs/"):
            return f"](../{target[5:]})"
        if target in links:
            return f"]({links[target]})"
        return match[0] if ":" in target or target.startswith("#") else f"](../../{target})"

    return re.sub(r"\]\(([^)\s]+)\)", relink, text)


def runs_here(source: str) -> bool:
    """Whether a script imports nothing that this environment lacks; others are shown, and run by the tests."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            wanted = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in wanted:
            try:
                found = importlib.import_module(module)
                if name is not None and not hasattr(found, name):
                    importlib.import_module(f"{module}.{name}")
            except ImportError:
                return False
    return True


def write_examples() -> list[str]:
    """Copy examples, each titled by how its docstring begins; return the names of those that can be run here."""
    target = AUTO / "examples"
    target.mkdir(parents=True)
    runnable = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text()
        title = re.match(r'"""([^:,.]+)', source)[1]
        head = f'"""\n{title}\n{"=" * len(title)}\n\n'
        body = source.replace('"""', head, 1)
        (target / path.name).write_text(body)
        if runs_here(source):
            runnable.append(path.name)
    about = "Scripts that run as they are, from the folder ``examples``. What they print and draw is below each."
    (target / "GALLERY_HEADER.rst").write_text(f"Gallery\n=======\n\n{about}\n")
    return runnable


def generate() -> list[str]:
    """Make docs/auto; return the names of the examples to run."""
    shutil.rmtree(AUTO, ignore_errors=True)
    AUTO.mkdir()
    write_reference()
    for name in ("README", "CHANGELOG", "CONTRIBUTING"):
        (AUTO / f"{name.lower()}.md").write_text(from_root((ROOT / f"{name}.md").read_text()))
    return write_examples()


RUNNABLE = generate()
sphinx_gallery_conf = {
    "examples_dirs": ["auto/examples"],
    "gallery_dirs": ["auto/gallery"],
    "filename_pattern": "/(" + "|".join(re.escape(name) for name in RUNNABLE) + ")$",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "within_subsection_order": "FileNameSortKey",
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 10**6,
    "write_computation_times": False,
    "remove_config_comments": True,
    "plot_gallery": True,
}


def draw_thumbnails(app: Any) -> None:
    """Give each example that draws nothing a picture for the gallery: the beginning of what it prints."""
    from matplotlib.figure import Figure

    gallery = AUTO / "gallery"
    for page in sorted(gallery.glob("*.rst")):
        printed = re.search(r"sphx-glr-script-out\n\n \.\. code-block:: none\n\n((?: {4}.*\n|\n)+)", page.read_text())
        if printed is None or (gallery / "images" / f"sphx_glr_{page.stem}_001.png").exists():
            continue
        lines = [line[4:36] for line in printed[1].splitlines() if line.strip()][:9]
        image = Figure(figsize=(4, 2.8))
        text = {"family": "monospace", "size": 13, "va": "top", "linespacing": 1.35, "color": "#3a3f47"}
        image.text(0.04, 0.95, "\n".join(lines), parse_math=False, **text)
        image.savefig(gallery / "images" / "thumb" / f"sphx_glr_{page.stem}_thumb.png", dpi=100)


def link(app: Any, name: str, source: list[str]) -> None:
    """Let links to files at the root lead to their pages in docs/auto, those to examples to the gallery."""
    text = re.sub(r"\]\(\.\./(README|CHANGELOG|CONTRIBUTING)\.md", lambda m: f"](auto/{m[1].lower()}.md", source[0])
    source[0] = re.sub(r"\]\(\.\./examples/(\w+)\.py", r"](auto/gallery/\1.rst", text)


def skip_foreign(app: Any, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leave out methods that other libraries give a class: they are described there."""
    module = getattr(value, "__module__", None) or "fastbn"
    return True if callable(value) and not module.startswith("fastbn") else None


def setup(app: Any) -> None:
    sys.path.insert(0, str(DOCS))
    app.connect("source-read", link)
    app.connect("builder-inited", draw_thumbnails, priority=900)  # after the gallery's own
    app.connect("autodoc-skip-member", skip_foreign)
