"""fastbn.compat.keras.BatchNormalization: arguments, weights, modes and messages of Keras's layer, without Keras."""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import numpy as np
import pytest

import fastbn
from fastbn.compat.keras import BatchNormalization


@pytest.fixture
def x(rng):
    return rng.normal(2, 3, (16, 4)).astype(np.float32)


def built(**arguments):
    layer = BatchNormalization(**arguments)
    layer.build((None, 4))
    return layer


def test_arguments_and_defaults_are_those_of_keras():
    assert {n: p.default for n, p in inspect.signature(BatchNormalization).parameters.items()} == {
        "axis": -1, "momentum": 0.99, "epsilon": 1e-3, "center": True, "scale": True,
        "beta_initializer": "zeros", "gamma_initializer": "ones",
        "moving_mean_initializer": "zeros", "moving_variance_initializer": "ones",
        "beta_regularizer": None, "gamma_regularizer": None, "beta_constraint": None, "gamma_constraint": None,
        "renorm": False, "renorm_clipping": None, "renorm_momentum": 0.99, "synchronized": False,
        "trainable": True, "dtype": None, "name": None,
    }  # fmt: skip
    assert list(inspect.signature(BatchNormalization.__call__).parameters) == ["self", "inputs", "training", "mask"]


def test_numbers_are_those_of_the_core(x, rng):
    layer, core = built(momentum=0.9), fastbn.BatchNorm(4, momentum=0.9)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    for training in (True, True, False):
        np.testing.assert_array_equal(layer(x, training=training), core(x, training))
        np.testing.assert_array_equal(layer.backward(dy), core.backward(dy))
        for name in ("gamma", "beta"):
            np.testing.assert_array_equal(layer.grads[name], core.grads[name])
    np.testing.assert_array_equal(layer.moving_variance, core.moving_variance)
    assert layer.call.__func__ is BatchNormalization.__call__


def test_order_of_weights():
    layer = built(renorm=True)
    names = ["gamma", "beta", "moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev"]
    assert [w.shape for w in layer.weights] == [(4,)] * 7
    layer.set_weights([np.full(4, i) for i in range(7)])
    state = layer.core.state_dict()
    assert [state[name][0] for name in names] == list(range(7))
    assert [w[0] for w in layer.trainable_weights] == [0, 1]
    assert [w[0] for w in layer.non_trainable_weights] == [2, 3, 4, 5, 6]
    assert layer.count_params() == 28
    assert len(layer.variables) == len(layer.get_weights()) == 7
    layer.trainable = False
    assert (len(layer.trainable_variables), len(layer.non_trainable_variables)) == (0, 7)
    bare = built(center=False, scale=False)
    assert bare.gamma is bare.beta is None
    assert len(bare.weights) == 2


def test_weights_are_themselves_and_get_weights_copies(x):
    layer = built()
    layer.gamma[...] = 3
    assert layer.weights[0] is layer.gamma
    copies = layer.get_weights()
    copies[0][...] = 0
    assert layer.gamma[0] == 3
    unbuilt = BatchNormalization()
    assert unbuilt.weights == []
    assert unbuilt.moving_mean is unbuilt.gamma is None


def test_a_frozen_layer_infers_and_has_gradients(x):
    layer = built(trainable=False)
    layer.set_weights([np.full(4, 2.0), np.zeros(4), np.ones(4), np.full(4, 3.0)])
    np.testing.assert_allclose(layer(x, training=True), 2 * (x - 1) / np.sqrt(3.001), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.backward(np.ones_like(x)), np.full_like(x, 2 / np.sqrt(3.001)), rtol=1e-6)
    assert (layer.moving_mean == 1).all()
    layer.trainable = True
    layer(x, training=True)
    assert (layer.moving_mean != 1).all()


def test_initializers_regularizers_constraints():
    layer = built(
        gamma_initializer={"module": "keras.initializers", "class_name": "Constant", "config": {"value": 2.0}},
        beta_initializer=lambda shape, dtype: np.full(shape, -1.0, dtype),
        gamma_regularizer={"class_name": "L1L2", "config": {"l1": 0.5, "l2": 0.25}},
        beta_regularizer="l2",
        beta_constraint="non_neg",
        gamma_constraint="MaxNorm",
    )
    assert layer.losses == pytest.approx([4 * (0.5 * 2 + 0.25 * 4), 4 * 0.01])
    layer.apply_constraints()
    np.testing.assert_allclose(layer.gamma, np.ones(4), rtol=1e-6)  # of norm 2
    np.testing.assert_array_equal(layer.beta, np.zeros(4))
    layer.trainable = False
    assert layer.losses == []
    assert built(gamma_regularizer="L1L2").losses == [0.0]  # as in Keras 3, both factors are 0


def test_objects_with_a_configuration():
    class L2:
        def get_config(self):
            return {"l2": 0.5}

    assert built(gamma_regularizer=L2()).losses == [2.0]


def test_other_names_of_initializers():
    names = {"zero": "Zeros", "one": "Ones", "normal": "RandomNormal", "uniform": "RandomUniform"}
    for given, wanted in names.items():
        assert BatchNormalization(gamma_initializer=given).get_config()["gamma_initializer"]["class_name"] == wanted


def test_classes_that_were_not_called():
    """Keras makes an object of a class."""

    class Ones:
        def get_config(self):
            return {}

    class L2(Ones):
        def __call__(self, value):
            return 0.5

    class Negated(Ones):
        def __call__(self, value):
            return -value

    layer = built(beta_initializer=Ones, beta_regularizer=L2, beta_constraint=Negated)
    assert layer.losses == [pytest.approx(0.04)]  # Keras's by its name, with its default
    layer.apply_constraints()
    np.testing.assert_array_equal(layer.beta, -np.ones(4))


def test_config_goes_through_json_and_back():
    layer = BatchNormalization(
        axis=1, renorm=True, renorm_clipping={"rmax": 3.0}, gamma_constraint="min_max_norm", beta_regularizer="L1",
        gamma_initializer=("random_normal", 1.0, 0.1), dtype="mixed_float16", name="a", trainable=False,
    )  # fmt: skip
    config = json.loads(json.dumps(layer.get_config()))
    assert config["gamma_initializer"]["config"] == {"seed": None, "mean": 1.0, "stddev": 0.1}
    assert config["dtype"]["config"] == {"name": "mixed_float16"}
    assert BatchNormalization.from_config(config).get_config() == config
    for constraint, entries in {
        "min_max_norm": {"min_value": 0.0, "max_value": 1.0, "rate": 1.0, "axis": 0},
        "unit_norm": {"axis": 0},
        "NonNeg": {},
    }.items():
        assert BatchNormalization(beta_constraint=constraint).get_config()["beta_constraint"]["config"] == entries


def test_the_inputs_of_a_model_are_no_part_of_its_first_layer():
    config = BatchNormalization(name="a").get_config()
    inputs = {"batch_input_shape": (None, 4), "batch_shape": (None, 4), "activity_regularizer": None}
    assert BatchNormalization.from_config(config | inputs).get_config() == config


def test_the_axis_of_a_norm_may_be_the_last():
    config = {"class_name": "MaxNorm", "config": {"max_value": 1.0, "axis": -1}}
    layer = built(gamma_constraint=config, beta_constraint={"class_name": "UnitNorm", "config": {"axis": [-1]}})
    layer.apply_constraints()
    np.testing.assert_allclose(layer.gamma, np.full(4, 0.5), rtol=1e-6)


def test_arguments_are_attributes():
    layer = BatchNormalization(
        renorm=True, renorm_clipping={"rmax": 3.0}, renorm_momentum=0.5, gamma_initializer=("constant", 2.0),
        gamma_regularizer="l2", beta_constraint="non_neg",
    )  # fmt: skip
    for name in inspect.signature(BatchNormalization).parameters:
        assert hasattr(layer, name), name
    assert (layer.renorm_clipping, layer.renorm_momentum, layer.synchronized) == ({"rmax": 3.0}, 0.5, False)
    assert (layer.gamma_initializer, layer.beta_initializer) == (("constant", 2.0), "zeros")
    assert (layer.moving_mean_initializer, layer.moving_variance_initializer) == ("zeros", "ones")
    assert (layer.gamma_regularizer, layer.beta_regularizer) == (("l2", 0.01), None)
    assert (layer.gamma_constraint, layer.beta_constraint) == (None, "non_neg")
    names = ("moving_stddev", "renorm_mean", "renorm_stddev")
    assert all(getattr(layer, name) is None for name in names)
    layer.build((None, 4))
    assert all(getattr(layer, name) is weight for name, weight in zip(names, layer.weights[4:]))
    assert BatchNormalization().renorm_clipping is None
    assert built().renorm_mean is None


def test_names_are_numbered():
    first, second = BatchNormalization().name, BatchNormalization().name
    assert first.startswith("batch_normalization")
    assert first != second
    assert repr(BatchNormalization(name="a")) == "<BatchNormalization name=a, built=False>"


@pytest.mark.parametrize(
    ("policy", "given", "result"),
    [
        (None, np.float64, np.float32),
        (None, np.uint8, np.float32),
        (None, np.int64, np.float32),
        ("float64", np.float32, np.float64),
        ("mixed_float16", np.float32, np.float16),
        (np.float64, np.float64, np.float64),
    ],
)
def test_inputs_are_cast_to_the_policy(policy, given, result, rng):
    data = rng.integers(0, 100, (8, 3)).astype(given)
    layer = BatchNormalization(dtype=policy)
    assert layer(data, training=True).dtype == result
    assert layer.compute_dtype == np.dtype(result).name
    assert layer.weights[0].dtype == layer.dtype == layer.variable_dtype
    assert layer.backward(np.ones((8, 3))).dtype == result


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_integers_are_not_rounded_by_a_mixed_policy(dtype):
    """Keras casts floating point inputs; integers it normalizes as float32, and rounds the result."""
    data = np.array([[3001, 10], [3003, 20], [3008, 65535]], dtype)
    mixed, plain = (BatchNormalization(dtype=policy) for policy in ("mixed_float16", "float32"))
    for training in (True, False):
        np.testing.assert_array_equal(mixed(data, training), plain(data, training).astype(np.float16))
    np.testing.assert_array_equal(mixed.get_weights(), plain.get_weights())
    for layer, kind in ((mixed, np.float16), (plain, np.float32)):
        layer(data, training=True)
        assert layer.backward(np.ones((3, 2))).dtype == kind
    assert mixed(np.float16(data / 2), training=True).dtype == np.float16  # what it keeps follows the last call
    assert mixed.backward(np.ones((3, 2))).dtype == np.float16
    again = pickle.loads(pickle.dumps(mixed))
    np.testing.assert_array_equal(again(data), mixed(data))


def test_numbers_of_configurations_are_named():
    """Keras takes an array for a constant."""
    wrong = {"class_name": "Constant", "config": {"value": [1.0, 2.0]}}
    with pytest.raises(TypeError, match=r"^value of beta_initializer must be a real number, got \[1\.0, 2\.0\]$"):
        BatchNormalization(beta_initializer=wrong)


def test_bfloat16_policy(x):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert BatchNormalization(dtype="mixed_bfloat16")(x, training=True).dtype == ml_dtypes.bfloat16


def test_renorm_infers_like_any_other(x):
    layer = built(renorm=True, renorm_clipping={"rmax": 1.0, "rmin": 1.0, "dmax": 0.0})
    plain = built()
    np.testing.assert_allclose(layer(x, training=True), plain(x, training=True), rtol=1e-5, atol=1e-6)
    assert layer.renorm
    assert layer.get_config()["renorm_clipping"] == {"rmax": 1.0, "rmin": 1.0, "dmax": 0.0}


def test_shapes_and_masks_pass_through():
    layer = built()
    assert layer.supports_masking
    assert layer.compute_output_shape((None, 4)) == (None, 4)
    assert layer.compute_mask(None, "mask") == "mask"
    assert (layer.axis, layer.momentum, layer.epsilon, layer.center, layer.scale) == (-1, 0.99, 1e-3, True, True)


def test_copies_and_pickles(x):
    layer = built()
    layer(x, training=True)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(other(x), layer(x))
        other(x, training=True)
    assert layer.core.batches == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BatchNormalization(axis=[1, 2]), TypeError, "axis must be an integer, got [1, 2]"),
        (lambda: BatchNormalization(momentum=1.5), ValueError, "momentum must be in [0, 1], got 1.5"),
        (lambda: BatchNormalization(momentum=None), TypeError, "momentum must be a real number, got None"),
        (
            lambda: BatchNormalization(synchronized=True),
            ValueError,
            "synchronized must be False: there is one device, got True",
        ),
        (
            lambda: BatchNormalization(dtype="float16"),
            ValueError,
            "dtype must be one of float32, float64, mixed_float16, mixed_bfloat16, got 'float16'",
        ),
        (
            lambda: BatchNormalization(renorm=True, renorm_clipping={"max": 1.0}),
            ValueError,
            "renorm_clipping must have no keys but rmin, rmax and dmax, got max",
        ),
        (
            lambda: BatchNormalization(gamma_initializer="other"),
            ValueError,
            "gamma_initializer must be callable, or one of zeros, ones, constant, random_normal, random_uniform, "
            "truncated_normal, or a tuple of a name and its numbers, got 'other'",
        ),
        (
            lambda: BatchNormalization(gamma_regularizer={"class_name": "Other", "config": {}}),
            ValueError,
            "gamma_regularizer must be the configuration of one of L1, L2, L1L2, "
            "got {'class_name': 'Other', 'config': {}}",
        ),
        (
            lambda: BatchNormalization(gamma_regularizer={"class_name": "L2", "config": {"l3": 1}}),
            ValueError,
            "L2 of gamma_regularizer must have no entry 'l3', got 1",
        ),
        (
            lambda: BatchNormalization(gamma_constraint={"class_name": "MaxNorm", "config": {"axis": 1}}),
            ValueError,
            "axis of gamma_constraint must be 0 or -1, got 1",
        ),
        (
            lambda: BatchNormalization.from_config({"unknown": 1}),
            ValueError,
            "config must have no entry 'unknown', got 1",
        ),
        (
            lambda: BatchNormalization.from_config({"activity_regularizer": "l2"}),
            ValueError,
            "config must have no entry 'activity_regularizer' but None, got 'l2'",
        ),
        (
            lambda: BatchNormalization().build((None, None)),
            ValueError,
            "input_shape must say how many channels there are on axis -1, got (None, None)",
        ),
        (
            lambda: BatchNormalization().count_params(),
            ValueError,
            "the layer must be built by a call or by build(input_shape), got one that is not",
        ),
        (
            lambda: BatchNormalization().set_weights([]),
            ValueError,
            "the layer must be built by a call or by build(input_shape), got one that is not",
        ),
        (
            lambda: built().set_weights([np.ones(4)]),
            ValueError,
            "weights must be 4 arrays (gamma, beta, moving_mean, moving_variance), got 1",
        ),
        (lambda: built().set_weights([np.ones(3)] * 4), ValueError, "must have shape (4,), got (3,)"),
        (
            lambda: built()(np.zeros((2, 2, 4), np.float32)),
            ValueError,
            "inputs must have 2 axes, as the layer was built with, got 3",
        ),
        (lambda: built()(np.zeros((2, 4), complex)), TypeError, "inputs must be real numbers, got complex128"),
        (
            lambda: built()(np.zeros((2, 4), np.float32), mask=np.ones((2, 4), bool)),
            ValueError,
            "mask must have 1 axes, one less than the inputs, got 2",
        ),
        (
            lambda: built()(np.zeros((2, 4), np.float32), mask=np.ones(3, bool)),
            ValueError,
            "mask must have shape (2,), got (3,)",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message or str(caught.value).endswith(" " + message)


@pytest.mark.skipif(
    "mask" not in inspect.signature(fastbn.BatchNorm.__call__).parameters, reason="BatchNorm takes no mask"
)
class TestMask:
    def test_masked_rows_take_no_part(self, x):
        mask = np.arange(16) < 10
        layer, part = built(momentum=0.0), built(momentum=0.0)
        spoiled = np.where(mask[:, np.newaxis], x, np.nan).astype(np.float32)
        y = layer(spoiled, training=True, mask=mask)
        np.testing.assert_allclose(y[:10], part(x[:10], training=True), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.moving_mean, part.moving_mean, rtol=1e-6)
        np.testing.assert_allclose(layer.moving_variance, part.moving_variance, rtol=1e-6)

    def test_masked_values_are_normalized_all_the_same(self, x):
        mask = np.arange(16) < 10
        y = built()(x, training=True, mask=mask)
        seen = x[:10]
        np.testing.assert_allclose(y, (x - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-3), rtol=1e-4, atol=1e-5)

    def test_rows_of_a_sequence(self):
        """Two sequences, the second one padded: the rows (1, 5), (2, 5) count, with momentum 0."""
        x = np.array([[[1.0, 5.0], [2.0, 5.0]], [[0.0, 0.0], [0.0, 0.0]]], np.float32)
        layer = BatchNormalization(momentum=0.0)
        layer(x, training=True, mask=np.array([[1, 1], [0, 0]]))
        np.testing.assert_allclose(layer.moving_mean, [1.5, 5.0])
        np.testing.assert_allclose(layer.moving_variance, [0.25, 0.0])

    def test_any_axis_and_masks_that_broadcast(self, rng):
        x = rng.standard_normal((6, 3, 4)).astype(np.float32)
        layer = BatchNormalization(axis=1, momentum=0.0)
        mask = rng.random((6, 1)) < 0.5
        mask[0] = True
        layer(x, training=True, mask=mask)
        np.testing.assert_allclose(layer.moving_mean, x[mask[:, 0]].mean((0, 2)), rtol=1e-4, atol=1e-6)

    def test_inference_ignores_it(self, x):
        layer = built()
        layer(x, training=True)
        np.testing.assert_array_equal(layer(x, mask=np.zeros(16, bool)), layer(x))
