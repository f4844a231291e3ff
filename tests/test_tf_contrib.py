"""fastbn.compat.tf_contrib: names, paths, collections."""

from __future__ import annotations

import numpy as np
import pytest

import fastbn
from fastbn import PendingUpdatesWarning, UntrainedWarning
from fastbn.compat import tf_contrib, tf_nn
from fastbn.compat import tf_layers as tf

pytestmark = pytest.mark.usefixtures("graph")

f32 = np.float32


def names(key="variables"):
    return [v.name for v in tf.get_collection(key)]


def value(name):
    (variable,) = tf.global_variables(name)
    return variable.value


# -- names and defaults ------------------------------------------------------------------------------------


def test_names_and_defaults(x):
    for _ in range(2):
        tf_contrib.batch_norm(x)
    assert names() == [f"BatchNorm{n}/{v}:0" for n in ("", "_1") for v in ("beta", "moving_mean", "moving_variance")]
    assert names("model_variables") == names()
    assert names("trainable_variables") == ["BatchNorm/beta:0", "BatchNorm_1/beta:0"]
    assert [u.name for u in tf.get_collection("update_ops")][:2] == [
        "BatchNorm/AssignMovingAvg:0",
        "BatchNorm/AssignMovingAvg_1:0",
    ]
    for update in tf.get_collection("update_ops", "BatchNorm/"):
        update()
    np.testing.assert_allclose(value("BatchNorm/moving_mean"), 0.001 * x.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(
        value("BatchNorm/moving_variance"), 0.999 + 0.001 * x.var(0, ddof=1), rtol=1e-6
    )  # rank 2 is fused


def test_the_layers_own_order_of_names(image):
    tf_contrib.batch_norm(image, scale=True)  # the path through tf.layers
    tf_contrib.batch_norm(image, scale=True, updates_collections=None)
    assert names()[::4] == ["BatchNorm/gamma:0", "BatchNorm_1/beta:0"]
    assert [u.name for u in tf.get_collection("update_ops")] == [
        "BatchNorm/AssignMovingAvg",
        "BatchNorm/AssignMovingAvg_1",
    ]


def test_scopes_and_reuse(x):
    with tf.variable_scope("net"):
        tf_contrib.batch_norm(x, scope="bn")
        tf_contrib.batch_norm(x, scope="bn", reuse=True)
        tf_contrib.batch_norm(x)
    assert names()[::3] == ["net/bn/beta:0", "net/BatchNorm/beta:0"]
    with pytest.raises(ValueError, match="name must be new, or its scope be entered with reuse=True"):
        tf_contrib.batch_norm(x, scope="net/bn")
    with pytest.raises(ValueError, match="name must exist where reuse=True, got 'other/beta'"):
        tf_contrib.batch_norm(x, scope="other", reuse=True)
    with pytest.raises(ValueError, match="reuse must be None where the scope has no name of its own, got True"):
        tf_contrib.batch_norm(x, reuse=True)
    with tf.variable_scope("net/bn", reuse=True) as scope:
        pass
    tf_contrib.batch_norm(x, scope=scope)
    assert len(names()) == 6


@pytest.mark.parametrize("shape", [(8, 3), (4, 2, 3), (4, 2, 2, 3)])
@pytest.mark.parametrize("debias", [False, True])
def test_the_root_as_scope(rng, shape, debias):
    x = rng.normal(1, 2, shape).astype(f32)
    tf_contrib.batch_norm(x, scope=tf.get_variable_scope(), zero_debias_moving_mean=debias)
    tf_contrib.batch_norm(x, scope="", reuse=True, zero_debias_moving_mean=debias)
    more = ["moving_mean/biased:0", "moving_mean/local_step:0"] if debias else []
    assert names() == ["beta:0", "moving_mean:0", "moving_variance:0", *more]
    assert tf.get_collection("update_ops")[0].name.removesuffix(":0") == "AssignMovingAvg"
    assert tf.get_layer("").backward(x).shape == shape


def test_layers_share_the_store(x):
    tf_contrib.batch_norm(x, scale=True, scope="bn", updates_collections=None)
    tf.batch_normalization(x, name="bn", reuse=True)
    assert len(names()) == 4


# -- updates -----------------------------------------------------------------------------------------------


def tower(x, is_training, **options):
    options = {"decay": 0.9, "updates_collections": None, "scope": "bn", "reuse": tf.AUTO_REUSE} | options
    return tf_contrib.batch_norm(x, is_training=is_training, **options)


def test_is_training_may_change_from_call_to_call(x):
    tower(x, True)
    np.testing.assert_allclose(value("bn/moving_mean"), 0.1 * x.mean(0), rtol=1e-6)
    before = value("bn/moving_mean").copy(), value("bn/moving_variance").copy()
    y = tower(x, False)
    np.testing.assert_allclose(y, (x - before[0]) / np.sqrt(before[1] + 0.001), rtol=1e-5, atol=1e-6)
    assert (value("bn/moving_mean") == before[0]).all()
    assert (value("bn/moving_variance") == before[1]).all()
    assert tf.get_collection("update_ops") == []
    tower(x, True)
    assert (value("bn/moving_mean") != before[0]).all()


def test_a_collection_of_ones_own(x):
    tower(x, True, updates_collections="mine")
    tower(x, True, updates_collections=["mine", "also"])
    assert len(tf.get_collection("mine")) == 4
    assert len(tf.get_collection("also")) == 2
    with pytest.warns(PendingUpdatesWarning, match="bn/moving_mean:0 is used, and 2 updates of it wait") as caught:
        tower(x, False)
    assert caught[0].filename == __file__
    for update in tf.get_collection("mine"):
        update()
    assert tf.get_collection("mine") == tf.get_collection("also") == []


def test_a_collection_that_is_named_twice(x):
    tower(x, True, updates_collections=["mine", "mine"])
    assert [u.name for u in tf.get_collection("mine")] == ["bn/AssignMovingAvg:0", "bn/AssignMovingAvg_1:0"]


def test_inference_without_training(x):
    with pytest.warns(UntrainedWarning, match="bn/moving_mean:0 and bn/moving_variance:0") as caught:
        tower(x, False)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("shape", "options", "ddof", "moves"),
    [
        ((8, 3), {}, 1, True),
        ((8, 3), {"fused": False}, 0, False),
        ((8, 3), {"fused": False, "updates_collections": None}, 0, True),
        ((8, 3), {"data_format": "NCHW"}, 1, True),
        ((4, 2, 3, 5), {}, 1, False),
        ((4, 2, 3, 5), {"updates_collections": "mine"}, 1, True),
        ((4, 2, 3, 5), {"updates_collections": None, "data_format": "NCHW"}, 1, True),
        ((4, 2, 3, 5), {"data_format": "NCHW"}, 1, False),
        ((4, 2, 3, 5), {"fused": False}, 0, False),
        ((4, 2, 5), {}, 0, False),
        ((4, 2, 5), {"updates_collections": None}, 0, True),
        ((4, 2, 5), {"zero_debias_moving_mean": True, "data_format": "NCHW"}, 0, True),
    ],
)
def test_the_three_paths(rng, shape, options, ddof, moves):
    x = rng.normal(1, 2, shape).astype(f32)
    channel = 1 if options.get("data_format") == "NCHW" else x.ndim - 1
    reduced = tuple(a for a in range(x.ndim) if a != channel)
    for trainable in (True, False):
        tf_contrib.batch_norm(x, decay=0.0, trainable=trainable, **options)
        for key in ("update_ops", "mine"):
            for update in tf.get_collection(key):
                update()
    wanted = x.astype(np.float64).var(reduced, ddof=ddof)
    np.testing.assert_allclose(value("BatchNorm/moving_variance"), wanted, rtol=1e-5)
    # Without trainable the path through tf.layers moves nothing.
    np.testing.assert_allclose(value("BatchNorm_1/moving_variance"), wanted if moves else 1, rtol=1e-5)
    assert names("trainable_variables") == ["BatchNorm/beta:0"]


# -- features ----------------------------------------------------------------------------------------------


def test_zero_debiased_mean(x):
    for step in range(1, 4):
        tower(x * step, True, zero_debias_moving_mean=True)
    means = np.array([x.mean(0, np.float64) * step for step in range(1, 4)])
    biased = 0.1 * (means[0] * 0.81 + means[1] * 0.9 + means[2])
    np.testing.assert_allclose(value("bn/bn/moving_mean/biased"), biased, rtol=1e-6)
    assert value("bn/bn/moving_mean/local_step") == 3
    np.testing.assert_allclose(value("bn/moving_mean"), biased / (1 - 0.9**3), rtol=1e-6)
    variances = [x.astype(np.float64).var(0, ddof=1) * step**2 for step in range(1, 4)]
    wanted = 0.9**3 + 0.1 * (variances[0] * 0.81 + variances[1] * 0.9 + variances[2])
    np.testing.assert_allclose(value("bn/moving_variance"), wanted, rtol=1e-6)
    assert "bn/bn/moving_mean/biased:0" not in names("model_variables")


def test_activations(x):
    plain = tf_contrib.batch_norm(x)
    for function in ("relu", tf_nn.relu, lambda y: np.maximum(y, 0)):
        np.testing.assert_array_equal(tf_contrib.batch_norm(x, activation_fn=function), np.maximum(plain, 0))
    dy = np.ones_like(x)
    with pytest.raises(
        ValueError, match="activation_fn must be a name of fastbn's for a gradient, got another function"
    ):
        tf.get_layer("BatchNorm_3").backward(dy)
    expected = fastbn.BatchNorm(3, activation="relu", scale=False)
    expected(x, training=True)
    np.testing.assert_array_equal(tf.get_layer("BatchNorm_2").backward(dy), expected.backward(dy))
    tf_contrib.batch_norm(x, activation_fn=tf_nn.relu6)
    tf_contrib.batch_norm(x, activation_fn=("leaky_relu", 0.2))


def test_initializers_and_regularizers(image):
    first = {"beta": [1.0, 2, 3, 4, 5], "gamma": "zeros", "moving_mean": "ones", "moving_variance": ("constant", 2.0)}
    penalties = {"beta": tf_contrib.l2_regularizer(0.5), "gamma": tf_contrib.l1_regularizer(1.0)}
    for options in ({}, {"updates_collections": None}):
        tf_contrib.batch_norm(image, scale=True, param_initializers=first, param_regularizers=penalties, **options)
    assert value("BatchNorm/beta").tolist() == [1, 2, 3, 4, 5]
    assert value("BatchNorm/gamma").tolist() == [0] * 5
    losses = {loss.name: loss() for loss in tf.get_collection("regularization_losses")}
    assert losses == {
        "BatchNorm/gamma/Regularizer:0": 0.0,
        "BatchNorm/beta/Regularizer:0": 0.5 * 55 / 2,
        "BatchNorm_1/beta/Regularizer:0": 0.5 * 55 / 2,
        "BatchNorm_1/gamma/Regularizer:0": 0.0,
    }
    tf_contrib.batch_norm(image, fused=False, updates_collections=None, param_regularizers=penalties)
    assert len(tf.get_collection("regularization_losses")) == 4  # TensorFlow's older path ignored them
    for nothing in (tf_contrib.l1_regularizer(0.0), tf_contrib.l2_regularizer(0.0), lambda w: None):
        for shape in ((4, 30), (4, 2, 3, 5)):
            tf_contrib.batch_norm(image.reshape(shape), param_regularizers={"beta": nothing})
    assert len(tf.get_collection("regularization_losses")) == 4


def test_batch_weights(x):
    """A weight of 2 is as good as the sample twice; weighted calls are never fused."""
    weights = np.array([0, 1, 2, 1, 0, 3, 1, 1])
    repeated = np.repeat(x, weights, 0).astype(np.float64)
    y = tf_contrib.batch_norm(x, decay=0.0, batch_weights=weights, scope="bn", updates_collections=None)
    np.testing.assert_allclose(value("bn/moving_mean"), repeated.mean(0), rtol=1e-6)
    np.testing.assert_allclose(value("bn/moving_variance"), repeated.var(0), rtol=1e-6)
    wanted = (x - repeated.mean(0)) / np.sqrt(repeated.var(0) + 0.001)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    dx = tf.get_layer("bn").backward(np.ones_like(x))
    assert dx.shape == x.shape
    before = value("bn/moving_mean").copy()
    tf_contrib.batch_norm(
        x, decay=0.0, batch_weights=np.zeros(8), scope="bn", reuse=True, updates_collections=None
    )  # nothing counts, nothing moves
    np.testing.assert_array_equal(value("bn/moving_mean"), before)


def test_batch_weights_with_a_debiased_mean_and_images(image):
    weights = np.array([1.0, 0.5, 2.0, 0.0])
    tf_contrib.batch_norm(image, batch_weights=weights, zero_debias_moving_mean=True, data_format="NCHW", scope="bn")
    for update in tf.get_collection("update_ops"):
        update()
    mean = np.average(image.astype(np.float64).mean((2, 3)), 0, weights)
    np.testing.assert_allclose(value("bn/moving_mean"), mean, rtol=1e-6)


def test_collections_of_variables_and_outputs(x):
    y = tf_contrib.batch_norm(x, variables_collections=["mine", "all"], outputs_collections="out", scope="a")
    tf_contrib.batch_norm(x, variables_collections={"beta": "mine"}, scope="b")
    tf_contrib.batch_norm(x, variables_collections=["mine"], scope="a", reuse=True)
    assert names("mine") == ["a/beta:0", "a/moving_mean:0", "a/moving_variance:0", "b/beta:0"]
    assert names("all") == ["a/beta:0", "a/moving_mean:0", "a/moving_variance:0"]
    assert tf.get_collection("out")[0] is y


PATHS = [((8, 3), {}, 0), ((4, 2, 2, 3), {}, 1), ((4, 2, 3), {"updates_collections": "mine"}, 0)]


@pytest.mark.parametrize(("shape", "options", "by_layer"), PATHS, ids=["fused", "layer", "older"])
def test_collections_of_variables_by_path(rng, shape, options, by_layer):
    x = rng.normal(1, 2, shape).astype(f32)
    given = ["variables", "trainable_variables", "all", "all"]
    tf_contrib.batch_norm(x, scale=True, scope="a", variables_collections=given, **options)
    first = ["a/gamma:0", "a/beta:0"] if by_layer else ["a/beta:0", "a/gamma:0"]
    moving = ["a/moving_mean:0", "a/moving_variance:0"]
    assert names("variables") == names("model_variables") == first + moving
    assert names("trainable_variables") == first + moving
    assert names("all") == ([*moving, "a/beta:0", "a/gamma:0"] if by_layer else first + moving)
    before = names("model_variables")
    for _ in range(2):  # the path through tf.layers adds variables that it has found
        tf_contrib.batch_norm(x, scale=True, scope="a", reuse=True, variables_collections="again", **options)
    assert names("again") == (names("all") if by_layer else [])
    assert names("model_variables") == before


def test_collections_of_other_variables(rng, image):
    tf_contrib.batch_norm(image, renorm=True, scope="a", variables_collections="mine")
    assert names("mine") == ["a/moving_mean:0", "a/moving_variance:0", "a/beta:0"]
    assert names("model_variables") == names()
    more = ["moving_mean/biased:0", "moving_mean/local_step:0"]
    for x, kept in ((image, []), (image[0], more)):  # fused, older
        tf.reset_default_graph()
        scope = tf.get_variable_scope()
        tf_contrib.batch_norm(x, scope=scope, zero_debias_moving_mean=True, variables_collections="mine")
        assert names("mine") == ["beta:0", "moving_mean:0", "moving_variance:0"]
        assert names("model_variables") == names("mine") + kept
        assert names() == names("mine") + more


def test_a_call_that_fails_late_changes_nothing(x):
    wrong = {"activation_fn": lambda y: 1 / 0}, {"variables_collections": 3}, {"outputs_collections": 3}
    wrong += {"updates_collections": 3}, {"variables_collections": {"beta": 3}}
    for scope in ("new", "old"):
        before = None
        if scope == "old":
            tower(x, True, scope="old")
            before = [v.eval().tolist() for v in tf.global_variables()]
        for options in wrong:
            with pytest.raises((TypeError, ZeroDivisionError)):
                tower(2 * x, True, scope=scope, **options)
            assert [v.eval().tolist() for v in tf.global_variables()] == (before or [])
            assert not tf.get_collection("update_ops")
    with pytest.raises(TypeError, match="outputs_collections must be a string, a sequence of strings or None, got 3"):
        tower(x, True, outputs_collections=3)


def test_renormalization_and_adjustment(x):
    tf_contrib.batch_norm(x, renorm=True, renorm_clipping={"rmax": 2.0}, renorm_decay=0.5, scope="renorm")
    assert names()[-1] == "renorm/renorm_stddev_weight:0"
    y = tf_contrib.batch_norm(x, adjustment=lambda shape: (np.full(3, 2.0), np.ones(3)))
    np.testing.assert_allclose(y, 2 * fastbn.BatchNorm(3)(x, training=True) + 1, rtol=1e-5, atol=1e-6)


WRONG = [
    ({"data_format": "NHCW"}, ValueError, "data_format must be one of NHWC, NCHW, got 'NHCW'"),
    ({"is_training": "yes"}, TypeError, "is_training must be a bool, got 'yes'"),
    ({"fused": "no"}, TypeError, "fused must be a bool, got 'no'"),
    ({"zero_debias_moving_mean": None}, TypeError, "zero_debias_moving_mean must be a bool, got None"),
    ({"decay": 2.0}, ValueError, r"momentum must be in \[0, 1\], got 2.0"),
    ({"renorm": True, "updates_collections": None}, ValueError, "renorm must be False with batch_weights, zero_debias"),
    ({"renorm": True, "zero_debias_moving_mean": True}, ValueError, "renorm must be False with batch_weights"),
    (
        {"adjustment": lambda s: (1, 0), "updates_collections": None},
        ValueError,
        "adjustment must be None with batch_weights, zero_debias_moving_mean or updates_collections of your own",
    ),
    (
        {"param_initializers": {"bias": "zeros"}},
        ValueError,
        "param_initializers must have no keys but beta, gamma, mov",
    ),
    ({"param_initializers": "zeros"}, TypeError, "param_initializers must be a dict or None, got str"),
    ({"param_regularizers": {"moving_mean": "l2"}}, ValueError, "param_regularizers must have no keys but beta, gamma"),
    ({"activation_fn": "softmax"}, ValueError, "activation must be None, relu"),
    ({"inputs": np.ones((4, 3), int)}, TypeError, "inputs must be float16, .*, got int64"),
    ({"inputs": np.ones(4, f32), "data_format": "NCHW"}, ValueError, "axis must be in"),
    ({"batch_weights": np.ones((8, 1))}, ValueError, r"batch_weights must have shape \(8,\), got \(8, 1\)"),
    ({"batch_weights": np.ones(7)}, ValueError, r"batch_weights must have shape \(8,\), got \(7,\)"),
    ({"batch_weights": np.ones(8), "renorm": True}, ValueError, "renorm must be False with batch_weights"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), WRONG, ids=[f"{next(iter(w[0]))}-{w[2][:30]}" for w in WRONG])
def test_a_wrong_argument_changes_nothing(x, wrong, error, message):
    with pytest.raises(error, match=message):
        tf_contrib.batch_norm(**{"inputs": x} | wrong)
    assert names() == names("model_variables") == tf.get_collection("update_ops") == []
    tf_contrib.batch_norm(x)
    assert names()[0] == "BatchNorm/beta:0"


@pytest.mark.parametrize("make", [tf_contrib.l1_regularizer, tf_contrib.l2_regularizer])
def test_regularizers_that_are_none(make):
    with pytest.raises(ValueError, match=r"scale must be finite and at least 0, got -1\.0"):
        make(-1.0)
