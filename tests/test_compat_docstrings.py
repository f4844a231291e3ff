"""The docstrings of the old APIs: in NumPy's form, every parameter described, and examples that print what they say."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys

import numpy as np
import pytest

import fastbn
from fastbn.compat import tf_contrib, tf_layers, tf_nn

MODULES = {"tf_layers": tf_layers, "tf_contrib": tf_contrib, "tf_nn": tf_nn}
NAMES = [f"{short}.{name}" for short, module in MODULES.items() for name in module.__all__]


def public(name):
    module, _, attribute = name.partition(".")
    return getattr(MODULES[module], attribute)


@pytest.mark.parametrize("name", [n for n in NAMES if callable(public(n))])
def test_documented(name):
    value = public(name)
    doc = inspect.getdoc(value)
    assert doc
    signature = inspect.signature(value).parameters
    if inspect.isclass(value) and "Parameters" not in doc:  # made by others, not by users
        signature = {}
    for parameter in signature:
        assert parameter in doc, parameter
    if inspect.isclass(value):
        for attribute, member in inspect.getmembers(value):
            if not attribute.startswith("_") and (callable(member) or isinstance(member, property)):
                assert inspect.getdoc(member), attribute


@pytest.mark.parametrize("name", NAMES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may save a file
    text = inspect.getdoc(public(name)) or ""
    test = doctest.DocTestParser().get_doctest(text, {"np": np, "fastbn": fastbn}, name, None, None)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
    tf_layers.reset_default_graph()


def test_importing_them_loads_numpy_only():
    program = (
        "import sys, fastbn.compat.tf_contrib; "
        "print([m for m in ('tensorflow', 'tf_keras', 'tf_slim', 'scipy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == "[]"
