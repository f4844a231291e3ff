"""Every benchmark computes what its name says, and the suite's configuration fits the project."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import reference

ROOT = Path(__file__).resolve().parent.parent
PREFIXES = ("time_", "timeraw_", "peakmem_", "mem_", "track_")

sys.path.insert(0, str(ROOT))
from benchmarks import cases, operations, overhead, speed  # noqa: E402

SUITE = [
    (suite, name)
    for module in (speed, overhead)
    for suite in vars(module).values()
    if inspect.isclass(suite) and suite.__module__ == module.__name__ and not suite.__name__.startswith("_")
    for name in dir(suite)
    if name.startswith(PREFIXES)
]


TESTED_APART = (overhead.ImportTime, overhead.LayerOverhead)
INSTANCES = [
    pytest.param(suite, name, params, id="-".join((suite.__name__, name, *params)))
    for suite, name in SUITE
    if suite not in TESTED_APART
    for params in itertools.product(*suite.params)
]


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """The same number of axes and at most a few hundred values per channel: time is not the matter here."""
    small = {name: (min(n, 8), min(c, 7), *(min(s, 5) for s in rest)) for name, (n, c, *rest) in cases.SHAPES.items()}
    small["tiny"] = cases.SHAPES["tiny"]
    monkeypatch.setattr(cases, "SHAPES", small)


def expected(operation, case, library):
    c = case
    statistics = reference.moments(c.x, c.axis)
    gamma, beta, epsilon = c.gamma, c.beta, cases.EPSILON
    if operation == "inference":
        return [reference.normalize(c.x, c.moving_mean, c.moving_variance, gamma, beta, epsilon, c.axis)]
    if operation == "backward":
        return list(reference.backward_train(c.dy, c.x, gamma, epsilon, c.axis))
    if operation == "moments":
        return [statistics.mean, statistics.variance()]
    ddof = 1 if library == "torch" else 0  # PyTorch has no choice
    return [
        reference.train(c.x, gamma, beta, epsilon, c.axis),
        reference.moving(c.moving_mean, statistics.mean, cases.MOMENTUM),
        reference.moving(c.moving_variance, statistics.variance(ddof), cases.MOMENTUM),
    ]


def check(result, wanted):
    got = list(result) if isinstance(result, tuple) else [result]
    assert len(got) == len(wanted)
    for g, w in zip(got, wanted, strict=True):
        assert np.shape(g) == np.shape(w)
        np.testing.assert_allclose(np.asarray(g, np.float64), w.astype(np.float64), rtol=2e-5, atol=2e-5)


def test_the_suite_has_the_promised_themes():
    names = {suite.__name__ for suite, _ in SUITE}
    themes = {"TrainForward", "Inference", "Backward", "Moments", "CallOverhead", "ImportTime", "PeakMemory"}
    assert themes <= names


@pytest.mark.parametrize(("suite", "name", "params"), INSTANCES)
def test_benchmark_computes_what_it_says(suite, name, params):
    described = dict(zip(suite.param_names, params, strict=True))
    operation = described.get("operation") or suite.operation
    library = described.get("library", "fastbn")
    bench = suite()
    if library == "torch" and find_spec("torch") is None:
        with pytest.raises(NotImplementedError):
            bench.setup(*params)
        return
    bench.setup(*params)
    wanted = None if operation == "copy" else expected(operation, bench.case, library)
    if name.startswith("track_"):
        bench.repeats = 1  # a second training step would start from other moving statistics
        assert getattr(bench, name)(*params) > 0
        assert bench.track_bandwidth.unit == "GB/s"
    else:
        getattr(bench, name)(*params)
    if wanted is None:
        np.testing.assert_array_equal(bench.case.out, bench.case.x)
    else:
        check(bench.result, wanted)


def test_names_say_the_operation():
    for suite, name in SUITE:
        if hasattr(suite, "operation"):
            assert name == f"time_{suite.operation}"


def test_layouts_are_what_they_are_called():
    for shape in cases.SHAPES:
        planar, interleaved = (cases.Case(shape, layout, "float32") for layout in cases.LAYOUTS)
        assert planar.x.shape[planar.axis] == interleaved.x.shape[interleaved.axis] == planar.gamma.size
        assert interleaved.x.strides[interleaved.axis] == interleaved.x.itemsize
        assert planar.x.strides[planar.axis] > planar.x.itemsize


def test_layer_overhead():
    bench = overhead.LayerOverhead()
    bench.setup()
    c = bench.case
    bench.time_forward_backward()
    y, dx = bench.result
    check(y, [reference.train(c.x, c.gamma, c.beta, cases.EPSILON)])
    wanted = reference.backward_train(c.dy, c.x, c.gamma, cases.EPSILON)
    check((dx, bench.bn.grads["gamma"], bench.bn.grads["beta"]), list(wanted))


@pytest.mark.parametrize("module", overhead.ImportTime.params[0])
def test_import_time_imports_the_module(module):
    code = overhead.ImportTime().timeraw_import(module)
    code += f"\nimport sys; assert {module!r} in sys.modules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_library_that_is_missing_is_skipped_not_failed():
    case = cases.Case("tiny", "planar", "float32")
    with pytest.raises(NotImplementedError, match="not installed"):
        operations.prepare("train", "no_such_library", case)


def test_configuration():
    text = (ROOT / "benchmarks" / "asv.conf.json").read_text()
    conf = json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))
    assert conf["project"] == "fastbn"
    assert (ROOT / "benchmarks" / conf["repo"] / "pyproject.toml").exists()
    assert conf["benchmark_dir"] == "."
    # A build without isolation needs what the build system asks for.
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in wanted}
    assert names <= set(conf["matrix"]["req"])
    assert all("setup.py" not in command for command in conf["build_command"])
