"""Projections of parameters after an optimizer's step, with the names and numbers of Keras, or a function of the array.

Norms go along the first axis of a parameter, so over all channels where there is one channel axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import checks, named
from .errors import must

Array = NDArray[Any]
Constraint = str | tuple[Any, ...] | Callable[[Array], Any]

_TINY: Final = 1e-7  # what Keras adds to a norm before it divides by it


def _norms(w: Array) -> Array:
    norms: Array = np.sqrt(np.square(w, dtype=np.float64).sum(axis=0, keepdims=True))
    return norms


def _non_neg(w: Array) -> Array:
    return np.maximum(w, 0)


def _unit_norm(w: Array) -> Array:
    return w / (_TINY + _norms(w))


def _max_norm(w: Array, largest: float) -> Array:
    return _min_max_norm(w, 0.0, largest, 1.0)


def _min_max_norm(w: Array, smallest: float, largest: float, rate: float) -> Array:
    norms = _norms(w)
    wanted = rate * np.clip(norms, smallest, largest) + (1 - rate) * norms
    return w * (wanted / (_TINY + norms))


def _bound(name: str, default: float) -> named.Number:
    return named.Number(name, default, 0.0, math.inf, "finite and at least 0")


NAMES: Final = {
    "non_neg": named.Named(_non_neg, ()),
    "unit_norm": named.Named(_unit_norm, ()),
    "max_norm": named.Named(_max_norm, (_bound("max_value", 2.0),)),
    "min_max_norm": named.Named(
        _min_max_norm,
        (_bound("min_value", 0.0), _bound("max_value", 1.0), named.Number("rate", 1.0, 0.0, 1.0, "in [0, 1]")),
    ),
}


def checked(value: Any, name: str) -> Constraint | None:
    """Return a constraint as users write it, checked: None, a name, (name, numbers...), or a function."""
    found: Constraint | None = None if value is None else named.checked(value, name, NAMES)
    if isinstance(found, tuple) and found[0] == "min_max_norm":
        low, high = (*found[1:], 1.0)[:2]
        if low > high:
            raise ValueError(must(name, "have min_value <= max_value", f"{low} and {high}"))
    return found


def projected(constraint: Constraint, w: Array, name: str) -> Array:
    """Return the projection of a parameter, of its shape and dtype."""
    value = checks.as_array(named.resolved(constraint, NAMES)(w), name)
    if value.dtype.kind not in "iuf":
        raise TypeError(must(name, "return real numbers", value.dtype))
    if value.shape != w.shape:
        raise ValueError(must(name, f"return an array of shape {w.shape}", value.shape))
    return value.astype(w.dtype)
