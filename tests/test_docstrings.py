"""Every public name has a docstring in NumPy's form, and the examples in them print what they say."""

from __future__ import annotations

import doctest
import inspect

import numpy as np
import pytest

import fastbn
from fastbn import compat

# What numpydoc's validation must not find. Left out: rules of taste (capitals, blank lines) and those that
# want sections where one sentence says it all.
CHECKS = {
    "GL05",
    "GL06",
    "GL07",
    "GL08",
    "SS01",
    "SS03",
    "PR01",
    "PR02",
    "PR03",
    "PR06",
    "PR10",
    "RT03",
    "YD01",
}


PUBLIC = {
    "": (fastbn, fastbn.__all__),
    "compat.": (compat, compat.__all__),
    "compat.keras.": (compat.keras, ["BatchNormalization"]),
}


def public_names():
    for prefix, (module, names) in PUBLIC.items():
        yield from names_of(prefix, module, names)


def names_of(prefix, module, names):
    for name in names:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            yield prefix + name
        if inspect.isclass(value) and not issubclass(value, BaseException):
            for member in dir(value):  # those that are inherited as well
                what = inspect.getattr_static(value, member)
                if not member.startswith("_") and (callable(what) or isinstance(what, classmethod | property)):
                    yield f"{prefix}{name}.{member}"


NAMES = list(public_names())


def described(name):
    value = fastbn
    for part in name.split("."):
        value = inspect.getattr_static(value, part)
    return value.__func__ if isinstance(value, classmethod | staticmethod) else value


@pytest.mark.parametrize("name", NAMES)
def test_form(name):
    validate = pytest.importorskip("numpydoc.validate", reason="`make lint` installs numpydoc").validate
    found = [f"{code}: {text}" for code, text in validate(f"fastbn.{name}")["errors"] if code in CHECKS]
    if isinstance(described(name), property):
        found = [error for error in found if not error.startswith(("GL08", "RT"))]
    assert not found
    assert inspect.getdoc(described(name))


@pytest.mark.parametrize("name", NAMES)
def test_examples(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an example may save a file
    names = {"np": np, "fastbn": fastbn}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(described(name)) or "", dict(names), name, None, None)
    runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
