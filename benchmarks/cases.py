"""The arrays that the benchmarks run on."""

from __future__ import annotations

import numpy as np

EPSILON = 1e-3
MOMENTUM = 0.99

# (batch, channels, *spatial): how the values lie in memory is the layout's matter.
SHAPES = {
    "conv2": (32, 64, 56, 56),
    "conv4": (32, 1024, 14, 14),
    "conv5": (32, 512, 7, 7),
    "rgb": (16, 3, 224, 224),
    "dense": (1024, 512),
    "table": (100_000, 10),
    "tiny": (32, 16),
}
# planar: a channel's values are contiguous runs (NCHW, or a table stored by columns).
# interleaved: channels are neighbours (NHWC, or a table stored by rows).
LAYOUTS = ["planar", "interleaved"]
DTYPES = ["float32", "float64"]


def _type(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


class Case:
    """Input, parameters and preallocated outputs of one benchmark, the same for every library.

    Parameters
    ----------
    shape : str or tuple of int
        A name in SHAPES, or (batch, channels, *spatial) itself.
    layout : {"planar", "interleaved"}
        Where the channels are in memory.
    dtype : str
        Of x, dy and out: a floating type, or an integer type for x whose results are float32. Parameters are
        float32, or float64 where x is.
    mean : float
        Of x, whose deviation is 1.
    """

    def __init__(self, shape: str | tuple[int, ...], layout: str, dtype: str, mean: float = 1) -> None:
        batch, channels, *spatial = SHAPES[shape] if isinstance(shape, str) else shape
        if layout == "interleaved":
            stored = (batch, *spatial, channels)
            self.axis = len(stored) - 1
        elif spatial:
            stored = (batch, channels, *spatial)
            self.axis = 1
        else:
            stored = (channels, batch)
            self.axis = 0
        rng = np.random.default_rng(0)
        result, dtype = _type(dtype), "float64" if dtype == "float64" else "float32"
        self.x = rng.standard_normal(stored, dtype=dtype)
        self.x += mean
        self.dy = rng.standard_normal(stored, dtype=dtype)
        if result.kind == "u":
            self.x = np.clip(self.x * 50 + 50, 0, 255)
        self.x = self.x.astype(result, copy=False)
        if result.kind != "u":
            self.dy = self.dy.astype(result, copy=False)
        self.out = np.zeros_like(self.dy)
        self.gamma = np.linspace(0.5, 1.5, channels, dtype=dtype)
        self.beta = np.linspace(-1, 1, channels, dtype=dtype)
        self.moving_mean = np.full(channels, 0.25, dtype)
        self.moving_variance = np.full(channels, 2.0, dtype)
        # For formulas in NumPy: the axes to reduce, and the shape that broadcasts a channel vector.
        self.reduced = tuple(i for i in range(self.x.ndim) if i != self.axis)
        self.broadcast = tuple(channels if i == self.axis else 1 for i in range(self.x.ndim))
