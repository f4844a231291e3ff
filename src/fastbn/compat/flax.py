"""flax: the variables of ``linen.BatchNorm`` and the state of ``nnx.BatchNorm``, in and out.

================  ========================================  ==================
fastbn            linen                                     nnx
================  ========================================  ==================
gamma, beta       params/scale, params/bias                 scale, bias
moving_mean       batch_stats/mean                          mean
moving_variance   batch_stats/var (of m values: ``ddof=0``) var
momentum          momentum, the same share                  momentum
epsilon           epsilon, 1e-5 by default                  epsilon
================  ========================================  ==================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import checks
from ..errors import must
from ..layer import BatchNorm
from . import _weights
from ._weights import UNSET, Unset

Array = NDArray[Any]

_NAMES: Final = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}
_COLLECTIONS: Final = {
    "gamma": "params",
    "beta": "params",
    "moving_mean": "batch_stats",
    "moving_variance": "batch_stats",
}
_DEFAULTS: Final[dict[str, Any]] = {"momentum": 0.99, "epsilon": 1e-5, "axis": -1}
_ATTRIBUTES: Final = ("mean", "var", "use_scale", "use_bias")


def _is_nnx(source: Any) -> bool:
    return not isinstance(source, Mapping) and all(hasattr(source, name) for name in _ATTRIBUTES)


def from_flax(
    source: Any,
    path: str = "",
    *,
    module: Any = None,
    momentum: float | Unset = UNSET,
    epsilon: float | Unset = UNSET,
    axis: int | tuple[int, ...] | Unset = UNSET,
    dtype: DTypeLike | None = None,
) -> BatchNorm:
    """Return the layer that does what a ``BatchNorm`` of flax does.

    Parameters
    ----------
    source : mapping or nnx.BatchNorm
        Variables of linen, ``{"params": ..., "batch_stats": ...}``, nested or flat as
        ``flax.traverse_util.flatten_dict`` makes them (with tuples, or ``sep="/"``), of which other collections are
        left out; the state of nnx, nested, or as a pure dict; or a live ``nnx.BatchNorm``. For dicts of arrays flax
        need not be installed.
    path : str, default: ""
        Where the layer is: "Block_0/BatchNorm_0".
    module : linen.BatchNorm or nnx.BatchNorm, optional
        From where momentum, epsilon and axis are taken if they are not given. A live source is its own.
    momentum, epsilon : float, optional
        By default those of the module, or flax's 0.99 and 1e-5.
    axis : int or tuple of ints, optional
        By default that of the module, or -1. Several are sorted, as flax does.
    dtype : {"float32", "float64"}, optional
        Of parameters and statistics; by default float64 if the source has that, else float32.

    Returns
    -------
    BatchNorm
        With memory of its own.

    Raises
    ------
    TypeError
        If ``source`` or ``module`` is none of these, or a value is not an array of real numbers.
    ValueError
        If there is no layer at ``path``, a name is missing or unknown, a shape differs, or a variance is negative; if
        the order of several axes depends on the number of axes of the data, as that of (1, -2) does.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.compat import from_flax
    >>> ones = np.ones(3, np.float32)
    >>> variables = {"params": {"bn": {"scale": ones}}, "batch_stats": {"bn": {"mean": ones, "var": ones}}}
    >>> from_flax(variables, "bn").center
    False
    """
    if _is_nnx(source):
        if path:
            raise ValueError(must("path", "not be given with a live layer", repr(path)))
        module = source if module is None else module
        state = {name: getattr(source, name) for name in _NAMES.values()}
        everything: Mapping[str, Any] = state
    elif isinstance(source, Mapping):
        merged = _merged(source)
        state = _weights.below(merged, path, "/")
        everything = merged
    else:
        raise TypeError(must("source", "be variables of linen, or a layer or state of nnx", type(source).__name__))
    found = _weights.taken(state, path, "/", ("mean", "var"), ("scale", "bias"), everything)
    given: dict[str, Any] = {"momentum": momentum, "epsilon": epsilon, "axis": axis}
    if module is not None and not all(hasattr(module, name) for name in given):
        raise TypeError(must("module", "be a BatchNorm of flax", type(module).__name__))
    for name, value in given.items():
        given[name] = _weights.chosen(value, _DEFAULTS[name] if module is None else getattr(module, name))
    if isinstance(given["axis"], Sequence):
        given["axis"] = _sorted(given["axis"], "axis")
    return _weights.layer(
        {ours: found[theirs] for ours, theirs in _NAMES.items() if theirs in found},
        {ours: _weights.path(path, theirs, "/") for ours, theirs in _NAMES.items()},
        dtype=dtype,
        **given,
    )


def _sorted(axes: Sequence[int], name: str) -> tuple[int, ...]:
    """Return several channel axes in the order of memory, which is that of flax's parameters.

    Those from the front lie before those from the back if they are the first axes, or the others the last: no other
    axis is beyond. Else the number of axes of the data would have to be known.
    """
    front, back = sorted(a for a in axes if a >= 0), sorted(a for a in axes if a < 0)
    if front != list(range(len(front))) and back != list(range(-len(back), 0)):
        words = "count all axes from the same end, or begin with axis 0, or end with axis -1"
        raise ValueError(must(name, words, tuple(axes)))
    return (*front, *back)


def _merged(source: Mapping[Any, Any]) -> dict[str, Any]:
    """Return all entries by path, with the two collections of linen brought together, and without its others."""
    paths = _paths(source, "")
    roots = {path.split("/", 1)[0] for path in paths} | {k for k, v in source.items() if isinstance(v, Mapping)}
    if "batch_stats" in roots or roots == {"params"}:
        merged: dict[str, Any] = {}
        for name in ("params", "batch_stats"):
            if name in paths:
                raise TypeError(must("source", "have mappings as params and batch_stats", type(paths[name]).__name__))
            merged |= _weights.below(paths, name, "/")
        return merged
    return paths


def _paths(tree: Mapping[Any, Any], start: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = "/".join(map(str, key)) if isinstance(key, tuple) else key
        if isinstance(value, Mapping):
            found |= _paths(value, f"{start}{name}/")
        else:
            found[f"{start}{name}"] = value
    return found


def from_flax_many(source: Mapping[Any, Any], path: str = "", **arguments: Any) -> dict[str, BatchNorm]:
    """Return all batch norm layers of a model, by their paths.

    Parameters
    ----------
    source : mapping
        Variables of linen, of which only params and batch_stats count, or the state of an nnx model
        (``nnx.state(model)``). A layer is what has mean and var.
    path : str, default: ""
        Look only below this one.
    **arguments
        Of `from_flax`, for all of them.

    Returns
    -------
    dict
        Layers by path; empty if there are none.

    Raises
    ------
    TypeError, ValueError
        As in `from_flax`.
    """
    if not isinstance(source, Mapping):
        raise TypeError(must("source", "be variables of linen or a state of nnx", type(source).__name__))
    _weights.text(path, "path")
    merged = _merged(source)
    paths = [name[: -len("var")].rstrip("/") for name in merged if name == "var" or name.endswith("/var")]
    layers = [p for p in paths if _weights.path(p, "mean", "/") in merged]
    inside = [p for p in layers if not path or p == path or p.startswith(path.rstrip("/") + "/")]
    return {p: from_flax(merged, p, **arguments) for p in inside}


def to_flax(bn: BatchNorm, layer: Any = None, *, path: str = "", api: Literal["linen", "nnx"] = "linen") -> Any:
    """Return a layer as variables or state of flax, or load it into a live ``nnx.BatchNorm``.

    Parameters
    ----------
    bn : BatchNorm
        A built layer that keeps moving statistics, without activation.
    layer : nnx.BatchNorm, optional
        Gets the values, momentum, epsilon and axis.
    path : str, default: ""
        Where to put the layer: "Block_0/BatchNorm_0".
    api : {"linen", "nnx"}, default: "linen"
        "linen" gives ``{"params": ..., "batch_stats": ...}``, "nnx" a pure dict as ``nnx.replace_by_pure_dict`` takes
        it.

    Returns
    -------
    dict or layer
        The layer, if there is one. Else NumPy arrays, nested along ``path``. Their axes are in the order of the data's,
        as flax has them, whatever the order of several channel axes in ``bn``.

    Raises
    ------
    TypeError
        If ``bn`` is not a BatchNorm, or ``layer`` not a layer of nnx.
    ValueError
        If flax has no place for the layer, ``layer`` differs in what it has, or the order of several axes depends on
        the number of axes of the data, as that of (1, -2) does.

    Examples
    --------
    >>> import fastbn
    >>> from fastbn.compat import to_flax
    >>> to_flax(fastbn.BatchNorm(1), path="bn")["params"]["bn"]["scale"]
    array([1.], dtype=float32)
    """
    api_ = checks.one_of(api, "api", ("linen", "nnx"))
    _check_for_flax(bn)
    _weights.text(path, "path")
    state = _state(bn)
    if layer is not None:
        if path:
            raise ValueError(must("path", "not be given with a layer", repr(path)))
        return _fill(bn, layer, state)
    if api_ == "nnx":
        return _nested(path, {theirs: state[ours] for ours, theirs in _NAMES.items() if ours in state})
    result: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for collection, content in result.items():
        content |= {t: state[o] for o, t in _NAMES.items() if o in state and _COLLECTIONS[o] == collection}
    return {collection: _nested(path, content) for collection, content in result.items() if content}


def _state(bn: BatchNorm) -> dict[str, Array]:
    """Return the arrays of a layer, with their axes in the order of flax."""
    axes = (bn.axis,) if isinstance(bn.axis, int) else bn.axis
    order = [axes.index(axis) for axis in _sorted(axes, "axis of bn")]
    state = _weights.state_of(bn)
    return {ours: state[ours].transpose(order) for ours in _NAMES if ours in state}


def _nested(path: str, content: dict[str, Any]) -> dict[str, Any]:
    for part in reversed([part for part in path.split("/") if part]):
        content = {part: content}
    return content


def _fill(bn: BatchNorm, layer: Any, state: Mapping[str, Array]) -> Any:
    if not _is_nnx(layer):
        raise TypeError(must("layer", "be an nnx.BatchNorm", type(layer).__name__))
    targets = {ours: getattr(layer, theirs) for ours, theirs in _NAMES.items()}
    has = [ours for ours, target in targets.items() if target is not None and np.ndim(target)]
    if set(has) != set(state):
        wanted = _weights.listed(_NAMES[ours] for ours in _NAMES if ours in state)
        raise ValueError(must("layer", "have " + wanted, _weights.listed(_NAMES[ours] for ours in has)))
    for ours in has:
        if tuple(targets[ours].shape) != state[ours].shape:
            name, got = _NAMES[ours], tuple(targets[ours].shape)
            raise ValueError(must(f"{name} of layer", f"have shape {state[ours].shape}", got))
    for ours in has:
        targets[ours][...] = state[ours].astype(np.asarray(targets[ours]).dtype)
    for name, value in flax_arguments(bn).items():
        setattr(layer, name, value)
    return layer


def flax_arguments(bn: BatchNorm) -> dict[str, Any]:
    """Return the arguments of flax's BatchNorm for a layer.

    Parameters
    ----------
    bn : BatchNorm
        A built layer, see `to_flax`.

    Returns
    -------
    dict
        momentum, epsilon, axis (several are sorted), use_scale and use_bias: for ``linen.BatchNorm(**arguments)``, and
        after the number of features for ``nnx.BatchNorm``.

    Raises
    ------
    TypeError, ValueError
        As in `to_flax`.

    Examples
    --------
    >>> import fastbn
    >>> from fastbn.compat import flax_arguments
    >>> flax_arguments(fastbn.BatchNorm(3))["use_bias"]
    True
    """
    _check_for_flax(bn)
    if bn.layout is not None:
        raise ValueError(must("bn", "name its channel axis by axis for flax", f"layout {bn.layout!r}"))
    return {
        "momentum": bn.momentum,
        "epsilon": bn.epsilon,
        "axis": bn.axis if isinstance(bn.axis, int) else _sorted(bn.axis, "axis of bn"),
        "use_scale": bn.scale,
        "use_bias": bn.center,
    }


def _check_for_flax(bn: BatchNorm) -> None:
    _weights.state_of(bn)
    if not bn.track:
        raise ValueError(must("bn", "keep moving statistics for flax", "one with track=False"))
    if bn.activation is not None:
        raise ValueError(must("bn", "have no activation for flax, which has none here", repr(bn.activation)))
    if bn.momentum is None:
        raise ValueError(must("bn", "have a momentum for flax, which knows no average of all batches", None))
