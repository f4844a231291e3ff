"""flax: linen.BatchNorm and nnx.BatchNorm train, infer and differentiate alike, and variables go both ways."""

from __future__ import annotations

import inspect
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parity import frameworks
from parity.configurations import COMPILED, configurations
from parity.tolerances import Moving, Step, assert_within

import fastbn
from fastbn.compat import flax_arguments, from_flax, from_flax_many, to_flax

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # it compiles for every shape
jax = frameworks.load("jax", "pip install jax flax")
linen = frameworks.load("flax.linen", "pip install jax flax")
nnx = frameworks.load("flax.nnx", "pip install jax flax")


def compare(c, ours, run, training, step, x, dy):
    """Call both on a batch, and compare results, and gradients if dy is given.

    `run` maps parameters and x to y and new statistics, which are returned.
    """
    parameters = {"scale": ours.gamma, "bias": ours.beta}
    parameters = {n: jax.numpy.asarray(p) for n, p in parameters.items() if p is not None}
    if dy is None:
        y, after = run(parameters, jax.numpy.asarray(x))
        assert_within(ours(x, training), np.asarray(y), step.e_y, "y")
        return after
    y, back, after = jax.vjp(run, parameters, jax.numpy.asarray(x), has_aux=True)
    dparameters, dx = back(jax.numpy.asarray(dy))
    assert_within(ours(x, training), np.asarray(y), step.e_y, "y")
    bounds = step.gradients(dy)
    assert_within(ours.backward(dy), np.asarray(dx), bounds[0], "dx")
    assert set(ours.grads) == {{"scale": "gamma", "bias": "beta"}[n] for n in dparameters}
    for ours_, theirs, bound in (("gamma", "scale", bounds[1]), ("beta", "bias", bounds[2])):
        if theirs in dparameters:
            assert_within(ours.grads[ours_], np.asarray(dparameters[theirs]), bound, theirs)
    return after


@frameworks.configurations
@given(configuration=configurations(shapes=COMPILED, several=True), fast=st.booleans())
def test_linen(configuration, fast):
    c = configuration
    gamma, beta, mean, variance = c.parameters()
    if fast and c.epsilon < 1e-3:
        c.epsilon = 1e-3  # the variance in one pass is noise where a channel is constant
    module = linen.BatchNorm(
        momentum=c.momentum,
        epsilon=c.epsilon,
        axis=c.axis,
        use_bias=c.center,
        use_scale=c.scale,
        use_fast_variance=fast,
    )
    variables = {"batch_stats": {"mean": mean.copy(), "var": variance.copy()}}
    parameters = {n: a for n, a, has in (("scale", gamma, c.scale), ("bias", beta, c.center)) if has}
    variables |= {"params": parameters} if parameters else {}
    ours = from_flax(variables, module=module)
    gamma, beta = ours.gamma, ours.beta
    moving = Moving(mean, variance)

    for number in range(c.steps):
        x, dy = c.batch(), c.gradient() if number == c.steps - 1 else None

        def run(parameters, a):
            y, after = module.apply(
                {"params": parameters, "batch_stats": variables["batch_stats"]},
                a,
                use_running_average=False,
                mutable=["batch_stats"],
            )
            return y, after["batch_stats"]

        step = Step(x, c.axis, c.epsilon, gamma, beta, one_pass=fast)
        variables["batch_stats"] = compare(c, ours, run, True, step, x, dy)
        moving.update(step, c.momentum)
        assert_within(ours.moving_mean, np.asarray(variables["batch_stats"]["mean"]), moving.bounds[0], "mean")
        assert_within(ours.moving_variance, np.asarray(variables["batch_stats"]["var"]), moving.bounds[1], "var")

    # From here on both have the same numbers.
    ours = from_flax({c_: {"block": {"bn": v}} for c_, v in variables.items()}, "block/bn", module=module)
    back = to_flax(ours)
    assert jax.tree_util.tree_structure(back) == jax.tree_util.tree_structure(variables)
    jax.tree_util.tree_map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b)), back, variables)
    assert linen.BatchNorm(**flax_arguments(ours), use_fast_variance=fast) == module.copy(axis=ours.axis)
    x, dy = c.batch(), c.gradient()

    def infer(parameters, a):
        return module.apply({**back, "params": parameters}, a, use_running_average=True), None

    statistics = (ours.moving_mean.copy(), ours.moving_variance.copy())
    compare(c, ours, infer, False, Step(x, c.axis, c.epsilon, gamma, beta, given=statistics), x, dy)
    frameworks.agreed("flax: linen.BatchNorm")


@frameworks.configurations
@given(configuration=configurations(shapes=COMPILED), fast=st.booleans())
def test_nnx(configuration, fast):
    c = configuration
    gamma, beta, mean, variance = c.parameters()
    if fast and c.epsilon < 1e-3:
        c.epsilon = 1e-3
    module = nnx.BatchNorm(
        c.channels[0], momentum=c.momentum, epsilon=c.epsilon, axis=c.axis, use_bias=c.center, use_scale=c.scale,
        use_fast_variance=fast, rngs=nnx.Rngs(0),
    )  # fmt: skip
    for name, value in {"scale": gamma, "bias": beta, "mean": mean, "var": variance}.items():
        if getattr(module, name) is not None:
            getattr(module, name)[...] = value
    ours = from_flax(module)
    gamma, beta = ours.gamma, ours.beta
    moving = Moving(mean, variance)
    for _ in range(c.steps):
        x = c.batch()
        step = Step(x, c.axis, c.epsilon, gamma, beta, one_pass=fast)
        y = module(jax.numpy.asarray(x), use_running_average=False)
        assert_within(ours(x, True), np.asarray(y), step.e_y, "y")
        moving.update(step, c.momentum)
        assert_within(ours.moving_mean, np.asarray(module.mean[...]), moving.bounds[0], "mean")
        assert_within(ours.moving_variance, np.asarray(module.var[...]), moving.bounds[1], "var")

    ours = from_flax(nnx.state(module), module=module)
    for source in (nnx.to_pure_dict(nnx.state(module)), {"bn": nnx.state(module)}):
        path = "bn" if "bn" in source else ""
        np.testing.assert_equal(from_flax(source, path, module=module).state_dict(), ours.state_dict())
    other = nnx.BatchNorm(c.channels[0], use_bias=c.center, use_scale=c.scale, use_fast_variance=fast, rngs=nnx.Rngs(1))
    to_flax(ours, other)
    for name, value in to_flax(ours, api="nnx").items():
        np.testing.assert_array_equal(np.asarray(getattr(other, name)[...]), value)
        np.testing.assert_array_equal(np.asarray(getattr(module, name)[...]), value)
    assert (other.momentum, other.epsilon, other.axis) == (c.momentum, c.epsilon, c.axis)
    x = c.batch()
    step = Step(x, c.axis, c.epsilon, gamma, beta, given=(ours.moving_mean, ours.moving_variance))
    y = other(jax.numpy.asarray(x), use_running_average=True)
    assert_within(ours(x), np.asarray(y), step.e_y, "y of inference")
    frameworks.agreed("flax: nnx.BatchNorm")


@pytest.mark.skipif(
    "mask" not in inspect.signature(fastbn.BatchNorm.__call__).parameters, reason="BatchNorm takes no mask"
)
@frameworks.configurations
@given(configuration=configurations(shapes=COMPILED))
def test_mask(configuration):
    c = configuration
    c.axis, c.axes, c.channels = -1, (len(c.shape) - 1,), (c.shape[-1],)
    x, mask = c.batch(), c.mask()[..., np.newaxis]
    gamma, beta, mean, variance = c.parameters()
    module = linen.BatchNorm(momentum=c.momentum, epsilon=c.epsilon, use_fast_variance=False)
    statistics = {"mean": mean, "var": variance}
    variables = {"params": {"scale": gamma, "bias": beta}, "batch_stats": statistics}
    ours = from_flax(variables, module=module)
    y, after = module.apply(variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"])
    step = Step(x, -1, c.epsilon, gamma, beta, mask=mask)
    assert_within(ours(x, True, mask=np.broadcast_to(mask, x.shape)), np.asarray(y), step.e_y, "y")
    moving = Moving(mean, variance)
    moving.update(step, c.momentum)
    assert_within(ours.moving_mean, np.asarray(after["batch_stats"]["mean"]), moving.bounds[0], "mean")
    assert_within(ours.moving_variance, np.asarray(after["batch_stats"]["var"]), moving.bounds[1], "var")
    frameworks.agreed("flax: linen.BatchNorm with a mask")


def test_models():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.BatchNorm(use_running_average=True, name="first")(linen.Dense(4)(x))
            return linen.BatchNorm(use_running_average=True, use_scale=False)(linen.LayerNorm()(x))

    variables = Model().init(jax.random.key(0), np.ones((2, 3), np.float32))
    layers = from_flax_many(variables)
    assert {name: (bn.scale, bn.center) for name, bn in layers.items()} == {
        "first": (True, True),
        "BatchNorm_0": (False, True),
    }
    with pytest.raises(ValueError, match=r"^source must have 'Dense_0/mean', got "):
        from_flax(variables, "Dense_0")


def nnx_layer(features=3, **arguments):
    return nnx.BatchNorm(features, **arguments, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bn: to_flax(bn, nnx_layer(4)), "scale of layer must have shape (3,), got (4,)"),
        (
            lambda bn: to_flax(bn, nnx_layer(use_bias=False)),
            "layer must have bias, mean, scale, var, got mean, scale, var",
        ),
        (lambda bn: from_flax(nnx_layer(), "a"), "path must not be given with a live layer, got 'a'"),
    ],
)
def test_messages(call, message):
    with pytest.raises(ValueError) as caught:
        call(from_flax(nnx_layer()))
    assert str(caught.value) == message
