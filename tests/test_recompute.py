"""Exact statistics of a data set, for one layer and for all layers of a model."""

from __future__ import annotations

import builtins
import itertools

import cases
import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st

from fastbn import BatchNorm, recompute_statistics

C = 4


def data_set(rows=57, dtype=np.float64, seed=0):
    return cases.normal((rows, C), dtype, mean=3, deviation=2, seed=seed)


def parts(x, size):
    return [x[i : i + size] for i in range(0, len(x), size)]


@given(cuts=st.lists(st.integers(0, 57), max_size=6), ddof=st.sampled_from([0, 1]))
def test_any_split_gives_the_statistics_of_the_whole(cuts, ddof):
    x = data_set()
    edges = [0, *sorted(cuts), len(x)]
    batches = [x[a:b] for a, b in itertools.pairwise(edges)]
    bn = BatchNorm(C, ddof=ddof, dtype=np.float64)
    recompute_statistics(bn, iter(batches))
    np.testing.assert_allclose(bn.moving_mean, x.mean(0), rtol=1e-13)
    np.testing.assert_allclose(bn.moving_variance, x.var(0, ddof=ddof), rtol=1e-13)
    assert bn.batches == sum(len(b) > 0 for b in batches)


@pytest.mark.parametrize("shape", [(2, C), (4, 3)], ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_layer_that_is_not_built(shape, dtype):
    bn = BatchNorm(axis=(1, 3))
    x = cases.normal((5, shape[0], 6, shape[1]), dtype)
    recompute_statistics(bn, [x[:2], x[2:]])
    assert bn.moving_mean.shape == shape
    assert bn.moving_mean.dtype == dtype
    np.testing.assert_allclose(bn.moving_variance, x.var((0, 2)), rtol=1e-5)


def model(first, second):
    return lambda x: second(np.maximum(first(x), 0) + 0.1 * x)


@pytest.mark.parametrize("training", [True, False])
def test_all_layers_of_a_model(training):
    first, second = BatchNorm(C, momentum=0.5, dtype=np.float64), BatchNorm(C, dtype=np.float64)
    first.gamma, first.beta = cases.parameters(C)
    first.moving_mean = np.full(C, 99.0)
    batches = parts(data_set(60), 15)
    inner = []

    def forward(x):
        h = np.maximum(first(x, training), 0) + 0.1 * x
        inner.append(h)
        return second(h, training)

    recompute_statistics([first, second], batches, forward=forward)
    x, h = np.concatenate(batches), np.concatenate(inner)
    for bn, values in ((first, x), (second, h)):
        np.testing.assert_allclose(bn.moving_mean, values.mean(0), rtol=1e-12)
        np.testing.assert_allclose(bn.moving_variance, values.var(0), rtol=1e-12)
        assert bn.batches == 4
    wanted = np.maximum(ref.train(batches[0], first.gamma, first.beta).astype(float), 0) + 0.1 * batches[0]
    np.testing.assert_allclose(inner[0], wanted, rtol=1e-10, atol=1e-12)
    y = first(x)  # it infers again
    np.testing.assert_allclose(
        y, ref.normalize(x, x.mean(0), x.var(0), first.gamma, first.beta).astype(float), rtol=1e-9
    )


def test_a_frozen_layer_of_several_calls():
    """A layer that is called twice per batch learns from both; one that is frozen is set like any other."""
    bn = BatchNorm(C, trainable=False, dtype=np.float64)
    x = data_set(20)
    recompute_statistics([bn], [x], forward=lambda b: (bn(b), bn(2 * b)))
    both = np.concatenate([x, 2 * x])
    np.testing.assert_allclose(bn.moving_mean, both.mean(0), rtol=1e-12)
    np.testing.assert_allclose(bn.moving_variance, both.var(0), rtol=1e-12)
    assert bn.batches == 2
    assert not bn.trainable


@pytest.mark.parametrize("options", [
    {"virtual_batch_size": 7}, {"renorm": True}, {"adjustment": lambda shape: (5, 5)}, {"zero_debias": True},
    {"momentum": None},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("direct", [True, False])
def test_other_features_do_not_matter(options, direct):
    bn = BatchNorm(C, dtype=np.float64, **options)
    batches = parts(data_set(), 10)
    outputs = []
    if direct:
        recompute_statistics(bn, batches)
    else:
        recompute_statistics(bn, batches, forward=lambda x: outputs.append(bn(x, True)))
        np.testing.assert_allclose(outputs[0], ref.train(batches[0]).astype(float), rtol=1e-10, atol=1e-12)
    x = np.concatenate(batches)
    np.testing.assert_allclose(bn.moving_mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(bn.moving_variance, x.var(0), rtol=1e-12)
    if bn.renorm:
        np.testing.assert_allclose(bn.renorm_state["moving_stddev"], np.sqrt(x.var(0) + 1e-3), rtol=1e-12)


def test_it_is_the_average_of_equal_batches_plus_what_lies_between_them():
    """What an average over batches, as PyTorch's update_bn takes it, leaves out."""
    batches = parts(data_set(60), 10)
    exact, average = BatchNorm(C, dtype=np.float64), BatchNorm(C, momentum=None, dtype=np.float64)
    recompute_statistics(exact, batches)
    for x in batches:
        average(x, True)
    between = np.var([x.mean(0) for x in batches], 0)
    np.testing.assert_allclose(exact.moving_variance, average.moving_variance + between, rtol=1e-12)


def test_progress(capsys):
    pytest.importorskip("tqdm")
    recompute_statistics(BatchNorm(C), parts(data_set(), 10), progress=True)
    assert "6/6" in capsys.readouterr().err
    recompute_statistics(BatchNorm(C), parts(data_set(), 10))
    assert capsys.readouterr().err == ""


def test_progress_without_tqdm(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="progress=True needs tqdm"):
        recompute_statistics(BatchNorm(C), [], progress=True)


def spoiled():
    x = data_set(10)
    x[3, 1] = np.nan
    return x


def test_statistics_that_are_not_finite():
    bn, skipping, raising = (BatchNorm(C, on_nonfinite=o) for o in ("propagate", "skip", "raise"))
    recompute_statistics(bn, [spoiled()])
    assert np.isfinite(bn.moving_mean).tolist() == [True, False, True, True]
    recompute_statistics(skipping, [spoiled()])
    assert skipping.moving_mean[1] == 0
    assert skipping.moving_variance[1] == 1
    assert skipping.moving_mean[0] == bn.moving_mean[0]
    message = 'batches must have finite statistics with on_nonfinite="raise", got others in channel 1'
    with pytest.raises(ValueError, match=message):
        recompute_statistics(raising, [spoiled()])
    assert raising.batches == 0
    assert not raising.moving_mean.any()


def test_an_error_on_the_way_changes_nothing():
    first, second = BatchNorm(C), BatchNorm(C)
    state = first.state_dict()

    def forward(x):
        first(x)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recompute_statistics([first, second], [data_set()], forward=forward)
    for name, array in first.state_dict().items():
        assert np.array_equal(array, state[name])
    first(data_set(), True)
    assert first.batches == 1  # it learns again


@pytest.mark.parametrize(("layers", "batches", "options", "error", "message"), [
    (BatchNorm(C), [], {}, ValueError, "batches must bring values to every layer, got none for BatchNorm"),
    (BatchNorm(C), [np.empty((0, C))], {}, ValueError, "batches must bring values to every layer"),
    (BatchNorm(C), data_set(), {}, TypeError, "batches must be an iterable, got ndarray"),
    (BatchNorm(C), 3, {}, TypeError, "batches must be an iterable, got int"),
    (BatchNorm(C), [np.ones((3, C + 1))], {}, ValueError, "x must have 4 channels, got 5"),
    (BatchNorm(), [np.ones((3, C)), np.ones((3, C + 1))], {}, ValueError, "x must have 4 channels, got 5"),
    (BatchNorm(C), [np.ones((3, C), int)], {}, TypeError, "batches must be float16"),
    (BatchNorm(C, track=False), [], {}, ValueError, "layers must keep moving statistics, got BatchNorm"),
    ([BatchNorm(C)], [], {}, ValueError, "forward must be given with several layers, got None"),
    ([BatchNorm(C)], [], {"forward": 3}, TypeError, "forward must be callable, got int"),
    ([BatchNorm(C)] * 2, [], {"forward": len}, ValueError, "layers must name at least one layer, each once, got 2"),
    ([], [], {"forward": len}, ValueError, "layers must name at least one layer, each once, got 0"),
    (["bn"], [], {"forward": len}, TypeError, "layers must be BatchNorm, got str"),
    (3, [], {"forward": len}, TypeError, "layers must be an iterable, got int"),
    ([BatchNorm(C)], [data_set()], {"forward": len}, ValueError, "batches must bring values to every layer"),
    (BatchNorm(C), [], {"progress": 2}, TypeError, "progress must be a bool, got 2"),
])  # fmt: skip
def test_messages(layers, batches, options, error, message):
    with pytest.raises(error, match=message):
        recompute_statistics(layers, batches, **options)


# -- freezing ----------------------------------------------------------------------------------------------


def test_a_frozen_layer_infers_with_gradients():
    bn, x, dy = BatchNorm(C, dtype=np.float64), data_set(), data_set(seed=1)
    bn(x, True)
    state = bn.state_dict()
    assert bn.freeze() is bn
    assert bn.mode(True) == "inference"
    y = bn(x, True)
    ref.assert_same_bits(y, bn(x, False))
    dx = bn.backward(dy)
    np.testing.assert_allclose(dx, dy * bn.gamma / np.sqrt(bn.moving_variance + 1e-3), rtol=1e-12)
    assert set(bn.grads) == {"gamma", "beta"}
    for name, array in bn.state_dict().items():
        assert np.array_equal(array, state[name])
    assert bn.unfreeze() is bn
    assert bn.mode(True) == "train"


# -- older files -------------------------------------------------------------------------------------------


def test_a_file_of_version_0_1_0(tmp_path):
    """Its header has the arguments that there were; every other one has its default."""
    from fastbn.state import write_state

    config = {
        "axis": [1, 2], "layout": None, "momentum": 0.9, "epsilon": 1e-5, "center": True, "scale": False, "ddof": 1,
        "dtype": "float32", "trainable": False, "name": "old",
    }  # fmt: skip
    arrays = {n: np.full((2, 3), i, np.float32) for i, n in enumerate(("beta", "moving_mean", "moving_variance"))}
    write_state(tmp_path / "old", "batch_norm", {"config": config, "batches": 7}, arrays)
    bn = BatchNorm.load(tmp_path / "old")
    wanted = BatchNorm((2, 3), **(config | {"axis": (1, 2)}))
    assert repr(bn) == repr(wanted)
    assert bn.batches == 7
    assert [v.flat[0] for v in bn.variables] == [0, 1, 2]
    del config["ddof"]
    write_state(tmp_path / "bad", "batch_norm", {"config": config, "batches": 7}, arrays)
    with pytest.raises(ValueError, match="config must have exactly the arguments of a layer, got others"):
        BatchNorm.load(tmp_path / "bad")


def test_averages_in_a_file_are_finite(tmp_path):
    from fastbn.state import write_state

    bn = BatchNorm(C, renorm=True)
    arrays = bn.state_dict()
    fields = {"config": bn.get_config(), "batches": arrays.pop("batches")}
    arrays["renorm_mean"][0] = np.nan
    write_state(tmp_path / "bn", "batch_norm", fields, arrays)
    with pytest.raises(ValueError, match="renorm_mean must be finite"):
        BatchNorm.load(tmp_path / "bn")
