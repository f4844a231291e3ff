"""TensorFlow 1: the variables of `tf.layers` and `tf.contrib.layers` batch norms, by name.

===================================  ======================================================================
variable, below its scope            becomes
===================================  ======================================================================
gamma, beta                          gamma, beta; missing ones are ``scale=False``, ``center=False``
moving_mean, moving_variance         the same
renorm_mean, renorm_mean_weight,     the state of ``renorm=True, renorm_scheme="tf1"``
renorm_stddev, renorm_stddev_weight
moving_stddev, renorm_mean,          that of ``renorm_scheme="keras"`` (TensorFlow 2)
renorm_stddev
moving_mean/biased,                  ``zero_debias="mean"``, local_step becomes ``batches``; TensorFlow put the whole
moving_mean/local_step               scope before them once more: net/BatchNorm/net/BatchNorm/moving_mean/biased
all others                           left out: an optimizer's (gamma/Adam), averages (ExponentialMovingAverage), and
                                     those of other layers in the scope (weights)
===================================  ======================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..errors import must
from ..layer import BatchNorm
from . import _weights

Array = NDArray[Any]

_TF1: Final = ("renorm_mean", "renorm_mean_weight", "renorm_stddev", "renorm_stddev_weight")
_TF2: Final = ("moving_stddev", "renorm_mean", "renorm_stddev")
_DEBIAS: Final = ("moving_mean/biased", "moving_mean/local_step")


def _by_name(variables: Any) -> dict[str, Any]:
    """Return arrays, or what gives one, by name without output number."""
    if hasattr(variables, "get_variable_to_shape_map") and hasattr(variables, "get_tensor"):  # a checkpoint
        return {name: _Lazy(variables, name) for name in variables.get_variable_to_shape_map()}
    if isinstance(variables, Mapping):
        found = dict(_weights.mapping(variables, "variables"))
    elif isinstance(variables, Iterable) and not isinstance(variables, str | bytes | np.ndarray):
        found = {}
        for variable in variables:
            if not isinstance(getattr(variable, "name", None), str):
                words = "be a mapping, variables with names, or a reader of a checkpoint"
                raise TypeError(must("variables", words, f"an iterable with {type(variable).__name__}"))
            found[variable.name] = variable
    else:
        words = "be a mapping, variables with names, or a reader of a checkpoint"
        raise TypeError(must("variables", words, type(variables).__name__))
    return {name.removesuffix(":0"): value for name, value in found.items()}


class _Lazy:
    """A variable of a checkpoint, which is read when its numbers are needed."""

    def __init__(self, reader: Any, name: str) -> None:
        self._reader = reader
        self._name = name

    def numpy(self) -> Any:
        return self._reader.get_tensor(self._name)


def from_tf1(
    variables: Any,
    scope: str = "",
    *,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    axis: int | Sequence[int] = -1,
    ddof: int = 0,
    renorm_clipping: Mapping[str, float] | None = None,
    renorm_momentum: float = 0.99,
    dtype: DTypeLike | None = None,
) -> BatchNorm:
    """Return the layer that a batch norm of TensorFlow 1 was, from its variables.

    Parameters
    ----------
    variables : mapping, iterable of variables, or checkpoint reader
        Arrays by name, such as ``{"batch_normalization/gamma:0": array}``, with or without ":0"; variables with
        ``name`` and a value; or what ``tf.train.load_checkpoint`` returns, of which only this layer is read.
    scope : str, default: ""
        Where the layer is, "batch_normalization" for instance. By default the layer that is in no scope, or the only
        one among the variables. Other variables of the scope, and of those in it, are left out.
    momentum : float, default: 0.99
        The share that is kept; `tf.contrib.layers` calls it ``decay``, 0.999 by default there.
    epsilon : float, default: 1e-3
        The fused kernels took at least 1.001e-5.
    axis : int or sequence of ints, default: -1
        The channel axis, 1 for "NCHW". Several axes where the layer had a list.
    ddof : {0, 1}, default: 0
        1 goes on as the fused kernels did: for inputs of rank 4, and in `tf.contrib.layers` also of rank 2.
    renorm_clipping : mapping, optional
        As the layer had it, if it had ``renorm=True``.
    renorm_momentum : float, default: 0.99
        As the layer had it.
    dtype : {"float32", "float64"}, optional
        Of parameters and statistics; by default float64 if the variables are, else float32.

    Returns
    -------
    BatchNorm
        With memory of its own.

    Raises
    ------
    TypeError
        If ``variables`` is none of these, or a value is not an array of real numbers.
    ValueError
        If there is no layer at ``scope``, or several without one; if a name is missing, a shape differs or a variance
        is negative.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.compat import from_tf1
    >>> ones = np.ones(3, np.float32)
    >>> names = ("gamma", "beta", "moving_mean", "moving_variance")
    >>> from_tf1({f"batch_normalization/{n}:0": ones for n in names}, "batch_normalization").gamma
    array([1., 1., 1.], dtype=float32)
    """
    axes: Any = tuple(axis) if isinstance(axis, list) else axis  # TensorFlow's layer took a list
    everything = _by_name(variables)
    scope = _checked_scope(everything, scope)
    state = _weights.below(everything, scope, "/")
    state |= _debias(state, scope)
    debiased = any(name in state for name in _DEBIAS)
    extra: tuple[str, ...] = ()
    arguments: dict[str, Any] = {}
    if "renorm_mean" in state or "renorm_stddev" in state:
        old = "moving_stddev" not in state
        extra = _TF1 if old else _TF2
        arguments = {
            "renorm": True,
            "renorm_scheme": "tf1" if old else "keras",
            "renorm_clipping": renorm_clipping,
            "renorm_momentum": renorm_momentum,
        }
    required = ("moving_mean", "moving_variance", *extra, *(_DEBIAS if debiased else ()))
    optional = ("gamma", "beta")
    state = {name: value for name, value in state.items() if name in required or name in optional}
    found = _weights.taken(state, scope, "/", required, optional, everything)
    batches = 0
    if debiased:
        del found["moving_mean/biased"]  # the mean times its weight, which follows from the other two
        step = found.pop("moving_mean/local_step")
        batches = _weights.batches(step, _weights.path(scope, "moving_mean/local_step", "/"))
        arguments["zero_debias"] = "mean"
    names = {name: _weights.path(scope, name, "/") for name in found}
    arrays = {
        name: _weights.flat(_weights.array(value, names[name]), names[name], axes) for name, value in found.items()
    }
    return _weights.layer(
        arrays, names, batches, momentum=momentum, epsilon=epsilon, axis=axes, ddof=ddof, dtype=dtype, **arguments
    )


def _debias(state: Mapping[str, Any], scope: str) -> dict[str, Any]:
    """Return the variables of the zero-debiased mean from where the average made them: below the layer's whole scope.

    That scope was opened within the layer's. It is an end of today's if a graph was imported into another scope.
    """
    parts = scope.split("/")
    found: dict[str, Any] = {}
    for start in reversed(range(len(parts))):
        inside = _weights.below(state, "/".join(parts[start:]), "/")
        found |= {name: inside[name] for name in _DEBIAS if name in inside}
    return found


def _checked_scope(everything: Mapping[str, Any], scope: str) -> str:
    """Return the scope of one layer."""
    scopes = _scopes(everything)
    scope = _weights.text(scope, "scope").rstrip("/")
    if scope in scopes:
        return scope
    inside = [s for s in scopes if not scope or s.startswith(scope + "/")]
    if len(inside) == 1:
        return inside[0]
    if inside:
        raise ValueError(must("scope", "name one layer; from_tf1_many takes several", _weights.listed(inside)))
    incomplete = any(name.startswith(f"{scope}/" if scope else "") for name in everything)
    if incomplete and everything:
        return scope  # the names say what is missing
    raise ValueError(must("scope", f"be one of {_weights.listed(scopes)}", repr(scope)))


def _scopes(everything: Mapping[str, Any]) -> list[str]:
    """Return the scopes that have a moving variance, in the order of the variables."""
    end = "moving_variance"
    return [n[: -len(end)].rstrip("/") for n in everything if n == end or n.endswith("/" + end)]


def from_tf1_many(variables: Any, scope: str = "", **arguments: Any) -> dict[str, BatchNorm]:
    """Return all batch norm layers among variables, by their scopes.

    Parameters
    ----------
    variables : mapping, iterable of variables, or checkpoint reader
        As in `from_tf1`. A layer is what has a ``moving_variance``; other variables are left out.
    scope : str, default: ""
        Look only below this one.
    **arguments
        Of `from_tf1`, for all of them.

    Returns
    -------
    dict
        Layers by scope; empty if there are none.

    Raises
    ------
    TypeError, ValueError
        As in `from_tf1`.
    """
    everything = _by_name(variables)
    scope = _weights.text(scope, "scope").rstrip("/")
    inside = [s for s in _scopes(everything) if not scope or s == scope or s.startswith(scope + "/")]
    return {found: from_tf1(everything, found, **arguments) for found in inside}
