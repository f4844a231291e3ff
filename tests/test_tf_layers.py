"""fastbn.compat.tf_layers: names, scopes, collections, deferred updates, files, and numbers that need no TensorFlow."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest

import fastbn
from fastbn import PendingUpdatesWarning, StateError, UntrainedWarning
from fastbn.compat import tf_layers as tf

f32 = np.float32


@pytest.fixture(autouse=True)
def graph():
    tf.reset_default_graph()
    yield
    tf.reset_default_graph()


@pytest.fixture
def x(rng):
    return rng.normal(1, 2, (8, 3)).astype(f32)


@pytest.fixture
def image(rng):
    return rng.normal(1, 2, (4, 2, 3, 5)).astype(f32)


def run_updates(key="update_ops"):
    updates = tf.get_collection(key)
    for update in updates:
        update()
    return len(updates)


def names(variables=None):
    return [v.name for v in (tf.global_variables() if variables is None else variables)]


# -- names -------------------------------------------------------------------------------------------------


def test_names_are_numbered_where_they_repeat(x):
    for _ in range(3):
        tf.batch_normalization(x, training=True)
    assert names()[::4] == [
        "batch_normalization/gamma:0",
        "batch_normalization_1/gamma:0",
        "batch_normalization_2/gamma:0",
    ]
    assert names()[:4] == [f"batch_normalization/{n}:0" for n in ("gamma", "beta", "moving_mean", "moving_variance")]


def test_scopes_nest_and_count_for_themselves(x):
    with tf.variable_scope("a") as outer:
        assert outer.name == tf.get_variable_scope().name == "a"
        tf.batch_normalization(x, training=True)
        with tf.variable_scope("b"):
            tf.batch_normalization(x, training=True)
            tf.batch_normalization(x, training=True)
    tf.batch_normalization(x, training=True)
    assert names()[::4] == [
        "a/batch_normalization/gamma:0",
        "a/b/batch_normalization/gamma:0",
        "a/b/batch_normalization_1/gamma:0",
        "batch_normalization/gamma:0",
    ]
    assert tf.get_variable_scope().name == ""


def test_a_scope_entered_again_counts_from_the_start(x):
    with tf.variable_scope("net"):
        tf.batch_normalization(x, training=True)
        tf.batch_normalization(x, training=True)
    for reuse in (True, tf.AUTO_REUSE):
        with tf.variable_scope("net", reuse=reuse):
            tf.batch_normalization(x, training=True)
            tf.batch_normalization(x, training=True)
    assert len(names()) == 8
    with (
        tf.variable_scope("net"),
        pytest.raises(ValueError, match=r"name must be new, .*'net/batch_normalization/gamma', which exists"),
    ):
        tf.batch_normalization(x, training=True)


def test_a_scope_object_can_be_entered_anywhere(x):
    with tf.variable_scope("a") as scope:
        pass
    with tf.variable_scope("other"), tf.variable_scope(scope):
        tf.batch_normalization(x, training=True)
    assert names()[0] == "a/batch_normalization/gamma:0"
    with tf.variable_scope(scope, reuse=True) as again:
        assert again.name == "a"
        assert again.reuse is True
        assert tf.get_variable("batch_normalization/beta").name == "a/batch_normalization/beta:0"
    assert repr(scope) == "<fastbn variable scope 'a' reuse=False>"


def test_default_names_of_scopes_are_numbered():
    found = []
    for _ in range(3):
        with tf.variable_scope(None, "block") as scope:
            found.append(scope.name)
    assert found == ["block", "block_1", "block_2"]


def test_reuse_is_inherited_and_can_be_switched_on(x):
    with tf.variable_scope("net"):
        tf.batch_normalization(x, training=True, name="bn")
        tf.get_variable_scope().reuse_variables()
        tf.batch_normalization(x, training=True, name="bn")
    with tf.variable_scope("net", reuse=True), tf.variable_scope("inner") as inner:
        assert inner.reuse is True
    assert len(names()) == 4


def test_only_the_first_character_at_the_root_has_a_rule_of_its_own(x):
    with tf.variable_scope("a"), tf.variable_scope("_b"):
        tf.batch_normalization(x, training=True, name="_c")
        tf.get_variable("-v", [1], initializer="zeros")
    assert names()[::4] == ["a/_b/_c/gamma:0", "a/_b/-v:0"]
    for name in ("_b", "-b", "/b"):
        with pytest.raises(ValueError, match=f"must begin with a letter, digit or dot outside of all scopes.*'{name}'"):
            tf.variable_scope(name).__enter__()
    with tf.variable_scope(""), pytest.raises(ValueError, match="begin with a letter, digit or dot"):
        tf.get_variable("_v", [1], initializer="zeros")
    assert tf.get_variable_scope().name == ""


def test_a_scope_without_a_name(x):
    tf.batch_normalization(x, training=True)
    with tf.variable_scope("") as scope:
        tf.batch_normalization(x, training=True)
    with tf.variable_scope("net"), tf.variable_scope("") as inner:
        tf.batch_normalization(x, training=True)
    assert (scope.name, inner.name) == ("", "net/")
    assert names()[::4] == [
        "batch_normalization/gamma:0",
        "batch_normalization_1/gamma:0",
        "net//batch_normalization/gamma:0",
    ]
    tf.batch_normalization(x, training=True, name="")  # as without
    assert names()[-4] == "batch_normalization_2/gamma:0"


def test_a_scope_is_left_before_it_is_entered_again(x):
    again, other = tf.variable_scope("a"), tf.variable_scope("b")
    with (
        again,
        pytest.raises(RuntimeError, match="variable_scope must be left before it is entered again, got 'a'"),
    ):
        again.__enter__()
    with again as scope, other as inner:
        assert (scope.name, inner.name) == ("a", "a/b")
        with pytest.raises(RuntimeError, match=r"variable_scope must be left once, after those inside .*, got 'a/b'"):
            again.__exit__(None, None, None)
        assert tf.get_variable_scope() is inner
    with other, again as scope:
        assert scope.name == "b/a"
    assert tf.get_variable_scope().name == ""


@pytest.mark.parametrize("reuse", [True, "auto", tf.AUTO_REUSE])
def test_a_name_is_found_again(x, reuse):
    tf.batch_normalization(x, training=True, name="bn")
    tf.batch_normalization(x, training=True, name="bn", reuse=reuse)
    assert len(names()) == 4
    tf.batch_normalization(x, training=True)
    tf.batch_normalization(x, training=True, reuse=reuse)  # without a name: the first of its kind
    assert len(names()) == 8


@pytest.mark.parametrize("reuse", [None, False])
def test_a_name_must_be_new(x, reuse):
    tf.batch_normalization(x, training=True, name="bn")
    with pytest.raises(
        ValueError, match="name must be new, or its scope be entered with reuse=True or AUTO_REUSE, got"
    ):
        tf.batch_normalization(x, training=True, name="bn", reuse=reuse)
    assert len(names()) == 4
    assert len(tf.get_collection("update_ops")) == 2


def test_a_name_must_exist_to_be_reused(x):
    with pytest.raises(ValueError, match="name must exist where reuse=True, got 'bn/gamma', which does not"):
        tf.batch_normalization(x, name="bn", reuse=True)
    assert not tf.global_variables()


def test_layer_objects_have_tensorflows_names(x):
    first, second, named = tf.BatchNormalization(), tf.BatchNormalization(), tf.BatchNormalization(name="bn")
    assert [layer.name for layer in (first, second, named)] == [
        "batch_normalization_1",
        "batch_normalization_2",
        "bn",
    ]
    with pytest.raises(ValueError, match="the layer must be called before it has a scope, got one that was not"):
        first.scope_name
    second(x, training=True)  # the first call names the variables
    first(x, training=True)
    assert (second.scope_name, first.scope_name) == ("batch_normalization", "batch_normalization_1")
    named(x, training=True)
    other = tf.BatchNormalization(name="bn")
    other(x, training=True)
    assert (named.scope_name, other.scope_name) == ("bn", "bn_1")
    assert repr(other) == "<fastbn tf_layers.BatchNormalization 'bn', (3,)>"
    assert repr(tf.BatchNormalization(name="q")) == "<fastbn tf_layers.BatchNormalization 'q', not built>"


def test_threads_number_by_themselves(x):
    found = []

    def work():
        with tf.variable_scope(None, "block") as scope:
            found.append(scope.name)

    with tf.variable_scope(None, "block"):
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
            thread.join()
    assert found == ["block", "block"]


# -- variables ---------------------------------------------------------------------------------------------


def test_lists_of_variables(x):
    layer = tf.BatchNormalization()
    assert layer.variables == []
    assert layer.gamma is layer.beta is layer.moving_mean is layer.moving_variance is None
    layer.build(x.shape)
    assert layer.built
    assert names(layer.variables) == names()
    assert layer.variables == [layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance]
    assert layer.trainable_variables == [layer.gamma, layer.beta] == tf.trainable_variables()
    assert layer.non_trainable_variables == [layer.moving_mean, layer.moving_variance]
    frozen = tf.BatchNormalization(trainable=False)
    frozen.build(x.shape)
    assert frozen.trainable_variables == []
    assert len(frozen.non_trainable_variables) == 4
    assert len(tf.trainable_variables()) == 2
    bare = tf.BatchNormalization(center=False, scale=False)
    bare.build(x.shape)
    assert names(bare.variables) == ["batch_normalization_2/moving_mean:0", "batch_normalization_2/moving_variance:0"]


def test_a_variable(x):
    tf.batch_normalization(x, training=True, name="bn")
    gamma = tf.global_variables("bn/gamma")[0]
    assert (gamma.name, gamma.op_name, gamma.shape, gamma.dtype) == ("bn/gamma:0", "bn/gamma", (3,), f32)
    assert gamma.trainable
    gamma.value[:] = 2  # the live array
    y = tf.batch_normalization(x, training=True, name="bn", reuse=True)
    np.testing.assert_allclose(y.std(0), 2, rtol=1e-3)
    assert gamma.assign([1, 2, 3]) is gamma.value
    copy = gamma.eval()
    copy[:] = 0
    assert np.asarray(gamma).tolist() == [1, 2, 3]
    assert np.asarray(gamma) is gamma.value
    assert np.array(gamma) is not gamma.value
    assert np.asarray(gamma, np.float64).dtype == np.float64
    assert repr(gamma) == "<fastbn variable 'bn/gamma:0' shape=(3,) dtype=float32>"
    with pytest.raises(ValueError, match=r"bn/gamma must have shape \(3,\), got \(2,\)"):
        gamma.assign([1, 2])
    assert gamma.value.tolist() == [1, 2, 3]


@pytest.mark.parametrize(("dtype", "kept"), [(np.float64, np.float64), (f32, f32), (np.float16, f32), (np.uint8, f32)])
def test_dtype_of_variables(dtype, kept):
    tf.batch_normalization(np.arange(12).reshape(4, 3).astype(dtype), training=True)
    assert {v.dtype for v in tf.global_variables()} == {np.dtype(kept)}
    layer = tf.BatchNormalization(dtype="float64")
    layer(np.ones((4, 3), f32), training=True)
    assert layer.gamma.dtype == np.float64


def test_shapes_with_several_axes_and_ghost_batches(image):
    layer = tf.BatchNormalization(axis=[3, 1])
    layer(image, training=True)
    assert layer.gamma.shape == (1, 2, 1, 5)
    ghost = tf.BatchNormalization(virtual_batch_size=2)
    ghost(image, training=True)
    assert ghost.gamma.shape == (1, 1, 1, 1, 5)
    run_updates()
    mean = image.astype(np.float64).mean((0, 2), keepdims=True)
    np.testing.assert_allclose(layer.moving_mean.value, 0.01 * mean, rtol=1e-6, atol=1e-8)
    dx = layer.backward(np.ones_like(image))
    assert dx.shape == image.shape
    assert layer.grads["gamma"].shape == (1, 2, 1, 5)


def test_initializers(x):
    layer = tf.BatchNormalization(
        gamma_initializer=[1.0, 2.0, 3.0],
        beta_initializer=lambda shape, dtype: np.full(shape, 7, dtype),
        moving_mean_initializer=tf.constant_initializer(5),
        moving_variance_initializer=("constant", 4.0),
    )
    layer.build(x.shape)
    assert [v.value.tolist() for v in layer.variables] == [[1, 2, 3], [7] * 3, [5] * 3, [4] * 3]
    other = tf.BatchNormalization(gamma_initializer=tf.zeros_initializer(), beta_initializer=tf.ones_initializer())
    other.build(x.shape)
    assert other.gamma.value.tolist() == [0] * 3
    assert other.beta.value.tolist() == [1] * 3


def test_initializers_that_were_not_called(x):
    """TensorFlow's are classes, and it makes an object of a class."""

    class Sevens:
        def __call__(self, shape, dtype):
            return np.full(shape, 7, dtype)

    layer = tf.BatchNormalization(
        gamma_initializer=tf.zeros_initializer,
        beta_initializer=tf.ones_initializer,
        moving_mean_initializer=tf.constant_initializer,
        moving_variance_initializer=Sevens,
    )
    layer.build(x.shape)
    assert [v.value.tolist() for v in layer.variables] == [[0] * 3, [1] * 3, [0] * 3, [7] * 3]


def test_collections_hold_a_variable_once():
    v = tf.get_variable("v", [2], initializer="ones", collections=["variables", "trainable_variables", "c", "c"])
    assert tf.global_variables() == tf.trainable_variables() == tf.get_collection("c") == [v]
    tf.add_to_collection("c", v)  # asked for twice
    assert tf.get_collection("c") == [v, v]


def test_get_variable():
    with tf.variable_scope("net"):
        kernel = tf.get_variable("kernel", [2, 3], initializer="ones", collections=["mine"], trainable=False)
        scalar = tf.get_variable("scalar", (), np.float64, 3.0)
        row = tf.get_variable("row", 4, initializer="zeros")
    assert (kernel.name, kernel.shape, scalar.value, row.shape) == ("net/kernel:0", (2, 3), 3.0, (4,))
    assert tf.get_collection("mine") == [kernel]
    assert tf.global_variables() == [scalar, row]
    with tf.variable_scope("net", reuse=True):
        assert tf.get_variable("kernel") is kernel
        with pytest.raises(ValueError, match=r"net/kernel must have shape \(3, 2\), got \(2, 3\)"):
            tf.get_variable("kernel", [3, 2])


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


# -- fused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "options", "fused"),
    [
        ((4, 2, 3, 5), {}, True),
        ((4, 2, 3, 5), {"axis": 1}, True),
        ((4, 2, 3, 5), {"axis": -3}, True),
        ((4, 2, 3, 5), {"axis": [3]}, True),
        ((4, 2, 3, 5), {"fused": True}, True),
        ((4, 2, 3, 5), {"fused": False}, False),
        ((4, 2, 3, 5), {"axis": 2}, False),
        ((4, 2, 3, 5), {"axis": 0, "fused": True}, False),
        ((4, 2, 3, 5), {"axis": [1, 3]}, False),
        ((4, 2, 3, 5), {"renorm": True}, False),
        ((4, 2, 3, 5), {"virtual_batch_size": 2}, False),
        ((4, 2, 3, 5), {"adjustment": lambda shape: (1.0, 0.0)}, False),
        ((8, 5), {"fused": True}, False),
        ((4, 2, 5), {}, False),
        ((4, 2, 1, 3, 5), {}, False),
    ],
)
def test_what_takes_the_fused_path(rng, shape, options, fused):
    x = rng.normal(1, 2, shape).astype(f32)
    layer = tf.BatchNormalization(momentum=0.0, epsilon=0.0, **options)
    y = layer(x, training=True)
    assert layer.fused is fused
    run_updates()
    axes = options.get("axis", -1)
    kept = {a % x.ndim for a in (axes if isinstance(axes, list) else [axes])}
    reduced = tuple(a for a in range(x.ndim) if a not in kept)
    if not {"renorm", "virtual_batch_size"} & set(options):
        variance = x.astype(np.float64).var(reduced, ddof=int(fused))
        np.testing.assert_allclose(layer.moving_variance.value.ravel(), variance.ravel(), rtol=1e-5)
    if "virtual_batch_size" not in options and "renorm" not in options:
        biased = x.astype(np.float64).var(reduced, keepdims=True)
        wanted = (x - x.mean(reduced, np.float64, keepdims=True)) / np.sqrt(biased + (1.001e-5 if fused else 0))
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-6)


def test_one_value_per_channel_is_finite():
    layer = tf.BatchNormalization(momentum=0.0)
    y = layer(np.full((1, 1, 1, 3), 7, f32), training=True)
    run_updates()
    assert y.tolist() == [[[[0, 0, 0]]]]
    assert layer.moving_variance.value.tolist() == [0, 0, 0]


def test_an_empty_batch_defers_nothing():
    layer = tf.BatchNormalization()
    assert layer(np.ones((0, 3), f32), training=True).shape == (0, 3)
    assert tf.get_collection("update_ops") == []


# -- features ----------------------------------------------------------------------------------------------


def test_renormalization_in_both_schemes(x):
    """One step by hand: the first batch is corrected by nothing in the scheme of TensorFlow 1."""
    first = tf.BatchNormalization(renorm=True, renorm_momentum=0.9, momentum=0.5)
    y = first(x, training=True)
    plain = fastbn.BatchNorm(3)(x, training=True)
    np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-6)
    assert names(first.variables)[4:] == [
        f"batch_normalization/{n}:0"
        for n in ("renorm_mean", "renorm_mean_weight", "renorm_stddev", "renorm_stddev_weight")
    ]
    run_updates()
    mean, sigma = x.mean(0, np.float64), np.sqrt(x.var(0, np.float64) + 1e-3)
    values = {v.op_name.split("/")[1]: v.value for v in first.variables}
    np.testing.assert_allclose(values["renorm_mean"], 0.1 * mean, rtol=1e-6)
    np.testing.assert_allclose(values["renorm_stddev"], 0.1 * sigma, rtol=1e-6)
    np.testing.assert_allclose([values["renorm_mean_weight"], values["renorm_stddev_weight"]], 0.1, rtol=1e-6)
    np.testing.assert_allclose(values["moving_mean"], 0.5 * mean, rtol=1e-6)
    np.testing.assert_allclose(values["moving_variance"], 0.5 + 0.5 * (sigma**2 - 1e-3), rtol=1e-6)
    tf.set_renorm_scheme("keras")
    second = tf.BatchNormalization(renorm=True, momentum=0.5, renorm_clipping={"rmax": 1.5, "rmin": 0.5, "dmax": 0.5})
    y = second(x, training=True)
    assert names(second.variables)[4:] == [
        f"batch_normalization_1/{n}:0" for n in ("moving_stddev", "renorm_mean", "renorm_stddev")
    ]
    r, d = np.clip(sigma, 0.5, 1.5), np.clip(mean, -0.5, 0.5)
    np.testing.assert_allclose(y, (x - mean) / sigma * r + d, rtol=1e-4, atol=1e-5)


def test_the_halves_of_an_update_are_apart(x):
    layer = tf.BatchNormalization(renorm=True)
    layer(x, training=True)
    mean, variance = layer.updates
    before = [v.eval() for v in layer.variables]
    mean()
    changed = [n for v, b, n in zip(layer.variables, before, names(layer.variables)) if (v.value != b).any()]
    assert [n.split("/")[1] for n in changed] == ["moving_mean:0", "renorm_mean:0", "renorm_mean_weight:0"]
    variance()
    assert sum((v.value != b).any() for v, b in zip(layer.variables, before)) == 6


def test_ghost_batches_are_strided_rows(rng):
    x = rng.normal(0, 1, (6, 2)).astype(f32)
    layer = tf.BatchNormalization(virtual_batch_size=2, momentum=0.0)
    y = layer(x, training=True)
    for g in range(3):
        group = x[g::3].astype(np.float64)
        np.testing.assert_allclose(
            y[g::3], (group - group.mean(0)) / np.sqrt(group.var(0) + 1e-3), rtol=1e-4, atol=1e-5
        )
    run_updates()
    variances = np.mean([x[g::3].astype(np.float64).var(0) for g in range(3)], 0)
    np.testing.assert_allclose(layer.moving_variance.value.ravel(), variances, rtol=1e-5)
    layer(x[:5])  # inference divides nothing


def test_adjustment(x):
    seen = []

    def adjustment(shape):
        seen.append(shape)
        return np.array([2.0, 1.0, 0.5]), np.ones(3)

    layer = tf.BatchNormalization(adjustment=adjustment)
    y = layer(x, training=True)
    plain = fastbn.BatchNorm(3)(x, training=True)
    np.testing.assert_allclose(y, plain * [2, 1, 0.5] + 1, rtol=1e-5, atol=1e-6)
    assert seen == [(8, 3)]
    run_updates()
    layer(x)
    assert seen == [(8, 3)]


def test_regularizers_and_constraints(x):
    layer = tf.BatchNormalization(
        gamma_regularizer=lambda w: 0.5 * (w**2).sum(), beta_regularizer=("l1", 2.0), gamma_constraint="non_neg"
    )
    layer(x, training=True)
    gamma_loss, beta_loss = layer.losses
    assert tf.get_collection(tf.GraphKeys.REGULARIZATION_LOSSES) == layer.losses
    assert gamma_loss.name == "batch_normalization/gamma/Regularizer:0"
    assert (gamma_loss(), float(beta_loss)) == (1.5, 0.0)
    layer.gamma.assign([-1, 2, 3])
    layer.beta.assign([-1, 2, 3])
    assert (gamma_loss(), beta_loss()) == (7.0, 12.0)
    tf.apply_constraints()
    assert layer.gamma.value.tolist() == [0, 2, 3]
    assert layer.beta.value.tolist() == [-1, 2, 3]
    tf.batch_normalization(x, training=True, name="batch_normalization", reuse=True, gamma_regularizer="l2")
    assert len(tf.get_collection("regularization_losses")) == 2  # a variable that exists keeps what it has
    assert repr(gamma_loss) == "<fastbn regularization loss 'batch_normalization/gamma/Regularizer:0'>"


def test_a_regularizer_without_a_penalty(x):
    layer = tf.BatchNormalization(gamma_regularizer=lambda w: None, beta_regularizer=("l1", 0.0))
    layer(x, training=True)
    assert [loss.name for loss in layer.losses] == ["batch_normalization/beta/Regularizer:0"]
    assert tf.get_collection("regularization_losses") == layer.losses


@pytest.mark.parametrize(
    "bounds", [{"rmax": np.inf}, {"dmax": np.inf}, {"rmin": -np.inf}, {"rmin": -1}, {"rmin": -1.0, "rmax": np.inf}]
)
@pytest.mark.parametrize("scheme", ["tf1", "keras"])
def test_bounds_that_bound_nothing(x, bounds, scheme):
    tf.set_renorm_scheme(scheme)
    y = tf.batch_normalization(x, training=True, renorm=True, renorm_clipping=bounds)
    np.testing.assert_array_equal(y, tf.batch_normalization(x, training=True, renorm=True))


# -- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_gradient_of_a_functional_call(rng, x, training):
    dy = rng.normal(0, 1, x.shape).astype(f32)
    bn = fastbn.BatchNorm(3)
    bn(x, training=True)
    bn(x, training=training)
    expected = bn.backward(dy)
    with tf.variable_scope("net"):
        tf.batch_normalization(x, training=True, name="bn")
        run_updates()
        tf.batch_normalization(x, training=training, name="bn", reuse=True)
    layer = tf.get_layer("net/bn")
    np.testing.assert_allclose(layer.backward(dy), expected, rtol=1e-5, atol=1e-6)
    for name in ("gamma", "beta"):
        np.testing.assert_allclose(layer.grads[name], bn.grads[name], rtol=1e-5, atol=1e-5)


def test_gradients_come_for_what_there_is(x):
    layer = tf.BatchNormalization(scale=False)
    with pytest.raises(ValueError, match="backward must follow a call of the layer in the same thread, got none"):
        layer.backward(x)
    layer(x, training=True)
    layer.backward(x)
    assert list(layer.grads) == ["beta"]
    with pytest.raises(ValueError, match=r"dy must have shape \(8, 3\), got \(8,\)"):
        layer.backward(np.ones(8, f32))


def test_an_unknown_layer(x):
    with pytest.raises(ValueError, match="name must be the scope of a layer: there is none, got 'bn'"):
        tf.get_layer("bn")
    tf.batch_normalization(x, training=True)
    with pytest.raises(ValueError, match="name must be the scope of a layer: batch_normalization, got 'bn'"):
        tf.get_layer("bn")


# -- files -------------------------------------------------------------------------------------------------


def train(x, name="bn"):
    tf.batch_normalization(x, training=True, name=name, reuse="auto")
    run_updates()


def test_save_and_restore(tmp_path, x):
    path = tmp_path / "model.npz"
    train(x)
    with tf.variable_scope("double"):
        tf.batch_normalization(x.astype(np.float64), training=True, renorm=True)
    expected = {v.name: v.eval() for v in tf.global_variables()}
    assert tf.Saver().save(path) == str(path)
    for variable in tf.global_variables():
        variable.assign(np.zeros(variable.shape))
    tf.Saver().restore(path)
    for variable in tf.global_variables():
        assert variable.value.dtype == expected[variable.name].dtype
        np.testing.assert_array_equal(variable.value, expected[variable.name])


def test_restore_before_the_variables_exist(tmp_path, x):
    train(x)
    expected = [v.eval() for v in tf.global_variables()]
    path = tf.Saver().save(tmp_path / "model.npz")
    tf.reset_default_graph()
    tf.Saver().restore(path)
    assert tf.global_variables() == []
    tf.batch_normalization(x, name="bn")  # no warning: these are statistics
    for variable, value in zip(tf.global_variables(), expected):
        np.testing.assert_array_equal(variable.value, value)


def test_save_some_under_other_names(tmp_path, x):
    train(x, "a")
    train(x * 2, "b")
    (mean,) = tf.global_variables("a/moving_mean")
    (other,) = tf.global_variables("b/moving_mean")
    path = tf.Saver({"mean": mean}).save(tmp_path / "some.npz")
    tf.Saver({"mean": other}).restore(path)
    np.testing.assert_array_equal(other.value, mean.value)
    path = tf.Saver([mean, other]).save(tmp_path / "two.npz")
    mean.assign([0, 0, 0])
    tf.Saver([mean]).restore(path)
    assert mean.value.all()


def test_what_a_file_must_have(tmp_path, x):
    train(x, "a")
    path = tf.Saver().save(tmp_path / "a.npz")
    train(x, "b")
    before = [v.eval() for v in tf.global_variables()]
    with pytest.raises(StateError, match=r"a\.npz: has no variable 'b/gamma'"):
        tf.Saver().restore(path)
    tf.reset_default_graph()
    train(x[:, :2], "a")
    with pytest.raises(StateError, match=r"a.npz: a/gamma must have shape \(2,\), got \(3,\)"):
        tf.Saver().restore(path)
    assert len(before) == 8
    fastbn.BatchNorm(3).save(tmp_path / "layer.npz")
    with pytest.raises(StateError, match="must be of kind 'variables', got 'batch_norm'"):
        tf.Saver().restore(tmp_path / "layer.npz")
    tf.reset_default_graph()
    with pytest.raises(ValueError, match="var_list must hold a variable to save, got none"):
        tf.Saver().save(tmp_path / "none.npz")
    assert not (tmp_path / "none.npz").exists()
    with pytest.raises(TypeError, match="var_list must hold variables, got ndarray"):
        tf.Saver([x])


def test_what_a_saver_must_be_given(x):
    train(x, "a")
    for none in ([], {}):
        with pytest.raises(ValueError, match="var_list must hold a variable to save, got none"):
            tf.Saver(none)
    v, w = tf.global_variables()[:2]
    for twice in ([v, w, v], {"a": v, "b": v}):
        with pytest.raises(ValueError, match="var_list must hold each variable once, under one name, got 'a/gamma:0'"):
            tf.Saver(twice)


@pytest.mark.parametrize(
    "listed",
    [
        [["a", "float32", [4]]],
        [["a", "float32", [2]]],
        [["a", "float32", [3]], ["a", "float32", [0]]],
        [["a", "float64", [3]]],
        [["a", "float32", [-3]]],
        [["a", "float32", ["x"]]],
        [["a", "float32"]],
        [[1, "float32", [3]]],
        7,
        None,
    ],
)
def test_a_file_whose_list_makes_no_sense(tmp_path, listed):
    from fastbn import state

    path = tmp_path / "bad.npz"
    state.write_state(path, "variables", {"variables": listed}, {"float32": np.zeros(3, f32)})
    with pytest.raises(StateError, match=r"bad\.npz: has a list of variables that makes no sense"):
        tf.Saver().restore(path)


def test_a_network_with_many_layers_is_one_file(tmp_path, x):
    for number in range(100):
        tf.batch_normalization(x, training=True, name=f"layer_{number}", beta_initializer=("constant", float(number)))
    path = tf.Saver().save(tmp_path / "many.npz")
    tf.reset_default_graph()
    tf.Saver().restore(path)
    tf.batch_normalization(x, training=True, name="layer_42")
    assert tf.global_variables("layer_42/beta")[0].value.tolist() == [42] * 3


def test_values_from_elsewhere(x):
    train(x)
    tf.load_variables({"bn/gamma:0": [1, 2, 3], "later/moving_mean": np.array([7.0, 7, 7])})
    assert tf.global_variables("bn/gamma")[0].value.tolist() == [1, 2, 3]
    tf.batch_normalization(x, name="later")
    assert tf.global_variables("later/moving_mean")[0].value.tolist() == [7, 7, 7]
    assert tf.global_variables("later/moving_mean")[0].dtype == f32
    with pytest.raises(ValueError, match=r"bn/beta must have shape \(3,\), got \(2,\)"):
        tf.load_variables({"bn/gamma": [9, 9, 9], "bn/beta": [1, 2]})
    assert tf.global_variables("bn/gamma")[0].value.tolist() == [1, 2, 3]
    with pytest.raises(TypeError, match="bn/beta must have a real dtype, got complex128"):
        tf.load_variables({"bn/beta": np.ones(3, complex)})
    tf.load_variables({"wrong/gamma": np.ones(2)})
    with pytest.raises(ValueError, match=r"loaded wrong/gamma must have shape \(3,\), got \(2,\)"):
        tf.batch_normalization(x, training=True, name="wrong")


# -- what is refused ---------------------------------------------------------------------------------------

WRONG = [
    ({"axis": 5}, ValueError, "axis must be in -2 to 1 .*, got 5"),
    ({"axis": [1, 1]}, ValueError, r"axis must name each axis once, got \(1, 1\)"),
    ({"axis": 1.0}, TypeError, "axis must be an int or a list of ints, got 1.0"),
    ({"axis": [0.5]}, TypeError, "axis must be an int or a list of ints, got 0.5"),
    ({"axis": True}, TypeError, "axis must be an int or a list of ints, got True"),
    ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
    ({"momentum": None}, TypeError, "momentum must be a real number, got None"),
    ({"epsilon": -1.0}, ValueError, "epsilon must be finite and at least 0, got -1.0"),
    ({"center": "yes"}, TypeError, "center must be a bool, got 'yes'"),
    ({"scale": None}, TypeError, "scale must be a bool, got None"),
    ({"training": "yes"}, TypeError, "training must be a bool, got 'yes'"),
    ({"trainable": 2}, TypeError, "trainable must be a bool, got 2"),
    ({"fused": "no"}, TypeError, "fused must be a bool, got 'no'"),
    ({"renorm": 3}, TypeError, "renorm must be a bool, got 3"),
    ({"renorm": True, "renorm_clipping": {"max": 1}}, ValueError, "renorm_clipping must have no keys but rmin, rmax"),
    (
        {"renorm": True, "renorm_clipping": {"rmin": np.inf}},
        ValueError,
        "rmin of renorm_clipping must be finite, got inf",
    ),
    (
        {"renorm": True, "renorm_clipping": {"rmax": -np.inf}},
        ValueError,
        "rmax of renorm_clipping must be finite and at ",
    ),
    ({"renorm": True, "renorm_momentum": 2.0}, ValueError, r"renorm_momentum must be in \[0, 1\], got 2.0"),
    ({"virtual_batch_size": 0}, ValueError, "virtual_batch_size must be at least 1, got 0"),
    ({"virtual_batch_size": 3, "training": True}, ValueError, "virtual_batch_size=3"),
    ({"virtual_batch_size": 2, "axis": 0}, ValueError, "axis must not be that of the samples with virtual_batch_size"),
    ({"virtual_batch_size": 2, "adjustment": lambda s: (1, 0)}, ValueError, "adjustment must be None with virtual_bat"),
    ({"adjustment": 3}, TypeError, "adjustment must be callable or None, got 3"),
    ({"adjustment": lambda s: 3, "training": True}, TypeError, "adjustment must return a tuple of scale and shift"),
    ({"name": "a b"}, ValueError, r"name must hold nothing but letters, .*, got 'a b'"),
    ({"name": "_x"}, ValueError, "must begin with a letter, digit or dot"),
    ({"name": 3}, TypeError, "name.* must be a string, got 3"),
    ({"reuse": "yes"}, ValueError, r"reuse must be None, True, False or \"auto\" \(AUTO_REUSE\), got 'yes'"),
    ({"reuse": 1}, ValueError, r"reuse must be None, True, False or \"auto\" \(AUTO_REUSE\), got 1"),
    ({"gamma_initializer": "one"}, ValueError, "initializer of .*gamma must be callable, or one of zeros"),
    ({"beta_initializer": np.ones(2)}, ValueError, r"initializer of .*beta must have shape \(3,\), got \(2,\)"),
    ({"beta_initializer": 1j}, TypeError, "initializer of .*beta must have a real dtype, got complex128"),
    ({"gamma_regularizer": "l3"}, ValueError, "regularizer of .*gamma must be callable, or one of l1"),
    ({"gamma_constraint": "small"}, ValueError, "constraint of .*gamma must be callable, or one of non_neg"),
    ({"inputs": np.ones((4, 3), int)}, TypeError, "inputs must be float16, .*, got int64"),
    ({"inputs": f32(3)}, ValueError, "must have at least 1 dimension"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[f"{next(iter(w[0]))}-{w[2][:30]}" for w in WRONG])
def test_a_wrong_argument_changes_nothing(x, wrong, error, message):
    with pytest.raises(error, match=message):
        tf.batch_normalization(**{"inputs": x} | wrong)
    assert tf.global_variables() == []
    assert all(not tf.get_collection(key) for key in ("update_ops", "regularization_losses", "trainable_variables"))
    tf.batch_normalization(x, training=True)
    assert names()[0] == "batch_normalization/gamma:0"


def test_a_first_call_that_fails_builds_nothing(x):
    layer = tf.BatchNormalization(virtual_batch_size=3)
    with pytest.raises(ValueError, match="virtual_batch_size"):
        layer(x, training=True)
    assert not layer.built
    assert layer.variables == tf.global_variables() == []
    layer(x[:6], training=True)
    assert layer.scope_name == "batch_normalization"


def test_values_go_on_waiting_where_a_call_fails(x):
    tf.load_variables({"bn/gamma": [1, 2, 3], "bn/beta": [1, 2]})
    with pytest.raises(ValueError, match="loaded bn/beta must have shape"):
        tf.batch_normalization(x, training=True, name="bn")
    assert tf.global_variables() == []
    tf.load_variables({"bn/beta": [4, 5, 6]})
    tf.batch_normalization(x, training=True, name="bn")
    assert [v.value.tolist() for v in tf.trainable_variables()] == [[1, 2, 3], [4, 5, 6]]


def test_later_inputs_must_fit(x, image):
    layer = tf.BatchNormalization()
    layer(x, training=True)
    with pytest.raises(ValueError, match="inputs must have 2 dimensions, as the first ones, got 4"):
        layer(image, training=True)
    with pytest.raises(ValueError, match=r"inputs must have 3 channels, as batch_normalization/gamma, got \(2,\)"):
        layer(x[:, :2], training=True)
    with pytest.raises(ValueError, match=r"batch_normalization/gamma must have shape \(2,\), got \(3,\)"):
        tf.batch_normalization(x[:, :2], training=True, reuse=True)


SCOPES = [
    ((None,), {}, TypeError, "name_or_scope must be given without a default_name, got None"),
    ((None, "a"), {"reuse": True}, ValueError, "reuse must be None where the scope has no name of its own, got True"),
    (("a b",), {}, ValueError, "name_or_scope must hold nothing but letters"),
    ((None, ""), {}, ValueError, "default_name must hold nothing but letters"),
    ((3,), {}, TypeError, "name_or_scope must be a string, got 3"),
    ((None, 3), {}, TypeError, "default_name must be a string, got 3"),
    (("a",), {"reuse": "x"}, ValueError, "reuse must be None, True, False"),
    (("a",), {"reuse": 3}, ValueError, "reuse must be None, True, False"),
]


@pytest.mark.parametrize(("given", "options", "error", "message"), SCOPES)
def test_scopes_that_are_none(given, options, error, message):
    with pytest.raises(error, match=message):
        tf.variable_scope(*given, **options)


VARIABLES = [
    ({"shape": None}, ValueError, "shape must be given for 'v', which is new, got None"),
    ({"initializer": None}, ValueError, "initializer must be given for 'v', which is new, got None"),
    ({"dtype": np.int32}, TypeError, "dtype must be float32 or float64, got int32"),
    ({"name": "v w"}, ValueError, "name must hold nothing but letters"),
    ({"name": "_v"}, ValueError, "name must begin with a letter"),
    ({"collections": 3}, TypeError, "collections must be a string, a sequence of strings or None, got 3"),
    ({"collections": [["c"]]}, TypeError, "collections must be a string, a sequence of strings or None"),
    ({"regularizer": lambda w: 1 / 0}, ZeroDivisionError, "division by zero"),
    ({"initializer": lambda shape, dtype: np.ones(7)}, ValueError, r"initializer of v must return an array of shape"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), VARIABLES)
def test_variables_that_cannot_be_made(wrong, error, message):
    with pytest.raises(error, match=message):
        tf.get_variable(**{"name": "v", "shape": [3], "initializer": "zeros"} | wrong)
    assert tf.global_variables() == []


def test_no_reset_inside_of_a_scope():
    with (
        tf.variable_scope("a"),
        pytest.raises(ValueError, match="reset_default_graph must be called outside of every variable_scope, got 'a'"),
    ):
        tf.reset_default_graph()


def test_schemes_of_renormalization():
    with pytest.raises(ValueError, match="scheme must be one of keras, tf1, got 'tf2'"):
        tf.set_renorm_scheme("tf2")


def test_threads_share_variables(x):
    tf.batch_normalization(x, training=True, name="bn", momentum=0.0)
    run_updates()

    def work():
        for _ in range(50):
            tf.batch_normalization(x, training=True, name="bn", reuse=True, momentum=0.0)
            for update in tf.get_collection("update_ops"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    update()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run_updates()
    assert tf.get_collection("update_ops") == []
    np.testing.assert_allclose(tf.global_variables("bn/moving_mean")[0].value, x.mean(0), rtol=1e-5)
