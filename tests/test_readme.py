"""The README keeps its word: its commands run, its tables say what happens. Its code: test_pages.py."""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastbn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def table(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, without its head."""
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_there_are_python_blocks():
    assert blocks("python")


def test_command_line_blocks_run(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("monday.npy", "tuesday.npy"):
        np.save(tmp_path / name, rng.standard_normal((1000, 8), dtype=np.float32))
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("fastbn ")]
    commands = [shlex.split(line, comments=True) for line in lines]
    assert {"info", "stats", "merge", "apply", "demo"} == {command[1] for command in commands}
    for command in commands:
        if command[1] != "demo":  # `fastbn demo` has tests of its own
            run = [sys.executable, "-m", *command]
            done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stderr
    x = np.concatenate([np.load(tmp_path / "monday.npy"), np.load(tmp_path / "tuesday.npy")])
    y = np.load(tmp_path / "monday-normalized.npy")
    mean, variance = x.mean(0, dtype=np.float64), x.var(0, dtype=np.float64)
    np.testing.assert_allclose(y, (x[:1000] - mean) / np.sqrt(variance + 1e-3), atol=1e-5)


@pytest.mark.parametrize(("call", "mode", "normalizes", "writes", "gradient"), table("Three modes"))
def test_table_of_modes(call, mode, normalizes, writes, gradient, rng):
    x, dy = (rng.standard_normal((64, 3)).astype(np.float32) for _ in range(2))
    before = {"moving_mean": np.full(3, 0.5, np.float32), "moving_variance": np.full(3, 2.0, np.float32)}
    moving = {name: a.copy() for name, a in before.items()}
    options = eval(f"dict({call})")
    y, cache = fastbn.batch_norm_forward(x, **moving, **options)
    mean, variance = (x.mean(0), x.var(0)) if normalizes == "this batch" else before.values()
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-3), atol=1e-5)
    assert any((moving[name] != before[name]).any() for name in before) == (writes == "yes")
    dx, _, _ = fastbn.batch_norm_backward(dy, cache)
    scale_only = np.allclose(dx, dy / np.sqrt(np.asarray(variance) + 1e-3), atol=1e-5)
    assert scale_only == (gradient == "scale only")
    if mode != "batch":  # the layer with the same `training` is in the mode of this row
        assert fastbn.BatchNorm(3).mode(options["training"]) == mode


def test_conventions_of_other_libraries(rng):
    """`momentum` is the share that is kept: PyTorch's 0.1 is 0.9 here."""
    x = rng.standard_normal((32, 4)).astype(np.float32)
    mean, variance = np.zeros(4, np.float32), np.ones(4, np.float32)
    fastbn.batch_norm(x, moving_mean=mean, moving_variance=variance, training=True, momentum=0.9, ddof=1)
    np.testing.assert_allclose(mean, 0.1 * x.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(variance, 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-5)


def test_defaults_are_those_of_the_conventions_table():
    layer = inspect.signature(fastbn.BatchNorm).parameters
    function = inspect.signature(fastbn.batch_norm).parameters
    for option, ours, *_ in table("Conventions"):
        if option in layer:
            assert str(layer[option].default) == ours == str(function[option].default)
