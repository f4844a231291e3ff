"""Importing fastbn: NumPy and nothing else, no side effects, documented public names."""

from __future__ import annotations

import doctest
import inspect
import json
import subprocess
import sys

import pytest

import fastbn

FOREIGN = [
    "scipy",
    "sklearn",
    "torch",
    "tensorflow",
    "jax",
    "jaxlib",
    "keras",
    "onnx",
    "onnxruntime",
    "dask",
    "distributed",
    "mpi4py",
    "matplotlib",
    "pandas",
    "polars",
    "tqdm",
    "joblib",
    "threadpoolctl",
    "ml_dtypes",
    "cython",
    "Cython",
    "pytest",
    "hypothesis",
    "mesonpy",
    "numba",
]

PUBLIC = {
    "batch_norm",
    "batch_norm_forward",
    "batch_norm_backward",
    "moments",
    "Moments",
    "normalize",
    "denormalize",
    "recompute_statistics",
    "update_moving",
    "fold",
    "BatchNorm",
    "set_num_threads",
    "get_num_threads",
    "threads",
    "show_config",
    "UntrainedWarning",
    "PendingUpdatesWarning",
    "StateError",
}


def run(program: str, *options: str) -> str:
    command = [sys.executable, *options, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_import_loads_numpy_only():
    program = """
import sys, json
import numpy
before = set(sys.modules)
import fastbn
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps(sorted(new - set(sys.stdlib_module_names))))
"""
    loaded = json.loads(run(program))
    assert not set(loaded) & set(FOREIGN)
    # Editable installs bring a loader of their own, and Cython a module without a file for its shared types.
    ours = [
        name
        for name in loaded
        if not name.startswith(("numpy", "fastbn", "_cython_", "_fastbn_editable", "cython_runtime"))
    ]
    assert not ours


def test_import_is_silent_and_warns_about_nothing():
    assert run("import fastbn", "-W", "error", "-X", "dev") == ""


def test_subnormal_numbers_survive_the_import():
    """A library linked with -ffast-math flushes them to zero in the whole process."""
    program = """
import numpy, fastbn
fastbn.batch_norm(numpy.ones((4, 3), "f4"), training=True)
tiny = numpy.finfo("f4").smallest_subnormal, numpy.finfo("f8").smallest_subnormal
print(all(t / 1 > 0 and numpy.array([t, t]).sum() == 2 * t and t * 1.0 > 0 for t in tiny), 5e-324 > 0)
"""
    assert run(program).split() == ["True", "True"]


def test_import_starts_no_thread():
    program = "import os, fastbn; print(len(os.listdir('/proc/self/task')))"
    if not sys.platform.startswith("linux"):
        pytest.skip("counts threads in /proc")
    without = run("import os, numpy; print(len(os.listdir('/proc/self/task')))")
    assert run(program) == without


def test_public_names():
    assert set(fastbn.__all__) == PUBLIC | ({"__version__"} & set(fastbn.__all__))
    assert len(set(fastbn.__all__)) == len(fastbn.__all__)
    visible = {n for n in vars(fastbn) if not n.startswith("_") and not inspect.ismodule(getattr(fastbn, n))}
    assert visible - {"annotations"} == PUBLIC
    assert set(dir(fastbn)) >= PUBLIC


def test_version():
    assert fastbn.__version__.count(".") >= 1
    assert fastbn.__version__[0].isdigit()


DOCUMENTED = sorted(n for n in PUBLIC if inspect.isfunction(getattr(fastbn, n)) or inspect.isclass(getattr(fastbn, n)))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented(name):
    public = getattr(fastbn, name)
    assert inspect.getdoc(public), name
    if inspect.isclass(public):
        for attribute in dir(public):  # those that are inherited as well
            member = inspect.getattr_static(public, attribute)
            if not attribute.startswith("_") and (inspect.isroutine(member) or isinstance(member, property)):
                assert inspect.getdoc(member), f"{name}.{attribute}"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_parameter_is_documented(name):
    public = getattr(fastbn, name)
    doc = inspect.getdoc(public)
    if inspect.isclass(public) and issubclass(public, Exception):
        return
    for parameter in inspect.signature(public).parameters:
        assert parameter in doc, f"{name}: {parameter}"


def test_examples_run():
    """The Examples of every docstring, as doctests; some there must be."""
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    examples = 0
    for name in DOCUMENTED:
        public = getattr(fastbn, name)
        for test in finder.find(public, name, globs={"fastbn": fastbn}):
            examples += len(test.examples)
            result = runner.run(test)
            assert result.failed == 0, test.name
    assert examples >= 10
