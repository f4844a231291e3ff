"""How a layer learns from a batch: what its statistics become."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import averages, checks, passes
from .composite import Batch
from .errors import must
from .kernels import _channels
from .parameters import Arrays, features
from .passes import Statistics
from .persistence import Persistent
from .weights import Count

Array = NDArray[Any]


class Learning(Persistent):
    """The part of `BatchNorm` that writes its statistics."""

    def _refuse_unfit(self, arrays: Arrays, x: Array | None = None) -> None:
        """Refuse to learn in arrays that cannot be written, or that the batch lies in."""
        for name, array in self._named(arrays).items():
            if name not in ("gamma", "beta"):
                checks.writable(array, name)
                checks.apart(array, name, x=x)

    def _adopted(self, arrays: Arrays) -> Arrays:
        """Return the arrays of the layer: those of a call, if nobody else has built it meanwhile. The lock is held."""
        if self._arrays is None:
            self._arrays = arrays
        elif self._arrays.shape != arrays.shape:
            raise ValueError(must("x", f"have {features(self._arrays.shape)} channels", features(arrays.shape)))
        return self._arrays

    def _learn_plainly(self, arrays: Arrays, statistics: Statistics, count: Count) -> None:
        """Take a batch of so many values into two moving averages; the lock is held."""
        assert arrays.moving_mean is not None
        assert arrays.moving_variance is not None
        share = averages.share(self.momentum, self.batches)
        moving = arrays.moving_mean, arrays.moving_variance
        _channels.put(passes.updated_moving(*moving, statistics, count, share, self.ddof), [(self, self.batches + 1)])

    def _learn(self, arrays: Arrays, batch: Batch) -> None:
        """Take a batch into the moving statistics as the options say; the lock is held."""
        assert arrays.moving_mean is not None
        assert arrays.moving_variance is not None
        mean, variance = arrays.moving_mean, arrays.moving_variance
        chosen = np.broadcast_to(batch.counted, batch.variance.shape)
        if self._options.on_nonfinite == "skip":
            chosen = chosen & Statistics(batch.statistics.mean, batch.variance).finite(mean.dtype)
            if not chosen.any():
                return
        taken = None if chosen.all() else chosen
        if self._renorm is not None:
            share = averages.share(self.momentum, self.batches)
            pairs = self._renorm.updated(arrays.extra, mean, variance, batch.statistics, self.epsilon, share, taken)
        else:
            debias = self._options.zero_debias
            share = averages.share(self.momentum, self.batches, zero_debias=bool(debias))
            pairs = [(mean, averages.blended(mean, batch.statistics.mean, share, taken))]
            share = averages.share(self.momentum, self.batches, zero_debias=debias is True)
            pairs.append((variance, averages.blended(variance, batch.variance, share, taken)))
        _channels.put(pairs, [(self, self.batches + 1)])
