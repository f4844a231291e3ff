"""Penalties on parameters: l1, l2 and l1_l2 with the defaults of Keras, or a function of the array."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from . import checks, named
from .errors import must

Array = NDArray[Any]
Regularizer = str | tuple[Any, ...] | Callable[[Array], Any]


def _l1(w: Array, l1: float) -> float:
    return l1 * float(np.abs(w, dtype=np.float64).sum())


def _l2(w: Array, l2: float) -> float:
    return l2 * float(np.square(w, dtype=np.float64).sum())


def _l1_l2(w: Array, l1: float, l2: float) -> float:
    return _l1(w, l1) + _l2(w, l2)


def _factor(name: str) -> named.Number:
    return named.Number(name, 0.01, 0.0, math.inf, "finite and at least 0")


NAMES: Final = {
    "l1": named.Named(_l1, (_factor("l1"),)),
    "l2": named.Named(_l2, (_factor("l2"),)),
    "l1_l2": named.Named(_l1_l2, (_factor("l1"), _factor("l2"))),
}
# The derivatives; that of an absolute value at 0 is 0.
_GRADIENTS: Final = {
    "l1": named.Named(lambda w, l1: l1 * np.sign(w), NAMES["l1"].numbers),
    "l2": named.Named(lambda w, l2: 2 * l2 * w, NAMES["l2"].numbers),
    "l1_l2": named.Named(lambda w, l1, l2: l1 * np.sign(w) + 2 * l2 * w, NAMES["l1_l2"].numbers),
}


def checked(value: Any, name: str) -> Regularizer | None:
    """Return a regularizer as users write it, checked: None, a name, (name, numbers...), or a function."""
    return None if value is None else named.checked(value, name, NAMES)


def loss(regularizer: Regularizer | None, w: Array | None, name: str) -> float:
    """Return the penalty on a parameter; 0 without one."""
    if regularizer is None or w is None:
        return 0.0
    value = checks.as_array(named.resolved(regularizer, NAMES)(w), name)
    if value.ndim or value.dtype.kind not in "iuf":
        raise TypeError(must(name, "return a real number", f"{value.dtype} of shape {value.shape}"))
    return float(value)


def gradient(regularizer: Regularizer | None, w: Array | None, name: str) -> Array | None:
    """Return the gradient of the penalty, of the parameter's dtype; a function must bring its own as `.gradient`."""
    if regularizer is None or w is None:
        return None
    if callable(regularizer):
        own = getattr(regularizer, "gradient", None)
        if own is None:
            raise TypeError(must(name, "be a name, or have a method gradient(array)", repr(regularizer)))
        value = checks.as_array(own(w), name)
        if value.shape != w.shape:
            raise ValueError(must(name, f"return a gradient of shape {w.shape}", value.shape))
    else:
        value = named.resolved(regularizer, _GRADIENTS)(w.astype(np.float64))
    return value.astype(w.dtype)
