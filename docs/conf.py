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
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars: dict[str, list[str]] = {"index": [], "performance": []}

# The order of the pages that have a place; every other Markdown file is listed with those for other libraries.
GUIDE = ["modes", "layouts", "conventions", "features", "weights", "accuracy", "threads", "state", "plots"]
OWN = ["index", "guide", "libraries", "gallery", "performance", "development", "design"]
# page: who needs it, what to install, where to start
LIBRARIES = {
    "sklearn": ("a scikit-learn pipeline", 'pip install ".[sklearn]"', "fastbn.sklearn.BatchNormScaler"),
    "pytorch": ("a PyTorch model on CPUs", 'pip install ".[torch]"', "fastbn.torch.convert"),
    "dask": ("a Dask cluster", 'pip install ".[dask]"', "fastbn.dask"),
    "mpi": ("MPI ranks", 'pip install ".[mpi]"', "fastbn.mpi"),
    "cython": ("Cython code", "pip install . cython setuptools", "fastbn.cython_api"),
}

# Public modules beside fastbn itself, and what each needs. One that cannot be imported here is named, not described.
MODULES = {
    "fastbn.sklearn": "scikit-learn",
    "fastbn.torch": "PyTorch",
    "fastbn.dask": "Dask",
    "fastbn.mpi": "mpi4py",
    "fastbn.plot": "Matplotlib",
    "fastbn.compat": "nothing else",
    "fastbn.compat.tf_layers": "nothing else",
    "fastbn.compat.tf_contrib": "nothing else",
    "fastbn.compat.keras": "nothing else",
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


def pages() -> dict[str, list[str]]:
    """Return the names of the Markdown files of each list of contents."""
    there = {path.stem for path in DOCS.glob("*.md")} - set(OWN)
    guide = [name for name in GUIDE if name in there]
    others = sorted(there - set(guide), key=lambda name: (name.startswith("from_"), name))
    libraries = [name for name in LIBRARIES if name in others]
    return {"guide": guide, "libraries": libraries + [name for name in others if name not in libraries]}


def public(module: Any) -> list[str]:
    """Return the names a module offers."""
    names = getattr(module, "__all__", None)
    if names is None:  # not what it imported itself
        mine = {name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
        names = sorted(name for name in mine if not name.startswith("_"))
    return [name for name in names if callable(getattr(module, name, None))]


def summary(module: str, names: list[str]) -> str:
    return "\n".join(
        ["```{eval-rst}", f".. currentmodule:: {module}", "", ".. autosummary::", "   :toctree: api/", ""]
        + [f"   {name}" for name in names]
        + ["```", ""]
    )


def reference() -> str:
    """Return the page of the API reference: fastbn, and the optional modules that can be imported here."""
    parts = ["# API reference", "", "`import fastbn` needs NumPy only, and offers:", ""]
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
    for name, needs in MODULES.items():
        path = Path(fastbn.__file__).parent.joinpath(*name.split(".")[1:])
        if not (path.is_dir() or path.with_suffix(".py").exists()):
            continue  # not in this version
        try:
            module = importlib.import_module(name)
        except ImportError:
            parts += [f"## {name}", "", f"Needs {needs}, and is not described where that is not installed.", ""]
            continue
        head = (module.__doc__ or "").strip().splitlines()
        parts += [f"## {name}", "", head[0] if head else "", "", summary(name, public(module))]
    return "\n".join(parts)


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


# What starts processes of its own, or is not in the extra "docs": examples of it are shown, and run by the tests.
NOT_HERE = {"dask", "distributed", "mpi4py", "mpi", "multiprocessing", "ray", "torch"}


def runs_here(source: str) -> bool:
    """Whether a script imports nothing that this environment lacks, or that is not to be run here."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            wanted = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            wanted = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in wanted:
            if NOT_HERE & {*module.split("."), name}:
                return False
            try:
                found = importlib.import_module(module)
                if name is not None and not hasattr(found, name):
                    importlib.import_module(f"{module}.{name}")
            except ImportError:
                return False
    return True


def write_examples() -> list[str]:
    """Copy examples with a title each; return the names of those that can be run here."""
    target = AUTO / "examples"
    target.mkdir(parents=True)
    runnable = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        source = path.read_text()
        title = path.stem.replace("_", " ").capitalize()
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
    (AUTO / "api.md").write_text(reference())
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
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 10**6,
    "write_computation_times": False,
    "remove_config_comments": True,
    "plot_gallery": True,
}


def fill_in(app: Any, name: str, source: list[str]) -> None:
    """Put what there is where a page says @guide@, @libraries@ or @rows@."""
    lists = pages()
    rows = [
        f"| {who} | `{install}` | [`{start}`]({page}.md) |"
        for page, (who, install, start) in LIBRARIES.items()
        if page in lists["libraries"]
    ]
    text = source[0].replace("@rows@", "\n".join(rows))
    for group, names in lists.items():
        text = text.replace(f"@{group}@", "\n".join(names))
    # Files at the root have pages in docs/auto.
    source[0] = re.sub(r"\]\(\.\./(README|CHANGELOG|CONTRIBUTING)\.md", lambda m: f"](auto/{m[1].lower()}.md", text)


def skip_foreign(app: Any, what: str, name: str, value: Any, skip: bool, options: Any) -> bool | None:
    """Leave out methods that other libraries give a class: they are described there."""
    module = getattr(value, "__module__", None) or "fastbn"
    return True if callable(value) and not module.startswith("fastbn") else None


def setup(app: Any) -> None:
    sys.path.insert(0, str(DOCS))
    app.connect("source-read", fill_in)
    app.connect("autodoc-skip-member", skip_foreign)
    # Their lists depend on what other pages there are.
    app.connect("env-get-outdated", lambda *_: ["index", "guide", "libraries"])
