"""Moving statistics beyond one momentum: means of all batches, zero debias, none at all, infinite and NaN batches."""

from __future__ import annotations

import math
import threading

import cases
import numpy as np
import pytest
import reference as ref
from hypothesis import given
from hypothesis import strategies as st

import fastbn
from fastbn import BatchNorm, batch_norm, batch_norm_forward, update_moving
from fastbn.averages import share

C = 3


def batches(count, dtype=np.float64):
    """Batches of different sizes and means."""
    return [cases.normal((4 + 3 * i, C), dtype, mean=i, deviation=1 + i, seed=i) for i in range(count)]


# -- shares ------------------------------------------------------------------------------------------------


def test_share_of_a_momentum():
    assert share(0.9, 0) == share(0.9, 7) == 0.9


def test_shares_of_the_mean_of_all_batches():
    assert [share(None, t) for t in range(4)] == [0, 1 / 2, 2 / 3, 3 / 4]


@given(momentum=st.floats(0.01, 0.999), count=st.integers(1, 60))
def test_zero_debias_is_the_biased_average_by_its_weight(momentum, count):
    """The published form: biased <- p * biased + (1 - p) * value, from 0, divided by 1 - p^t."""
    values = np.random.default_rng(count).normal(5, 1, count)
    biased, average = 0.0, 123.0
    for t, value in enumerate(values):
        biased = momentum * biased + (1 - momentum) * value
        s = share(momentum, t, zero_debias=True)
        assert 0 <= s < 1
        average = s * average + (1 - s) * value if s else value
    weight = -math.expm1(count * math.log(momentum))
    assert average == pytest.approx(biased / weight, rel=1e-11)


@pytest.mark.parametrize(("momentum", "t", "expected"), [(0.9, 0, 0.0), (0.0, 5, 0.0), (1.0, 0, 1.0), (1.0, 5, 1.0)])
def test_debiased_shares_at_the_ends(momentum, t, expected):
    assert share(momentum, t, zero_debias=True) == expected


def test_a_debiased_share_near_1_is_that_of_the_mean():
    assert share(1 - 1e-12, 9, zero_debias=True) == pytest.approx(0.9, rel=1e-9)


# -- layers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ddof", [0, 1])
def test_momentum_none_is_the_mean_over_batches(ddof):
    bn = BatchNorm(C, momentum=None, ddof=ddof, dtype=np.float64)
    data = batches(6)
    for x in data:
        bn(x, True)
    np.testing.assert_allclose(bn.moving_mean, np.mean([x.mean(0) for x in data], 0), rtol=1e-13)
    np.testing.assert_allclose(bn.moving_variance, np.mean([x.var(0, ddof=ddof) for x in data], 0), rtol=1e-13)
    assert bn.batches == 6


def test_momentum_none_is_that_of_pytorch():
    torch = pytest.importorskip("torch")
    module = torch.nn.BatchNorm1d(C, momentum=None, eps=1e-3)
    bn = BatchNorm(C, momentum=None, ddof=1)
    for x in batches(5, np.float32):
        module(torch.from_numpy(x))
        bn(x, True)
    np.testing.assert_allclose(bn.moving_mean, module.running_mean.numpy(), rtol=1e-5)
    np.testing.assert_allclose(bn.moving_variance, module.running_var.numpy(), rtol=1e-5)
    assert bn.batches == int(module.num_batches_tracked)


def test_momentum_none_goes_on_from_a_state():
    data = batches(5)
    whole, half = BatchNorm(C, momentum=None), BatchNorm(C, momentum=None)
    for x in data:
        whole(x, True)
    for x in data[:3]:
        half(x, True)
    other = BatchNorm(momentum=None)
    other.load_state_dict(half.state_dict())
    for x in data[3:]:
        other(x, True)
    for a, b in zip(whole.variables, other.variables, strict=True):
        ref.assert_same_bits(a, b)


def test_momentum_may_be_set_later():
    bn = BatchNorm(C, momentum=0.5)
    bn.momentum = None
    x = batches(1)[0]
    bn(x, True)
    np.testing.assert_allclose(bn.moving_mean, x.mean(0), rtol=1e-6)


def test_zero_debias():
    momentum, data = 0.9, batches(5)
    bn = BatchNorm(C, momentum=momentum, zero_debias=True, dtype=np.float64)
    mean = variance = np.zeros(C)
    for t, x in enumerate(data, 1):
        bn(x, True)
        mean = momentum * mean + (1 - momentum) * x.mean(0)
        variance = momentum * variance + (1 - momentum) * x.var(0)
        np.testing.assert_allclose(bn.moving_mean, mean / (1 - momentum**t), rtol=1e-12)
        np.testing.assert_allclose(bn.moving_variance, variance / (1 - momentum**t), rtol=1e-12)


def test_zero_debias_of_the_mean_alone():
    data = batches(4)
    bn, both, plain = (BatchNorm(C, momentum=0.9, zero_debias=z, dtype=np.float64) for z in ("mean", True, False))
    for x in data:
        for layer in (bn, both, plain):
            layer(x, True)
    ref.assert_same_bits(bn.moving_mean, both.moving_mean)
    np.testing.assert_allclose(bn.moving_variance, plain.moving_variance, rtol=1e-14)


@pytest.mark.parametrize("options", [{"momentum": None}, {"zero_debias": True}], ids=str)
def test_an_untrained_layer_infers_with_its_initial_statistics(options):
    x = batches(1)[0]
    with pytest.warns(UserWarning, match="no batch has reached"):
        y = BatchNorm(C, **options)(x)
    ref.assert_same_bits(y, batch_norm(x, moving_mean=np.zeros(C), moving_variance=np.ones(C)))


@pytest.mark.parametrize("options", [{"zero_debias": True}, {"momentum": None}, {"virtual_batch_size": 2}], ids=str)
def test_threads_lose_no_update(options):
    x = cases.normal((40, C), np.float64, mean=10)
    bn = BatchNorm(C, **options)

    def work():
        for _ in range(50):
            bn(x, True)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert bn.batches == 200


# -- functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, C), (20000, C)], ids=str)
@pytest.mark.parametrize("forward", [False, True])
def test_functions_take_the_number_of_batches(shape, forward):
    mean, variance = np.zeros(C), np.ones(C)
    data = [cases.normal(shape, np.float64, mean=i, seed=i) for i in range(3)]
    for t, x in enumerate(data):
        (batch_norm_forward if forward else batch_norm)(
            x, moving_mean=mean, moving_variance=variance, training=True, momentum=None, batches=t
        )
    np.testing.assert_allclose(mean, np.mean([x.mean(0) for x in data], 0), rtol=1e-12)
    np.testing.assert_allclose(variance, np.mean([x.var(0) for x in data], 0), rtol=1e-12)


def test_update_moving():
    mean, variance = np.full(C, 9.0), np.full(C, 9.0)
    for t in range(3):
        update_moving(mean, variance, np.full(C, t), np.full(C, 2.0 * t), momentum=None, batches=t)
    assert (mean == 1).all()
    assert (variance == 2).all()
    update_moving(mean, variance, np.full(C, 3.0), np.full(C, 4.0), momentum=0.9, zero_debias=True, batches=0)
    assert (mean == 3).all()
    assert (variance == 4).all()


def test_inference_needs_no_number_of_batches():
    x = batches(1)[0]
    arguments = {"moving_mean": np.zeros(C), "moving_variance": np.ones(C)}
    ref.assert_same_bits(batch_norm(x, momentum=None, **arguments), batch_norm(x, **arguments))


def test_messages():
    x, mean, variance = batches(1)[0], np.zeros(C), np.ones(C)
    arguments = {"moving_mean": mean, "moving_variance": variance}
    with pytest.raises(ValueError, match="batches must be given with momentum=None, got None"):
        batch_norm(x, training=True, momentum=None, **arguments)
    with pytest.raises(ValueError, match="batches must be given with zero_debias=True, got None"):
        update_moving(mean, variance, mean + 1, variance + 1, momentum=0.9, zero_debias=True)
    with pytest.raises(ValueError, match="batches must be at least 0, got -1"):
        batch_norm(x, training=True, momentum=None, batches=-1, **arguments)
    with pytest.raises(TypeError, match=r"batches must be an integer, got 1\.5"):
        batch_norm_forward(x, training=True, momentum=None, batches=1.5, **arguments)
    with pytest.raises(TypeError, match="zero_debias must be a bool, got 3"):
        BatchNorm(zero_debias=3)
    with pytest.raises(ValueError, match="zero_debias must be a bool or \"mean\", got 'all'"):
        BatchNorm(zero_debias="all")
    assert not mean.any()
    assert (variance == 1).all()


# -- no moving statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("training", [True, False, None])
def test_without_moving_statistics_every_call_normalizes_with_its_batch(training, trainable):
    x = cases.normal((9, C), mean=4)
    bn = BatchNorm(track=False, trainable=trainable)
    assert bn.mode(training) == "batch"
    y = bn(x, training)
    expected = batch_norm(x, training=True)
    ref.assert_same_bits(y, expected)
    assert [v.tolist() for v in bn.variables] == [[1] * C, [0] * C]
    assert bn.batches == 0
    assert set(bn.state_dict()) == {"gamma", "beta", "batches"}
    dy = cases.normal(x.shape, seed=1)
    assert np.isfinite(bn.backward(dy)).all()
    for name in ("moving_mean", "moving_variance"):
        with pytest.raises(ValueError, match="track must be True in a layer whose moving statistics are needed"):
            getattr(bn, name)


def test_a_layer_without_any_array(tmp_path):
    bn = BatchNorm(track=False, center=False, scale=False)
    bn(np.ones((2, C)), True)
    assert bn.variables == []
    bn.save(tmp_path / "bn")
    assert repr(BatchNorm.load(tmp_path / "bn")) == repr(bn) == "BatchNorm(3, center=False, scale=False, track=False)"


# -- statistics that are not finite ------------------------------------------------------------------------


def spoiled(value):
    x = cases.normal((8, C), np.float64, mean=2)
    x[3, 1] = value
    return x


@pytest.mark.parametrize("momentum", [0.99, None])
def test_what_the_moving_statistics_cannot_hold_is_not_finite(momentum):
    """A variance of float32 data may be beyond float32."""
    x = cases.normal((20, 2))
    x[:, 0] *= np.float32(1e25)
    skips = BatchNorm(2, on_nonfinite="skip", momentum=momentum)
    skips(x, True)
    assert skips.moving_variance[0] == 1
    assert skips.moving_mean[0] == 0
    assert skips.moving_variance[1] != 1
    assert skips.batches == 1
    raises = BatchNorm(2, on_nonfinite="raise", momentum=momentum)
    before = raises.state_dict()
    with pytest.raises(
        ValueError, match='x must have finite statistics with on_nonfinite="raise", got others in channel 0'
    ):
        raises(x, True)
    with pytest.raises(ValueError, match="batches must have finite statistics"):
        fastbn.recompute_statistics(raises, [x])
    assert str(raises.state_dict()) == str(before)
    fastbn.recompute_statistics(skips, [x])
    assert skips.moving_variance[0] == 1
    wide = BatchNorm(2, on_nonfinite="raise", dtype="float64")
    wide(x, True)
    assert np.isfinite(wide.moving_variance).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_propagate(value):
    bn = BatchNorm(C)
    bn(spoiled(value), True)
    assert np.isfinite(bn.moving_mean).tolist() == [True, False, True]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_skip_leaves_the_channel_as_it_was(value):
    bn, clean = BatchNorm(C, on_nonfinite="skip"), BatchNorm(C)
    x = spoiled(value)
    y = bn(x, True)
    ref.assert_same_bits(y, batch_norm(x, training=True))
    clean(x, True)
    for array, other, initial in zip(bn.variables[2:], clean.variables[2:], (0, 1), strict=True):
        assert array[1] == initial
        np.testing.assert_allclose(array[[0, 2]], other[[0, 2]], rtol=1e-6)
    assert bn.batches == 1


def test_skip_does_not_count_a_batch_that_reached_nothing():
    bn = BatchNorm(C, on_nonfinite="skip", momentum=None)
    bn(np.full((4, C), np.nan), True)
    assert bn.batches == 0
    assert bn.moving_mean.tolist() == [0] * C


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 4}, {"renorm": True}], ids=str)
def test_raise_comes_before_any_write(value, in_place, options):
    bn = BatchNorm(C, on_nonfinite="raise", **options)
    x = spoiled(value)
    before, state = x.copy(), bn.state_dict()
    out = x if in_place else np.full_like(x, 7)
    kept = out.copy()
    message = r'x must have finite statistics with on_nonfinite="raise", got others in channel 1'
    with pytest.raises(ValueError, match=message):
        bn(x, True, out=out)
    ref.assert_same_bits(x, before)
    ref.assert_same_bits(out, kept)
    for name, array in bn.state_dict().items():
        assert np.array_equal(array, state[name])
    good = cases.normal((8, C), np.float64)
    y = bn(good, True)
    if not options:
        ref.assert_same_bits(y, batch_norm(good, training=True))
    bn(x)  # inference looks at no batch


def test_on_nonfinite_is_one_of_three():
    with pytest.raises(ValueError, match="on_nonfinite must be one of propagate, raise, skip, got 'ignore'"):
        BatchNorm(on_nonfinite="ignore")
