"""Every operation of every library, as a call without arguments on a Case.

A call returns (y, moving_mean, moving_variance) for "train", y for "inference", (dx, dgamma, dbeta) for
"backward" and (mean, variance) for "moments". Where a library can write into a preallocated output, it does.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from .cases import EPSILON, MOMENTUM, Case

LIBRARIES = ["fastbn", "numpy", "torch"]
# Also for `make compare`: they have some of the operations, and NotImplementedError for the rest.
PEERS = ["torch", "jax", "onnxruntime", "sklearn", "numpy"]
OPERATIONS = ["train", "inference", "backward", "moments"]


def prepare(operation: str, library: str, case: Case, **options: Any) -> Callable[[], Any]:
    """Return the call to be timed; without the library NotImplementedError, which asv reports as skipped.

    Options are for fastbn's forward functions; PyTorch does an activation and a residual in calls of its own.
    """
    if options and library not in ("fastbn", "torch"):
        raise NotImplementedError(f"{library} has no {', '.join(options)} here")
    if library != "fastbn" and find_spec(library) is None:
        raise NotImplementedError(f"{library} is not installed")
    call: Callable[[], Any] = globals()[f"_{library}"](operation, case, **options)
    return call


def _fastbn(operation: str, c: Case, **options: Any) -> Callable[[], Any]:
    import fastbn

    affine = {"gamma": c.gamma, "beta": c.beta, "epsilon": EPSILON, "axis": c.axis, **options}
    moving = {"moving_mean": c.moving_mean, "moving_variance": c.moving_variance}

    def train() -> Any:
        y = fastbn.batch_norm(c.x, training=True, momentum=MOMENTUM, out=c.out, **affine, **moving)
        return y, c.moving_mean, c.moving_variance

    def inference() -> Any:
        return fastbn.batch_norm(c.x, out=c.out, **affine, **moving)

    def moments() -> Any:
        m = fastbn.moments(c.x, axis=c.axis)
        return m.mean, m.variance()

    if operation == "backward":
        _, cache = fastbn.batch_norm_forward(c.x, training=True, update=False, **affine)
        return lambda: fastbn.batch_norm_backward(c.dy, cache, out=c.out)
    return {"train": train, "inference": inference, "moments": moments}[operation]


def _numpy(operation: str, c: Case) -> Callable[[], Any]:
    gamma, beta, mean, variance = (a.reshape(c.broadcast) for a in (c.gamma, c.beta, c.moving_mean, c.moving_variance))

    def train() -> Any:
        mu, var = c.x.mean(c.reduced, keepdims=True), c.x.var(c.reduced, keepdims=True)
        mean[...] = MOMENTUM * mean + (1 - MOMENTUM) * mu
        variance[...] = MOMENTUM * variance + (1 - MOMENTUM) * var
        y = (c.x - mu) / np.sqrt(var + EPSILON) * gamma + beta
        return y, c.moving_mean, c.moving_variance

    def inference() -> Any:
        return (c.x - mean) / np.sqrt(variance + EPSILON) * gamma + beta

    def moments() -> Any:
        return c.x.mean(c.reduced), c.x.var(c.reduced)

    mu, var = c.x.mean(c.reduced, keepdims=True), c.x.var(c.reduced, keepdims=True)
    scale = 1 / np.sqrt(var + EPSILON)
    size = c.x.size // c.gamma.size

    def backward() -> Any:
        xhat = (c.x - mu) * scale
        dbeta = c.dy.sum(c.reduced)
        dgamma = (c.dy * xhat).sum(c.reduced)
        dx = c.dy - dbeta.reshape(c.broadcast) / size - xhat * (dgamma.reshape(c.broadcast) / size)
        return dx * (gamma * scale), dgamma, dbeta

    return {"train": train, "inference": inference, "moments": moments, "backward": backward}[operation]


def _torch(operation: str, c: Case, activation: str | None = None, residual: Any = None) -> Callable[[], Any]:
    import torch

    if activation not in (None, "relu", "silu"):
        raise NotImplementedError(f"no {activation} of PyTorch here")

    def second(a: Any) -> Any:
        """Return an array with the channels second, as PyTorch wants it. This moves strides, not data."""
        bits = a.dtype.name == "bfloat16"  # which NumPy has under another type's name
        tensor = torch.from_numpy(a.view(np.uint16) if bits else a)
        return (tensor.view(torch.bfloat16) if bits else tensor).movedim(c.axis, 1)

    x, dy, out = (second(a) for a in (c.x, c.dy, c.out))
    added = None if residual is None else second(residual)
    images = x if x.dtype == torch.uint8 else None
    if images is not None:  # PyTorch has no batch norm of bytes
        x = torch.empty_like(out)
    gamma, beta, mean, variance = (torch.from_numpy(a) for a in (c.gamma, c.beta, c.moving_mean, c.moving_variance))
    saved = {"save_mean": torch.empty_like(mean), "save_invstd": torch.empty_like(mean)}
    aten = torch.ops.aten

    def forward(training: bool) -> Any:
        args = (x, gamma, beta, mean, variance, training, 1 - MOMENTUM, EPSILON)
        # With out=, PyTorch 2.13 computes wrong statistics of a table stored by columns (seen in training).
        if images is not None:
            x.copy_(images)
        if x.ndim == 2 and c.axis == 0:
            y = aten.native_batch_norm(*args)[0]
        else:
            aten.native_batch_norm.out(*args, out=out, **saved)
            y = out
        if added is not None:
            y.add_(added)
        if activation is not None:
            (aten.relu_ if activation == "relu" else aten.silu_)(y)
        return c.out if y is out else y.movedim(1, c.axis).numpy()

    def train() -> Any:
        return forward(True), c.moving_mean, c.moving_variance

    def inference() -> Any:
        return forward(False)

    def moments() -> Any:
        variance, mean = torch.var_mean(x, [i for i in range(x.ndim) if i != 1], correction=0)
        return mean.numpy(), variance.numpy()

    if operation == "backward":
        y, save_mean, save_invstd = aten.native_batch_norm(x, gamma, beta, None, None, True, 0.0, EPSILON)

        def backward() -> Any:
            before = dy
            if activation is not None:
                before = aten.threshold_backward(dy, y, 0) if activation == "relu" else aten.silu_backward(dy, y)
            dx, dgamma, dbeta = aten.native_batch_norm_backward(
                before, x, gamma, None, None, save_mean, save_invstd, True, EPSILON, [True, True, True]
            )
            bits = dx.view(torch.uint16) if dx.dtype == torch.bfloat16 else dx
            return bits.movedim(1, c.axis).numpy().view(c.dy.dtype), dgamma.numpy(), dbeta.numpy()

        return backward
    return {"train": train, "inference": inference, "moments": moments}[operation]


def _jax(operation: str, c: Case) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    x, dy, gamma, beta, mean, variance = map(
        jnp.asarray, (c.x, c.dy, c.gamma, c.beta, c.moving_mean, c.moving_variance)
    )

    def scaled(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any) -> Any:
        scale = gamma / jnp.sqrt(variance + EPSILON)
        return (x - mean.reshape(c.broadcast)) * scale.reshape(c.broadcast) + beta.reshape(c.broadcast)

    def moments(x: Any) -> Any:
        mean = jnp.mean(x, axis=c.reduced)
        return mean, jnp.mean(jnp.square(x - mean.reshape(c.broadcast)), axis=c.reduced)

    def train(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any) -> Any:
        mu, var = moments(x)
        keep = MOMENTUM
        return scaled(x, gamma, beta, mu, var), keep * mean + (1 - keep) * mu, keep * variance + (1 - keep) * var

    def backward(dy: Any, x: Any, gamma: Any, beta: Any) -> Any:
        return jax.vjp(lambda x, g, b: scaled(x, g, b, *moments(x)), x, gamma, beta)[1](dy)

    function, args = {
        "train": (train, (x, gamma, beta, mean, variance)),
        "inference": (scaled, (x, gamma, beta, mean, variance)),
        "moments": (moments, (x,)),
        "backward": (backward, (dy, x, gamma, beta)),
    }[operation]
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(*args))


def _onnxruntime(operation: str, c: Case) -> Callable[[], Any]:
    if operation != "inference" or find_spec("onnx") is None or (c.axis != 1 and c.x.ndim > 1):
        raise NotImplementedError("ONNX Runtime has inference with the channels second")
    import onnx.helper as helper
    import onnxruntime

    vectors = {"gamma": c.gamma, "beta": c.beta, "mean": c.moving_mean, "variance": c.moving_variance}
    node = helper.make_node("BatchNormalization", ["x", *vectors], ["y"], epsilon=EPSILON)
    graph = helper.make_graph(
        [node],
        "batch_norm",
        [helper.make_tensor_value_info("x", 1, c.x.shape)],
        [helper.make_tensor_value_info("y", 1, c.x.shape)],
        initializer=[helper.make_tensor(name, 1, v.shape, v) for name, v in vectors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", c.x)
    binding.bind_output("y", "cpu", 0, np.float32, c.x.shape, c.out.ctypes.data)

    def inference() -> Any:
        session.run_with_iobinding(binding)
        return c.out

    return inference


def _sklearn(operation: str, c: Case) -> Callable[[], Any]:
    if operation not in ("inference", "moments") or c.x.ndim != 2 or c.axis != 1:
        raise NotImplementedError("scikit-learn scales tables by rows, and has no gradient")
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler()
    if operation == "moments":

        def moments() -> Any:
            scaler.fit(c.x)
            return scaler.mean_, scaler.var_

        return moments
    # Its formula has no gamma and beta: they go into its mean and scale.
    scaler.fit(c.x[:2])
    scale = np.sqrt(c.moving_variance + EPSILON, dtype=c.x.dtype) / c.gamma
    scaler.mean_, scaler.scale_ = c.moving_mean - c.beta * scale, scale
    return lambda: scaler.transform(c.x)
