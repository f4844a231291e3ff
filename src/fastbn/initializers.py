"""First values of parameters and statistics: by the names and with the numbers that Keras uses, or by a function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import checks, named
from .errors import must

Array = NDArray[Any]

# What stands for an initializer among the arguments of a layer.
Initializer = str | tuple[Any, ...] | Callable[[tuple[int, ...], np.dtype[Any]], Any]


def _constant(shape: tuple[int, ...], value: float) -> Array:
    return np.full(shape, value)


def _normal(shape: tuple[int, ...], mean: float, deviation: float) -> Array:
    return np.random.default_rng().normal(mean, deviation, shape)


def _uniform(shape: tuple[int, ...], low: float, high: float) -> Array:
    return np.random.default_rng().uniform(low, high, shape)


def _truncated_normal(shape: tuple[int, ...], mean: float, deviation: float) -> Array:
    """Draw what lies beyond two deviations again, about one value in 22."""
    generator = np.random.default_rng()
    values = generator.standard_normal(shape)
    while (beyond := abs(values) > 2).any():
        values[beyond] = generator.standard_normal(np.count_nonzero(beyond))
    return mean + deviation * values


_ANY: Final = (-math.inf, math.inf, "finite")
_NOT_NEGATIVE: Final = (0.0, math.inf, "finite and at least 0")

NAMES: Final = {
    "zeros": named.Named(lambda shape: np.zeros(shape), ()),
    "ones": named.Named(lambda shape: np.ones(shape), ()),
    "constant": named.Named(_constant, (named.Number("value", 0.0, *_ANY),)),
    "random_normal": named.Named(
        _normal, (named.Number("mean", 0.0, *_ANY), named.Number("stddev", 0.05, *_NOT_NEGATIVE))
    ),
    "random_uniform": named.Named(
        _uniform, (named.Number("minval", -0.05, *_ANY), named.Number("maxval", 0.05, *_ANY))
    ),
    "truncated_normal": named.Named(
        _truncated_normal, (named.Number("mean", 0.0, *_ANY), named.Number("stddev", 0.05, *_NOT_NEGATIVE))
    ),
}


def checked(value: Any, name: str) -> Initializer:
    """Return an initializer as users write it, checked: a name, (name, numbers...), or a function."""
    found: Initializer = named.checked(value, name, NAMES)
    if isinstance(found, tuple) and found[0] == "random_uniform":
        low, high = (*found[1:], 0.05)[:2]
        if low > high:
            raise ValueError(must(name, "have minval <= maxval", f"{low} and {high}"))
    return found


def create(initializer: Initializer, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return a new array of first values.

    Parameters
    ----------
    initializer : str, tuple or callable
        As `checked` returns it. A callable gets shape and dtype.
    name : str
        Of the argument, for messages.
    shape : tuple of ints
        Shape of the array.
    dtype : dtype
        float32 or float64.

    Returns
    -------
    ndarray
        Of that shape and dtype, with memory of its own.
    """
    if not callable(initializer):
        return np.array(named.resolved(initializer, NAMES)(shape), dtype, order="C")
    values = checks.as_array(initializer(shape, dtype), name)
    if values.dtype.kind not in "iuf":
        raise TypeError(must(name, "return real numbers", values.dtype))
    if values.shape != shape:
        raise ValueError(must(name, f"return an array of shape {shape}", values.shape))
    return np.array(values, dtype, order="C")
