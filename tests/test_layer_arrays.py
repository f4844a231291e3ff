"""The arrays of a layer: nothing else lies in them, and they change together or not at all."""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
from test_layer import STATE

import fastbn
from fastbn import BatchNorm

C = 3  # of the fixture x


@pytest.mark.parametrize("options", [{}, {"zero_debias": True}, {"renorm": True}], ids=str)
@pytest.mark.parametrize("name", ["moving_mean", "moving_variance"])
def test_statistics_that_are_read_only_stay_together(name, options, x):
    bn = BatchNorm(C, **options)
    getattr(bn, name).flags.writeable = False
    before, state = str(bn.state_dict()), BatchNorm(C, **options).state_dict()
    state["gamma"] += 1
    state["beta"] += 1
    out = np.zeros_like(x)
    for change in (
        lambda: bn(x, True, out=out),
        lambda: bn.load_state_dict(state),
        lambda: fastbn.recompute_statistics(bn, [x]),
    ):
        with pytest.raises(ValueError, match=f"{name} must be writable, got a read-only array"):
            change()
        assert str(bn.state_dict()) == before
    assert not out.any()


def test_parameters_that_are_read_only_stay_together():
    bn = BatchNorm(C, gamma_constraint="max_norm", beta_constraint=lambda beta: beta + 1)
    bn.beta.flags.writeable = False
    gamma = bn.gamma.copy()
    with pytest.raises(ValueError, match="beta must be writable, got a read-only array"):
        bn.apply_constraints()
    ref.assert_same_bits(bn.gamma, gamma)


@pytest.mark.parametrize("options", [{}, {"zero_debias": True}], ids=str)
def test_a_batch_that_lies_in_the_moving_statistics(options):
    """They would change it before its gradient is taken."""
    bn = BatchNorm(C, **options)
    with pytest.raises(ValueError, match="moving_variance must not share memory with x"):
        bn(bn.moving_variance[None], True)
    assert (bn.moving_variance == 1).all()


@pytest.mark.parametrize("options", [{}, {"zero_debias": True}], ids=str)
@pytest.mark.parametrize("others", [2, C + 3])
def test_a_layer_that_gets_other_channels_while_it_is_called(options, others, x):
    """Of another thread, say: the statistics of one number of channels do not go into those of another."""

    def ones(shape, _):
        if shape == (C,) and not bn.built:
            bn.build(others)
        return np.ones(shape)

    bn = BatchNorm(gamma_initializer=ones, **options)
    with pytest.raises(ValueError, match=f"x must have {others} channels, got {C}"):
        bn(x, True)
    assert not bn.moving_mean.any()
    assert bn.batches == 0


@pytest.mark.parametrize("options", [{}, {"zero_debias": True}], ids=str)
@pytest.mark.parametrize("name", STATE)
def test_out_is_none_of_the_layers_arrays(name, options):
    layer = BatchNorm(4, axis=0, **options)
    before = getattr(layer, name).copy()
    with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
        layer(np.arange(4, dtype=np.float32), True, out=getattr(layer, name))
    ref.assert_same_bits(getattr(layer, name), before)


class Exported:
    """Another library's array in the memory of one of NumPy's."""

    def __init__(self, array):
        self.__array_interface__ = array.__array_interface__


@pytest.mark.parametrize("options", [{}, {"zero_debias": True}], ids=str)
@pytest.mark.parametrize("name", [*STATE, "mask"])
def test_out_of_another_library_is_none_of_them_either(name, options):
    layer, mask = BatchNorm(4, axis=0, **options), np.ones(16, bool)
    before = str(layer.state_dict())
    out = mask.view(np.float32) if name == "mask" else getattr(layer, name)
    with pytest.raises(ValueError, match=f"out must not share memory with {name}"):
        layer(np.arange(4, dtype=np.float32), True, out=Exported(out), mask=mask[:4])
    assert str(layer.state_dict()) == before
    assert mask.all()


@pytest.mark.parametrize("options", [{}, {"renorm": True}], ids=str)
def test_a_negative_variance_is_refused_before_it_is_too_late(options, tmp_path):
    """No state with one is loaded, so a copy or a file of such a layer would be lost."""
    bn = BatchNorm(C, **options)
    with pytest.raises(ValueError, match=r"moving_variance must not be negative, got -1\.0"):
        bn.moving_variance = [1.0, -1.0, 2.0]
    ref.assert_same_bits(bn.moving_variance, np.ones(C, np.float32))
    bn.moving_mean = [1.0, -1.0, 2.0]
    for name in ("moving_variance", *(n for n in bn.renorm_state if n.endswith("stddev"))):
        bn = BatchNorm(C, **options)
        dict(bn.renorm_state, moving_variance=bn.moving_variance)[name][1] = -1
        with pytest.raises(ValueError, match=f"{name} must not be negative in a layer that is saved, got -1"):
            bn.save(tmp_path / "layer.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.float16, np.int64])
def test_a_state_of_another_type_builds_a_layer_that_has_its_own(dtype):
    """As one that is built takes it."""
    state = {name: np.arange(C).astype(dtype) for name in STATE}
    for bn in (BatchNorm(C, dtype="float32"), BatchNorm(dtype="float32")):
        bn.load_state_dict(state)
        ref.assert_same_bits(bn.moving_variance, np.arange(C, dtype=np.float32))
    with pytest.raises(TypeError, match=f"moving_mean must be float32 or float64, got {np.dtype(dtype)}"):
        BatchNorm().load_state_dict(state)
