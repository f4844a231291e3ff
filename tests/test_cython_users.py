"""`fastbn.cython_api`: what other modules get by cimport, through its pointers and in modules built against it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import fastbn
from fastbn import cython_api

ROOT = Path(__file__).resolve().parent.parent
DONE, NO_MEMORY, INVALID = range(3)
EXTENT, STRIDES, STATISTICS = (
    "Py_ssize_t, Py_ssize_t, Py_ssize_t",
    "Py_ssize_t const *",
    "double const *, double const *",
)
READ, WRITTEN = "{} const *, " + STRIDES, "{} *, " + STRIDES
TYPED = {
    "moments": f"int ({EXTENT}, {READ}, double *, double *, int)",
    "normalize": f"int ({EXTENT}, {READ}, {WRITTEN}, {{0}} const *, {{0}} const *, {STATISTICS}, double, int)",
    "train": f"int ({EXTENT}, {READ}, {WRITTEN}, {{0}} const *, {{0}} const *, double *, double *, double, int)",
    "gradient": f"int ({EXTENT}, {READ}, {READ}, {WRITTEN}, {{0}} const *, {STATISTICS}, double, int, "
    "{0} *, {0} *, int)",
}
# What is promised to be stable: a module built against one of these must find it again.
SIGNATURES = {
    f"{name}_{kind}": text.replace("{}", kind).replace("{0}", kind)
    for name, text in TYPED.items()
    for kind in ("float", "double")
} | {
    "update_moving": "int (Py_ssize_t, double *, double *, double const *, double const *, double, int, double)",
    "merge_moments": "int (Py_ssize_t, double, double *, double *, double, double const *, double const *)",
}
C_TYPES = {"int": ctypes.c_int, "double": ctypes.c_double, "Py_ssize_t": ctypes.c_ssize_t}


def function(name):
    """A function of the API, called through ctypes, which releases the GIL."""
    capsule, signature = cython_api.__pyx_capi__[name], SIGNATURES[name]
    take = ctypes.pythonapi.PyCapsule_GetPointer
    take.restype, take.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    arguments = signature.split("(")[1].rstrip(")").split(", ")
    types = [C_TYPES.get(argument, ctypes.c_void_p) for argument in arguments]
    call = ctypes.CFUNCTYPE(ctypes.c_int, *types)(take(capsule, signature.encode()))
    return lambda *values: call(*(v.ctypes.data if isinstance(v, np.ndarray) else v for v in values))


CALLS = {name: function(name) for name in SIGNATURES} if set(cython_api.__pyx_capi__) >= set(SIGNATURES) else {}
KINDS = {"float": np.float32, "double": np.float64}


def strides(array):
    return np.array(array.strides, np.intp)


def test_signatures_are_those_that_were_promised():
    found = {name: re.search('"(.*)"', repr(capsule))[1] for name, capsule in cython_api.__pyx_capi__.items()}
    assert found == SIGNATURES


def test_declarations_are_installed():
    assert Path(fastbn.__file__).with_name("cython_api.pxd").exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 3, 7), (40, 130, 1), (3, 5, 300), (2000, 64, 1), (16, 8, 1000)])
@pytest.mark.parametrize("threads", [1, 3])
def test_bits_are_those_of_the_functions(kind, shape, threads, rng):
    x, dy = (rng.normal(3, 2, shape).astype(KINDS[kind]) for _ in range(2))
    gamma, beta = (rng.normal(1, 0.5, shape[1]).astype(KINDS[kind]) for _ in range(2))
    y, dx, dgamma, dbeta = np.empty_like(x), np.empty_like(x), np.empty_like(gamma), np.empty_like(gamma)
    mean, variance, m2 = np.empty((3, shape[1]))
    want_y, cache = fastbn.batch_norm_forward(x, gamma=gamma, beta=beta, training=True, axis=1)
    want = fastbn.batch_norm_backward(dy, cache)
    found = fastbn.moments(x, axis=1)

    assert CALLS[f"moments_{kind}"](*shape, x, None, mean, m2, threads) == DONE
    assert (mean == found.mean).all()
    assert (m2 == found.m2).all()
    call = CALLS[f"train_{kind}"]
    assert call(*shape, x, None, y, None, gamma, beta, mean, variance, 1e-3, threads) == DONE
    assert (y == want_y).all()
    assert (variance == found.variance()).all()
    call = CALLS[f"gradient_{kind}"]
    arguments = (*shape, dy, None, x, None, dx, None, gamma, mean, variance, 1e-3)
    assert call(*arguments, 0, dgamma, dbeta, threads) == DONE
    for ours, theirs in zip((dx, dgamma, dbeta), want, strict=True):
        assert (ours == theirs).all()
    dgamma[:] = 0
    assert call(*arguments, 0, dgamma, None, threads) == DONE
    assert (dgamma == want[1]).all()
    dbeta[:] = 0
    assert call(*arguments, 0, None, dbeta, threads) == DONE
    assert (dbeta == want[2]).all()

    moving = mean.astype(x.dtype), variance.astype(x.dtype)
    want_y, cache = fastbn.batch_norm_forward(
        x, gamma=gamma, beta=beta, moving_mean=moving[0], moving_variance=moving[1], axis=1
    )
    wide = [np.array(m, np.float64) for m in moving]
    assert CALLS[f"normalize_{kind}"](*shape, x, None, y, None, gamma, beta, *wide, 1e-3, threads) == DONE
    assert (y == want_y).all()
    want = fastbn.batch_norm_backward(dy, cache)
    arguments = (*shape, dy, None, x, None, dx, None, gamma, *wide, 1e-3)
    assert call(*arguments, 1, dgamma, dbeta, threads) == DONE
    for ours, theirs in zip((dx, dgamma, dbeta), want, strict=True):
        assert (ours == theirs).all()


def test_strides_are_those_of_views(rng):
    x = rng.standard_normal((6, 4, 90)).astype(np.float32)
    views = x[::2, ::-1, ::3], np.zeros((30, 3, 4), np.float32).transpose(1, 2, 0)
    y, (mean, variance) = views[1], np.empty((2, 4))
    call = CALLS["train_float"]
    assert call(3, 4, 30, views[0], strides(views[0]), y, strides(y), None, None, mean, variance, 1e-3, 1) == DONE
    np.testing.assert_array_equal(y, fastbn.batch_norm(views[0], training=True, axis=1))
    same = np.ascontiguousarray(views[0])
    assert call(3, 4, 30, same, None, same, None, None, None, mean, variance, 1e-3, 1) == DONE  # in place
    np.testing.assert_array_equal(y, same)


def test_moving_statistics_and_merged_moments(rng):
    x = rng.normal(5, 3, (90, 4))
    mean, m2 = np.zeros((2, 4))
    count = 0
    for part in (x[:30], x[30:31], x[31:]):
        own = np.empty((2, 4))
        assert CALLS["moments_double"](len(part), 4, 1, part, None, own[0], own[1], 1) == DONE
        assert CALLS["merge_moments"](4, count, mean, m2, len(part), own[0], own[1]) == DONE
        count += len(part)
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(m2 / count, x.var(0), rtol=1e-14)
    ours, theirs = (np.zeros(4), np.ones(4)), (np.zeros(4), np.ones(4))
    variance = x.var(0)
    assert CALLS["update_moving"](4, *ours, x.mean(0), variance, 90, 1, 0.9) == DONE
    fastbn.update_moving(*theirs, x.mean(0), variance, momentum=0.9, count=90, ddof=1)
    np.testing.assert_array_equal(ours, theirs)
    for count in (0.5, 1, 1.5, 2.25):  # a sum of weights
        for ddof in (0, 1):
            assert CALLS["update_moving"](4, *ours, x.mean(0), variance, count, ddof, 0.9) == DONE
            fastbn.update_moving(*theirs, x.mean(0), variance, momentum=0.9, count=count, ddof=ddof)
            np.testing.assert_array_equal(ours, theirs)
    assert CALLS["update_moving"](4, *ours, x.mean(0), variance, 0, 1, 0.9) == DONE
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 3, 5), (4, 3, 0), (4, 0, 5), (0, 0, 0)])
def test_empty_batches(shape):
    x, (mean, second), (dgamma, dbeta) = np.empty(shape, np.float32), np.ones((2, 3)), np.ones((2, 3), np.float32)
    channels = shape[1]
    assert CALLS["moments_float"](*shape, x, None, mean, second, 1) == DONE
    assert not mean[:channels].any()
    assert not second[:channels].any()
    mean[:] = second[:] = 1
    assert CALLS["train_float"](*shape, x, None, x, None, None, None, mean, second, 0.0, 1) == DONE
    assert not mean[:channels].any()
    assert not second[:channels].any()
    assert CALLS["normalize_float"](*shape, x, None, x, None, None, None, mean, second, 0.0, 1) == DONE
    call = CALLS["gradient_float"]
    assert call(*shape, x, None, x, None, x, None, None, mean, second, 0.0, 0, dgamma, dbeta, 1) == DONE
    assert not dgamma[:channels].any()
    assert not dbeta[:channels].any()


def test_what_is_invalid_touches_nothing():
    x, (mean, second) = np.ones((4, 3, 5), np.float32), np.full((2, 3), 7.0)
    odd, short = np.array([60, 20, 3], np.intp), x.ctypes.data + 1
    wrong = [
        (-1, 3, 5, x, None, mean, second, 1),
        (4, -3, 5, x, None, mean, second, 1),
        (4, 3, -5, x, None, mean, second, 1),
        (1 << 40, 1 << 20, 1 << 10, x, None, mean, second, 1),
        (4, 3, 5, None, None, mean, second, 1),
        (4, 3, 5, x, None, None, second, 1),
        (4, 3, 5, x, None, mean, None, 1),
        (4, 3, 5, short, None, mean, second, 1),
        (4, 3, 5, x, odd, mean, second, 1),
        (4, 3, 5, x, None, mean, second, 0),
    ]
    for arguments in wrong:
        assert CALLS["moments_float"](*arguments) == INVALID
    before = x.copy()
    for y, strided in ((None, None), (x.ctypes.data + 2, None), (x, odd)):
        call = CALLS["normalize_float"]
        assert call(4, 3, 5, x, None, y, strided, None, None, mean, second, 1e-3, 1) == INVALID
        assert CALLS["train_float"](4, 3, 5, x, None, y, strided, None, None, mean, second, 1e-3, 1) == INVALID
        call = CALLS["gradient_float"]
        assert call(4, 3, 5, x, None, x, None, y, strided, None, mean, second, 1e-3, 0, None, None, 1) == INVALID
    assert CALLS["normalize_float"](4, 3, 5, x, None, x, None, None, None, None, second, 1e-3, 1) == INVALID
    assert CALLS["train_float"](4, 3, 5, x, None, x, None, None, None, mean, None, 1e-3, 1) == INVALID
    call = CALLS["gradient_float"]
    assert call(4, 3, 5, x, None, x, None, x, None, None, mean, None, 1e-3, 0, None, None, 1) == INVALID
    assert CALLS["update_moving"](3, mean, second, mean, None, 1, 0, 0.5) == INVALID
    assert CALLS["update_moving"](3, mean, second, mean, second, -1, 0, 0.5) == INVALID
    assert CALLS["update_moving"](3, mean, second, mean, second, 1, 2, 0.5) == INVALID
    assert CALLS["update_moving"](3, mean, second, mean, second, 1, 0, 1.5) == INVALID
    assert CALLS["merge_moments"](3, 1, mean, None, 1, mean, second) == INVALID
    assert CALLS["merge_moments"](3, -1, mean, second, 1, mean, second) == INVALID
    for infinite in (np.inf, np.nan):
        assert CALLS["update_moving"](3, mean, second, mean, second, infinite, 0, 0.5) == INVALID
        assert CALLS["merge_moments"](3, infinite, mean, second, 1, mean, second) == INVALID
        assert CALLS["merge_moments"](3, 1, mean, second, infinite, mean, second) == INVALID
    askew = mean.ctypes.data + 4
    assert CALLS["moments_float"](4, 3, 5, x, None, askew, second, 1) == INVALID
    assert CALLS["update_moving"](3, mean, second, askew, second, 1, 0, 0.5) == INVALID
    assert CALLS["merge_moments"](3, 1, mean, askew, 1, mean, second) == INVALID
    for parameters in ((askew, second, None), (mean, askew, None), (mean, second, short)):
        place, other, gamma = parameters
        assert CALLS["normalize_float"](4, 3, 5, x, None, x, None, gamma, None, place, other, 1e-3, 1) == INVALID
        assert CALLS["train_float"](4, 3, 5, x, None, x, None, gamma, None, place, other, 1e-3, 1) == INVALID
        assert call(4, 3, 5, x, None, x, None, x, None, gamma, place, other, 1e-3, 0, None, None, 1) == INVALID
        assert call(4, 3, 5, x, None, x, None, x, None, None, mean, second, 1e-3, 0, gamma, askew + 1, 1) == INVALID
    assert (mean == 7).all()
    assert (second == 7).all()
    assert (x == before).all()


def test_memory_that_is_not_there_is_a_status():
    """A million million channels: the first allocation fails, before data are looked at."""
    x, (mean, second) = np.ones(1, np.float32), np.ones((2, 1))
    at_one_place = np.zeros(3, np.intp)
    channels = 1 << 50
    call = CALLS["gradient_float"]
    data = (x, at_one_place) * 3
    assert call(1, channels, 1, *data, None, mean, second, 1e-3, 0, None, None, 1) == NO_MEMORY


def test_several_threads_at_once(rng):
    x = rng.standard_normal((64, 32, 200)).astype(np.float32)
    want = fastbn.batch_norm(x, training=True, axis=1)

    def work(threads):
        y, (mean, variance) = np.empty_like(x), np.empty((2, 32))
        arguments = (*x.shape, x, None, y, None, None, None, mean, variance, 1e-3, threads)
        return all(CALLS["train_float"](*arguments) == DONE and (y == want).all() for _ in range(20))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, (1, 2, 1, 3)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_works_alone(rng):
    program = """
import os, sys
sys.path.insert(0, sys.argv[1])
import numpy as np
import test_cython_users as t
x = np.random.default_rng(0).standard_normal((64, 32, 200)).astype(np.float32)
def work():
    y, (mean, variance) = np.empty_like(x), np.empty((2, 32))
    assert t.CALLS["train_float"](*x.shape, x, None, y, None, None, None, mean, variance, 1e-3, 3) == 0
    return y.tobytes()
before = work()
child = os.fork()
if child == 0:
    os._exit(0 if work() == before else 1)
print(os.waitpid(child, 0)[1])
"""
    run = [sys.executable, "-W", "ignore", "-c", program, str(Path(__file__).parent)]
    assert subprocess.run(run, capture_output=True, text=True, timeout=60, check=True).stdout.split() == ["0"]


def blocks(language):
    text = (ROOT / "docs" / "cython.md").read_text()
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def build(folder, **sources):
    """Build modules as their users would; an editable install hides its declarations from Cython, so it names them."""
    for name, source in sources.items():
        (folder / f"{name}.pyx").write_text(source)
    setup = blocks("py")[0].replace('cythonize("tables.pyx")', "cythonize('*.pyx', include_path=sys.argv[3:])")
    (folder / "setup.py").write_text("import sys\n" + setup.replace("setup(", "setup(script_args=sys.argv[1:3], "))
    command = [sys.executable, "setup.py", "build_ext", "--inplace", str(Path(fastbn.__file__).parent.parent)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {
        name: folder / next(p.name for p in folder.glob(f"{name}.*") if p.suffix in (".so", ".pyd")) for name in sources
    }


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Threads that Python does not know, each calling with a team of its own inside of theirs.
STRANGERS = """
# distutils: extra_compile_args = -pthread
# distutils: extra_link_args = -pthread
from fastbn.cython_api cimport DONE, train_float

cdef extern from "pthread.h" nogil:
    ctypedef unsigned long pthread_t
    int pthread_create(pthread_t*, void*, void* (*)(void*) noexcept nogil, void*)
    int pthread_join(pthread_t, void**)

cdef struct Work:
    float* x
    float* y
    double* statistics
    int status

cdef void* work(void* what) noexcept nogil:
    cdef Work* w = <Work*> what
    cdef int i
    for i in range(20):
        w.status |= train_float(64, 32, 200, w.x, NULL, w.y, NULL, NULL, NULL, w.statistics, w.statistics + 32, 1e-3, 2)
    return NULL

def run(float[:, :, ::1] x, float[:, :, :, ::1] y, double[:, ::1] statistics):
    cdef pthread_t[4] threads
    cdef Work[4] works
    cdef int i, status = 0
    for i in range(4):
        works[i] = Work(&x[0, 0, 0], &y[i, 0, 0, 0], &statistics[i, 0], 0)
    for i in range(4):
        pthread_create(&threads[i], NULL, work, &works[i])
    for i in range(4):  # holding the GIL: whoever asked for it would wait for ever
        pthread_join(threads[i], NULL)
        status |= works[i].status
    return status
"""


@pytest.mark.slow
def test_a_module_built_against_the_package(tmp_path, rng):
    pytest.importorskip("setuptools")
    pytest.importorskip("Cython")
    built = build(tmp_path, tables=blocks("cython")[1], strangers=STRANGERS)
    tables = load("tables", built["tables"])
    starts = np.array([0, 10, 500, 500, 501, 3000], np.intp)
    rows = rng.normal(3, 2, (3000, 7)).astype(np.float32)
    want = [fastbn.batch_norm(rows[a:b], training=True) for a, b in pairwise(starts)]
    mean, _ = tables.normalize_tables(rows, starts)
    assert (rows == np.concatenate(want)).all()
    assert not mean[2].any()
    x, dy = (rng.standard_normal((8, 16, 900)).astype(np.float32) for _ in range(2))
    gamma, beta = (rng.standard_normal(16).astype(np.float32) for _ in range(2))
    y, cache = fastbn.batch_norm_forward(x, gamma=gamma, beta=beta, training=True, axis=1)
    for ours, theirs in zip(
        tables.training_step(x, dy, gamma, beta), (y, *fastbn.batch_norm_backward(dy, cache)), strict=True
    ):
        assert (ours == theirs).all()

    x = rng.standard_normal((64, 32, 200)).astype(np.float32)
    y, statistics = np.zeros((4, *x.shape), np.float32), np.zeros((4, 64))
    assert load("strangers", built["strangers"]).run(x, y, statistics) == DONE
    assert (y == fastbn.batch_norm(x, training=True, axis=1)).all()


@pytest.mark.slow
def test_a_module_built_by_meson(tmp_path, rng):
    """The file that the page gives is all that it takes, with the programs of this environment."""
    pytest.importorskip("mesonbuild")
    pytest.importorskip("Cython")
    (tmp_path / "tables.pyx").write_text(blocks("cython")[1])
    (tmp_path / "meson.build").write_text(blocks("meson")[0])
    programs = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for step in (["setup", "build"], ["compile", "-C", "build"]):
        command = [sys.executable, "-m", "mesonbuild.mesonmain", *step]
        done = subprocess.run(
            command, cwd=tmp_path, env=os.environ | programs, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
    tables = load("tables", next((tmp_path / "build").glob("tables.*.so")))
    rows = rng.normal(3, 2, (300, 7)).astype(np.float32)
    want = fastbn.batch_norm(rows, training=True)
    tables.normalize_tables(rows, np.array([0, 300], np.intp))
    assert (rows == want).all()


@pytest.mark.slow
def test_another_signature_is_an_error_at_import(tmp_path):
    """A module built against other declarations does not import, and so never calls what it does not mean."""
    pytest.importorskip("setuptools")
    pytest.importorskip("Cython")
    declarations = Path(fastbn.__file__).with_name("cython_api.pxd").read_text()
    package = tmp_path / "fastbn"
    package.mkdir()
    (package / "__init__.py").touch()
    assert "double count, int ddof" in declarations
    gone = "cdef int gone_float(int n) noexcept nogil"
    (package / "cython_api.pxd").write_text(
        declarations.replace("double count, int ddof", "int count, int ddof") + gone
    )
    calls = {"changed": "update_moving(0, NULL, NULL, NULL, NULL, 1, 0, 1)", "missing": "gone_float(1)"}
    for name, call in calls.items():
        source = f"from fastbn.cython_api cimport {call.split('(')[0]}\ndef f(): return {call}\n"
        (tmp_path / f"{name}.pyx").write_text(source)
    (tmp_path / "setup.py").write_text(blocks("py")[0].replace("tables.pyx", "*.pyx"))
    build_ext = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(build_ext, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    with pytest.raises((ImportError, TypeError), match=r"update_moving has wrong signature"):
        load("changed", next(tmp_path.glob("changed.*.so")))
    with pytest.raises((ImportError, TypeError), match=r"gone_float"):
        load("missing", next(tmp_path.glob("missing.*.so")))
