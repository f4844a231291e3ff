"""The README and the pages keep their word: their code runs, and prints what its comments say."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a page may need; all other code runs with fastbn and NumPy alone.
OPTIONAL = {
    "dask": {"dask", "distributed", "sklearn"},
    "mpi": {"mpi4py"},
    "plots": {"matplotlib"},
    "pytorch": {"torch"},
    "sklearn": {"joblib", "onnx", "skorch", "sklearn", "torch"},
}
IMPORTED = {"fastbn.dask": "dask", "fastbn.plot": "matplotlib", "fastbn.sklearn": "sklearn", "fastbn.torch": "torch"}
# page: the extra that its first line installs, and the language of its first program.
STARTS = {
    "sklearn": ("sklearn", "python"),
    "pytorch": ("torch", "python"),
    "dask": ("dask", "python"),
    "mpi": ("mpi", "python"),
    "cython": ("cython", "cython"),
}


def blocks(language: str, path: Path) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def page(name: str) -> Path:
    return ROOT / "docs" / f"{name}.md"


def said(block: str) -> list[str]:
    """What the comments of a program say that it prints."""
    wanted = re.findall(r"^ *print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
    assert len(wanted) == len(re.findall(r"\bprint\(", block)), "every print says what it prints"
    return wanted


def missing(block: str) -> set[str]:
    """The packages that a program imports and that are not installed."""
    names = set()
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    packages = {IMPORTED.get(name, name.partition(".")[0]) for name in names}
    return {name for name in packages if find_spec(name) is None}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:onnx", "ignore::DeprecationWarning:skorch")
def test_programs_print_what_their_comments_say(path, tmp_path, monkeypatch):
    """The Python of a document is one program. What needs a package that is not installed is left out, and said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace: dict[str, object] = {}
    left_out: set[str] = set()
    for i, block in enumerate(blocks("python", path)):
        lacking = missing(block)
        assert lacking <= OPTIONAL.get(path.stem, set()), "a page that needs more than it says"
        left_out |= lacking
        if lacking and i == 0:
            break  # the others go on from there
        if lacking:
            continue
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(block, path.name, "exec"), namespace)
        except (ImportError, RuntimeError) as error:
            if path.stem == "mpi" and "MPI" in str(error):  # mpi4py is there, and no MPI library
                pytest.skip(str(error))
            raise
        assert printed.getvalue().splitlines() == said(block)
    if left_out:
        pytest.skip(f"without what needs {', '.join(sorted(left_out))}, not installed")


@pytest.mark.parametrize("name", STARTS)
def test_a_first_program_takes_one_line_and_one_block(name):
    """The page of a library begins with what to install; a program that prints follows at once."""
    extra, language = STARTS[name]
    first, second = re.findall(r"^```(\w+)\n(.*?)^```$", page(name).read_text(), flags=re.MULTILINE | re.DOTALL)[:2]
    assert first == ("sh", f'pip install ".[{extra}]"\n')
    assert second[0] == language
    assert said(second[1])


@pytest.mark.parametrize("path", [ROOT / "README.md", page("index")], ids=lambda path: path.name)
def test_the_start_pages_have_a_row_for_each(path):
    """With a link to its page and the line that this begins with, for whoever reads the file as it is."""
    prefix = "docs/" if path.parent == ROOT else ""
    for name, (extra, _) in STARTS.items():
        rows = [line for line in path.read_text().splitlines() if f"]({prefix}{name}.md) | " in line]
        assert len(rows) == 1, name
        assert f'| `pip install ".[{extra}]"` |' in rows[0]


def test_every_page_is_in_one_list_of_contents():
    """Those of the guide and of other libraries list their pages also for whoever reads the file as it is."""
    listed = []
    for name in ("index", "guide", "libraries", "development"):
        text = page(name).read_text()
        (entries,) = re.findall(r"^```{toctree}\n(?::.*\n)*\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
        entries = [re.sub(r".*<(\w+)>", r"\1", entry) for entry in entries.split("\n") if entry]
        if name in ("guide", "libraries"):
            assert re.findall(r"^- \[.+\]\((\w+)\.md\)", text, flags=re.MULTILINE) == entries
        listed += [entry for entry in entries if "auto/" not in entry]
    assert sorted(listed) == sorted(path.stem for path in (ROOT / "docs").glob("*.md") if path.stem != "index")


def test_mpi_program_on_two_ranks(tmp_path):
    pytest.importorskip("mpi4py")
    if shutil.which("mpiexec") is None:
        pytest.skip("mpiexec is not installed")
    program = blocks("python", page("mpi"))[0]
    (tmp_path / "program.py").write_text(program)
    (command,) = [block for block in blocks("sh", page("mpi")) if block.startswith("mpiexec")]
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    environment = os.environ | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "".join(done.stdout.split()) == "".join(said(program) * 2)  # lines of two ranks may run into each other


@pytest.mark.slow
def test_first_cython_module(tmp_path):
    """By the page's own command. An editable install hides its declarations from Cython, so they are named."""
    pytest.importorskip("setuptools")
    pytest.importorskip("Cython")
    source = blocks("cython", page("cython"))[0]
    (tmp_path / "first.pyx").write_text(source)
    (command,) = [block for block in blocks("sh", page("cython")) if block.startswith("cythonize")]
    places = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(fastbn.__file__).parent.parent),
    }
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, env=os.environ | places, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1:] == said(source)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_rows_of_a_table_have_all_columns(path):
    for table in re.findall(r"(?:^\|.*\|\n)+", path.read_text(), flags=re.MULTILINE):
        lines = [re.sub(r"`[^`]*`|\\\|", "", line) for line in table.splitlines()]
        assert len({line.count("|") for line in lines}) == 1, table
