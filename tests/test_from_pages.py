"""docs/from_*.md keep their word: their code runs without any framework, and prints what its comments say."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.glob("from_*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        wanted = re.findall(r"^ *print\(.*\)  # (.*)$", block, flags=re.MULTILINE)
        assert len(wanted) == block.count("print("), "every print says what it prints"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, page.name, "exec"), namespace)
        assert printed.getvalue().splitlines() == wanted


def test_rows_of_the_features_have_all_columns():
    for table in re.findall(r"(?:^\|.*\|\n)+", (DOCS / "features.md").read_text(), flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
