"""What a data set brings to a layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import averages, checks
from . import layout as layouts
from .composite import Batch
from .errors import must
from .moments import Moments, moments
from .parameters import features

if TYPE_CHECKING:
    from .layer import BatchNorm

Array = NDArray[Any]


class Record:
    """What a data set brings to a layer, for `recompute_statistics`."""

    def __init__(self) -> None:
        self.moments = Moments()
        self.batches = 0
        self.shape: tuple[int, ...] = ()
        self.dtype: np.dtype[Any] = np.dtype(np.float32)

    def add(self, layer: BatchNorm, x: Array) -> None:
        """Add a batch; one without values changes nothing."""
        shape = layouts.channel_shape(x.shape, layouts.channel_axes(layer.axis, layer.layout, x.ndim))
        wanted = layer._arrays.shape if layer._arrays is not None else self.shape or shape
        if shape != wanted:
            raise ValueError(must("x", f"have {features(wanted)} channels", features(shape)))
        if x.size:
            found = moments(x, axis=layer.axis, layout=layer.layout, nan_policy=layer.nan_policy)
            if np.any(found.count):
                self._take(x, shape, found)

    def take(self, x: Array, shape: tuple[int, ...], batch: Batch) -> None:
        """Add a batch whose moments are known."""
        self._take(x, shape, batch.moments())

    def _take(self, x: Array, shape: tuple[int, ...], found: Moments) -> None:
        if not self.batches:
            self.shape, self.dtype = shape, checks.parameter_dtype(x.dtype)
        self.moments.merge(found)
        self.batches += 1

    def check(self, layer: BatchNorm) -> None:
        """Refuse statistics that are not finite where the layer does."""
        finite = np.isfinite(self.moments.mean) & np.isfinite(self.moments.m2)
        if layer.on_nonfinite == "raise" and not finite.all():
            where = f"others in channel {int(np.argmin(finite))}"
            raise ValueError(must("batches", 'have finite statistics with on_nonfinite="raise"', where))

    def store(self, layer: BatchNorm) -> None:
        """Set the statistics of the layer."""
        if not layer.built:
            layer.build(features(self.shape), self.dtype)
        mean, variance = self.moments.mean, self.moments.variance(layer.ddof)
        taken = np.broadcast_to(np.greater(self.moments.count, 0), mean.shape)  # a channel without values keeps its own
        if layer.on_nonfinite == "skip":
            taken = taken & np.isfinite(mean) & np.isfinite(variance)
        arrays = layer._existing()
        moving_mean, moving_variance = layer._tracked()
        with layer._lock:
            averages.blend(moving_mean, mean, 0.0, taken)
            averages.blend(moving_variance, variance, 0.0, taken)
            if layer._renorm is not None:
                layer._renorm.follow(arrays.extra, moving_variance, layer.epsilon)
            layer.batches = self.batches
