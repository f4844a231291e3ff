"""Arrays of other libraries, through __dlpack__ and __array__: without a copy on the CPU, refused
elsewhere."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import reference as ref

from fastbn import BatchNorm, batch_norm, batch_norm_backward, batch_norm_forward, moments, normalize


class OnlyDLPack:
    """An array that speaks nothing but DLPack."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.exports = 0

    def __dlpack__(self, **options):
        self.exports += 1
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class OnDevice(OnlyDLPack):
    """An array in the memory of a GPU: exporting it to NumPy would read an address of another device."""

    def __dlpack_device__(self):
        return (2, 0)

    def __dlpack__(self, **options):
        raise AssertionError("must not be asked for its memory")


class OnlyArray:
    """An array-like with __array__."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __array__(self, dtype=None, copy=None):
        assert not copy, "asked for a copy"
        return self.array


X = cases.normal((20, 3, 5), mean=2)


@pytest.mark.parametrize("wrap", [OnlyDLPack, OnlyArray])
def test_results_are_those_of_the_array(wrap):
    dy = cases.normal(X.shape, seed=1)
    gamma, beta = cases.parameters(3)
    expected, cache = batch_norm_forward(X, gamma=gamma, beta=beta, training=True, axis=1)
    gradients = batch_norm_backward(dy, cache)
    y, cache = batch_norm_forward(wrap(X), gamma=wrap(gamma), beta=wrap(beta), training=True, axis=1)
    assert type(y) is np.ndarray
    ref.assert_same_bits(y, expected)
    for a, b in zip(batch_norm_backward(wrap(dy), cache), gradients, strict=True):
        ref.assert_same_bits(a, b)
    s = moments(wrap(X), axis=1)
    assert s == moments(X, axis=1)
    ref.assert_same_bits(
        normalize(wrap(X), wrap(s.mean), wrap(s.variance()), axis=1),
        normalize(X, s.mean, s.variance(), axis=1),
    )
    ref.assert_same_bits(BatchNorm(3, axis=1)(wrap(X), True), BatchNorm(3, axis=1)(X, True))


def test_memory_of_another_device_is_refused():
    with pytest.raises(TypeError, match="x must be in main memory"):
        batch_norm(OnDevice(X), training=True, axis=1)
    with pytest.raises(TypeError, match="gamma must be in main memory"):
        batch_norm(X, gamma=OnDevice(np.ones(3)), training=True, axis=1)


def test_dlpack_strides_are_kept():
    view = X.transpose(0, 2, 1)[::2]
    ref.assert_same_bits(batch_norm(OnlyDLPack(view), training=True), batch_norm(view, training=True))


class Broken:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("the array is gone")


def test_errors_of_the_other_library_come_through():
    with pytest.raises(RuntimeError, match="gone"):
        batch_norm(Broken(), training=True)


def test_objects_that_are_no_arrays():
    for thing in (object(), {"a": 1}, "text", {1, 2}, lambda: 1):
        with pytest.raises((TypeError, ValueError), match="x must"):
            batch_norm(thing, training=True)


def test_torch_tensors_share_their_memory():
    torch = pytest.importorskip("torch")
    t = torch.randn(8, 6, 5, 4)
    for tensor in (t, t.contiguous(memory_format=torch.channels_last), t[:, ::2], t.transpose(1, 3)):
        y = batch_norm(tensor, training=True, axis=1)
        assert type(y) is np.ndarray
        ref.assert_same_bits(y, batch_norm(tensor.numpy(), training=True, axis=1))
        if tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last):
            assert y.strides == tuple(4 * s for s in tensor.stride())


def test_torch_moving_statistics_are_updated_in_place():
    torch = pytest.importorskip("torch")
    mean, variance = torch.zeros(3), torch.ones(3)
    arrays = np.zeros(3, np.float32), np.ones(3, np.float32)
    batch_norm(X, moving_mean=mean.numpy(), moving_variance=variance.numpy(), training=True, axis=1)
    batch_norm(X, moving_mean=arrays[0], moving_variance=arrays[1], training=True, axis=1)
    ref.assert_same_bits(mean.numpy(), arrays[0])
    ref.assert_same_bits(variance.numpy(), arrays[1])


def test_torch_agrees():
    """Its own batch norm in float64: the same formula, with the other meaning of momentum."""
    torch = pytest.importorskip("torch")
    x = cases.normal((10, 6, 4, 3), np.float64, mean=2)
    gamma, beta = cases.parameters(6, np.float64)
    mean, variance = cases.moving(6, np.float64)
    running = torch.tensor(mean), torch.tensor(variance)
    tensor = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.batch_norm(
        tensor, *running, torch.tensor(gamma), torch.tensor(beta), training=True, momentum=0.1, eps=1e-3
    )
    dy = cases.normal(x.shape, np.float64, seed=1)
    y.backward(torch.tensor(dy))
    ours, cache = batch_norm_forward(
        x, gamma=gamma, beta=beta, moving_mean=mean, moving_variance=variance, training=True, momentum=0.9,
        axis=1, ddof=1,
    )  # fmt: skip
    dx, _, _ = batch_norm_backward(dy, cache)
    np.testing.assert_allclose(ours, y.detach().numpy(), atol=1e-13)
    np.testing.assert_allclose(dx, tensor.grad.numpy(), atol=1e-13)
    np.testing.assert_allclose(mean, running[0].numpy(), rtol=1e-13)
    np.testing.assert_allclose(variance, running[1].numpy(), rtol=1e-13)


def test_tensors_that_require_gradients():
    """NumPy may not see them; the error is PyTorch's or ours, never a silent detach of the graph."""
    torch = pytest.importorskip("torch")
    with pytest.raises((RuntimeError, TypeError, BufferError)):
        batch_norm(torch.ones(4, 3, requires_grad=True), training=True)
