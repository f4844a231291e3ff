"""fastbn.compat.tf_layers: names, scopes, variables and their collections."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from graphs import names, run_updates

from fastbn.compat import tf_contrib
from fastbn.compat import tf_layers as tf

pytestmark = pytest.mark.usefixtures("graph")

f32 = np.float32

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


@pytest.mark.parametrize(("shape", "collections", "number"), [
    ((8, 3), "update_ops", 1), ((8, 2, 3), "update_ops", 2), ((8, 2, 3), None, 1), ((8, 2, 2, 3), None, 1),
])  # fmt: skip
def test_contrib_takes_a_number_where_it_made_a_layer_object(rng, shape, collections, number):
    """And found no name in the scope around it; its own two paths made none."""
    x = rng.normal(0, 1, shape)
    tf_contrib.batch_norm(x, scope=tf.get_variable_scope(), updates_collections=collections)
    assert tf.BatchNormalization().name == f"batch_normalization_{number}"


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


def test_initializers_take_a_dtype(x):
    """As TensorFlow's do; the variable's counts."""
    layer = tf.BatchNormalization(
        gamma_initializer=tf.zeros_initializer(dtype=np.float64),
        beta_initializer=tf.ones_initializer(np.float64),
        moving_mean_initializer=tf.constant_initializer(5, np.float64, verify_shape=True),
    )
    layer.build(x.shape)
    assert [v.value.tolist() for v in layer.variables] == [[0] * 3, [1] * 3, [5] * 3, [1] * 3]
    assert {v.dtype for v in layer.variables} == {np.dtype(np.float32)}


def test_other_names_of_initializers(x):
    layer = tf.BatchNormalization(gamma_initializer="zero", moving_mean_initializer="one")
    layer.build(x.shape)
    assert [layer.gamma.value.tolist(), layer.moving_mean.value.tolist()] == [[0] * 3, [1] * 3]


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


# -- what is refused ---------------------------------------------------------------------------------------

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


def test_dtype_none_is_float32():
    """As in TensorFlow; NumPy takes None for float64."""
    assert tf.get_variable("a", 3, None, "zeros").dtype == np.float32


@pytest.mark.parametrize("shape", [2.7, "3", (2.0,), (None,), True])
def test_shapes_are_integers(shape):
    with pytest.raises(TypeError, match=r"^shape must be an int or a sequence of ints, got "):
        tf.get_variable("a", shape, initializer="zeros")
    assert not tf.global_variables()


def test_channels_must_be_known_to_build():
    layer = tf.BatchNormalization(axis=1)
    message = r"^input_shape must say how many channels there are on axis 1, got \(3, None\)$"
    with pytest.raises(ValueError, match=message):
        layer.build((3, None))
    layer.build((None, 3))
    assert layer.gamma.shape == (3,)
