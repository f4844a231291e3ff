"""Keras 3: fastbn.compat.keras.BatchNormalization is its layer, on NumPy arrays, and configurations go both ways."""

from __future__ import annotations

import inspect
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parity import frameworks
from parity.configurations import SHAPES, configurations
from parity.tolerances import Moving, Step, assert_within

import fastbn
from fastbn.compat import from_keras, from_keras_many, keras_config, to_keras
from fastbn.compat.keras import BatchNormalization

os.environ.setdefault("KERAS_BACKEND", "torch")
INSTALL = "pip install keras torch==2.13.0"
torch = frameworks.load("torch", INSTALL)
keras = frameworks.load("keras", INSTALL)
if keras.backend.backend() != "torch":
    pytest.skip(f"Keras runs on {keras.backend.backend()} here, not on PyTorch", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of its get_weights

CLIPPINGS = [None, {}, {"rmax": 1.5, "rmin": 0.5, "dmax": 0.75}, {"rmax": 2.0}, {"rmin": 0.9}, {"dmax": 0.1}]
PENALTIES = [
    None,
    "L2",
    "L1L2",
    {"class_name": "L1", "config": {"l1": 0.5}, "module": "keras.regularizers"},
    {"class_name": "L2", "config": {"l2": 0.5}, "module": "keras.regularizers"},
]
PROJECTIONS = [None, "non_neg", "unit_norm", "max_norm", "min_max_norm"]


def called(layer, x, dy, training):
    """Result and gradients of a layer of Keras on PyTorch."""
    inputs = torch.from_numpy(x).requires_grad_()
    weights = [v.value for v in layer.trainable_variables]
    y = layer(inputs, training=training)
    dx, *dweights = torch.autograd.grad(y, [inputs, *weights], torch.from_numpy(dy), allow_unused=True)
    return y.detach().numpy(), dx.numpy(), [g.numpy() for g in dweights]


@frameworks.configurations
@given(
    configuration=configurations(),
    renorm=st.booleans(),
    clipping=st.sampled_from(CLIPPINGS),
    renorm_momentum=st.sampled_from((0.0, 0.5, 0.9, 0.99)),
    trainable=st.sampled_from((True, True, True, False)),
    penalties=st.tuples(st.sampled_from(PENALTIES), st.sampled_from(PENALTIES)),
    projections=st.tuples(st.sampled_from(PROJECTIONS), st.sampled_from(PROJECTIONS)),
)
def test_layer(configuration, renorm, clipping, renorm_momentum, trainable, penalties, projections):
    c = configuration
    c.epsilon = max(c.epsilon, 1e-3)  # the variance in one pass is noise where a channel is constant
    clipping = clipping if renorm else None
    arguments = {
        "axis": c.axis,
        "momentum": c.momentum,
        "epsilon": c.epsilon,
        "center": c.center,
        "scale": c.scale,
        "beta_regularizer": penalties[0],
        "gamma_regularizer": penalties[1],
        "beta_constraint": projections[0],
        "gamma_constraint": projections[1],
        "renorm": renorm,
        "renorm_clipping": clipping,
        "renorm_momentum": renorm_momentum,
        "trainable": trainable,
        "name": "bn",
    }
    theirs, ours = keras.layers.BatchNormalization(**arguments), BatchNormalization(**arguments)
    assert ours.get_config() == theirs.get_config()
    assert BatchNormalization.from_config(theirs.get_config()).get_config() == theirs.get_config()
    assert keras.layers.BatchNormalization.from_config(ours.get_config()).get_config() == theirs.get_config()
    for layer in (theirs, ours):
        layer.build(c.shape)
    for name in ("weights", "trainable_weights", "non_trainable_weights"):
        assert [v.shape for v in getattr(ours, name)] == [tuple(v.shape) for v in getattr(theirs, name)]

    gamma, beta, mean, variance = c.parameters()
    start = [*[gamma] * c.scale, *[beta] * c.center, mean, variance]
    if renorm:
        start += [np.sqrt(variance), mean + 0.25, c.rng.uniform(0.1, 3.0, mean.shape).astype(np.float32)]
    for layer in (theirs, ours):
        layer.set_weights(start)
    gamma, beta = gamma if c.scale else None, beta if c.center else None
    first = len(start) - 2 - 3 * renorm  # of the moving statistics
    moving = Moving(mean, variance)
    penalty = [v.item() for v in theirs.losses]
    np.testing.assert_allclose(ours.losses, penalty, rtol=1e-5)

    for _ in range(c.steps):
        before = [np.asarray(w) for w in theirs.get_weights()]
        if renorm or not trainable:
            ours.set_weights(before)
        x, dy = c.batch(), c.gradient()
        learns = trainable
        given_ = None if learns else before[first : first + 2]
        step = Step(x, c.axis, c.epsilon, gamma, beta, given=given_, one_pass=True)
        if renorm and learns:
            step.renormalize(before[-2], before[-1], **(clipping or {}))
        y, dx, dweights = called(theirs, x, dy, True)
        bounds = step.gradients(dy)
        assert_within(ours(x, training=True), y, step.e_y, "y")
        assert_within(ours.backward(dy), dx, bounds[0], "dx")
        if learns:
            named = {"gamma": bounds[1], "beta": bounds[2]}
            names = [n for n, has in (("gamma", c.scale), ("beta", c.center)) if has]
            assert list(ours.grads) == names
            for name, value in zip(names, dweights):
                assert_within(ours.grads[name], value, named[name], f"d{name}")
        if not learns:
            for mine, other in zip(ours.get_weights(), theirs.get_weights()):
                np.testing.assert_array_equal(mine, other)
            continue
        moving.update(step, c.momentum)
        if renorm:
            compare_renorm_weights(c, step, before, ours, theirs, renorm_momentum)
            continue
        theirs_ = dict(zip(("moving_mean", "moving_variance"), theirs.get_weights()[-2:]))
        for name, bound in zip(theirs_, moving.bounds):
            assert_within(getattr(ours, name), theirs_[name], bound, name)

    # From here on both have the same numbers.
    copy = from_keras(theirs)
    assert [w.tobytes() for w in to_keras(copy)] == [np.asarray(w).tobytes() for w in theirs.get_weights()]
    assert keras_config(copy) == theirs.get_config()
    other = keras.layers.BatchNormalization.from_config(keras_config(copy))
    other.build(c.shape)
    to_keras(copy, other)
    assert [np.asarray(w).tobytes() for w in other.get_weights()] == [w.tobytes() for w in to_keras(copy)]
    x = c.batch()
    step = Step(x, c.axis, c.epsilon, gamma, beta, given=theirs.get_weights()[first : first + 2])
    y = called(theirs, x, c.gradient(), False)[0]
    assert_within(copy(x), y, step.e_y, "y of inference")
    if trainable:
        for variable in theirs.trainable_variables:
            if variable.constraint is not None:
                variable.assign(variable.constraint(variable))
        ours.apply_constraints()
        for mine, other_ in zip(ours.trainable_weights, theirs.trainable_weights):
            np.testing.assert_allclose(mine, other_.numpy(), rtol=1e-5, atol=1e-6)
    frameworks.agreed(f"keras {keras.__version__}: layers.BatchNormalization")


def compare_renorm_weights(c, step, before, ours, theirs, renorm_momentum):
    """Weights after a step of batch renormalization, from weights that were the same before it."""
    sigma = step.flat(1 / step.r)
    e_sigma, e_mean = sigma * step.flat(step.e_r), step.flat(step.e_mean)
    mean = step.flat(step.mean)
    names = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
    old = dict(zip(names, before[-5:]))

    def bound(name, batch, error, keep):
        rounding = 5 * step.u * (abs(old[name]) + abs(batch))  # of products, sums and the share itself
        return 1.1 * ((1 - keep) * error + rounding) + 1e-37

    bounds = {
        "moving_mean": bound("moving_mean", mean, e_mean, c.momentum),
        "moving_stddev": bound("moving_stddev", sigma, e_sigma, c.momentum),
        "renorm_mean": bound("renorm_mean", mean, e_mean, renorm_momentum),
        "renorm_stddev": bound("renorm_stddev", sigma, e_sigma, renorm_momentum),
    }
    deviation = c.momentum * old["moving_stddev"] + (1 - c.momentum) * sigma
    bounds["moving_variance"] = 2.1 * deviation * bounds["moving_stddev"] + 4 * step.u * (deviation**2 + c.epsilon)
    mine, other = (dict(zip(names, layer.get_weights()[-5:])) for layer in (ours, theirs))
    for name in names:
        assert_within(mine[name], np.asarray(other[name]), bounds[name], name)


@pytest.mark.skipif(
    "mask" not in inspect.signature(fastbn.BatchNorm.__call__).parameters, reason="BatchNorm takes no mask"
)
@frameworks.configurations
@given(configuration=configurations(shapes=tuple(s for s in SHAPES if s[0] > 2 or len(s) > 2)))
def test_mask(configuration):
    c = configuration
    c.axis, c.axes, c.channels = -1, (len(c.shape) - 1,), (c.shape[-1],)
    x, dy, mask = c.batch(), c.gradient(), c.mask()
    gamma, beta, mean, variance = c.parameters()
    theirs, ours = (
        kind(momentum=c.momentum, epsilon=c.epsilon) for kind in (keras.layers.BatchNormalization, BatchNormalization)
    )
    for layer in (theirs, ours):
        layer.build(c.shape)
        layer.set_weights([gamma, beta, mean, variance])
    inputs = torch.from_numpy(x).requires_grad_()
    y = theirs(inputs, training=True, mask=torch.from_numpy(mask))
    weights = [v.value for v in theirs.trainable_variables]
    dx, *dweights = (g.numpy() for g in torch.autograd.grad(y, [inputs, *weights], torch.from_numpy(dy)))
    # Keras divides by the number of values and 1e-7, in float32.
    step = Step(x, -1, c.epsilon, gamma, beta, mask=mask[..., np.newaxis], divisor=1e-7)
    assert_within(ours(x, training=True, mask=mask), y.detach().numpy(), step.e_y, "y")
    bounds = step.gradients(dy)
    assert_within(ours.backward(dy), dx, bounds[0], "dx")
    for name, value, bound in zip(("gamma", "beta"), dweights, bounds[1:]):
        assert_within(ours.grads[name], value, bound, f"d{name}")
    moving = Moving(mean, variance)
    moving.update(step, c.momentum)
    for mine, other, bound in zip(ours.get_weights()[2:], theirs.get_weights()[2:], moving.bounds):
        assert_within(mine, other, bound, "moving statistics")
    frameworks.agreed(f"keras {keras.__version__}: layers.BatchNormalization with a mask")


@pytest.mark.parametrize("policy", ("mixed_float16", "mixed_bfloat16"))
def test_policies(policy, rng):
    if policy == "mixed_bfloat16":
        pytest.importorskip("ml_dtypes")
    x = rng.standard_normal((16, 4)).astype(np.float32)
    theirs, ours = keras.layers.BatchNormalization(dtype=policy), BatchNormalization(dtype=policy)
    y, mine = theirs(x, training=True).detach(), ours(x, training=True)
    assert mine.dtype.name == str(y.dtype).removeprefix("torch.")
    assert [w.dtype for w in ours.weights] == [np.float32] * 4
    np.testing.assert_allclose(mine.astype(np.float32), y.float().numpy(), rtol=2**-7, atol=2**-8)
    assert theirs.compute_dtype == ours.compute_dtype
    assert theirs.variable_dtype == ours.variable_dtype


def test_models():
    inner = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="deep")], name="inner")
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="bn", epsilon=0.5), inner])
    layers = from_keras_many(model)
    assert {name: bn.epsilon for name, bn in layers.items()} == {"bn": 0.5, "inner/deep": 1e-3}
    with pytest.raises(TypeError, match=r"^source must be one layer; from_keras_many takes a model, got Sequential$"):
        from_keras(model)


def test_untouched_layers_have_the_same_weights():
    theirs, ours = keras.layers.BatchNormalization(renorm=True), fastbn.BatchNorm(3, renorm=True)
    theirs.build((None, 3))
    for mine, other in zip(to_keras(ours), theirs.get_weights()):
        np.testing.assert_array_equal(mine, other)
