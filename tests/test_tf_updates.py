"""fastbn.compat.tf_layers: deferred updates, and the warnings about statistics that nothing reached."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from graphs import names, run_updates

import fastbn
from fastbn import PendingUpdatesWarning, UntrainedWarning
from fastbn.compat import tf_layers as tf

pytestmark = pytest.mark.usefixtures("graph")

f32 = np.float32

# -- updates -----------------------------------------------------------------------------------------------


def test_updates_wait_until_they_are_called(x):
    layer = tf.BatchNormalization(momentum=0.9)
    layer(x, training=True)
    assert layer.moving_mean.value.tolist() == [0, 0, 0]
    first, second = layer.updates
    assert tf.get_collection(tf.GraphKeys.UPDATE_OPS) == [first, second]
    assert (first.name, second.name) == (
        "batch_normalization/AssignMovingAvg",
        "batch_normalization/AssignMovingAvg_1",
    )
    assert repr(first) == "<fastbn update 'batch_normalization/AssignMovingAvg', pending>"
    assert first() is layer.moving_mean.value
    np.testing.assert_allclose(first.run(), 0.1 * x.mean(0), rtol=1e-6)  # the second time it does nothing
    assert first.done
    assert repr(first) == "<fastbn update 'batch_normalization/AssignMovingAvg', done>"
    assert tf.get_collection("update_ops") == layer.updates == [second]
    assert layer.moving_variance.value.tolist() == [1, 1, 1]
    second()
    np.testing.assert_allclose(layer.moving_variance.value, 0.9 + 0.1 * x.var(0), rtol=1e-6)
    assert tf.get_collection("update_ops") == layer.updates == []


def test_updates_of_several_steps_in_order_and_out_of_order(x):
    expected = fastbn.BatchNorm(3, momentum=0.5)
    for part in (x, x * 2, x + 1):
        tf.batch_normalization(part, training=True, momentum=0.5, name="bn", reuse="auto")
        expected(part, training=True)
    assert run_updates() == 6
    (mean,) = tf.global_variables("bn/moving_mean")
    np.testing.assert_allclose(mean.value, expected.moving_mean, rtol=1e-6)


def test_scope_of_a_collection(x):
    tf.batch_normalization(x, training=True, name="a")
    tf.batch_normalization(x, training=True, name="b")
    tf.add_to_collection("update_ops", lambda: None)
    assert [u.name for u in tf.get_collection("update_ops", "b/")] == ["b/AssignMovingAvg", "b/AssignMovingAvg_1"]
    assert len(tf.get_collection("update_ops")) == 5
    assert tf.get_collection("no such") == []


def test_a_layer_that_is_not_trainable_takes_the_batch_and_moves_nothing(x):
    layer = tf.BatchNormalization(trainable=False)
    assert layer.mode(True) == "batch"
    y = layer(x, training=True)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-6)
    assert layer.updates == tf.get_collection("update_ops") == []


def test_a_layer_forgets_updates_that_were_carried_out(x):
    layer = tf.BatchNormalization()
    for _ in range(3):
        layer(x, training=True)
        first, second = tf.get_collection("update_ops")
        first()
        second()
        assert not layer._updates
    layer(x, training=True)
    assert layer.updates == tf.get_collection("update_ops")


def test_a_layer_belongs_to_the_graph_of_its_variables(x):
    layer, unbuilt = tf.BatchNormalization(), tf.BatchNormalization()
    layer(x, training=True)
    tf.reset_default_graph()
    for training in (True, False):
        with pytest.raises(ValueError, match="the layer must be called before reset_default_graph, got a call after"):
            layer(x, training=training)
    assert tf.get_collection("update_ops") == tf.global_variables() == []
    unbuilt(x, training=True)
    assert names(unbuilt.variables) == names()


def test_an_update_that_fails_can_be_called_again(x):
    layer = tf.BatchNormalization()
    layer(x, training=True)
    update = layer.updates[0]
    layer.moving_mean.value.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        update()
    assert not update.done
    layer.moving_mean.value.flags.writeable = True
    update()
    assert layer.moving_mean.value.any()


# -- warnings ----------------------------------------------------------------------------------------------


def test_inference_after_training_whose_updates_never_ran(x):
    layer = tf.BatchNormalization()
    layer(x, training=True)
    with pytest.warns(
        PendingUpdatesWarning, match="batch_normalization/moving_mean:0 is used, and 1 updates of it wait"
    ) as w:
        layer(x)
    assert w[0].filename == __file__
    layer(x)  # once is enough
    run_updates()
    layer(x)


def test_inference_after_updates_of_the_mean_alone(x):
    layer = tf.BatchNormalization()
    layer(x, training=True)
    layer.updates[0]()
    with pytest.warns(PendingUpdatesWarning, match="moving_variance:0 is used, and 1 updates of it wait"):
        layer(x)
    layer(x)  # once is enough
    layer.updates[0]()
    layer(x)


def test_functional_inference_after_training_whose_updates_never_ran(x):
    for _ in range(3):
        tf.batch_normalization(x, training=True, name="bn", reuse="auto")
    with pytest.warns(PendingUpdatesWarning, match="3 updates") as w:
        tf.batch_normalization(x, name="bn", reuse=True)
    assert w[0].filename == __file__


def test_updates_asked_for_once_and_run_every_step(x):
    """The idiom of a graph: there the same operation could be run again and again."""
    layer = tf.BatchNormalization()
    layer(x, training=True)
    updates = tf.get_collection("update_ops")
    for update in updates:
        update()
    layer(x, training=True)
    with pytest.warns(
        PendingUpdatesWarning, match="AssignMovingAvg was carried out before, and 1 newer updates of"
    ) as w:
        updates[0]()
    assert w[0].filename == __file__
    layer(x)  # within a step one update may wait
    layer(x, training=True)
    with pytest.warns(PendingUpdatesWarning, match="2 updates"):
        layer(x)


def test_inference_without_training(x):
    with pytest.warns(UntrainedWarning, match="no batch has reached: mean 0, variance 1") as w:
        y = tf.batch_normalization(x)
    assert w[0].filename == __file__
    np.testing.assert_allclose(y, x / np.sqrt(1.001), rtol=3e-7)


def test_a_warning_that_is_an_error_changes_nothing(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UntrainedWarning):
            tf.batch_normalization(x)
    assert tf.global_variables() == []


def test_no_warning_where_statistics_were_set(x):
    layer = tf.BatchNormalization()
    layer.build(x.shape)
    layer.moving_mean.assign(np.zeros(3))
    layer(x)
    other = tf.BatchNormalization(moving_mean_initializer="ones")
    other(x)
