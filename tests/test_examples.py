"""Every example runs, without a warning, and its assertions hold."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def test_there_are_examples():
    assert len(EXAMPLES) >= 3


# What an example needs beside the extra `test`.
NEEDS = {"torch_residual_network": "torch"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, tmp_path):
    if path.stem in NEEDS:
        pytest.importorskip(NEEDS[path.stem])
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
