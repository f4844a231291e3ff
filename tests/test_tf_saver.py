"""fastbn.compat.tf_layers: files of variables, and values for variables that are still to be made."""

from __future__ import annotations

import numpy as np
import pytest
from graphs import run_updates

import fastbn
from fastbn import StateError
from fastbn.compat import tf_layers as tf

pytestmark = pytest.mark.usefixtures("graph")

f32 = np.float32


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
