"""Folding into the weights of every kind of convolution, against the convolution itself; affine and denormalize."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import reference as ref

import fastbn
from fastbn import BatchNorm, denormalize, fold, normalize

IN, OUT, M = 4, 6, 3
OPTIONS = ({}, {"center": False}, {"scale": False}, {"center": False, "scale": False})


def trained(channels, **options):
    bn = BatchNorm(channels, epsilon=1e-5, **options)
    size = int(np.prod(channels))
    mean, variance = cases.moving(size)
    bn.moving_mean, bn.moving_variance = mean.reshape(bn.moving_mean.shape), variance.reshape(bn.moving_mean.shape)
    gamma, beta = cases.parameters(size)
    if bn.gamma is not None:
        bn.gamma = gamma.reshape(bn.gamma.shape)
    if bn.beta is not None:
        bn.beta = beta.reshape(bn.beta.shape)
    return bn


# Where the output channels are, with a convolution written as a sum over explicit indices: (shape, layout, groups,
# function of (weight, output channel) that gives all weights that lead to it).
def by_axis(axis):
    return lambda w, o: np.take(w, o, axis)


CASES = {
    "OI": ((OUT, IN), 1, by_axis(0)),
    "IO": ((IN, OUT), 1, by_axis(1)),
    "OIW": ((OUT, IN, 3), 1, by_axis(0)),
    "WIO": ((3, IN, OUT), 1, by_axis(2)),
    "OIHW": ((OUT, IN, 3, 2), 1, by_axis(0)),
    "OIHW grouped": ((OUT, IN // 2, 3, 2), 2, by_axis(0)),
    "OIHW depthwise": ((OUT, 1, 3, 2), OUT, by_axis(0)),
    "HWIO": ((3, 2, IN, OUT), 1, by_axis(3)),
    "HWIO grouped": ((3, 2, IN // 2, OUT), 2, by_axis(3)),
    "DHWIO": ((2, 3, 2, IN, OUT), 1, by_axis(4)),
    "OIDHW": ((OUT, IN, 2, 3, 2), 1, by_axis(0)),
    "IOW": ((IN, OUT, 3), 1, by_axis(1)),
    "IOHW": ((IN, OUT, 3, 2), 1, by_axis(1)),
    "IOHW grouped": ((IN, OUT // 2, 3, 2), 2, lambda w, o: w[o // 3 * 2 : o // 3 * 2 + 2, o % 3]),
    "IODHW": ((IN, OUT, 2, 3, 2), 1, by_axis(1)),
    "WOI": ((3, OUT, IN), 1, by_axis(1)),
    "HWOI": ((3, 2, OUT, IN), 1, by_axis(2)),
    "HWOI grouped": ((3, 2, OUT // 2, IN), 2, lambda w, o: w[:, :, o % 3, o // 3 * 2 : o // 3 * 2 + 2]),
    "DHWOI": ((2, 3, 2, OUT, IN), 1, by_axis(3)),
    "WIM": ((3, 2, M), 1, lambda w, o: w[:, o // M, o % M]),
    "HWIM": ((3, 2, 2, M), 1, lambda w, o: w[:, :, o // M, o % M]),
    "DHWIM": ((2, 3, 2, 2, M), 1, lambda w, o: w[:, :, :, o // M, o % M]),
}


def channels(name, shape, groups):
    """How many output channels a weight has."""
    layout = name.split()[0]
    if "M" in layout:
        return shape[layout.index("I")] * shape[layout.index("M")]
    transposed = layout.index("I") < layout.index("O") if layout[-1] in "HW" else layout[-1] == "I" and layout != "OI"
    return shape[layout.index("O")] * (groups if transposed else 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"center": False}, {"scale": False}, {"center": False, "scale": False}], ids=str
)
@pytest.mark.parametrize("name", CASES)
def test_weights(name, options, with_bias, dtype):
    """Every weight that leads to a channel is scaled by that channel's factor, and no other."""
    shape, groups, weights_of = CASES[name]
    weight = cases.normal(shape, dtype)
    count = channels(name, shape, groups)
    assert count == OUT
    bn = trained(count, **options)
    bias = cases.normal((count,), dtype) if with_bias else None
    w, b = fold(weight, bias, bn, weight_layout=name.split()[0], groups=groups)
    assert w.dtype == b.dtype == dtype
    assert w.shape == weight.shape
    scale = 1 / np.sqrt(bn.moving_variance.astype(float) + 1e-5) * (1 if bn.gamma is None else bn.gamma.astype(float))
    rtol = 3 * ref.unit(dtype) + (1e-15 if dtype == np.float64 else 0)
    for o in range(count):
        np.testing.assert_allclose(weights_of(w, o), weights_of(weight, o) * scale[o], rtol=rtol)
    old = 0 if bias is None else bias.astype(float)
    want = (old - bn.moving_mean) * scale + (0 if bn.beta is None else bn.beta)
    np.testing.assert_allclose(b, want, rtol=10 * ref.unit(dtype), atol=10 * ref.unit(dtype))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("with_bias", [False, True])
def test_convolutions_of_pytorch(transposed, groups, with_bias):
    torch = pytest.importorskip("torch")
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    conv = kind(IN, OUT, 3, groups=groups, bias=with_bias, dtype=torch.float64)
    bn = trained(OUT, axis=1)
    x = torch.from_numpy(cases.normal((2, IN, 7, 6), np.float64))
    with torch.no_grad():
        expected = bn(conv(x).numpy())
        bias = None if conv.bias is None else conv.bias.numpy()
        w, b = fold(conv.weight.numpy(), bias, bn, weight_layout="IOHW" if transposed else "OIHW", groups=groups)
        conv.weight.copy_(torch.from_numpy(w))
        conv.bias = torch.nn.Parameter(torch.from_numpy(b))
        np.testing.assert_allclose(conv(x).numpy(), expected, rtol=1e-11, atol=1e-12)


def test_axis_and_layout_say_the_same():
    weight, bn = cases.normal((OUT, IN, 3, 3)), trained(OUT)
    for a, b in zip(fold(weight, None, bn, axis=0), fold(weight, None, bn, weight_layout="OIHW"), strict=True):
        ref.assert_same_bits(a, b)


def test_several_axes():
    """A layer with channels (2, 3) behind a weight that has both, and one with 6 behind it in their order."""
    weight = cases.normal((2, 5, 3))
    for bn in (trained((2, 3), axis=(1, 2)), trained(6)):
        w, b = fold(weight, None, bn, axis=(0, 2))
        scale, shift = (a.reshape(2, 3) for a in bn.affine())
        np.testing.assert_allclose(w, weight * scale[:, None], rtol=1e-6)
        np.testing.assert_allclose(b.reshape(2, 3), shift, rtol=1e-6, atol=1e-6)
        assert b.shape == bn.moving_mean.shape


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({}, ValueError, "axis or weight_layout must be given, got neither"),
    ({"axis": 0, "weight_layout": "OIHW"}, ValueError, "axis or weight_layout must be given, got both"),
    ({"weight_layout": "OHWI"}, ValueError, "weight_layout must be one of OI, OIW, .*, got 'OHWI'"),
    ({"weight_layout": "OIW"}, ValueError, "weight must have 3 dimensions with weight_layout 'OIW', got 4"),
    ({"weight_layout": "HWIO"}, ValueError, r"weight must have \(6,\) channels in layout HWIO, got \(3,\)"),
    ({"axis": 3}, ValueError, r"weight must have \(6,\) channels along axis 3, got \(3,\)"),
    ({"weight_layout": "OIHW", "groups": 0}, ValueError, "groups must be at least 1, got 0"),
    ({"weight_layout": "OIHW", "groups": 1.5}, TypeError, "groups must be an integer, got 1.5"),
    ({"axis": 1, "groups": 2}, ValueError, "weight_layout must be given where an axis holds the channels of one group"),
    ({"weight_layout": "IOHW", "groups": 4}, ValueError, "weight must have input channels in 4 equal groups, got 6"),
    ({"weight_layout": "IOHW", "groups": 2}, ValueError, r"weight must have \(6,\) channels in layout IOHW in 2"),
])  # fmt: skip
def test_messages(arguments, error, message):
    with pytest.raises(error, match=message):
        fold(np.ones((6, 4, 3, 3), np.float32), None, trained(6), **arguments)


def test_a_layer_without_statistics_cannot_be_folded():
    for call in (
        lambda bn: fold(np.ones((3, 2)), None, bn, axis=1),
        BatchNorm.affine,
        lambda bn: bn.denormalize([[1.0]]),
    ):
        with pytest.raises(ValueError, match="track must be True in a layer whose moving statistics are needed"):
            call(BatchNorm(2, track=False))
        with pytest.raises(ValueError, match="the layer must be built"):
            call(BatchNorm())


# -- affine ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("options", [{}, {"center": False}, {"scale": False}], ids=str)
def test_affine(options, dtype):
    bn = trained(OUT, dtype=dtype, **options)
    scale, shift = bn.affine()
    assert scale.dtype == shift.dtype == dtype
    gamma = 1.0 if bn.gamma is None else bn.gamma.astype(ref.LD)
    beta = 0.0 if bn.beta is None else bn.beta.astype(ref.LD)
    exact = gamma / np.sqrt(bn.moving_variance.astype(ref.LD) + 1e-5)
    exact_shift = beta - bn.moving_mean * exact
    unit = ref.unit(dtype)
    allowed = unit if dtype == np.float32 else 5 * unit  # in float64 there is a rounding per operation
    assert (abs(scale - exact) <= 1.0001 * allowed * abs(exact)).all()
    assert (abs(shift - exact_shift) <= 1.0001 * allowed * (abs(exact_shift) + abs(bn.moving_mean * exact))).all()
    x = cases.normal((9, OUT), np.float64)
    np.testing.assert_allclose(scale * x + shift, bn(x), rtol=1e-5, atol=1e-5)


def test_affine_of_a_variance_of_0():
    bn = BatchNorm(2, epsilon=0.0)
    bn.moving_mean, bn.moving_variance, bn.beta = [5.0, 1.0], [0.0, 4.0], [7.0, 0.0]
    scale, shift = bn.affine()
    assert scale.tolist() == [0, 0.5]
    assert shift.tolist() == [7, -0.5]


# -- denormalize -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [((9, 4), -1), ((3, 4, 5, 5), 1), ((2, 4, 3, 2), (1, 3)), ((3000, 4), 1)], ids=cases.name
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("with_parameters", [False, True])
def test_denormalize_undoes_normalize(case, dtype, with_parameters):
    shape, axis = case
    x = cases.normal(shape, dtype, mean=3, deviation=2)
    features = cases.channel_shape(x, axis)
    size = int(np.prod(features))
    mean, variance = (a.reshape(features) for a in cases.moving(size))
    gamma, beta = (a.reshape(features) if with_parameters else None for a in cases.parameters(size))
    arguments = {"gamma": gamma, "beta": beta, "axis": axis, "epsilon": 1e-5}
    y = normalize(x, mean, variance, **arguments)
    back = denormalize(y, mean, variance, **arguments)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, x, rtol=100 * ref.unit(dtype), atol=100 * ref.unit(dtype))
    inside = y.copy()
    assert denormalize(inside, mean, variance, out=inside, **arguments) is inside
    ref.assert_same_bits(inside, back)


@pytest.mark.parametrize("options", [{}, {"center": False, "scale": False}], ids=str)
def test_denormalize_of_a_layer(options):
    bn = trained(4, axis=1, **options)
    x = cases.normal((5, 4, 3), np.float64)
    np.testing.assert_allclose(bn.denormalize(bn(x)), x, rtol=1e-12, atol=1e-12)
    out = np.empty_like(x)
    assert bn.denormalize(x, out=out) is out


def test_denormalize_of_a_constant_channel_is_its_mean():
    assert denormalize(np.array([[0.0], [9.0]]), [3.0], [0.0], epsilon=0.0).tolist() == [[3.0], [3.0]]


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"gamma": [1.0, 0.0]}, ValueError, "gamma must have no zeros where it is divided by, got one in channel 1"),
    ({"variance": [1.0, -1.0]}, ValueError, "variance must be at least -epsilon, got -1.0"),
    ({"variance": [1.0]}, ValueError, r"variance must have shape \(2,\), got \(1,\)"),
    ({"mean": None}, ValueError, "mean must be given, got None"),
    ({"beta": [1.0]}, ValueError, r"beta must have shape \(2,\), got \(1,\)"),
    ({"y": np.ones((3, 2), int)}, TypeError, "y must be float16"),
    ({"epsilon": -1}, ValueError, "epsilon must be finite"),
    ({"out": np.ones((3, 3))}, ValueError, r"out must have shape \(3, 2\), got \(3, 3\)"),
])  # fmt: skip
def test_denormalize_messages(arguments, error, message):
    arguments = {"y": np.ones((3, 2)), "mean": np.zeros(2), "variance": np.ones(2)} | arguments
    with pytest.raises(error, match=message):
        denormalize(**arguments)


def test_denormalize_writes_to_no_argument():
    both = np.ones((3, 2))
    with pytest.raises(ValueError, match="out must not share memory with mean"):
        denormalize(np.ones((3, 2)), both[0], np.ones(2), out=both)
    assert (both == 1).all()
    assert fastbn.denormalize is denormalize
