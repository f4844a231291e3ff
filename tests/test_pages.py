"""The pages about other packages keep their word: their code runs and prints what its comments say."""

from __future__ import annotations

import contextlib
import io
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = {"sklearn": ("sklearn", "joblib"), "dask": ("dask", "distributed", "sklearn"), "mpi": ("mpi4py",)}


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks(page):
    missing = [name for name in PAGES[page] if find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed")
    namespace: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", (DOCS / f"{page}.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        wanted = re.findall(r"^ *print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
        assert len(wanted) == block.count("print("), "every print says what it prints"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                exec(compile(block, f"{page}.md", "exec"), namespace)
            except ImportError as error:
                if page == "mpi" and "mpi4py" not in str(error):  # mpi4py without an MPI library
                    pytest.skip(str(error))
                raise
        if page != "mpi":  # which prints numbers
            assert printed.getvalue().splitlines() == wanted
        else:
            assert len(printed.getvalue().splitlines()) == len(wanted)
