"""Memory that results share with inputs: exactly in place is allowed, everything else is refused or
harmless."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from cases import call, snapshot, unchanged
from numpy.lib.stride_tricks import as_strided

from fastbn import BatchNorm, batch_norm, batch_norm_backward, batch_norm_forward, normalize, update_moving

C = 6
f32 = np.float32


def test_out_that_partly_overlaps_x():
    memory = np.arange(200, dtype=f32)
    before = memory.copy()
    x = memory[:120].reshape(20, C)
    shifted = [
        memory[1:121].reshape(20, C),
        memory[C : 120 + C].reshape(20, C),
        memory[60:180].reshape(20, C),
        x[::-1],
        x[:, ::-1],
        memory[:120].reshape(C, 20).T,
    ]
    for out in shifted:
        with pytest.raises(ValueError, match="overlap"):
            batch_norm(x, training=True, out=out)
        with pytest.raises(ValueError, match="overlap"):
            normalize(x, np.zeros(C), np.ones(C), out=out)
        _, cache = batch_norm_forward(np.ones_like(x), training=True)
        with pytest.raises(ValueError, match="overlap"):
            batch_norm_backward(x, cache, out=out)
        assert (memory == before).all()
    # Neighbours that share no byte, interleaved or not, are no overlap.
    batch_norm(x, training=True, out=np.empty(240, f32)[120:].reshape(20, C))
    both = np.ones((20, 2 * C), f32)
    batch_norm(both[:, ::2], training=True, out=both[:, 1::2])


def test_out_that_is_x_is_allowed():
    x = cases.normal((20, C))
    expected = batch_norm(x, training=True)
    assert batch_norm(x, training=True, out=x) is x
    assert (x == expected).all()
    y = cases.normal((20, C))
    batch_norm(y, training=True, out=y[...])  # another array object of the same memory
    assert (y == expected).all()


def test_out_that_is_x_whatever_stride_an_axis_of_one_index_has():
    rows = cases.normal((20, C))
    x, out = rows[:, None], rows.reshape(20, 1, C)
    assert x.strides != out.strides
    expected = batch_norm(x, training=True, axis=(1, 2))
    assert batch_norm(x, training=True, axis=(1, 2), out=out) is out
    assert (rows == expected[:, 0]).all()


@pytest.mark.parametrize("name", ["gamma", "beta", "moving_mean", "moving_variance"])
def test_out_that_overlaps_a_parameter(name):
    memory = np.ones(4 * C + C - 1, f32)
    arguments = call() | {"out": memory[: 4 * C].reshape(4, C), name: memory[4 * C - 1 :]}
    before = snapshot(arguments)
    x = arguments.pop("x")
    for training in (True, False):
        arguments["training"] = training
        with pytest.raises(ValueError, match="overlap"):
            batch_norm(x, **arguments)
        assert unchanged(before)


def test_moving_mean_and_variance_in_one_memory():
    arguments = call()
    arguments["moving_mean"] = arguments["moving_variance"]
    before = snapshot(arguments)
    x = arguments.pop("x")
    with pytest.raises(ValueError, match="overlap"):
        batch_norm(x, **arguments)
    assert unchanged(before)


@pytest.mark.parametrize("other", ["x", "gamma", "beta"])
@pytest.mark.parametrize("name", ["moving_mean", "moving_variance"])
def test_a_moving_array_that_shares_the_memory_of_an_input(name, other):
    """Either it is refused, or all results are those of separate arrays: never something in between."""
    dy = cases.normal((4, C), seed=1)

    def step(shared: bool):
        arguments = call()
        arguments[name][:] = np.abs(arguments["x"][1] if other == "x" else arguments[other])
        if other == "x":
            arguments["x"][1] = arguments[name]
        else:
            arguments[other] = arguments[name].copy()
        if shared:
            arguments[name] = arguments["x"][1] if other == "x" else arguments[other]
        before = snapshot(arguments)
        x = arguments.pop("x")
        try:
            y, cache = batch_norm_forward(x, **arguments)
        except ValueError:
            assert unchanged(before)
            return None
        return y, arguments["moving_mean"], arguments["moving_variance"], *batch_norm_backward(dy, cache)

    together = step(True)
    if together is not None:
        for a, b in zip(together, step(False), strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("other", ["x", "gamma", "beta"])
@pytest.mark.parametrize("name", ["moving_mean", "moving_variance"])
def test_a_moving_array_that_lies_shifted_in_an_input(name, other):
    """Of very many channels some learn before others are read: results are those of separate arrays even so."""
    channels, shift = 5000, 1500
    memory = cases.normal((3 * channels + shift,), f32) + 3
    given = {k: np.ones(channels, f32) for k in ("gamma", "beta", "moving_mean", "moving_variance")}

    def step(shared: bool):
        own = memory.copy()
        arguments = {k: v.copy() for k, v in given.items()}
        x = own[: 3 * channels].reshape(3, channels)
        if other != "x":
            x = x.copy()
            arguments[other] = own[:channels]
        learns = own[shift : shift + channels]
        arguments[name] = learns if shared else learns.copy()
        y = batch_norm(x, training=True, momentum=0.5, **arguments)
        return y, arguments["moving_mean"], arguments["moving_variance"]

    for a, b in zip(step(True), step(False), strict=True):
        assert a.tobytes() == b.tobytes()


def test_mean_and_variance_in_one_array_without_overlap():
    both = np.ones((C, 2), f32)
    x = cases.normal((20, C))
    mean, variance = np.ones(C, f32), np.ones(C, f32)
    batch_norm(x, moving_mean=mean, moving_variance=variance, training=True)
    batch_norm(x, moving_mean=both[:, 0], moving_variance=both[:, 1], training=True)
    assert (both == np.stack([mean, variance], 1)).all()


def test_out_that_overlaps_itself():
    """Two indices, one address: no result could be right in both."""
    x = cases.normal((10, C))
    buffer = np.zeros(100, f32)
    for strides in ((4, 4), (8, 4), (0, 4)):
        out = as_strided(buffer, (10, C), strides)
        with pytest.raises(ValueError, match="out must have a place of its own for every value"):
            batch_norm(x, training=True, out=out)
    assert (buffer == 0).all()
    interleaved = as_strided(buffer, (10, C), (4, 40))  # transposed, but every value has its place
    assert (batch_norm(x, training=True, out=interleaved) == batch_norm(x, training=True)).all()


def test_a_call_whose_gradient_is_taken_keeps_its_x():
    """The cache refers to x: a forward call refuses to overwrite it, a layer refuses its gradient."""
    x = cases.normal((20, C))
    before = snapshot(x)
    with pytest.raises(ValueError, match="overlap"):
        batch_norm_forward(x, training=True, out=x)
    assert unchanged(before)
    bn = BatchNorm(C)
    assert bn(x, True, out=x) is x
    with pytest.raises(ValueError, match="overwritten"):
        bn.backward(x)


def test_gradient_into_dy_or_x_but_not_into_parts_of_them():
    memory = cases.normal((21 * C,))
    x, dy = memory[: 20 * C].reshape(20, C), cases.normal((20, C), seed=1)
    _, cache = batch_norm_forward(x, training=True)
    expected = batch_norm_backward(dy, cache)[0]
    before = snapshot(memory, dy)
    for out in (memory[C:].reshape(20, C), memory[1 : 20 * C + 1].reshape(20, C), x[::-1]):
        with pytest.raises(ValueError, match="overlap"):
            batch_norm_backward(dy, cache, out=out)
    assert unchanged(before)
    assert batch_norm_backward(dy, cache, out=x)[0] is x
    assert (x == expected).all()


def test_update_moving_from_views_of_what_it_writes():
    """Refused, or as if the batch statistics had been copied first."""
    mean, variance = np.arange(6.0), np.arange(6.0) + 1
    expected = 0.5 * mean + 0.5 * mean[::-1], 0.5 * variance + 0.5 * mean
    try:
        update_moving(mean, variance, mean[::-1], mean, momentum=0.5)
    except ValueError:
        expected = np.arange(6.0), np.arange(6.0) + 1
    assert (mean == expected[0]).all()
    assert (variance == expected[1]).all()
