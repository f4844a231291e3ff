"""ONNX: BatchNormalization nodes in and out, and a layer folded into Mul and Add.

================  ===================================================
fastbn            ONNX (operator sets 7 to 15 and later)
================  ===================================================
gamma, beta       scale, B: both always
moving_mean       input_mean (mean before operator set 14)
moving_variance   input_var (var), of m values: ``ddof=0``
momentum          momentum, the same share, 0.9 by default
epsilon           epsilon, 1e-5 by default
axis              1 always; an input of rank 1 has one channel
================  ===================================================
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import checks
from .. import layout as layouts
from ..errors import must
from ..layer import BatchNorm
from . import _weights
from ._weights import UNSET, Unset

Array = NDArray[Any]

_NAMES: Final = {"gamma": "scale", "beta": "B", "moving_mean": "input_mean", "moving_variance": "input_var"}
_OLDER: Final = {"mean": "input_mean", "var": "input_var", "bias": "B"}
_EPSILON: Final = 1e-5
_MOMENTUM: Final = 0.9
_OPSET: Final = 15
_IR: Final = 8  # the version of the format that belongs to this operator set: old readers take the file


def _package() -> Any:
    try:
        import onnx
    except ImportError as error:
        _weights.missing("onnx", '"fastbn[onnx]"', error)
    return onnx


def from_onnx(
    source: Any,
    node: str | int | None = None,
    *,
    epsilon: float | Unset = UNSET,
    momentum: float | Unset = UNSET,
    axis: int = 1,
    dtype: DTypeLike | None = None,
) -> BatchNorm:
    """Return the layer that does what a BatchNormalization node does.

    Parameters
    ----------
    source : mapping, path, bytes or ModelProto
        Arrays by the names of the operator's inputs (scale, B, input_mean, input_var), for which onnx need not be
        installed; or a model, its bytes, or its file, beside which its data may be in other files.
    node : str or int, optional
        Name of the node, or of its output, or its number among the BatchNormalization nodes. By default the only one.
        Nodes that share a name have that of their output alone.
    epsilon, momentum : float, optional
        By default those of the node, or ONNX's 1e-5 and 0.9.
    axis : int, default: 1
        Channel axis of the arrays that the layer will get. ONNX's is always 1.
    dtype : {"float32", "float64"}, optional
        Of parameters and statistics; by default float64 if the source has that, else float32.

    Returns
    -------
    BatchNorm
        With memory of its own.

    Raises
    ------
    ImportError
        Without the package, where there is a model to read.
    TypeError
        If ``source`` is none of these, or a value is not an array of real numbers.
    ValueError
        If there is no such node, its parameters are not constants (initializers, Constant nodes, or an Identity of
        these), a shape differs, or a variance is negative.
    OSError
        If the file cannot be read.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.compat import from_onnx
    >>> one = np.ones(1, np.float32)
    >>> from_onnx({"scale": one, "B": one, "input_mean": one, "input_var": one}).momentum
    0.9
    """
    if isinstance(source, Mapping):
        if node is not None:
            raise ValueError(must("node", "not be given with a mapping", repr(node)))
        state = {_OLDER.get(name, name): value for name, value in _weights.mapping(source, "source").items()}
        label = ""
        attributes: dict[str, Any] = {}
    else:
        model = _model(source)
        found = _chosen(model, node)
        label = found.name or found.output[0]
        attributes = _attributes(found)
        state = _inputs(model.graph, found, label)
    names = tuple(_NAMES.values())
    taken = _weights.taken(state, label, "/", names, (), state)
    return _weights.layer(
        {ours: taken[theirs] for ours, theirs in _NAMES.items()},
        {ours: _weights.path(label, theirs, "/") for ours, theirs in _NAMES.items()},
        epsilon=_weights.chosen(epsilon, attributes.get("epsilon", _EPSILON)),
        momentum=_weights.chosen(momentum, attributes.get("momentum", _MOMENTUM)),
        axis=axis,
        dtype=dtype,
    )


def from_onnx_many(source: Any, **arguments: Any) -> dict[str, BatchNorm]:
    """Return all BatchNormalization nodes of a model as layers, by name, or by output without one of their own.

    Parameters
    ----------
    source : path, bytes or ModelProto
        The model.
    **arguments
        Of `from_onnx`, for all of them.

    Returns
    -------
    dict
        Layers by the names that `from_onnx` takes; empty if there are none. A node without a name, and each of several
        with one name, has the name of its output.

    Raises
    ------
    ImportError, TypeError, ValueError, OSError
        As in `from_onnx`.
    """
    model = _model(source)
    return {label: from_onnx(model, i, **arguments) for i, label in enumerate(_labels(_nodes(model)))}


def _model(source: Any) -> Any:
    onnx = _package()
    if isinstance(source, onnx.ModelProto):
        return source
    try:
        if isinstance(source, bytes):
            return onnx.load_model_from_string(source)
        if isinstance(source, str | os.PathLike):
            return onnx.load_model(os.fspath(source))
    except OSError:
        raise
    except Exception as error:
        raise ValueError(must("source", "be an ONNX model", f"{type(error).__name__}: {error}")) from error
    raise TypeError(must("source", "be a mapping, a path, bytes or a ModelProto", type(source).__name__))


def _nodes(model: Any) -> list[Any]:
    return [n for n in model.graph.node if n.op_type == "BatchNormalization" and n.domain in ("", "ai.onnx")]


def _labels(nodes: Sequence[Any]) -> list[str]:
    """Return one name for each node: its own, or its output's, which is unique, where it has none or another has it."""
    known = Counter(name for n in nodes for name in {n.name, n.output[0]})
    return [n.name if n.name and known[n.name] == 1 else n.output[0] for n in nodes]


def _chosen(model: Any, node: Any) -> Any:
    nodes = _nodes(model)
    names = _labels(nodes)
    labels = _weights.listed(names)
    if node is None:
        if len(nodes) != 1:
            raise ValueError(must("node", "name one BatchNormalization; from_onnx_many takes several", labels))
        return nodes[0]
    if isinstance(node, int | np.integer) and not isinstance(node, bool):
        if not 0 <= node < len(nodes):
            raise ValueError(must("node", f"be less than {len(nodes)}, the number of BatchNormalization nodes", node))
        return nodes[node]
    if not isinstance(node, str):
        raise TypeError(must("node", "be a name or a number", repr(node)))
    matching = [n for n, name in zip(nodes, names) if name == node]
    matching = matching or [n for n in nodes if n.name == node] or [n for n in nodes if n.output[0] == node]
    if len(matching) != 1:
        raise ValueError(must("node", f"be one of {labels}", repr(node)))
    return matching[0]


def _attributes(node: Any) -> dict[str, Any]:
    """Return epsilon and momentum as Python shows the float32 numbers that they are: 0.9, not 0.8999999761581421."""
    found = {a.name: a for a in node.attribute}
    if "spatial" in found and found["spatial"].i == 0:
        raise ValueError(must("spatial of the node", "be 1: statistics per channel", 0))
    return {name: float(str(np.float32(found[name].f))) for name in ("epsilon", "momentum") if name in found}


def _inputs(graph: Any, node: Any, label: str) -> dict[str, Any]:
    """Return the constants that a node reads; their inputs have a fixed order."""
    onnx = _package()
    constants: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
    for other in graph.node:  # which come after those that they read
        if other.op_type == "Constant":
            for attribute in other.attribute:
                if attribute.name in ("value", "value_float", "value_floats"):
                    constants[other.output[0]] = onnx.helper.get_attribute_value(attribute)
        elif other.op_type == "Identity" and other.input[0] in constants:  # exporters write it for equal tensors
            constants[other.output[0]] = constants[other.input[0]]
    found = {}
    for theirs, name in zip(_NAMES.values(), node.input[1:]):
        if name not in constants:
            raise ValueError(must(f"{theirs} of {label}", "be a constant of the model", f"the output {name!r}"))
        value = constants[name]
        tensor = isinstance(value, onnx.TensorProto)
        if tensor and value.data_location == onnx.TensorProto.EXTERNAL:  # which onnx would look for where Python runs
            where = next((entry.value for entry in value.external_data if entry.key == "location"), "")
            raise ValueError(must(f"{theirs} of {label}", "be in the model", f"data in another file: {where!r}"))
        found[theirs] = onnx.numpy_helper.to_array(value) if tensor else np.asarray(value, np.float32)
    return found


def to_onnx(
    bn: BatchNorm,
    *,
    form: Literal["node", "folded", "arrays"] = "node",
    rank: int | None = None,
    name: str = "batch_normalization",
    input_name: str = "X",
    output_name: str = "Y",
) -> Any:
    """Return inference of a layer as an ONNX model.

    Parameters
    ----------
    bn : BatchNorm
        A built layer that keeps moving statistics, with one channel axis. Of the activations, relu and leaky_relu
        have an operator and follow as a node.
    form : {"node", "folded", "arrays"}, default: "node"
        "node" is a BatchNormalization, between two Transpose where the channel axis is not 1; "folded" a Mul by
        gamma / sqrt(moving_variance + epsilon) and an Add; "arrays" are the inputs of the operator by name (scale, B,
        input_mean, input_var), for which onnx need not be installed.
    rank : int, optional
        Number of axes of the input. It may be missing for "arrays", and where the layer's layout tells it ("NCHW"). A
        "node" needs 2: ONNX's operator takes an input of rank 1 for one channel.
    name : str, default: "batch_normalization"
        Of the node, and the beginning of the names of its constants.
    input_name, output_name : str
        Of the model.

    Returns
    -------
    ModelProto or dict
        A model of operator set 15 with one input and one output of its dtype, checked by ``onnx.checker``.

    Raises
    ------
    ImportError
        Without the package, where there is a model to make.
    TypeError
        If ``bn`` is not a BatchNorm.
    ValueError
        If ONNX has no place for the layer, ``form`` is unknown, or ``rank`` is missing or too small.

    Examples
    --------
    >>> import fastbn
    >>> from fastbn.compat import to_onnx
    >>> list(to_onnx(fastbn.BatchNorm(3), form="arrays"))
    ['scale', 'B', 'input_mean', 'input_var']
    """
    form_ = checks.one_of(form, "form", ("node", "folded", "arrays"))
    state = _weights.state_of(bn)
    shape = bn._existing().shape
    if len(shape) > 1:
        raise ValueError(must("bn", "have one channel axis for ONNX", f"parameters of shape {shape}"))
    if not bn.track:
        raise ValueError(must("bn", "keep moving statistics for ONNX", "one with track=False"))
    state.setdefault("gamma", np.ones_like(state["moving_mean"]))
    state.setdefault("beta", np.zeros_like(state["moving_mean"]))
    if form_ == "arrays":
        if bn.activation is not None:
            raise ValueError(must("bn", "have no activation for arrays", repr(bn.activation)))
        return {theirs: state[ours] for ours, theirs in _NAMES.items()}
    onnx = _package()
    made = _Graph(onnx, name, state["moving_mean"].dtype)
    axis, rank = _axis(bn, rank)
    last = "" if bn.activation is None else f"{name}/normalized"
    if form_ == "folded":
        scale, shift = bn.affine()
        trailing = [-1] + [1] * (rank - 1 - axis)  # what is before these axes is broadcast
        product = f"{name}/scaled"
        made.add("Mul", [input_name, made.constant("scale", scale.reshape(trailing))], product)
        made.add("Add", [product, made.constant("shift", shift.reshape(trailing))], last or output_name)
    else:
        if rank < 2:
            raise ValueError(must("rank", "be at least 2 for a node; folded takes 1", rank))
        inputs = [made.constant(theirs, state[ours]) for ours, theirs in _NAMES.items()]
        attributes: dict[str, Any] = {"epsilon": bn.epsilon}
        if bn.momentum is not None:
            attributes["momentum"] = bn.momentum
        if axis == 1:
            made.add("BatchNormalization", [input_name, *inputs], last or output_name, name, **attributes)
        else:
            there = [0, axis] + [a for a in range(1, rank) if a != axis] if axis else [1, 0, *range(2, rank)]
            made.add("Transpose", [input_name], f"{name}/first", perm=there)
            made.add("BatchNormalization", [f"{name}/first", *inputs], f"{name}/second", name, **attributes)
            back = [int(place) for place in np.argsort(there)]
            made.add("Transpose", [f"{name}/second"], last or output_name, perm=back)
    if bn.activation is not None:
        _activation(made, bn.activation, last, output_name)
    dims: list[Any] = [None] * rank
    dims[axis] = shape[0]
    return made.model(input_name, output_name, dims)


def _axis(bn: BatchNorm, rank: int | None) -> tuple[int, int]:
    """Return the channel axis, counted from 0, and the rank, which some names of layouts tell."""
    if rank is None and bn.layout is not None:
        rank = layouts.LAYOUTS[bn.layout][1]
    if rank is None:
        raise ValueError(must("rank", "be the number of axes of the input", None))
    (axis,) = layouts.channel_axes(bn.axis, bn.layout, checks.count(rank, "rank"))
    return axis, rank


def _activation(made: _Graph, activation: Any, source: str, target: str) -> None:
    name, slope = activation if isinstance(activation, tuple) else (activation, None)
    if name == "relu":
        made.add("Relu", [source], target)
    elif name == "leaky_relu":
        made.add("LeakyRelu", [source], target, None, **({} if slope is None else {"alpha": slope}))
    else:
        raise ValueError(must("activation of bn", "be relu, leaky_relu or None for ONNX", repr(activation)))


class _Graph:
    """A graph in the making."""

    def __init__(self, onnx: Any, name: str, dtype: np.dtype[Any]) -> None:
        self._onnx = onnx
        self._name = name
        self._type = onnx.TensorProto.DOUBLE if dtype == np.float64 else onnx.TensorProto.FLOAT
        self._nodes: list[Any] = []
        self._constants: list[Any] = []

    def constant(self, name: str, value: Array) -> str:
        """Add a constant, and return its name."""
        whole = f"{self._name}/{name}"
        self._constants.append(self._onnx.numpy_helper.from_array(np.ascontiguousarray(value), whole))
        return whole

    def add(self, operator: str, inputs: list[str], output: str, name: str | None = None, **attributes: Any) -> None:
        """Add a node."""
        name = name or f"{self._name}/{operator}_{len(self._nodes)}"
        self._nodes.append(self._onnx.helper.make_node(operator, inputs, [output], name, **attributes))

    def model(self, source: str, target: str, dims: list[Any]) -> Any:
        """Return the model, checked."""
        helper = self._onnx.helper
        ends = [helper.make_tensor_value_info(name, self._type, dims) for name in (source, target)]
        graph = helper.make_graph(self._nodes, self._name, ends[:1], ends[1:], self._constants)
        operators = [helper.make_opsetid("", _OPSET)]
        model = helper.make_model(graph, opset_imports=operators, ir_version=_IR, producer_name="fastbn")
        self._onnx.checker.check_model(model)
        return model
