"""Weights in and out of Keras: arrays, configurations, layers and models."""

from __future__ import annotations

import numpy as np
import pytest
from weights_cases import (
    BETA,
    MEAN,
    STATE,
    VARIANCE,
    C,
    keras_layer,
    layer,
    prefixed,
    without,
)

import fastbn
from fastbn.compat import (
    from_keras,
    from_keras_many,
    keras_config,
    to_keras,
)
from fastbn.compat.keras import BatchNormalization


def test_keras_lists_and_names():
    assert not from_keras([BETA, MEAN, VARIANCE], {"scale": False}).scale
    assert not from_keras(prefixed(without(STATE, "gamma"), "bn/"), prefix="bn").scale
    renormed = from_keras([*STATE.values(), np.sqrt(VARIANCE), MEAN, np.sqrt(VARIANCE)], {"renorm": True})
    assert renormed.renorm
    assert renormed.renorm_scheme == "keras"
    assert [w.tolist() for w in to_keras(renormed)][4] == np.sqrt(VARIANCE).tolist()
    named = dict(zip(("moving_stddev", "renorm_mean", "renorm_stddev"), to_keras(renormed)[4:]))
    assert from_keras(STATE | named).renorm
    assert from_keras(list(STATE.values()), ddof=1).ddof == 1


def test_lists_of_axes_of_older_keras():
    assert from_keras(list(STATE.values()), {"axis": [3], "fused": True}).axis == 3
    grid = np.arange(6, dtype=np.float32).reshape(1, 2, 1, 3)
    bn = from_keras([grid, grid, grid, grid], {"axis": [1, 3]})
    assert bn.axis == (1, 3)
    np.testing.assert_array_equal(bn.gamma, grid.reshape(2, 3))


def test_configurations_of_older_keras():
    """As tf.keras writes them: resolved axes, initializers with a dtype, names of fused kernels."""
    initializer = {"module": "keras.initializers", "class_name": "Ones", "config": {"dtype": "float32"}}
    config = {"axis": [1], "fused": True, "virtual_batch_size": None, "gamma_initializer": initializer}
    bn = from_keras(list(STATE.values()), config | {"dtype": "float32", "beta_regularizer": None})
    assert (bn.axis, bn.gamma_initializer) == (1, "ones")


def test_keras_layer_there_and_back():
    theirs = BatchNormalization(axis=1, epsilon=0.5, gamma_regularizer="L2", name="bn", trainable=False)
    theirs.build((None, C, 4))
    theirs.set_weights(list(STATE.values()))
    bn = from_keras(theirs)
    assert (bn.axis, bn.epsilon, bn.gamma_regularizer, bn.name, bn.trainable) == (1, 0.5, ("l2", 0.01), "bn", False)
    assert keras_config(bn) == theirs.get_config()
    again = BatchNormalization.from_config(keras_config(bn))
    again.build((None, C, 4))
    assert to_keras(bn, again) is again
    np.testing.assert_array_equal(again.moving_variance, VARIANCE)


def test_keras_3_has_no_slashes_in_names():
    bn = fastbn.BatchNorm(3, name="net/stem/bn")
    assert keras_config(bn)["name"] == "net_stem_bn"
    assert bn.name == "net/stem/bn"


def test_keras_axes_are_compared_where_the_rank_is_known():
    assert to_keras(layer(axis=3), keras_layer(-1)).axis == -1
    assert to_keras(layer(layout="channels_last"), keras_layer(3)).axis == 3
    theirs = keras_layer(-1)
    theirs._ndim = None
    assert to_keras(layer(axis=1), theirs) is theirs
    with pytest.raises(ValueError, match=r"^axis of layer must be 1, got 3$"):
        to_keras(layer(layout="NCHW"), theirs)


def test_what_only_training_would_need_stays_behind():
    """Configurations of Keras that fastbn has nothing like, as serialized by Keras 3 and by tf.keras."""
    config = {
        "batch_input_shape": (None, 3),
        "batch_shape": (None, 3),
        "activity_regularizer": {"class_name": "L2", "config": {"l2": 0.01}},
        "gamma_initializer": {"class_name": "GlorotUniform", "config": {"seed": None, "input_axes": None}},
        "beta_initializer": "he_normal",
        "gamma_regularizer": {"module": "builtins", "class_name": "function", "config": "penalty"},
        "beta_regularizer": {"class_name": "L2", "config": {"l2": 0.5}},
        "gamma_constraint": {"class_name": "MaxNorm", "config": {"max_value": 2, "axis": -1}},
        "beta_constraint": {"class_name": "__lambda__", "config": {"value": ("...", None, None)}},
    }
    bn = from_keras(list(STATE.values()), config)
    assert (bn.gamma_initializer, bn.beta_initializer) == ("ones", "zeros")
    assert (bn.gamma_regularizer, bn.beta_regularizer) == (None, ("l2", 0.5))
    assert (bn.gamma_constraint, bn.beta_constraint) == (("max_norm", 2.0), None)
    grid = np.ones((1, 2, 1, 3))
    bn = from_keras([grid] * 4, config | {"axis": [1, 3], "beta_constraint": "non_neg"})
    assert (bn.gamma_constraint, bn.beta_constraint) == (None, "non_neg")


def test_a_subclass_of_a_keras_layer_may_have_more_entries():
    class Named(BatchNormalization):
        def get_config(self):
            return super().get_config() | {"tag": "a"}

    assert from_keras(built_by_keras(Named, epsilon=0.5)).epsilon == 0.5


def built_by_keras(kind, **arguments):
    made = kind(**arguments)
    made.build((None, C))
    return made


class Holder:
    """Like a model, or any other layer of Keras, that has layers inside."""

    def __init__(self, name, *inside):
        self.name, self.inside = name, inside

    def _flatten_layers(self, recursive=True, include_self=True):
        assert not recursive
        assert not include_self
        return iter(self.inside)


class Model(Holder):
    @property
    def layers(self):
        return list(self.inside)


def test_all_layers_of_a_keras_model():
    def bn(name):
        return built_by_keras(BatchNormalization, name=name)

    shared, block = bn("shared"), Holder("block", bn("bn"), Holder("wrapper", bn("bn")))
    block.inside += (block,)  # Keras has layers that know the one that they are in
    model = Model("model", bn("bn"), bn("bn_1"), bn("bn"), shared, block, block, Model("inner", bn("bn"), shared))
    layers = from_keras_many(model)
    assert list(layers) == ["bn", "bn_1", "bn_2", "shared", "block/bn", "block/wrapper/bn", "inner/bn"]

    class Older:
        layers = (bn("a"),)

    assert list(from_keras_many(Older())) == ["a"]
