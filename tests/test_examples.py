"""Every example runs, without a warning, and its assertions hold."""

import ast
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


SLOW = {"dask_larger_than_memory"}


def packages(path):
    """What an example imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in SLOW else []) for p in EXAMPLES]
)
def test_example(path, tmp_path):
    missing = sorted(name for name in packages(path) if find_spec(name) is None)
    if missing:
        pytest.skip(f"{', '.join(missing)}: not installed")
    run = subprocess.run(
        [sys.executable, "-W", "error", path],
        cwd=tmp_path,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout
    assert not run.stderr
    assert os.listdir(tmp_path) == []


def test_the_published_numbers_are_printed(tmp_path):
    path = next(path for path in EXAMPLES if path.stem == "train_one_adam_step")
    run = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True)
    for number in ("1.404974", "0.3514931", "0.74709475", "-0.40697935", "1.215785"):
        assert number in run.stdout
