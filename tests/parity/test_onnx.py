"""ONNX: nodes run by ONNX Runtime give the numbers of the layer, in inference and in training, and go both ways.

ONNX has no gradients. ``training_mode`` gives a batch's result and the new moving statistics.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parity import frameworks
from parity.configurations import configurations
from parity.tolerances import Moving, Step, assert_within

import fastbn
from fastbn.compat import from_onnx, from_onnx_many, to_onnx

onnx = frameworks.load("onnx", "pip install onnx onnxruntime")
runtime = frameworks.load("onnxruntime", "pip install onnx onnxruntime")

INPUTS = ("scale", "B", "input_mean", "input_var")


def node_model(c, arrays, *, training, opset):
    """A model of one BatchNormalization, in training with its three outputs."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    outputs = ["Y", "mean", "var"] if training else ["Y"]
    attributes = {"training_mode": 1} if training else {}
    node = helper.make_node(
        "BatchNormalization", ["X", *INPUTS], outputs, "bn", epsilon=c.epsilon, momentum=c.momentum, **attributes
    )
    values = [onnx.numpy_helper.from_array(a, n) for n, a in zip(INPUTS, arrays)]
    ends = [[helper.make_tensor_value_info(n, kind, None) for n in names] for names in (["X"], outputs)]
    graph = helper.make_graph([node], "graph", *ends, values)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(model, x):
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})


@frameworks.configurations
@given(configuration=configurations(axes="second"), opset=st.sampled_from((9, 14, 15)))
def test_node(configuration, opset):
    c = configuration
    arrays = c.parameters()
    ours = from_onnx(node_model(c, arrays, training=False, opset=opset))
    assert (ours.epsilon, ours.momentum) == (c.epsilon, c.momentum)
    gamma, beta, mean, variance = arrays
    moving = Moving(mean, variance)
    for _ in range(c.steps if opset >= 14 else 0):
        x = c.batch()
        step = Step(x, 1, c.epsilon, gamma, beta, folded=True)
        y, *arrays[2:] = run(node_model(c, arrays, training=True, opset=opset), x)
        assert_within(ours(x, training=True), y, step.e_y, "y")
        moving.update(step, c.momentum)
        assert_within(ours.moving_mean, arrays[2], moving.bounds[0], "running_mean")
        assert_within(ours.moving_variance, arrays[3], moving.bounds[1], "running_var")
    model = node_model(c, arrays, training=False, opset=opset)
    ours = from_onnx(model.SerializeToString(), "bn")
    for name, value in zip(INPUTS, arrays):
        np.testing.assert_array_equal(to_onnx(ours, form="arrays")[name], value)
    x = c.batch()
    step = Step(x, 1, c.epsilon, gamma, beta, given=(ours.moving_mean, ours.moving_variance), folded=True)
    assert_within(ours(x), run(model, x)[0], step.e_y, "y of inference")
    frameworks.agreed(f"onnxruntime {runtime.__version__}: BatchNormalization")


@frameworks.configurations
@given(
    configuration=configurations(),
    form=st.sampled_from(("node", "folded")),
    activation=st.sampled_from((None, "relu", ("leaky_relu", 0.25))),
)
def test_export(configuration, form, activation):
    c = configuration
    bn = fastbn.BatchNorm(
        c.channels, axis=c.axis, momentum=c.momentum, epsilon=c.epsilon, center=c.center, scale=c.scale,
        activation=activation,
    )  # fmt: skip
    gamma, beta, bn.moving_mean, bn.moving_variance = c.parameters()
    if c.scale:
        bn.gamma = gamma
    if c.center:
        bn.beta = beta
    model = to_onnx(bn, form=form, rank=len(c.shape))
    x = c.batch()
    statistics = (bn.moving_mean, bn.moving_variance)
    step = Step(x, c.axis, c.epsilon, bn.gamma, bn.beta, given=statistics, folded=True)
    (y,) = run(model, x)
    assert_within(bn(x), y, step.e_y, "y")  # the slope of an activation is at most 1
    if form == "node":
        again = from_onnx(model, axis=c.axis)
        assert (again.momentum, again.epsilon) == (c.momentum, c.epsilon)
        np.testing.assert_array_equal(again.moving_variance, bn.moving_variance)
        assert list(from_onnx_many(model)) == ["batch_normalization"]
    frameworks.agreed(f"onnxruntime {runtime.__version__}: exported layers")


def test_constants_may_be_nodes(tmp_path):
    bn = fastbn.BatchNorm(2, axis=1)
    model = to_onnx(bn, rank=3)
    for tensor in list(model.graph.initializer):
        model.graph.initializer.remove(tensor)
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
    onnx.save(model, tmp_path / "bn.onnx")
    np.testing.assert_array_equal(from_onnx(tmp_path / "bn.onnx").gamma, bn.gamma)


def test_float64():
    bn = fastbn.BatchNorm(2, axis=1, dtype=np.float64)
    bn.moving_mean = [1.0, 2.0]
    x = np.arange(12.0).reshape(3, 2, 2)
    (y,) = run(to_onnx(bn, rank=3), x)
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, bn(x), rtol=1e-9)  # epsilon is a float32 in a node


def test_messages():
    bn = fastbn.BatchNorm(2, axis=1)
    model = to_onnx(bn, rank=3)
    with pytest.raises(ValueError, match=r"^node must be one of batch_normalization, got 'other'$"):
        from_onnx(model, "other")
    with pytest.raises(ValueError, match=r"^node must be less than 1, the number of BatchNormalization nodes, got 3$"):
        from_onnx(model, 3)
    with pytest.raises(TypeError, match=r"^node must be a name or a number, got 1.5$"):
        from_onnx(model, 1.5)
    two = onnx.compose.merge_models(
        onnx.compose.add_prefix(model, "a/"), onnx.compose.add_prefix(model, "b/"), io_map=[("a/Y", "b/X")]
    )
    assert list(from_onnx_many(two)) == ["a/batch_normalization", "b/batch_normalization"]
    message = (
        r"^node must name one BatchNormalization; from_onnx_many takes several, "
        r"got a/batch_normalization, b/batch_normalization$"
    )
    with pytest.raises(ValueError, match=message):
        from_onnx(two)
    with pytest.raises(ValueError, match=r"^source must be an ONNX model, got DecodeError: "):
        from_onnx(b"no model")
    with pytest.raises(TypeError, match=r"^source must be a mapping, a path, bytes or a ModelProto, got int$"):
        from_onnx(3)
    with pytest.raises(FileNotFoundError):
        from_onnx("no such file")
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("spatial", 0))
    with pytest.raises(ValueError, match=r"^spatial of the node must be 1: statistics per channel, got 0$"):
        from_onnx(model)
    model = to_onnx(bn, rank=3)
    model.graph.initializer.pop()
    message = (
        r"^input_var of batch_normalization must be a constant of the model, "
        r"got the output 'batch_normalization/input_var'$"
    )
    with pytest.raises(ValueError, match=message):
        from_onnx(model)
