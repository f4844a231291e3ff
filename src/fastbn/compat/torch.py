"""PyTorch: weights of ``nn.BatchNorm1d/2d/3d`` and whatever has their state, in and out.

==============  ======================  ============================================================
fastbn          PyTorch                 note
==============  ======================  ============================================================
gamma, beta     weight, bias            ``affine=False`` is ``scale=False, center=False``
moving_mean     running_mean            none of both with ``track_running_stats=False``
moving_variance running_var             of m - 1 values: ``ddof=1``
batches         num_batches_tracked
momentum        1 - momentum            the share that is kept; None is the average of all batches
epsilon         eps
==============  ======================  ============================================================
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import checks
from ..errors import must
from ..layer import BatchNorm
from . import _weights
from ._weights import UNSET, Unset

Array = NDArray[Any]

_NAMES: Final = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
_COUNTER: Final = "num_batches_tracked"
_EPS: Final = 1e-5
_MOMENTUM: Final = 0.1


def _is_module(source: Any) -> bool:
    return hasattr(source, "state_dict") and hasattr(source, "named_modules")


def _is_layer(module: Any) -> bool:
    """Whether a module is a batch norm: by the names of its classes, as PyTorch need not be there."""
    named = any("BatchNorm" in kind.__name__ for kind in type(module).__mro__)
    return named and all(hasattr(module, name) for name in ("eps", "running_mean", "running_var"))


def _activation(module: Any) -> Any:
    """Return what a module of `fastbn.torch`, which need not be there, applies to its result."""
    ours = any(kind.__module__ == "fastbn.torch.modules" for kind in type(module).__mro__)
    return module.activation if ours else None


def _kept(momentum: Any) -> float | None:
    """Return the share of the old value for PyTorch's momentum, which is that of the new one."""
    return None if momentum is None else other_share(checks.real(momentum, "momentum", 0.0, 1.0, "in [0, 1]"))


def other_share(momentum: float) -> float:
    """Return 1 - momentum, free of the noise of its last bits: 0.1 for 0.9."""
    return float(f"{1.0 - float(momentum):.15g}")


def from_torch(
    source: Any,
    prefix: str = "",
    *,
    eps: float | Unset = UNSET,
    momentum: float | Unset | None = UNSET,
    axis: int = 1,
    dtype: DTypeLike | None = None,
) -> BatchNorm:
    """Return the layer that does what a batch norm module of PyTorch does.

    Parameters
    ----------
    source : mapping or module
        A state dict of tensors or arrays, for which PyTorch need not be installed; or a live module: a batch norm, or
        with ``prefix`` a model that has one. Modules of `fastbn.torch` with an activation give a layer with it.
    prefix : str, default: ""
        Where the layer is in ``source``: "layer1.0.bn1" for names such as "layer1.0.bn1.weight".
    eps : float, optional
        PyTorch's: that of the module, or 1e-5.
    momentum : float or None, optional
        PyTorch's, the share of the NEW value: that of the module, or 0.1. None is the average of all batches.
    axis : int, default: 1
        Channel axis of the arrays that the layer will get. PyTorch's is always 1.
    dtype : {"float32", "float64"}, optional
        Of parameters and statistics; by default float64 if the source has that, else float32.

    Returns
    -------
    BatchNorm
        With ``ddof=1``, ``momentum = 1 - momentum``, and memory of its own.

    Raises
    ------
    TypeError
        If ``source`` is neither, or a value is not an array of real numbers.
    ValueError
        If a name is missing or unknown, a shape differs, or a variance is negative.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.compat import from_torch
    >>> from_torch({"bn.running_mean": np.zeros(3), "bn.running_var": np.ones(3)}, "bn", momentum=0.1).momentum
    0.9
    """
    given: dict[str, Any] = {"axis": axis, "ddof": 1, "dtype": dtype}
    if _is_module(source):
        module = _submodule(source, prefix)
        eps = _weights.chosen(eps, module.eps)
        momentum = _weights.chosen(momentum, getattr(module, "momentum", _MOMENTUM))
        given |= {"epsilon": eps, "momentum": _kept(momentum), "activation": _activation(module)}
        state = dict(module.state_dict())
        if not state:  # neither affine nor tracking
            return BatchNorm(module.num_features, center=False, scale=False, track=False, **given)
        everything = state
    else:
        everything = dict(_weights.mapping(source, "source"))
        state = _weights.below(everything, prefix, ".")
    eps, momentum = _weights.chosen(eps, _EPS), _weights.chosen(momentum, _MOMENTUM)
    given |= {"epsilon": eps, "momentum": _kept(momentum)}
    tracks = state.get("running_mean") is not None or state.get("running_var") is not None
    if not tracks and state.get("weight") is None and state.get("bias") is None:
        required: tuple[str, ...] = ("weight", "running_mean")  # nothing at all: name what a layer has
    else:
        required = ("running_mean", "running_var") if tracks else ()
        if tracks and momentum is None:
            required = (*required, _COUNTER)  # the average goes on from there
    optional = tuple(n for n in (*_NAMES.values(), _COUNTER) if n not in required)
    found = _weights.taken(state, prefix, ".", required, optional, everything)
    names = {ours: _weights.path(prefix, theirs, ".") for ours, theirs in _NAMES.items()}
    return _weights.layer(
        {ours: found[theirs] for ours, theirs in _NAMES.items() if theirs in found},
        names,
        _weights.batches(found.get(_COUNTER), _weights.path(prefix, _COUNTER, ".")),
        **given,
    )


def _submodule(model: Any, prefix: str) -> Any:
    """Return the batch norm at a place in a model."""
    modules = dict(model.named_modules())
    if prefix not in modules:
        layers = _weights.listed(name for name, module in modules.items() if _is_layer(module))
        raise ValueError(must("prefix", f"name a batch norm of the model: {layers}", repr(prefix)))
    module = modules[prefix]
    if not _is_layer(module):
        layers = _weights.listed(name for name, inner in modules.items() if _is_layer(inner))
        words = "be a batch norm module, or name one by prefix, or go to from_torch_many"
        raise TypeError(must("source", words, f"{type(module).__name__} with these: {layers}"))
    if getattr(module, "has_uninitialized_params", bool)():
        raise ValueError(must("source", "have its parameters", f"{type(module).__name__} before its first batch"))
    return module


def from_torch_many(
    source: Any,
    prefix: str = "",
    *,
    eps: float | Unset = UNSET,
    momentum: float | Unset | None = UNSET,
    axis: int = 1,
    dtype: DTypeLike | None = None,
) -> dict[str, BatchNorm]:
    """Return all batch norm layers of a model, by their prefixes.

    Parameters
    ----------
    source : mapping or module
        A model, or its state dict. In a state dict whatever has a ``running_var`` is a batch norm: layers that do not
        track statistics look like other layers there, and are left out.
    prefix : str, default: ""
        Look only below this one.
    eps, momentum, axis, dtype
        As in `from_torch`, for all of them.

    Returns
    -------
    dict
        Layers by the prefixes that `from_torch` takes; empty if there are none.

    Raises
    ------
    TypeError, ValueError
        As in `from_torch`.
    """
    _weights.text(prefix, "prefix")
    if _is_module(source):
        names = [name for name, module in source.named_modules() if _is_layer(module)]
    else:
        end = "running_var"
        state = _weights.mapping(source, "source")
        names = [key[: -len(end)].rstrip(".") for key in state if key == end or key.endswith("." + end)]
    inside = [n for n in names if not prefix or n == prefix or n.startswith(prefix.rstrip(".") + ".")]
    options: dict[str, Any] = {"eps": eps, "momentum": momentum, "axis": axis, "dtype": dtype}
    return {name: from_torch(source, name, **options) for name in inside}


def to_torch(bn: BatchNorm, module: Any = None, *, prefix: str = "") -> Any:
    """Return a layer as a state dict for PyTorch, or load it into a module.

    What only concerns training and has no counterpart (``ddof=0``, renormalization, ghost batches, regularizers) stays
    behind: inference is the same, training goes on as PyTorch trains.

    Parameters
    ----------
    bn : BatchNorm
        A built layer with one channel axis and without activation.
    module : module, optional
        A live batch norm, made by ``nn.BatchNorm2d(**torch_arguments(bn))`` for instance. It gets the values, eps and
        momentum.
    prefix : str, default: ""
        Put before the names, with a dot.

    Returns
    -------
    dict or module
        The module, if there is one. Else NumPy arrays by name, ready for ``torch.from_numpy``: weight, bias,
        running_mean, running_var, num_batches_tracked (int64), as far as the layer has them. With a bias there must
        be a weight in PyTorch: it is ones if the layer has no gamma.

    Raises
    ------
    TypeError
        If ``bn`` is not a BatchNorm, or ``module`` not a batch norm module.
    ValueError
        If PyTorch has no place for the layer, or the module differs in what it has.

    Examples
    --------
    >>> import fastbn
    >>> from fastbn.compat import to_torch
    >>> list(to_torch(fastbn.BatchNorm(3)))
    ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
    """
    state = _weights.state_of(bn)
    _weights.one_axis(bn, "PyTorch")
    _weights.text(prefix, "prefix")
    if "beta" in state and "gamma" not in state:
        state["gamma"] = np.ones_like(state["beta"])
    result: dict[str, Array] = {theirs: state[ours] for ours, theirs in _NAMES.items() if ours in state}
    if bn.track:
        result[_COUNTER] = np.array(state["batches"], np.int64)
    if module is None:
        return {_weights.path(prefix, name, "."): value for name, value in result.items()}
    if prefix:
        raise ValueError(must("prefix", "not be given with a module", repr(prefix)))
    return _fill(bn, module, result)


def _fill(bn: BatchNorm, module: Any, state: dict[str, Array]) -> Any:
    if not (_is_module(module) and _is_layer(module)):
        raise TypeError(must("module", "be a batch norm module", type(module).__name__))
    target = module.state_dict()
    if set(target) - {_COUNTER} != set(state) - {_COUNTER}:
        raise ValueError(must("module", "have " + _weights.listed(state), _weights.listed(target)))
    for name, value in state.items():
        if name in target and tuple(target[name].shape) != value.shape:
            raise ValueError(must(f"{name} of module", f"have shape {value.shape}", tuple(target[name].shape)))
    try:
        import torch
    except ImportError as error:
        _weights.missing("torch", "torch", error)
    module.load_state_dict({name: torch.from_numpy(value) for name, value in state.items() if name in target})
    arguments = torch_arguments(bn)
    module.eps = arguments["eps"]
    if hasattr(module, "momentum"):
        module.momentum = arguments["momentum"]
    return module


def torch_arguments(bn: BatchNorm) -> dict[str, Any]:
    """Return the arguments of PyTorch's batch norm modules for a layer.

    Parameters
    ----------
    bn : BatchNorm
        A built layer with one channel axis.

    Returns
    -------
    dict
        num_features, eps, momentum (the share of the new value), affine and track_running_stats, and ``bias=False``
        for a layer with scale and without center, which PyTorch 2.13 knows.

    Raises
    ------
    TypeError, ValueError
        As in `to_torch`.

    Examples
    --------
    >>> import fastbn
    >>> from fastbn.compat import torch_arguments
    >>> torch_arguments(fastbn.BatchNorm(3, momentum=0.9))["momentum"]
    0.1
    """
    _weights.state_of(bn)
    _weights.one_axis(bn, "PyTorch")
    arguments: dict[str, Any] = {
        "num_features": bn._existing().shape[0],
        "eps": bn.epsilon,
        "momentum": None if bn.momentum is None else other_share(bn.momentum),
        "affine": bn.scale or bn.center,
        "track_running_stats": bn.track,
    }
    if bn.scale and not bn.center:
        arguments["bias"] = False
    return arguments
