"""Activations that run in the pass of the normalization: their names, and what the kernels are told of them."""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

from . import checks, kernels
from .errors import must

SLOPE: Final = 0.01  # of "leaky_relu" by itself
_GELU: Final = 2 * math.sqrt(2 / math.pi)
_NAMES: Final = ("relu", "relu6", "silu", "gelu_tanh", "leaky_relu")

Bend = tuple[int, tuple[float, float, float]]


class Activation(NamedTuple):
    """A checked activation.

    Attributes
    ----------
    bend : tuple
        For `kernels.run`.
    from_output : bool
        Whether the derivative can be told from the result alone.
    """

    bend: Bend
    from_output: bool


def _clipped(lo: float, hi: float) -> Activation:
    return Activation((kernels.BENDS["clipped"], (lo, hi, 0.0)), True)


def _bent(slope: float) -> Activation:
    # A negative slope folds the numbers below 0 onto those above: a result does not say where it came from.
    return Activation((kernels.BENDS["bent"], (slope, 0.0, 0.0)), slope >= 0)


def _smooth(k1: float, k3: float) -> Activation:
    return Activation((kernels.BENDS["smooth"], (k1, k3, 0.0)), False)


# NaN is no bound.
_FIXED: Final = {
    "relu": _clipped(0.0, math.nan),
    "relu6": _clipped(0.0, 6.0),
    "silu": _smooth(1.0, 0.0),
    "gelu_tanh": _smooth(_GELU, 0.044715 * _GELU),
}


def named(value: Any) -> str | tuple[str, float] | None:
    """Return an activation as users write it, checked: None, a name, or ("leaky_relu", slope)."""
    if value is None or (isinstance(value, str) and value in _NAMES):
        return value
    if isinstance(value, tuple) and len(value) == 2 and value[0] == "leaky_relu":
        return "leaky_relu", checks.real(value[1], "slope of leaky_relu", -math.inf, math.inf, "finite")
    error = ValueError if isinstance(value, str | tuple) else TypeError
    raise error(must("activation", f'be None, {", ".join(_NAMES)} or ("leaky_relu", slope)', repr(value)))


def resolved(value: Any) -> Activation | None:
    """Return what an activation as users write it means."""
    if isinstance(value, str) and value in _FIXED:
        return _FIXED[value]
    name = named(value)
    if name is None:
        return None
    slope = name[1] if isinstance(name, tuple) else SLOPE
    return _bent(slope) if slope else _FIXED["relu"]  # 0 times infinity would be NaN
