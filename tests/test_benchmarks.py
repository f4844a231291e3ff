"""Every benchmark computes what its name says, and the suite's configuration fits the project."""

from __future__ import annotations

import inspect
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import reference

import fastbn

ROOT = Path(__file__).resolve().parent.parent
PREFIXES = ("time_", "timeraw_", "peakmem_", "mem_", "track_")

sys.path.insert(0, str(ROOT))
from benchmarks import (  # noqa: E402
    accuracy,
    builds,
    cases,
    compare,
    limit,
    operations,
    overhead,
    picture,
    regress,
    speed,
    sweep,
    weights,
)

SUITE = [
    (suite, name)
    for module in (speed, overhead)
    for suite in vars(module).values()
    if inspect.isclass(suite) and suite.__module__ == module.__name__ and not suite.__name__.startswith("_")
    for name in dir(suite)
    if name.startswith(PREFIXES)
]


TESTED_APART = (overhead.ImportTime, overhead.LayerOverhead, overhead.ActivationMemory)
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


UNITS = {"track_bandwidth": "GB/s", "track_limits": "limits", "track_extra_memory": "MB"}


def once(calls, seconds):
    """In place of `measure`: a second training step would start from other moving statistics."""
    times = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        times[name] = time.perf_counter() - start
    return times


def test_the_suite_has_the_promised_themes():
    names = {suite.__name__ for suite, _ in SUITE}
    themes = {"TrainForward", "Inference", "Backward", "Moments", "CallOverhead", "ImportTime", "PeakMemory"}
    themes |= {"Bandwidth", "Limits", "ExtraMemory"}
    assert themes <= names


@pytest.mark.parametrize(("suite", "name", "params"), INSTANCES)
def test_benchmark_computes_what_it_says(suite, name, params, monkeypatch):
    monkeypatch.setattr(speed, "measure", once)
    described = dict(zip(suite.param_names, params, strict=True))
    operation = described.get("operation") or suite.operation
    library = described.get("library", "fastbn")
    bench = suite()
    if library == "torch" and find_spec("torch") is None:
        with pytest.raises(NotImplementedError):
            bench.setup(*params)
        return
    try:
        bench.setup(*params)
    except NotImplementedError as error:
        assert suite is speed.Limits
        pytest.skip(str(error))
    wanted = None if operation == "copy" else expected(operation, bench.case, library)
    if name.startswith("track_"):
        bench.repeats = 1  # a second training step would start from other moving statistics
        value = getattr(bench, name)(*params)
        assert getattr(bench, name).unit == UNITS[name]
        assert value > 0 or name == "track_extra_memory"
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


def test_extra_memory_is_what_a_call_holds():
    try:
        held, kept = overhead.extra_memory(lambda: b"x" * (64 << 20))
        _, given_back = overhead.extra_memory(lambda: len(b"x" * (64 << 20)))
    except NotImplementedError as error:
        pytest.skip(str(error))
    assert len(held) == 64 << 20
    assert 63 < kept < 80
    assert 63 < given_back < 80


@pytest.mark.parametrize(("activation", "layout"), list(itertools.product(*overhead.ActivationMemory.params)))
def test_activation_memory(activation, layout):
    bench = overhead.ActivationMemory()
    bench.setup(activation, layout)
    bench.track_extra_memory(activation, layout)
    c, options = bench.case, {"epsilon": cases.EPSILON, "activation": activation}
    _, cache = fastbn.batch_norm_forward(c.x, gamma=c.gamma, beta=c.beta, axis=c.axis, training=True, **options)
    for got, wanted in zip(bench.result, fastbn.batch_norm_backward(c.dy, cache), strict=True):
        np.testing.assert_array_equal(got, wanted)
        assert got.dtype == wanted.dtype


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


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("operation", operations.OPERATIONS)
@pytest.mark.parametrize("library", operations.PEERS)
def test_peers_compute_the_same(library, operation, layout):
    """Contenders of `make compare` differ in speed only."""
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    for shape in ("conv2", "table"):
        case = cases.Case(shape, layout, "float32")
        wanted = expected(operation, case, library)
        try:
            call = operations.prepare(operation, library, case)
        except NotImplementedError:
            assert library in ("onnxruntime", "sklearn")
            continue
        check(call(), wanted)


EQUIVALENTS = [n for n in compare.ENTRIES if "-" in n]


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("name", EQUIVALENTS)
def test_pytorch_computes_the_same_as_fused_calls_and_small_types(name, layout):
    pytest.importorskip("torch")
    entry = compare.ENTRIES[name]
    results = []
    for library in ("torch", "fastbn"):
        case = cases.Case((4, 5, 6, 7), layout, entry.dtype)
        results.append(operations.prepare(entry.operation, library, case, **entry.options(case))())
    half = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(entry.dtype, 1e-5)
    if entry.operation == "train":  # the moving variance of PyTorch is divided by m - 1
        results = [result[:2] for result in results]
    for theirs, ours in zip(*results) if isinstance(results[0], tuple) else [results]:
        theirs, ours = (np.asarray(a, np.float64) for a in (theirs, ours))
        np.testing.assert_allclose(theirs, ours, rtol=2 * half, atol=4 * half)


needs_compiler = pytest.mark.skipif(limit.compiled() is None, reason="no C compiler with OpenMP is installed")


@needs_compiler
@pytest.mark.parametrize("writes", [0, 0.5, 1, 2, 4])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("nbytes", [1, 64, 200_000, 3_000_000])
def test_the_limit_moves_everything(nbytes, pair, writes):
    """Every cache line is written, with twice what was read: reads and stores are not optimized away."""
    calls = limit.calls(nbytes, pair=pair, writes=writes, threads=2)
    assert ("limit past the caches" in calls) == (nbytes > limit.SMALL and writes > 0)
    for call in calls.values():
        u, v, y = call.__defaults__[0]
        assert (v is not None) == pair
        assert u.nbytes >= nbytes
        for data in (u, v) if pair else (u,):
            data.view(np.float32)[:] = 3
        total = call()
        if writes:
            assert y.nbytes >= u.nbytes * writes
            written = y.view(np.float32)[: int(u.size // 64 * writes) * 16]
            assert (written == (12 if pair else 6)).all()
        else:
            assert total > 0


def test_limit_without_a_compiler(monkeypatch):
    monkeypatch.setattr(limit, "compiled", lambda: None)
    assert limit.calls(1000) == {}
    assert limit.least({"fastbn": 3.0}) == float("inf")


def test_least():
    times = {"limit": 3.0, "limit past the caches": 2.0, "fastbn": 4.0}
    assert limit.least(times) == 2
    assert times == {"fastbn": 4.0}


def test_compare_prints_a_row_for_each_case(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "set_threads", lambda threads: None)
    arguments = ["--ops", "train,moments", "--cases", "tiny,single", "--peers", "numpy", "--seconds", "0.001"]
    compare.main([*arguments, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(r["operation"], r["case"]) for r in rows] == [
        (name, case) for name in ("train", "moments") for case in ("tiny", "single", "single")
    ]
    assert all(r["fastbn"] > 0 and r["peers"]["numpy"] > 0 and r["best"] == "numpy" for r in rows)
    printed = capsys.readouterr().out
    assert printed.count("| train | ") == 3
    assert "geometric means" in printed
    with pytest.raises(SystemExit, match="unknown case nothing"):
        compare.main(["--cases", "nothing"])


def test_what_fastbn_does_not_have_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(compare.ENTRIES, "nothing", compare.Entry("train", options=lambda case: {"no_such": 1}))
    assert compare.available(compare.ENTRIES["train"])
    assert compare.table(["nothing"], compare.cases_of("tiny"), 0.001, 1, []) == []
    assert "not in this version" in capsys.readouterr().out


def test_sweep_is_drawn(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sweep, "set_threads", lambda threads: None)
    monkeypatch.setattr(sweep, "MAP_VALUES", 1 << 10)
    monkeypatch.setattr(sweep, "BY_THREADS", (2, 3, 4, 5))
    monkeypatch.setattr(sweep, "measure", once)
    results = sweep.run(list(sweep.PARTS), list(sweep.OPERATIONS), 0.001, 2, (0, 1e-5), ["numpy"])
    assert {r["operation"] for r in results["sizes"]} == set(sweep.OPERATIONS)
    assert results["peak"] > 0
    files = sweep.draw(results, tmp_path)
    assert [file.stem for file in files] == ["bandwidth", "growth", "threads", "roofline", "shapes"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_lines_of_a_sweep():
    """Contenders that were not measured at a size leave a gap; the limit comes first."""
    rows = [
        {"operation": "train", "nbytes": 1024, "moved": 2048, "times": {"limit": 1.0, "fastbn": 2.0, "numpy": 4.0}},
        {"operation": "train", "nbytes": 4096, "moved": 8192, "times": {"limit": 2.0, "fastbn": 4.0}},
        {"operation": "inference", "nbytes": 1024, "moved": 2048, "times": {"fastbn": 1.0}},
    ]
    sizes, lines = sweep.series(rows, "train", sweep.rate)
    assert sizes == [1024, 4096]
    assert list(lines) == ["limit", "fastbn", "NumPy"]
    assert lines["fastbn"] == pytest.approx([1.024, 2.048])
    assert lines["NumPy"][0] == pytest.approx(0.512)
    assert math.isnan(lines["NumPy"][1])


@pytest.mark.parametrize("fresh", [False, True])
def test_costs_of_weights_are_those_of_different_sums(fresh):
    """The plain calls compute what the reference does, and no form what another one does."""
    case = cases.Case((6, 5, 4, 7), "planar", "float32")
    forms = weights.calls(case, fresh)
    assert (forms["train"]["plain"]() is case.out) == (forms["backward"]["plain"]()[0] is case.out) == (not fresh)
    assert {*forms["train"]} == {*forms["backward"]} == {"plain", *weights.FORMS}
    results = {}
    for form in forms["train"]:
        y = forms["train"][form]().copy()
        results[form] = y, *(a.copy() for a in forms["backward"][form]())
    wanted = [expected("train", case, "fastbn")[0], *expected("backward", case, "fastbn")]
    check(results["plain"], wanted)
    digests = {tuple(a.tobytes() for a in result) for result in results.values()}
    assert len(digests) == len(results)


def test_costs_of_weights_are_printed(capsys):
    weights.main(["--cases", "3x4,conv5", "--rounds", "2", "--seconds", "0.001"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 8
    assert [row.split(" | ")[0] for row in printed[2:]] == ["| train", "| backward"] * 3
    assert all(float(cell) > 0.1 for row in printed[2:] for cell in row.strip("| ").split(" | ")[4:])
    weights.main(["--cases", "dense", "--rounds", "1", "--seconds", "0.001", "--fresh", "--json"])
    assert {*weights.FORMS} < {*json.loads(capsys.readouterr().out)[0]}


def test_accuracy_is_measured_and_drawn(tmp_path, capsys):
    accuracy.main(["--points", "3", "--json", str(tmp_path / "accuracy.json")])
    printed = capsys.readouterr().out
    assert "largest error of variance, in ulp" in printed
    found = json.loads((tmp_path / "accuracy.json").read_text())
    assert found["condition"] == sorted(found["condition"])
    assert found["condition"][0] == pytest.approx(1, abs=0.01)
    assert found["condition"][-1] > 1e6
    assert max(found["variance"]["fastbn"]) < 0.1
    assert max(found["y"]["fastbn"]) < 20
    assert found["y"]["E[x²] - E[x]²"][-1] > 1e6
    pytest.importorskip("matplotlib")
    path = accuracy.draw(found, tmp_path / "new" / "accuracy.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    times = {"limit": 1.0, "fastbn": 2.0, "torch": 9.0}
    rows = [{"operation": "train", "nbytes": 1024, "moved": 2048, "threads": 1, "times": times}]
    (tmp_path / "sizes.json").write_text(json.dumps({"sizes": rows}))
    picture.main([str(tmp_path / "start"), str(tmp_path / "accuracy.json"), str(tmp_path / "sizes.json")])
    assert sorted(file.name for file in (tmp_path / "start").iterdir()) == ["error.png", "speed.png"]


def test_sweep_in_parts_is_put_together(tmp_path):
    parts = {
        "large": {"sizes": [{"nbytes": 4096}], "threads": [{"threads": 1}], "peak": 2.0},
        "small": {"sizes": [{"nbytes": 1024}], "shapes": []},
    }
    for name, part in parts.items():
        (tmp_path / name).write_text(json.dumps(part))
    assert sweep.together([tmp_path / name for name in parts]) == {
        "sizes": [{"nbytes": 1024}, {"nbytes": 4096}],
        "threads": [{"threads": 1}],
        "peak": 2.0,
        "shapes": [],
    }


def test_sizes_of_the_sweep():
    found = list(sweep.sizes(0, 2))
    assert found[0] == 1024
    assert [*sweep.sizes(0, 0.001), *sweep.sizes(0.001, 2)] == found
    assert all(math.prod(sweep.shape_of(n)) * 4 <= n for n in found)
    assert all(math.prod(sweep.shape_of(n)) * 4 > 0.9 * n for n in found)


def installed(folder):
    """A link to the fastbn that is tested, as another build; the modules of an editable install lie apart."""
    root, modules = Path(fastbn.__file__).parent, Path(find_spec("fastbn.kernels._planar_base").origin).parent
    if not list((root / "kernels").glob("_planar_base.*so")):
        shutil.copytree(root, folder / "fastbn")
        for built in modules.glob("*.so"):
            shutil.copy(built, folder / "fastbn" / "kernels")
    else:
        (folder / "fastbn").symlink_to(root)


REGRESS = ("--ops", "train", "--cases", "tiny", "--seconds", "0.02", "--pairs", "3", "--threads", "1")


def test_regress_compares_two_builds(tmp_path, capfd):
    installed(tmp_path)
    assert regress.main([str(tmp_path), "--threshold", "1000", *REGRESS]) == 0
    printed = capfd.readouterr().out
    assert f"old: {tmp_path.resolve()}" in printed
    assert "| train | tiny | interleaved |" in printed
    assert regress.main([str(tmp_path), "--threshold", "0.001", "--cold", "0.1", *REGRESS]) == 1
    assert "slower" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "rows"),
    [
        (
            ("--mean", "100", "--cases", "3x4,2x3x2x5"),
            ("| train | 3x4 | interleaved |", "| train | 2x3x2x5 | planar |"),
        ),
        (("--between", "--ops", "train,backward,moments"), ("| backward | tiny | interleaved |",)),
        (("--of", "20"), ("| train | tiny | interleaved |",)),
        (("--past", "16"), ("| train | tiny | interleaved |",)),
    ],
    ids=lambda value: value[0],
)
def test_regress_in_other_places(options, rows, tmp_path, capfd):
    installed(tmp_path)
    assert regress.main([str(tmp_path), "--threshold", "1000", *REGRESS, *options]) == 0
    printed = capfd.readouterr().out
    assert all(row in printed for row in rows)


@pytest.mark.parametrize("layout", ["planar", "interleaved"])
def test_channels_of_wider_arrays(layout):
    plain, case = (cases.Case((4, 3, 5, 2), layout, "float32") for _ in range(2))
    regress.take_channels(case, 7)
    assert operations.prepare("train", "fastbn", case)()[0] is case.out
    operations.prepare("train", "fastbn", plain)()
    assert np.array_equal(case.out, plain.out)
    assert case.x.base.size == 4 * 7 * 5 * 2
    assert np.count_nonzero(case.out.base) == plain.out.size


@pytest.mark.parametrize("past", [0, 16, 60])
def test_arrays_behind_the_beginning_of_a_line(past):
    plain, case = (cases.Case((4, 3), "interleaved", "float32") for _ in range(2))
    regress.behind_lines(case, past)
    assert {getattr(case, name).ctypes.data % regress.LINE for name in ("x", "dy", "out")} == {past}
    assert np.array_equal(case.x, plain.x)
    assert np.array_equal(case.dy, plain.dy)
    assert operations.prepare("train", "fastbn", case)()[0] is case.out


@pytest.mark.parametrize(("operation", "given"), [("train", "x"), ("backward", "dy")])
def test_a_call_between_layers_writes_what_it_reads(operation, given):
    case = cases.Case((4, 3), "interleaved", "float32")
    call = regress.between_layers(operations.prepare(operation, "fastbn", case), case, operation)
    call()
    expected = case.out.copy()
    getattr(case, given)[...] = case.out[...] = 0
    call()
    assert np.array_equal(case.out, expected)


def test_regress_wants_a_build(tmp_path):
    with pytest.raises(FileNotFoundError, match="no installed fastbn"):
        builds.use(tmp_path)


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
