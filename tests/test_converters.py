"""Weights of other frameworks, as dicts of arrays: names, conventions, shapes, and every message. No framework needed.

The live modules of the frameworks have their tests in `tests/parity`.
"""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from weights_cases import (
    BETA,
    GAMMA,
    LINEN,
    MEAN,
    MODEL,
    ONNX,
    STATE,
    TF1,
    TORCH,
    VARIANCE,
    C,
    layer,
    prefixed,
    without,
)

import fastbn
from fastbn.compat import (
    flax_arguments,
    from_flax,
    from_flax_many,
    from_keras,
    from_onnx,
    from_onnx_many,
    from_tf1,
    from_tf1_many,
    from_torch,
    from_torch_many,
    load_safetensors,
    save_safetensors,
    tf_contrib,
    tf_layers,
    to_flax,
    to_onnx,
    to_torch,
    torch_arguments,
)

SOURCES = {
    "torch": lambda: from_torch(TORCH),
    "keras": lambda: from_keras(list(STATE.values())),
    "tf1": lambda: from_tf1(TF1),
    "onnx": lambda: from_onnx(ONNX),
    "flax": lambda: from_flax(LINEN),
}


@pytest.mark.parametrize("source", SOURCES)
def test_arrays_arrive_by_their_names_in_memory_of_their_own(source):
    bn = SOURCES[source]()
    for name, value in STATE.items():
        np.testing.assert_array_equal(getattr(bn, name), value)
        assert not np.shares_memory(getattr(bn, name), value)
        assert getattr(bn, name).dtype == np.float32


@pytest.mark.parametrize(
    ("source", "momentum", "epsilon", "ddof", "axis"),
    [
        ("torch", 0.9, 1e-5, 1, 1),
        ("keras", 0.99, 1e-3, 0, -1),
        ("tf1", 0.99, 1e-3, 0, -1),
        ("onnx", 0.9, 1e-5, 0, 1),
        ("flax", 0.99, 1e-5, 0, -1),
    ],
)
def test_conventions_are_those_of_the_framework(source, momentum, epsilon, ddof, axis):
    bn = SOURCES[source]()
    assert (bn.momentum, bn.epsilon, bn.ddof, bn.axis) == (momentum, epsilon, ddof, axis)


def test_training_goes_on_with_the_share_of_pytorch(rng):
    x = rng.standard_normal((5, C)).astype(np.float32)
    bn = from_torch(TORCH, momentum=0.3)
    bn(x, training=True)
    np.testing.assert_allclose(bn.moving_mean, 0.7 * MEAN + 0.3 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(bn.moving_variance, 0.7 * VARIANCE + 0.3 * x.var(0, ddof=1), rtol=1e-5)
    assert bn.batches == 8


def test_average_of_all_batches(rng):
    x = rng.standard_normal((5, C)).astype(np.float32)
    bn = from_torch(TORCH, momentum=None)
    assert bn.momentum is None
    bn(x, training=True)
    np.testing.assert_allclose(bn.moving_mean, MEAN + (x.mean(0) - MEAN) / 8, rtol=1e-5)
    assert torch_arguments(bn)["momentum"] is None
    assert to_torch(bn)["num_batches_tracked"] == 8


@pytest.mark.parametrize("momentum", (0.1, 0.01, 0.003, 0.25, 0.0, 1.0))
def test_momentum_survives_both_swaps(momentum):
    assert torch_arguments(from_torch(TORCH, momentum=momentum))["momentum"] == momentum


def test_torch_layers_with_less():
    assert not from_torch(without(TORCH, "weight", "bias")).scale
    assert not from_torch(without(TORCH, "bias")).center
    assert from_torch(without(TORCH, "num_batches_tracked")).batches == 0  # as before PyTorch 0.4.1
    untracked = from_torch(without(TORCH, "running_mean", "running_var", "num_batches_tracked"))
    assert not untracked.track
    x = np.arange(12, dtype=np.float32).reshape(4, C)
    np.testing.assert_array_equal(untracked(x), untracked(x, training=True))
    assert list(to_torch(untracked)) == ["weight", "bias"]
    assert torch_arguments(untracked)["track_running_stats"] is False


def test_torch_and_back():
    back = to_torch(from_torch(TORCH), prefix="layer1.bn")
    assert list(back) == [f"layer1.bn.{name}" for name in TORCH]
    for name, value in TORCH.items():
        np.testing.assert_array_equal(back[f"layer1.bn.{name}"], value)
        assert back[f"layer1.bn.{name}"].dtype == value.dtype


def test_pytorch_has_no_bias_without_weight():
    state = to_torch(layer(scale=False))
    np.testing.assert_array_equal(state["weight"], np.ones(C))
    assert torch_arguments(layer(center=False))["bias"] is False
    assert torch_arguments(layer(center=False, scale=False))["affine"] is False


def test_float64_stays_and_float16_becomes_float32():
    wide = {k: v.astype(np.float64) for k, v in without(TORCH, "num_batches_tracked").items()}
    assert from_torch(wide).gamma.dtype == np.float64
    assert from_torch(wide, dtype="float32").gamma.dtype == np.float32
    assert from_torch({k: v.astype(np.float16) for k, v in wide.items()}).gamma.dtype == np.float32


def test_models_of_torch():
    assert {n: bn.scale for n, bn in from_torch_many(MODEL).items()} == {"layer1.bn": True, "layer1.bn2": False}
    assert list(from_torch_many(MODEL, "layer1.bn")) == ["layer1.bn"]
    assert list(from_torch_many(TORCH)) == [""]
    assert from_torch_many(MODEL, "layer2") == {}
    assert from_torch(MODEL, "layer1.bn.").batches == 7


def test_tf1_scopes(rng):
    variables = TF1 | prefixed(without(STATE, "gamma"), "net/bn_1/") | {"net/dense/kernel:0": np.ones((2, 3))}
    layers = from_tf1_many(variables, momentum=0.9, ddof=1)
    assert {n: (bn.scale, bn.momentum, bn.ddof) for n, bn in layers.items()} == {
        "net/bn": (True, 0.9, 1),
        "net/bn_1": (False, 0.9, 1),
    }
    assert list(from_tf1_many(variables, "net/bn_1/")) == ["net/bn_1"]
    assert from_tf1(variables, "net/bn").scale


def test_tf1_leaves_out_other_variables():
    inner = prefixed(without(STATE, "gamma"), "net/bn/inner/")
    variables = TF1 | inner | {"net/bn/weights:0": np.ones((2, 3)), "net/bn/kernel/Adam:0": np.ones((2, 3))}
    assert {n: bn.scale for n, bn in from_tf1_many(variables).items()} == {"net/bn": True, "net/bn/inner": False}
    np.testing.assert_array_equal(from_tf1(variables, "net/bn").gamma, GAMMA)
    root = STATE | TF1 | {"global_step:0": np.array(7)}
    assert list(from_tf1_many(root)) == ["", "net/bn"]
    np.testing.assert_array_equal(from_tf1(root).gamma, GAMMA)
    old = {"renorm_mean": MEAN, "renorm_mean_weight": 0.5, "renorm_stddev": GAMMA, "renorm_stddev_weight": 0.5}
    old |= {f"{name}/ExponentialMovingAverage": value for name, value in old.items()}
    assert from_tf1(TF1 | prefixed(old, "net/bn/")).renorm_scheme == "tf1"


@pytest.mark.parametrize("scope", ("net/bn", "imported/net/bn"))
def test_tf1_zero_debias_is_below_the_scope_of_the_mean(scope):
    """TensorFlow's names have the whole scope twice; a graph imported into a scope has one more before."""
    debiased = {f"{scope}/net/bn/moving_mean/biased:0": MEAN, f"{scope}/net/bn/moving_mean/local_step:0": 4.0}
    bn = from_tf1(prefixed(STATE, f"{scope}/") | debiased)
    assert (bn.zero_debias, bn.batches) == ("mean", 4)
    assert from_tf1_many(TF1 | debiased)["net/bn"].zero_debias == (scope == "net/bn" and "mean")


def test_tf1_takes_the_variables_of_tf_contrib():
    for scope in (None, "net/inner"):
        tf_layers.reset_default_graph()
        x = np.eye(C, dtype=np.float32)
        tf_contrib.batch_norm(x, scope=scope, zero_debias_moving_mean=True, updates_collections=None)
        bn = from_tf1(tf_layers.global_variables())
        assert (bn.zero_debias, bn.batches) == ("mean", 1)
        np.testing.assert_allclose(bn.moving_mean, x.mean(0), rtol=1e-5)
    tf_layers.reset_default_graph()


def test_tf1_optimizer_slots_are_left_out():
    slots = {"net/bn/gamma/Adam": GAMMA, "net/bn/gamma/Adam_1": GAMMA, "net/bn/beta/Momentum:0": GAMMA}
    np.testing.assert_array_equal(from_tf1(TF1 | slots).gamma, GAMMA)


def test_tf1_renorm_and_zero_debias():
    old = {"renorm_mean": MEAN, "renorm_mean_weight": 0.5, "renorm_stddev": GAMMA, "renorm_stddev_weight": 0.5}
    bn = from_tf1(TF1 | prefixed(old, "net/bn/"), renorm_momentum=0.9, renorm_clipping={"rmax": 2.0})
    assert (bn.renorm_scheme, bn.renorm_momentum, bn.renorm_clipping) == ("tf1", 0.9, {"rmax": 2.0})
    assert bn.renorm_state["renorm_mean_weight"] == 0.5
    new = {"moving_stddev": GAMMA, "renorm_mean": MEAN, "renorm_stddev": GAMMA}
    assert from_tf1(TF1 | prefixed(new, "net/bn/")).renorm_scheme == "keras"
    debiased = {"net/bn/moving_mean/biased": MEAN, "net/bn/moving_mean/local_step": np.float32(4)}
    bn = from_tf1(TF1 | debiased)
    assert (bn.zero_debias, bn.batches) == ("mean", 4)


def test_tf1_axes_and_virtual_batches():
    grid = np.arange(6, dtype=np.float32).reshape(1, 2, 1, 3)
    np.testing.assert_array_equal(from_tf1(dict.fromkeys(STATE, grid), axis=(1, 3)).gamma, grid.reshape(2, 3))
    np.testing.assert_array_equal(from_tf1(dict.fromkeys(STATE, grid), axis=(3, 1)).gamma, grid.reshape(2, 3).T)
    virtual = {name: value.reshape(1, 1, C) for name, value in STATE.items()}
    np.testing.assert_array_equal(from_tf1(virtual).gamma, GAMMA)


class Variable:
    def __init__(self, name, value):
        self.name, self.value = name, value


class Reader:
    """Like a reader of a checkpoint, which must not read what is not asked for."""

    def get_variable_to_shape_map(self):
        return {"a/" + n: list(v.shape) for n, v in STATE.items()} | {"huge": [10**9], "a/gamma/Adam": [C]}

    def get_tensor(self, name):
        return STATE[name.removeprefix("a/")]


def test_tf1_variables_and_checkpoints():
    for source in ([Variable(f"a/{n}:0", v) for n, v in STATE.items()], Reader()):
        bn = from_tf1(source, "a")
        np.testing.assert_array_equal(bn.moving_variance, VARIANCE)
    assert list(from_tf1_many(Reader())) == ["a"]


def test_flax_there_and_back():
    bn = from_flax({name: {"block": {"bn": tree}} for name, tree in LINEN.items()}, "block/bn", momentum=0.5)
    assert bn.momentum == 0.5
    back = to_flax(bn, path="block/bn")
    assert list(back["params"]["block"]["bn"]) == ["scale", "bias"]
    np.testing.assert_array_equal(back["batch_stats"]["block"]["bn"]["var"], VARIANCE)
    assert set(to_flax(bn, api="nnx")) == {"scale", "bias", "mean", "var"}
    assert "params" not in to_flax(layer(center=False, scale=False))
    assert list(from_flax_many({"a": to_flax(bn, api="nnx"), "b": {"kernel": MEAN}})) == ["a"]
    assert flax_arguments(bn) == {
        "momentum": 0.5, "epsilon": 1e-5, "axis": -1, "use_scale": True, "use_bias": True,
    }  # fmt: skip


@pytest.mark.parametrize("collection", ("cache", "intermediates", "perturbations"))
def test_flax_collections_beside(collection):
    """Whatever else a model keeps is no layer, even where it has a layer's names."""
    variables = {name: {"bn": tree} for name, tree in LINEN.items()} | {collection: {"bn": {"mean": 0, "other": 1}}}
    for source in (variables, dict(reversed(variables.items()))):
        assert {n: (bn.scale, bn.center) for n, bn in from_flax_many(source).items()} == {"bn": (True, True)}
        np.testing.assert_array_equal(from_flax(source, "bn").moving_mean, MEAN)
    without_params = without(variables, "params")
    assert {n: (bn.scale, bn.center) for n, bn in from_flax_many(without_params).items()} == {"bn": (False, False)}


@pytest.mark.parametrize(
    ("axis", "ordered", "shape"),
    [
        ((3, 1), (1, 3), (5, 3, 4, 2)),
        ((1, 3), (1, 3), (5, 2, 4, 3)),
        ((-1, -3), (-3, -1), (5, 3, 4, 2)),
        ((-1, 1), (1, -1), (5, 3, 4, 2)),
        ((-2, 0), (0, -2), (3, 4, 2, 5)),
        ((2, 3, 1), (1, 2, 3), (5, 4, 2, 3)),  # an order that is not its own inverse
    ],
)
def test_flax_sorts_axes(axis, ordered, shape, rng):
    bn = fastbn.BatchNorm((2, 3, 4)[: len(axis)], axis=axis)
    for name in STATE:
        setattr(bn, name, rng.uniform(1, 2, bn.moving_mean.shape))
    x = rng.standard_normal(shape).astype(np.float32)
    assert flax_arguments(bn)["axis"] == ordered
    for variables in (to_flax(bn), to_flax(bn, api="nnx")):
        for given in (axis, ordered):  # from_flax sorts, as flax does
            np.testing.assert_allclose(from_flax(variables, axis=given, epsilon=bn.epsilon)(x), bn(x), rtol=1e-6)


def onnx_model(nodes, constants=()):
    onnx = pytest.importorskip("onnx")
    values = [onnx.numpy_helper.from_array(a, n) for n, a in constants]
    ends = [[onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, None)] for n in ("X", "Y")]
    graph = onnx.helper.make_graph(nodes, "graph", *ends, values)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 15)], ir_version=8)


def test_onnx_constants_of_other_forms():
    helper = pytest.importorskip("onnx").helper
    nodes = [
        helper.make_node("Constant", [], ["scale"], value_floats=GAMMA.tolist()),
        helper.make_node("Identity", ["shared"], ["B"]),
        helper.make_node("Identity", ["B"], ["input_mean"]),
        helper.make_node("BatchNormalization", ["X", *ONNX], ["Y"], "bn"),
    ]
    bn = from_onnx(onnx_model(nodes, [("shared", BETA), ("input_var", VARIANCE)]))
    np.testing.assert_array_equal([bn.gamma, bn.beta, bn.moving_mean], [GAMMA, BETA, BETA])
    nodes[0] = helper.make_node("Constant", [], ["scale"], value_float=1.0)
    message = r"^bn/scale must have shape \(3,\) as bn/input_mean, got \(\)$"
    with pytest.raises(ValueError, match=message):
        from_onnx(onnx_model(nodes, [("shared", BETA), ("input_var", VARIANCE)]))


def test_onnx_nodes_of_one_name():
    helper = pytest.importorskip("onnx").helper
    names = ["bn", "bn", "", "other", "third"]
    values = ["X", "a", "b", "third", "d", "Y"]
    nodes = [
        helper.make_node("BatchNormalization", [x, *ONNX], [y], name) for x, y, name in zip(values, values[1:], names)
    ]
    model = onnx_model(nodes, ONNX.items())
    layers = from_onnx_many(model)
    assert list(layers) == ["a", "b", "third", "other", "Y"]
    assert all(from_onnx(model, name) for name in layers)
    with pytest.raises(ValueError, match=r"^node must be one of Y, a, b, other, third, got 'bn'$"):
        from_onnx(model, "bn")


def test_onnx_data_beside_the_model(tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    model = onnx_model([onnx.helper.make_node("BatchNormalization", ["X", *ONNX], ["Y"], "bn")], ONNX.items())
    path = tmp_path / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="data", size_threshold=0)
    np.testing.assert_array_equal(from_onnx(path).gamma, GAMMA)
    monkeypatch.chdir(tmp_path)  # a file of this name here may be any model's
    for source in (path.read_bytes(), onnx.load(path, load_external_data=False)):
        with pytest.raises(ValueError, match=r"^scale of bn must be in the model, got data in another file: 'data'$"):
            from_onnx(source)


def test_onnx_nodes_have_an_axis_of_channels():
    pytest.importorskip("onnx")
    with pytest.raises(ValueError, match=r"^rank must be at least 2 for a node; folded takes 1, got 1$"):
        to_onnx(layer(), rank=1)
    assert to_onnx(layer(), rank=1, form="folded")


def test_onnx_arrays():
    arrays = to_onnx(layer(scale=False), form="arrays")
    np.testing.assert_array_equal(arrays["scale"], np.ones(C))
    np.testing.assert_array_equal(arrays["input_var"], VARIANCE)
    older = dict(zip(("scale", "bias", "mean", "var"), STATE.values()))
    np.testing.assert_array_equal(from_onnx(older).beta, BETA)


def test_safetensors_there_and_back(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    save_safetensors(path, MODEL, metadata={"format": "np"})
    assert set(load_safetensors(path)) == set(MODEL)
    part = load_safetensors(path, "layer1.bn.")
    assert list(part) == [f"layer1.bn.{n}" for n in sorted(TORCH)]
    np.testing.assert_array_equal(from_torch(part, "layer1.bn").moving_mean, MEAN)
    for wrong, message in [
        ({"a": "b"}, "a must be an array of real numbers, got str of dtype <U1"),
        ([1], "arrays must be a mapping of names to arrays, got list"),
    ]:
        with pytest.raises(TypeError) as caught:
            save_safetensors(path, wrong)
        assert str(caught.value) == message
    with pytest.raises(TypeError, match=r"^metadata must be a mapping of strings to strings, got 'a': 1$"):
        save_safetensors(path, {}, metadata={"a": 1})
    assert set(load_safetensors(path)) == set(MODEL)  # nothing was written
    with pytest.raises(fastbn.StateError, match=r"has no tensor whose name begins with 'layer2'$"):
        load_safetensors(path, "layer2")
    path.write_bytes(b"no tensors")
    with pytest.raises(fastbn.StateError, match=r"model\.safetensors: "):
        load_safetensors(path)
    with pytest.raises(TypeError, match=r"^prefix must be a string, got None$"):
        load_safetensors(path, None)
    with pytest.raises(FileNotFoundError):
        load_safetensors(tmp_path / "none")


def test_safetensors_bfloat16(tmp_path):
    pytest.importorskip("safetensors")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    path = tmp_path / "half.safetensors"
    save_safetensors(path, {"a": GAMMA.astype(ml_dtypes.bfloat16), "b": GAMMA.astype(np.float16)})
    found = load_safetensors(path)
    assert (found["a"].dtype, found["b"].dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(found["a"], GAMMA)


def test_safetensors_of_other_dtypes(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "other.safetensors"
    wide = np.dtype(np.longdouble)
    if wide != np.float64:
        with pytest.raises(TypeError, match=rf"^a must have a dtype that the format knows, got {wide}$"):
            save_safetensors(path, {"a": np.ones(2, wide)})
        assert not path.exists()
    entries = {
        "a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]},
    }
    header = json.dumps(entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes([1, 2, 3, 4]))
    assert load_safetensors(path, "b")["b"].tolist() == [3, 4]
    with pytest.raises(
        fastbn.StateError, match=r"other\.safetensors: a has the dtype F8_E4M3, which NumPy does not know$"
    ):
        load_safetensors(path)


def test_missing_packages_are_named(monkeypatch, tmp_path):
    for name in ("onnx", "safetensors", "safetensors.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'^onnx must be installed for this: pip install "fastbn\[onnx\]"$'):
        to_onnx(layer())
    message = r'^safetensors must be installed for this: pip install "fastbn\[safetensors\]"$'
    with pytest.raises(ImportError, match=message):
        load_safetensors(tmp_path / "a")
    with pytest.raises(ImportError, match=message):
        save_safetensors(tmp_path / "a", {})


def test_import_loads_numpy_only():
    code = """
import sys, fastbn.compat
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"torch", "keras", "tensorflow", "onnx", "jax", "flax", "safetensors"}, loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
