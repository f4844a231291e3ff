"""What converters refuse, and with which words."""

from __future__ import annotations

import numpy as np
import pytest
from weights_cases import (
    BETA,
    GAMMA,
    LINEN,
    MEAN,
    MODEL,
    ONNX,
    STATE,
    TF1,
    TORCH,
    VARIANCE,
    keras_layer,
    layer,
    prefixed,
    without,
)

import fastbn
from fastbn.compat import (
    flax_arguments,
    from_flax,
    from_flax_many,
    from_keras,
    from_keras_many,
    from_onnx,
    from_tf1,
    from_torch,
    keras_config,
    to_flax,
    to_keras,
    to_onnx,
    to_torch,
)
from fastbn.compat.keras import BatchNormalization


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: from_torch(3), TypeError, "source must be a mapping of names to arrays, got int"),
        (lambda: from_torch({1: GAMMA}), TypeError, "source must have strings as names, got 1"),
        (lambda: from_torch(TORCH, 3), TypeError, "prefix must be a string, got 3"),
        (lambda: from_torch({}), ValueError, "source must have 'weight', got none"),
        (
            lambda: from_torch(MODEL, "layer1"),
            ValueError,
            "source must have 'layer1.weight', got conv.weight, layer1.bn.bias, layer1.bn.num_batches_tracked, "
            "layer1.bn.running_mean, layer1.bn.running_var, layer1.bn.weight, layer1.bn2.num_batches_tracked, "
            "layer1.bn2.running_mean and 1 more",
        ),
        (
            lambda: from_torch(without(TORCH, "running_var")),
            ValueError,
            "source must have 'running_var', got bias, num_batches_tracked, running_mean, weight",
        ),
        (
            lambda: from_torch(without(TORCH, "num_batches_tracked"), momentum=None),
            ValueError,
            "source must have 'num_batches_tracked', got bias, running_mean, running_var, weight",
        ),
        (
            lambda: from_torch(TORCH | {"extra": GAMMA}),
            ValueError,
            "source must have no other names than running_mean, running_var, weight, bias, num_batches_tracked, "
            "got extra",
        ),
        (
            lambda: from_torch(prefixed(TORCH, "a.") | {"a.extra": GAMMA}, "a"),
            ValueError,
            "source must have no other names than running_mean, running_var, weight, bias, num_batches_tracked "
            "below a, got a.extra",
        ),
        (
            lambda: from_torch(prefixed(TORCH | {"weight": GAMMA[:2]}, "a."), "a"),
            ValueError,
            "a.weight must have shape (3,) as a.running_mean, got (2,)",
        ),
        (
            lambda: from_torch(TORCH | {"running_var": -VARIANCE}),
            ValueError,
            "running_var must not be negative, got -2.0",
        ),
        (
            lambda: from_torch({k: v[0] for k, v in TORCH.items() if k != "num_batches_tracked"}),
            ValueError,
            "running_mean must have as many axes as there are channel axes, 1, got shape ()",
        ),
        (
            lambda: from_torch({"running_mean": np.ones((2, 3)), "running_var": np.ones((2, 3))}),
            ValueError,
            "running_mean must have as many axes as there are channel axes, 1, got shape (2, 3)",
        ),
        (
            lambda: from_flax({"mean": np.ones((2, 3)), "var": np.ones((2, 3))}),
            ValueError,
            "mean must have as many axes as there are channel axes, 1, got shape (2, 3)",
        ),
        (
            lambda: from_flax({"mean": MEAN, "var": VARIANCE}, axis=(1, 2)),
            ValueError,
            "mean must have as many axes as there are channel axes, 2, got shape (3,)",
        ),
        (
            lambda: from_onnx(dict.fromkeys(ONNX, np.ones((2, 3)))),
            ValueError,
            "input_mean must have as many axes as there are channel axes, 1, got shape (2, 3)",
        ),
        (
            lambda: from_torch(TORCH | {"weight": ["a", "b", "c"]}),
            TypeError,
            "weight must be an array of real numbers, got list of dtype <U1",
        ),
        (
            lambda: from_torch(TORCH | {"weight": [[1], [1, 2], []]}),
            TypeError,
            "weight must be an array, got list: ",
        ),
        (
            lambda: from_torch(TORCH | {"num_batches_tracked": np.array([1, 2])}),
            ValueError,
            "num_batches_tracked must be one integer, at least 0, got [1, 2]",
        ),
        (lambda: from_torch(TORCH, momentum=1.5), ValueError, "momentum must be in [0, 1], got 1.5"),
        (lambda: from_torch(TORCH, momentum="a"), TypeError, "momentum must be a real number, got 'a'"),
        (lambda: from_torch(TORCH, eps=-1), ValueError, "epsilon must be finite and at least 0, got -1.0"),
        (lambda: to_torch(3), TypeError, "bn must be a fastbn.BatchNorm, got int"),
        (
            lambda: to_torch(fastbn.BatchNorm()),
            ValueError,
            "bn must be built by a call or by build(num_features), got one that is not",
        ),
        (
            lambda: to_torch(fastbn.BatchNorm((2, 3), axis=(1, 2))),
            ValueError,
            "bn must have one channel axis for PyTorch, got parameters of shape (2, 3)",
        ),
        (
            lambda: to_torch(layer(activation="relu")),
            ValueError,
            "bn must have no activation for PyTorch, which has none here, got 'relu'",
        ),
        (lambda: to_torch(layer(), object()), TypeError, "module must be a batch norm module, got object"),
        (
            lambda: from_keras(3),
            TypeError,
            "source must be a layer, a list of arrays or a mapping, got int",
        ),
        (
            lambda: from_keras([GAMMA] * 3),
            ValueError,
            "source must be 4 arrays (gamma, beta, moving_mean, moving_variance); config says which there are, got 3",
        ),
        (
            lambda: from_keras([GAMMA] * 4, {"scale": False}),
            ValueError,
            "source must be 3 arrays (beta, moving_mean, moving_variance); config says which there are, got 4",
        ),
        (
            lambda: from_keras([GAMMA, BETA, MEAN, VARIANCE[:2]]),
            ValueError,
            "moving_variance must have shape (3,) as moving_mean, got (2,)",
        ),
        (lambda: from_keras([GAMMA] * 4, 3), TypeError, "config must be a mapping, got int"),
        (
            lambda: from_keras([GAMMA] * 4, {"fused": None, "other": 1}),
            ValueError,
            "config must have no entry 'other', got 1",
        ),
        (
            lambda: from_keras([GAMMA] * 4, {"virtual_batch_size": 2}),
            ValueError,
            "config must have no entry 'virtual_batch_size' but None, got 2",
        ),
        (
            lambda: from_keras(without(STATE, "moving_mean")),
            ValueError,
            "source must have 'moving_mean', got beta, gamma, moving_variance",
        ),
        (
            lambda: from_keras(prefixed(STATE, "bn/"), prefix="other"),
            ValueError,
            "source must have 'other/moving_mean', got bn/beta, bn/gamma, bn/moving_mean, bn/moving_variance",
        ),
        (
            lambda: from_keras(STATE | {"kernel": GAMMA}),
            ValueError,
            "source must have no other names than gamma, beta, moving_mean, moving_variance, got kernel",
        ),
        (
            lambda: from_keras(BatchNormalization()),
            ValueError,
            "source must be a layer that is built, got one without weights",
        ),
        (lambda: from_keras_many(3), TypeError, "model must have layers, got int"),
        (
            lambda: to_keras(layer(track=False)),
            ValueError,
            "bn must keep moving statistics for Keras, got one with track=False",
        ),
        (
            lambda: to_keras(layer(momentum=None)),
            ValueError,
            "bn must have a momentum for Keras, which knows no average of all batches, got None",
        ),
        (
            lambda: to_keras(layer(renorm=True, renorm_scheme="tf1")),
            ValueError,
            "bn must have the renorm_scheme 'keras', got 'tf1'",
        ),
        (
            lambda: keras_config(layer(layout="NCHW")),
            ValueError,
            "bn must name its channel axis by axis for Keras, got layout 'NCHW'",
        ),
        (lambda: to_keras(layer(), 3), TypeError, "layer must be a layer of Keras, got int"),
        (
            lambda: to_keras(layer(), BatchNormalization(momentum=0.5)),
            ValueError,
            "momentum of layer must be 0.99, got 0.5",
        ),
        (
            lambda: to_keras(layer(), BatchNormalization()),
            ValueError,
            "layer must be built with weights of shape (3,), (3,), (3,), (3,), got none",
        ),
        (lambda: to_keras(layer(axis=1), keras_layer(2)), ValueError, "axis of layer must be 1, got 2"),
        (lambda: to_keras(layer(axis=1), keras_layer(-1)), ValueError, "axis of layer must be 1, got 3"),
        (lambda: to_keras(layer(layout="NCHW"), keras_layer(3)), ValueError, "axis of layer must be 1, got 3"),
        (
            lambda: from_keras([GAMMA] * 4, {"activity_regularizer": "l2", "units": 3}),
            ValueError,
            "config must have no entry 'units', got 3",
        ),
        (
            lambda: from_tf1(3),
            TypeError,
            "variables must be a mapping, variables with names, or a reader of a checkpoint, got int",
        ),
        (
            lambda: from_tf1([3]),
            TypeError,
            "variables must be a mapping, variables with names, or a reader of a checkpoint, got an iterable with int",
        ),
        (lambda: from_tf1(TF1, 3), TypeError, "scope must be a string, got 3"),
        (lambda: from_tf1(TF1, "other"), ValueError, "scope must be one of net/bn, got 'other'"),
        (lambda: from_tf1({}), ValueError, "scope must be one of none, got ''"),
        (
            lambda: from_tf1(TF1 | prefixed(STATE, "net/bn_1/")),
            ValueError,
            "scope must name one layer; from_tf1_many takes several, got net/bn, net/bn_1",
        ),
        (
            lambda: from_tf1(without(TF1, "net/bn/moving_variance:0"), "net/bn"),
            ValueError,
            "source must have 'net/bn/moving_variance', got net/bn/beta, net/bn/gamma, net/bn/moving_mean",
        ),
        (
            lambda: from_tf1(TF1 | {"net/bn/renorm_mean:0": MEAN}),
            ValueError,
            "source must have 'net/bn/renorm_mean_weight', got net/bn/beta, net/bn/gamma, net/bn/moving_mean, "
            "net/bn/moving_variance, net/bn/renorm_mean",
        ),
        (
            lambda: from_tf1(TF1 | {"net/bn/net/bn/moving_mean/biased": MEAN}),
            ValueError,
            "source must have 'net/bn/moving_mean/local_step', got net/bn/beta, net/bn/gamma, net/bn/moving_mean, "
            "net/bn/moving_variance, net/bn/net/bn/moving_mean/biased",
        ),
        (
            lambda: from_tf1(TF1 | {"net/bn/moving_mean/biased": MEAN, "net/bn/moving_mean/local_step": 1.5}),
            ValueError,
            "net/bn/moving_mean/local_step must be one integer, at least 0, got 1.5",
        ),
        (
            lambda: from_tf1(TF1 | {"net/bn/gamma:0": np.ones((3, 3))}),
            ValueError,
            "net/bn/gamma must have one value per channel of axis -1, got shape (3, 3)",
        ),
        (
            lambda: from_flax(3),
            TypeError,
            "source must be variables of linen, or a layer or state of nnx, got int",
        ),
        (
            lambda: from_flax({"params": 3}),
            TypeError,
            "source must have mappings as params and batch_stats, got int",
        ),
        (
            lambda: from_flax(LINEN, "bn"),
            ValueError,
            "source must have 'bn/mean', got bias, mean, scale, var",
        ),
        (
            lambda: from_flax({"mean": MEAN, "var": VARIANCE, "kernel": MEAN}),
            ValueError,
            "source must have no other names than mean, var, scale, bias, got kernel",
        ),
        (
            lambda: from_flax({"mean": np.ones((2, 3)), "var": np.ones((2, 3))}, axis=(-2, 1)),
            ValueError,
            "axis must count all axes from the same end, or begin with axis 0, or end with axis -1, got (-2, 1)",
        ),
        (
            lambda: to_flax(fastbn.BatchNorm((2, 3), axis=(1, -2))),
            ValueError,
            "axis of bn must count all axes from the same end, or begin with axis 0, or end with axis -1, got (1, -2)",
        ),
        (
            lambda: flax_arguments(fastbn.BatchNorm((2, 3), axis=(1, -2))),
            ValueError,
            "axis of bn must count all axes from the same end, or begin with axis 0, or end with axis -1, got (1, -2)",
        ),
        (
            lambda: from_flax_many(3),
            TypeError,
            "source must be variables of linen or a state of nnx, got int",
        ),
        (lambda: to_flax(layer(), api="jax"), ValueError, "api must be one of linen, nnx, got 'jax'"),
        (lambda: to_flax(layer(), object()), TypeError, "layer must be an nnx.BatchNorm, got object"),
        (
            lambda: to_flax(layer(), object(), path="a"),
            ValueError,
            "path must not be given with a layer, got 'a'",
        ),
        (
            lambda: to_flax(layer(track=False)),
            ValueError,
            "bn must keep moving statistics for flax, got one with track=False",
        ),
        (
            lambda: to_flax(layer(activation="relu")),
            ValueError,
            "bn must have no activation for flax, which has none here, got 'relu'",
        ),
        (
            lambda: to_flax(layer(momentum=None)),
            ValueError,
            "bn must have a momentum for flax, which knows no average of all batches, got None",
        ),
        (
            lambda: flax_arguments(layer(layout="NCHW")),
            ValueError,
            "bn must name its channel axis by axis for flax, got layout 'NCHW'",
        ),
        (lambda: from_onnx(ONNX, "bn"), ValueError, "node must not be given with a mapping, got 'bn'"),
        (
            lambda: from_onnx(without(ONNX, "B")),
            ValueError,
            "source must have 'B', got input_mean, input_var, scale",
        ),
        (
            lambda: to_onnx(layer(), form="other"),
            ValueError,
            "form must be one of node, folded, arrays, got 'other'",
        ),
        (
            lambda: to_onnx(layer(activation="relu"), form="arrays"),
            ValueError,
            "bn must have no activation for arrays, got 'relu'",
        ),
        (
            lambda: to_onnx(layer(track=False), form="arrays"),
            ValueError,
            "bn must keep moving statistics for ONNX, got one with track=False",
        ),
        (
            lambda: to_onnx(fastbn.BatchNorm((2, 3), axis=(1, 2)), form="arrays"),
            ValueError,
            "bn must have one channel axis for ONNX, got parameters of shape (2, 3)",
        ),
    ],
)
def test_messages(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message or (message.endswith(": ") and str(caught.value).startswith(message))
