"""The command line: what every command writes, and where."""

import io
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
from commands import COMMAND, args, run, saved

import fastbn
from fastbn import cli, stream
from fastbn.cli import main
from fastbn.npy import NpyFile


@pytest.fixture
def data(tmp_path, rng):
    return saved(tmp_path, rng)


# -- info ----------------------------------------------------------------------------------------------------


def test_info():
    result = run("info")
    assert result.returncode == 0
    assert fastbn.__version__ in result.stdout
    assert "thread" in result.stdout
    assert not result.stderr


def test_info_as_json():
    result = run("info", "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(fastbn.show_config(mode="dicts")))


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastbn {fastbn.__version__}\n"
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("info", "stats", "apply", "merge", "demo"))


# -- stats, apply, merge -------------------------------------------------------------------------------------


def test_stats_then_apply_standardizes(data, tmp_path, capsys):
    path, x = data
    assert main(args("stats", path, "-o", tmp_path / "m.npz")) == 0
    assert "5 channels of 1000 values each" in capsys.readouterr().out
    moments, axis = stream.load_moments(tmp_path / "m.npz")
    assert axis == -1
    assert moments.count == 1000
    np.testing.assert_allclose(moments.mean, x.astype(float).mean(0), rtol=1e-9)
    np.testing.assert_allclose(moments.variance(), x.astype(float).var(0), rtol=1e-8)

    assert main(args("apply", tmp_path / "m.npz", path, "-o", tmp_path / "y.npy", "--epsilon", "0")) == 0
    y = np.load(tmp_path / "y.npy")
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, fastbn.normalize(x, moments.mean, moments.variance(), epsilon=0.0))
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(0), 1, atol=1e-5)


def test_the_stored_axis_is_the_default_of_apply(tmp_path, rng):
    x = rng.standard_normal((4, 3, 7, 6))
    np.save(tmp_path / "x.npy", x)
    assert main(args("stats", tmp_path / "x.npy", "--axis", 1, "-o", tmp_path / "m.npz")) == 0
    assert main(args("apply", tmp_path / "m.npz", tmp_path / "x.npy", "-o", tmp_path / "y.npy")) == 0
    expected = (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-3)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected, atol=1e-12)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_apply_a_saved_layer(tmp_path, rng, layout):
    x = rng.standard_normal((4, 3, 5, 6)).astype(np.float32)
    layer = fastbn.BatchNorm(layout=layout, epsilon=0.1)
    layer(x, training=True)
    layer.gamma[...] = 3
    layer.beta[...] = -1
    layer.save(tmp_path / "bn.npz")
    np.save(tmp_path / "x.npy", x)
    assert main(args("apply", tmp_path / "bn.npz", tmp_path / "x.npy", "-o", tmp_path / "y.npy")) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), layer(x))


@pytest.mark.parametrize("activation", ["relu", "relu6", "silu", "gelu_tanh", "leaky_relu", ("leaky_relu", 0.5)])
def test_apply_a_layer_with_an_activation(tmp_path, data, activation):
    path, x = data
    layer = fastbn.BatchNorm(5, momentum=0, activation=activation)
    layer(x, training=True)
    layer.save(tmp_path / "bn.npz")
    assert main(args("apply", tmp_path / "bn.npz", path, "-o", tmp_path / "y.npy")) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), layer(x))


@pytest.mark.parametrize("policy", ["propagate", "omit", "raise"])
def test_nan_does_what_it_does_in_the_layer(tmp_path, data, capsys, policy):
    path, x = data
    layer = fastbn.BatchNorm(5, nan_policy=policy)
    layer(x, training=True)
    layer.save(tmp_path / "bn.npz")
    apply = args("apply", tmp_path / "bn.npz", path, "-o", tmp_path / "y.npy")
    assert main(apply) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), layer(x))
    (tmp_path / "y.npy").unlink()
    x[3, 2] = np.nan
    np.save(path, x)
    if policy != "raise":
        assert main(apply) == 0
        np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), layer(x))
        return
    with pytest.raises(ValueError, match="NaN"):
        layer(x)
    assert main(apply) == 1
    message = f'fastbn: error: {path} must have no NaN with nan_policy="raise", got some in channel 2\n'
    assert capsys.readouterr().err == message
    assert sorted(os.listdir(tmp_path)) == ["bn.npz", "x.npy"]


@pytest.mark.parametrize(
    "options", [{"layout": "NCHW"}, {"layout": "channels_first"}, {"axis": 1}, {"axis": 3}], ids=str
)
def test_an_axis_that_is_given_stands_for_that_of_the_layer(tmp_path, rng, options):
    layer = fastbn.BatchNorm(3, **options)
    layer.moving_mean[...] = [1, 2, 3]
    layer.save(tmp_path / "bn.npz")
    x = rng.standard_normal((3, 7))
    np.save(tmp_path / "x.npy", x)
    apply = args("apply", tmp_path / "bn.npz", tmp_path / "x.npy", "-o", tmp_path / "y.npy")
    assert main(apply) == 1  # by the layer's own axis, which x does not have or which is of another length
    assert main([*apply, "--axis", "-2"]) == 0
    expected = fastbn.normalize(x, layer.moving_mean, layer.moving_variance, axis=0)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected)


def test_a_layer_of_several_axes_has_no_single_one(tmp_path, rng, capsys):
    layer = fastbn.BatchNorm(axis=(1, 2))
    x = rng.standard_normal((4, 3, 5))
    layer(x, training=True)
    layer.save(tmp_path / "bn.npz")
    np.save(tmp_path / "x.npy", x)
    apply = args("apply", tmp_path / "bn.npz", tmp_path / "x.npy", "-o", tmp_path / "y.npy")
    for command in (apply, [*apply, "--axis", "1"]):
        assert main(command) == 1
        assert "one channel axis" in capsys.readouterr().err


def test_merge_is_the_whole(tmp_path, data):
    path, x = data
    for name, part in zip("abc", np.split(x, [10, 700])):
        np.save(tmp_path / f"{name}.npy", part)
        assert main(args("stats", tmp_path / f"{name}.npy", "-o", tmp_path / f"{name}.npz", "--quiet")) == 0
    assert main(args("merge", *(tmp_path / f"{name}.npz" for name in "abc"), "-o", tmp_path / "all.npz")) == 0
    merged, axis = stream.load_moments(tmp_path / "all.npz")
    whole = stream.moments_of_file(path)
    assert axis == -1
    assert merged.count == whole.count
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-9)


def test_merged_axes_that_differ_must_be_given(tmp_path, data, capsys):
    path, x = data
    np.save(tmp_path / "t.npy", x.T)
    main(args("stats", path, "-o", tmp_path / "a.npz"))
    main(args("stats", tmp_path / "t.npy", "--axis", 0, "-o", tmp_path / "b.npz"))
    assert main(args("merge", tmp_path / "a.npz", tmp_path / "b.npz", "-o", tmp_path / "c.npz")) == 0
    apply = args("apply", tmp_path / "c.npz", path, "-o", tmp_path / "y.npy")
    assert main(apply) == 2
    assert "--axis" in capsys.readouterr().err
    assert main([*apply, "--axis", "1"]) == 0


def test_nan_stays_within_its_channel(tmp_path, data):
    path, x = data
    x[3, 2] = np.nan
    np.save(path, x)
    assert main(args("stats", path, "-o", tmp_path / "m.npz")) == 0
    assert main(args("apply", tmp_path / "m.npz", path, "-o", tmp_path / "y.npy")) == 0
    assert np.isnan(np.load(tmp_path / "y.npy")).any(0).tolist() == [False, False, True, False, False]


def test_quiet_and_where_things_go(tmp_path, data):
    path, _ = data
    loud = run("stats", path, "-o", tmp_path / "m.npz")
    assert loud.stdout.count("\n") == 7
    assert loud.stderr == ""  # no bar where there is no terminal
    quiet = run("stats", path, "-o", tmp_path / "m.npz", "--quiet")
    assert quiet.stdout == quiet.stderr == ""


def test_a_bar_on_a_terminal(tmp_path, data, monkeypatch, capsys):
    pytest.importorskip("tqdm")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert main(args("stats", data[0], "-o", tmp_path / "m.npz")) == 0
    assert "stats: 100%" in terminal.getvalue()
    assert "stats:" not in capsys.readouterr().out


def test_no_bar_without_tqdm(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert main(args("stats", data[0], "-o", tmp_path / "m.npz", "--quiet")) == 0
    with cli._progress(10, "x", quiet=False) as progress:
        assert progress is None


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(tmp_path, data, closed):
    path, x = data

    def shell(*parts):
        command = f"{shlex.join([*COMMAND, *args(*parts)])} {closed}"
        return subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120, check=False)

    apply = ["apply", tmp_path / "m.npz", path, "-o", tmp_path / "y.npy"]
    merge = ["merge", tmp_path / "m.npz", tmp_path / "m.npz", "-o", tmp_path / "c.npz"]
    for parts in (["info"], ["stats", path, "-o", tmp_path / "m.npz"], apply, merge):
        done = shell(*parts)
        assert (done.returncode, done.stderr) == (0, "")
    moments, _ = stream.load_moments(tmp_path / "m.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), fastbn.normalize(x, moments.mean, moments.variance()))
    assert stream.load_moments(tmp_path / "c.npz")[0].count == 2000
    done = shell("stats", tmp_path / "no.npy", "-o", tmp_path / "n.npz")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == ("2>" not in closed)


def test_header_of_a_file(data):
    found = NpyFile.open(data[0])
    assert (found.shape, found.dtype, found.fortran_order) == ((1000, 5), np.float32, False)
    assert found.nbytes == 20000
