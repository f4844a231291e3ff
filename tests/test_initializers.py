"""Initializers, regularizers and constraints: names and numbers of Keras, and functions."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest

from fastbn import BatchNorm

C = 5
W = np.array([-3.0, 0.5, 0.0, 2.0, -1.0])


def scaled_ones(shape, dtype):
    return np.full(shape, 0.5, dtype)


def sum_of_squares(w):
    return (w**2).sum()


def with_gamma(values=W, **options):
    bn = BatchNorm(len(values), dtype=np.float64, **options)
    bn.gamma[:] = values
    return bn


# -- initializers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("initializer", "value"), [
    ("zeros", 0), ("ones", 1), ("Zeros", 0), ("constant", 0), (("constant", 0.25), 0.25), (scaled_ones, 0.5),
    (lambda shape, dtype: np.full(shape, 3), 3), (("Constant", 2), 2),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_first_values(initializer, value, dtype):
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    bn = BatchNorm(C, dtype=dtype, **{f"{name}_initializer": initializer for name in names})
    for array in bn.variables:
        assert array.dtype == dtype
        assert array.tolist() == [value] * C


@pytest.mark.parametrize(("initializer", "mean", "deviation", "bound"), [
    ("random_normal", 0, 0.05, np.inf),
    (("random_normal", 3.0, 0.1), 3, 0.1, np.inf),
    ("random_uniform", 0, 0.1 / 12**0.5, 0.05),
    (("random_uniform", -1.0, 3.0), 1, 4 / 12**0.5, 3),
    ("truncated_normal", 0, 0.05 * 0.8796, 0.1),  # the deviation of a normal number that is cut at two deviations
    (("TruncatedNormal", 1.0, 0.5), 1, 0.5 * 0.8796, 2),
])  # fmt: skip
def test_random_values(initializer, mean, deviation, bound):
    """Means and deviations within six standard errors of 20000 values: wrong once in a billion runs."""
    n = 20000
    values = BatchNorm(n, gamma_initializer=initializer).gamma.astype(float)
    assert abs(values.mean() - mean) < 6 * deviation / n**0.5
    assert abs(values.std() - deviation) < 6 * deviation / n**0.5
    assert abs(values).max() <= bound
    assert (values != BatchNorm(n, gamma_initializer=initializer).gamma).any()


def test_a_layer_that_builds_itself_and_several_axes():
    x = np.random.default_rng(0).standard_normal((4, 2, 6, 3))
    asked = []

    def initializer(shape, dtype):
        asked.append((shape, dtype))
        return np.arange(6).reshape(shape)

    bn = BatchNorm(axis=(1, 3), beta_initializer=initializer)
    bn(x, True)
    assert asked == [((2, 3), np.float64)]
    assert bn.beta.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_layer_has_a_copy():
    values = np.ones(C, np.float32)
    bn = BatchNorm(C, gamma_initializer=lambda shape, dtype: values)
    values[:] = 7
    assert bn.gamma.tolist() == [1] * C


@pytest.mark.parametrize(("wrong", "error", "message"), [
    ("glorot", ValueError, "gamma_initializer must be callable, or one of zeros, ones, .*got 'glorot'"),
    (3, TypeError, "gamma_initializer must be callable, or one of .*, got 3"),
    ((), TypeError, r"gamma_initializer must be callable, or one of .*, got \(\)"),
    (("zeros", 1), ValueError, "gamma_initializer must have at most 0 numbers after 'zeros'"),
    (("random_normal", 0, -1), ValueError, "stddev of gamma_initializer must be finite and at least 0, got -1.0"),
    (("random_uniform", 1), ValueError, "gamma_initializer must have minval <= maxval, got 1.0 and 0.05"),
    (("constant", "1"), TypeError, "value of gamma_initializer must be a real number, got '1'"),
    (lambda shape, dtype: np.ones(3), ValueError, r"gamma_initializer must return an array of shape \(5,\), got"),
    (lambda shape, dtype: np.ones(shape, complex), TypeError, "gamma_initializer must return real numbers, got"),
])  # fmt: skip
def test_wrong_initializers(wrong, error, message):
    with pytest.raises(error, match=message):
        BatchNorm(C, gamma_initializer=wrong)


def test_a_variance_is_not_negative():
    with pytest.raises(ValueError, match=r"moving_variance_initializer must return no negative number, got -1.0"):
        BatchNorm(C, moving_variance_initializer=("constant", -1.0))


# -- regularizers ------------------------------------------------------------------------------------------

REGULARIZERS = [
    ("l1", 0.01 * 6.5, 0.01 * np.sign(W)),
    ("L2", 0.01 * 14.25, 0.02 * W),
    ("l1_l2", 0.01 * 6.5 + 0.01 * 14.25, 0.01 * np.sign(W) + 0.02 * W),
    (("l1", 2), 2 * 6.5, 2 * np.sign(W)),
    (("l2", 0.5), 0.5 * 14.25, W),
    (("l1_l2", 0.5, 0.25), 0.5 * 6.5 + 0.25 * 14.25, 0.5 * np.sign(W) + 0.5 * W),
]


@pytest.mark.parametrize(("regularizer", "loss", "gradient"), REGULARIZERS, ids=lambda v: str(v)[:20])
def test_regularizers(regularizer, loss, gradient):
    bn = with_gamma(gamma_regularizer=regularizer)
    assert bn.regularization_loss() == pytest.approx(loss, rel=1e-14)
    gradients = bn.regularization_gradients()
    assert list(gradients) == ["gamma"]
    np.testing.assert_allclose(gradients["gamma"], gradient, rtol=1e-14)
    assert gradients["gamma"].dtype == np.float64
    both = with_gamma(gamma_regularizer=regularizer, beta_regularizer=regularizer)
    both.beta[:] = W
    assert both.regularization_loss() == pytest.approx(2 * loss, rel=1e-14)
    assert list(both.regularization_gradients()) == ["gamma", "beta"]


def test_no_regularizer():
    for bn in (BatchNorm(C), BatchNorm(gamma_regularizer="l2"), BatchNorm(C, scale=False, gamma_regularizer="l2")):
        assert bn.regularization_loss() == 0
        assert bn.regularization_gradients() == {}


def test_backward_leaves_the_penalty_out():
    x = np.random.default_rng(0).standard_normal((6, C))
    plain, bn = with_gamma(), with_gamma(gamma_regularizer="l2")
    for layer in (plain, bn):
        layer(x, True)
        layer.backward(x)
    assert (bn.grads["gamma"] == plain.grads["gamma"]).all()


def test_a_regularizing_function():
    bn = with_gamma(gamma_regularizer=sum_of_squares)
    assert bn.regularization_loss() == 14.25
    with pytest.raises(TypeError, match=r"gamma_regularizer must be a name, or have a method gradient\(array\), got"):
        bn.regularization_gradients()

    class Squares:
        def __call__(self, w):
            return sum_of_squares(w)

        def gradient(self, w):
            return 2 * w

    bn = with_gamma(gamma_regularizer=Squares())
    assert bn.regularization_gradients()["gamma"].tolist() == (2 * W).tolist()
    bn.gamma_regularizer = lambda w: w
    with pytest.raises(TypeError, match=r"gamma_regularizer must return a real number, got float64 of shape \(5,\)"):
        bn.regularization_loss()
    Squares.gradient = lambda self, w: 1.0
    bn.gamma_regularizer = Squares()
    with pytest.raises(ValueError, match=r"gamma_regularizer must return a gradient of shape \(5,\), got \(\)"):
        bn.regularization_gradients()


@pytest.mark.parametrize(("wrong", "error", "message"), [
    ("l3", ValueError, "beta_regularizer must be callable, or one of l1, l2, l1_l2, .*got 'l3'"),
    (("l2", -1), ValueError, "l2 of beta_regularizer must be finite and at least 0, got -1.0"),
    (0.01, TypeError, "beta_regularizer must be callable"),
])  # fmt: skip
def test_wrong_regularizers(wrong, error, message):
    with pytest.raises(error, match=message):
        BatchNorm(C, beta_regularizer=wrong)


# -- constraints -------------------------------------------------------------------------------------------

NORM = np.sqrt(14.25)  # of W, by Keras divided by itself plus 1e-7
CONSTRAINTS = [
    ("non_neg", np.maximum(W, 0)),
    ("NonNeg", np.maximum(W, 0)),
    ("unit_norm", W / (NORM + 1e-7)),
    ("max_norm", W * 2 / (NORM + 1e-7)),
    (("MaxNorm", 5.0), W * NORM / (NORM + 1e-7)),
    ("min_max_norm", W / (NORM + 1e-7)),
    (("min_max_norm", 5.0, 6.0), W * 5 / (NORM + 1e-7)),
    (("min_max_norm", 0.5, 2.0, 0.25), W * (0.25 * 2 + 0.75 * NORM) / (NORM + 1e-7)),
    (lambda w: w + 1, W + 1),
]


@pytest.mark.parametrize(("constraint", "expected"), CONSTRAINTS, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_constraints(constraint, expected, dtype):
    bn = BatchNorm(C, gamma_constraint=constraint, beta_constraint=constraint, dtype=dtype)
    bn.gamma[:] = bn.beta[:] = W
    gamma, beta = bn.gamma, bn.beta
    bn.apply_constraints()
    assert bn.gamma is gamma
    for array in (gamma, beta):
        assert array.dtype == dtype
        np.testing.assert_allclose(array, expected, rtol=1e-6 if dtype == np.float32 else 1e-14)


def test_no_constraint():
    bn = with_gamma()
    bn.apply_constraints()
    assert bn.gamma.tolist() == W.tolist()
    BatchNorm(gamma_constraint="non_neg").apply_constraints()  # not built: nothing to project


def test_a_constraint_that_fails_changes_nothing():
    bn = with_gamma(gamma_constraint="non_neg", beta_constraint=lambda w: w[:2])
    with pytest.raises(ValueError, match=r"beta_constraint must return an array of shape \(5,\), got \(2,\)"):
        bn.apply_constraints()
    bn.beta_constraint = lambda w: w * 1j
    with pytest.raises(TypeError, match="beta_constraint must return real numbers, got complex128"):
        bn.apply_constraints()
    assert bn.gamma.tolist() == W.tolist()


@pytest.mark.parametrize(("wrong", "error", "message"), [
    ("norm", ValueError, "gamma_constraint must be callable, or one of non_neg, unit_norm, max_norm, min_max_norm"),
    (("min_max_norm", 2.0), ValueError, "gamma_constraint must have min_value <= max_value, got 2.0 and 1.0"),
    (("min_max_norm", 0, 1, 2), ValueError, r"rate of gamma_constraint must be in \[0, 1\], got 2.0"),
])  # fmt: skip
def test_wrong_constraints(wrong, error, message):
    with pytest.raises(error, match=message):
        BatchNorm(C, gamma_constraint=wrong)


# -- configuration -----------------------------------------------------------------------------------------

NAMED = {
    "gamma_initializer": ("random_normal", 1.0, 0.02),
    "beta_initializer": ("constant", 0.5),
    "gamma_regularizer": ("l2", 1e-4),
    "beta_regularizer": "l1",
    "gamma_constraint": ("max_norm", 3.0),
    "beta_constraint": "non_neg",
}


def test_names_survive_a_file(tmp_path):
    bn = BatchNorm(C, **NAMED)
    bn.save(tmp_path / "bn")
    for twin in (BatchNorm.load(tmp_path / "bn"), copy.copy(bn), pickle.loads(pickle.dumps(bn))):
        assert twin.get_config() == bn.get_config()
        assert repr(twin) == repr(bn)
        assert twin.gamma.tolist() == bn.gamma.tolist()
        assert twin.regularization_loss() == bn.regularization_loss()


def test_functions_survive_a_pickle_but_no_file(tmp_path):
    bn = BatchNorm(C, gamma_initializer=scaled_ones, gamma_regularizer=sum_of_squares)
    twin = pickle.loads(pickle.dumps(bn))
    assert twin.gamma_regularizer is sum_of_squares
    assert twin.gamma.tolist() == bn.gamma.tolist()
    with pytest.raises(TypeError, match="gamma_initializer must not be a function in a layer that is saved, got"):
        bn.save(tmp_path / "bn")
    assert not list(tmp_path.iterdir())


def test_from_config():
    bn = BatchNorm(C, axis=(1, 2), renorm=True, renorm_clipping={"dmax": 1}, layout=None, zero_debias=False, **NAMED)
    config = json.loads(json.dumps(bn.get_config()))
    twin = BatchNorm.from_config(config)
    assert not twin.built
    assert twin.get_config() == bn.get_config()
    assert repr(BatchNorm.from_config({})) == "BatchNorm()"
    with pytest.raises(TypeError, match="config must hold arguments of a layer, got decay, eps"):
        BatchNorm.from_config({"eps": 1, "decay": 2})
