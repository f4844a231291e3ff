"""Batch renormalization: ``y = (x_hat * r + d) * gamma + beta``, with r and d that bring a batch closer to averages.

With the batch's mean and sigma = sqrt(variance + epsilon), and averages of both over earlier batches::

    r = clip(sigma / sigma_r, rmin, rmax),   d = clip((mean - mean_r) / sigma_r, -dmax, dmax)

taken before the averages learn from the batch, and constants for the gradient (S. Ioffe, "Batch Renormalization:
Towards Reducing Minibatch Dependence in Batch-Normalized Models", NeurIPS 2017). Two schemes exist:

========  ==============================================  =========================================================
scheme    mean_r, sigma_r                                 moving statistics
========  ==============================================  =========================================================
keras     renorm_mean, max(renorm_stddev, sqrt(epsilon))  moving_mean of the batch's mean, moving_stddev of its
                                                          sigma, moving_variance = max(0, moving_stddev^2 - epsilon)
tf1       renorm_mean + (1 - weight) * mean, and the      of the averages divided by their weights, and of the
          same for sigma: what the averages would be      square of that of sigma, less epsilon
          had they begun with this batch
========  ==============================================  =========================================================

"keras" is what TensorFlow 2 and Keras do, "tf1" what `tf.layers` did until 1.12.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import checks
from .averages import blended
from .errors import must
from .passes import Statistics

Array = NDArray[Any]

SCHEMES: Final = ("keras", "tf1")
# What is no bound, and the range of what is one; a negative rmin changes nothing, since no r is negative.
_NO_BOUND: Final = {"rmin": -math.inf, "rmax": math.inf, "dmax": math.inf}
_NOT_NEGATIVE: Final = (0.0, math.inf, "finite and at least 0")
_RANGES: Final = {"rmin": (-math.inf, math.inf, "finite"), "rmax": _NOT_NEGATIVE, "dmax": _NOT_NEGATIVE}


def clipping(value: Any) -> dict[str, float] | None:
    """Return the bounds of r and d, checked; a missing or infinite one is no bound."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(must("renorm_clipping", "be a mapping or None", type(value).__name__))
    if not set(value) <= set(_NO_BOUND):
        raise ValueError(must("renorm_clipping", "have no keys but rmin, rmax and dmax", ", ".join(map(str, value))))
    bounds = {
        key: checks.real(value[key], f"{key} of renorm_clipping", *_RANGES[key])
        for key, none in _NO_BOUND.items()
        if value.get(key) is not None and (getattr(value[key], "ndim", False) or value[key] != none)
    }
    if bounds.get("rmin", 0.0) > bounds.get("rmax", math.inf):
        raise ValueError(must("renorm_clipping", "have rmin <= rmax", f"{bounds['rmin']} and {bounds['rmax']}"))
    return bounds


class Renorm:
    """The averages of a layer and what follows from them; `state` holds those of a layer by the names of `names`."""

    def __init__(self, scheme: str, momentum: float, bounds: Mapping[str, float] | None) -> None:
        self.momentum = momentum
        self.bounds = dict(bounds or {})
        self.debiased = scheme == "tf1"
        self.names = (
            ("renorm_mean", "renorm_mean_weight", "renorm_stddev", "renorm_stddev_weight")
            if self.debiased
            else ("moving_stddev", "renorm_mean", "renorm_stddev")
        )

    def create(self, moving_mean: Array, moving_variance: Array) -> dict[str, Array]:
        """Return the first averages of a layer with these moving statistics."""
        if self.debiased:
            return {
                n: np.zeros(() if n.endswith("weight") else moving_mean.shape, moving_mean.dtype) for n in self.names
            }
        deviation = np.sqrt(moving_variance)
        return {"moving_stddev": deviation, "renorm_mean": moving_mean.copy(), "renorm_stddev": deviation.copy()}

    def correction(self, state: Mapping[str, Array], batch: Statistics, epsilon: float) -> tuple[Array, Array]:
        """Return r and d of a batch, flat."""
        sigma = np.sqrt(batch.variance + epsilon)
        mean, deviation = (state[n].reshape(-1).astype(np.float64) for n in ("renorm_mean", "renorm_stddev"))
        if self.debiased:
            mean += (1.0 - float(state["renorm_mean_weight"])) * batch.mean
            deviation += (1.0 - float(state["renorm_stddev_weight"])) * sigma
        else:
            deviation = np.maximum(deviation, math.sqrt(epsilon))
        # Deviations are 0 only with epsilon 0, in channels that never varied: those need no correction.
        safe = np.where(deviation == 0, 1.0, deviation)
        r = np.where(deviation == 0, 1.0, sigma / safe)
        d = (batch.mean - mean) / safe
        bounds = self.bounds
        if "rmin" in bounds or "rmax" in bounds:
            r = np.clip(r, bounds.get("rmin"), bounds.get("rmax"))
        if "dmax" in bounds:
            d = np.clip(d, -bounds["dmax"], bounds["dmax"])
        return r, d

    def updated(
        self,
        state: Mapping[str, Array],
        moving_mean: Array,
        moving_variance: Array,
        batch: Statistics,
        epsilon: float,
        share: float,
        taken: Array | None,
    ) -> list[tuple[Array, Array]]:
        """Return what the averages and the moving statistics become with a batch, for `_channels.put`."""
        sigma = np.sqrt(batch.variance + epsilon)
        learned, values = taken, [batch.mean, sigma]
        if self.debiased and taken is not None:
            # Channels share one weight: one that is not taken brings again what it is known by.
            known = [moving_mean.astype(np.float64), np.sqrt(moving_variance.astype(np.float64) + epsilon)]
            for i, name in enumerate(("renorm_mean", "renorm_stddev")):
                known_by = float(state[name + "_weight"])
                old = state[name].astype(np.float64) / known_by if known_by else known[i]
                values[i] = np.where(taken, values[i], old.reshape(-1))
            learned = None
        new = {
            name: blended(state[name], value, self.momentum, learned)
            for name, value in zip(("renorm_mean", "renorm_stddev"), values)
        }
        if self.debiased:
            debiased = []
            for name, average in list(new.items()):
                weight = new[name + "_weight"] = blended(state[name + "_weight"], np.ones(()), self.momentum)
                debiased.append(average.astype(np.float64) / float(weight) if weight else average)
            mean, deviation = debiased
            variance = np.maximum(np.square(deviation) - epsilon, 0.0)
        else:
            mean = batch.mean
            new["moving_stddev"] = blended(state["moving_stddev"], sigma, share, taken)
            variance = np.maximum(np.square(new["moving_stddev"], dtype=np.float64) - epsilon, 0.0)
        rest = share if self.debiased else 0.0  # the average of deviations has been taken already
        return [
            (moving_mean, blended(moving_mean, mean, share, taken)),
            (moving_variance, blended(moving_variance, variance, rest, taken)),
            *((state[name], value) for name, value in new.items()),
        ]

    def following(self, state: Mapping[str, Array], variance: Array, epsilon: float) -> list[tuple[Array, Array]]:
        """Return what averages become that fit a moving variance from elsewhere, for `_channels.put`."""
        if self.debiased:
            return []
        target = state["moving_stddev"]
        return [(target, np.sqrt(variance.astype(np.float64) + epsilon).astype(target.dtype))]
