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
from .passes import Statistics

if TYPE_CHECKING:
    from .layer import BatchNorm

Array = NDArray[Any]


class Record:
    """What a data set brings to a layer, for `recompute_statistics`.

    Parameters
    ----------
    wanted : list
        Of all records of a data set; emptied when that has been gone through, or will not be.
    """

    def __init__(self, wanted: list[None]) -> None:
        self.wanted = wanted
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
        """Refuse statistics that are not finite where the layer does, and a layer that cannot take them."""
        if layer._arrays is not None:
            layer._refuse_unfit(layer._arrays)
        dtype = self.dtype if layer._arrays is None else layer.moving_mean.dtype
        finite = Statistics(self.moments.mean, self.moments.variance(layer.ddof)).finite(dtype)
        finite |= np.equal(self.moments.count, 0)
        if layer.on_nonfinite == "raise" and not finite.all():
            where = f"others in channel {int(np.argmin(finite))}"
            raise ValueError(must("batches", 'have finite statistics with on_nonfinite="raise"', where))

    def updated(self, layer: BatchNorm) -> list[tuple[Array, Array]]:
        """Return what the arrays of a layer become, which is built if it was not, for `_channels.put`."""
        if not layer.built:
            layer.build(features(self.shape), self.dtype)
        mean, variance = self.moments.mean, self.moments.variance(layer.ddof)
        taken = np.broadcast_to(np.greater(self.moments.count, 0), mean.shape)  # a channel without values keeps its own
        moving_mean, moving_variance = layer._tracked()
        if layer.on_nonfinite == "skip":
            taken = taken & Statistics(mean, variance).finite(moving_mean.dtype)
        new = averages.blended(moving_variance, variance, 0.0, taken)
        pairs = [(moving_mean, averages.blended(moving_mean, mean, 0.0, taken)), (moving_variance, new)]
        if layer._renorm is not None:
            pairs += layer._renorm.following(layer._existing().extra, new, layer.epsilon)
        return pairs
