"""Keras: weights and configurations of its ``BatchNormalization``, in and out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .. import layout as layouts
from ..errors import must
from ..layer import BatchNorm
from . import _keras_config, _weights
from .keras import BatchNormalization


def from_keras(source: Any, config: Mapping[str, Any] | None = None, *, prefix: str = "", ddof: int = 0) -> BatchNorm:
    """Return the layer that does what a ``BatchNormalization`` of Keras does.

    Parameters
    ----------
    source : layer, sequence of arrays, or mapping
        A live layer of Keras 3, tf.keras or `fastbn.compat.keras`, built; its ``get_weights()``: gamma, beta,
        moving_mean, moving_variance (and those of renorm), as far as it has them; or arrays by these names.
    config : mapping, optional
        The layer's ``get_config()``, or a part of it: what is missing has the defaults of Keras. A live layer brings
        its own. It says what a list has: ``{"scale": False}`` for one without gamma.
    prefix : str, default: ""
        For a mapping: where the layer is, "bn1" for names such as "bn1/gamma".
    ddof : {0, 1}, default: 0
        TensorFlow's fused kernels (rank 4, so most image models of tf.keras) put the variance of m - 1 values into
        the moving variance: 1 goes on as they do. Keras 3 has 0.

    Returns
    -------
    BatchNorm
        With the same momentum, epsilon, axis, initializers, regularizers, constraints and renormalization.

    Raises
    ------
    TypeError
        If ``source`` is none of these, or a value is not an array of real numbers.
    ValueError
        If the number of arrays, a name or a shape does not fit, a variance is negative, or ``config`` has an entry that
        Keras's layer does not have.

    Notes
    -----
    What fastbn has no counterpart for stays behind if only training would change: initializers such as
    "glorot_uniform", regularizers and constraints of a user's own, activity regularizers, and what a live layer of a
    subclass has in its configuration beside Keras's entries. Set ``bn.gamma_regularizer`` to a function of the array to
    have it back.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.compat import from_keras
    >>> zeros, ones = np.zeros(3), np.ones(3)
    >>> from_keras([zeros, zeros, ones], {"scale": False, "momentum": 0.9}).scale
    False
    """
    if hasattr(source, "get_weights") and hasattr(source, "get_config"):
        if type(source).__name__ == "Model" or hasattr(source, "layers"):
            raise TypeError(must("source", "be one layer; from_keras_many takes a model", type(source).__name__))
        config = _keras_config.own(source.get_config()) if config is None else config
        source = source.get_weights()
        if not source:
            raise ValueError(must("source", "be a layer that is built", "one without weights"))
    config = {} if config is None else config
    given = _keras_config.DEFAULTS | _keras_config.arguments(config, without=("activity_regularizer",))
    wanted = [
        name
        for name, has in zip(_keras_config.ORDER, (given["scale"], given["center"], True, True, *[given["renorm"]] * 3))
        if has
    ]
    if isinstance(source, Mapping):
        everything = {_without_colon(k): v for k, v in _weights.mapping(source, "source").items()}
        state = _weights.below(everything, prefix, "/")
        if not {"scale", "center", "renorm"} & set(config):
            wanted = [
                name for name in _keras_config.ORDER if name in state or name in ("moving_mean", "moving_variance")
            ]
            if any(name in state for name in _keras_config.RENORM):
                wanted = [name for name in _keras_config.ORDER if name in wanted or name in _keras_config.RENORM]
                given["renorm"] = True
        found = _weights.taken(state, prefix, "/", wanted, (), everything)
    elif isinstance(source, Sequence) and not isinstance(source, str):
        if len(source) != len(wanted):
            words = f"be {len(wanted)} arrays ({', '.join(wanted)}); config says which there are"
            raise ValueError(must("source", words, len(source)))
        found = dict(zip(wanted, source))
    else:
        raise TypeError(must("source", "be a layer, a list of arrays or a mapping", type(source).__name__))
    axis = given["axis"]
    axis = tuple(axis) if isinstance(axis, Sequence) and len(axis) > 1 else _keras_config.axis(axis)
    names = {name: _weights.path(prefix, name, "/") for name in found}
    return _weights.layer(
        {name: _weights.flat(_weights.array(value, names[name]), names[name], axis) for name, value in found.items()},
        names,
        axis=axis,
        momentum=given["momentum"],
        epsilon=given["epsilon"],
        ddof=ddof,
        **{n: _keras_config.expressed(n, given[n], isinstance(axis, tuple)) for n in _keras_config.NAMED},
        renorm=given["renorm"],
        renorm_clipping=given["renorm_clipping"] if given["renorm"] else None,
        renorm_momentum=given["renorm_momentum"],
        trainable=given["trainable"],
        name=given["name"],
    )


def _without_colon(name: str) -> str:
    """Return the name that TensorFlow writes with an output number: gamma for gamma:0."""
    return name[:-2] if name.endswith(":0") else name


def from_keras_many(model: Any, *, ddof: int = 0) -> dict[str, BatchNorm]:
    """Return all batch norm layers of a live model, by the names of their layers.

    Parameters
    ----------
    model : model
        Of Keras 3 or tf.keras, built. Models, wrappers such as TimeDistributed, and layers of a user's own inside it
        are looked into; their names come first, with a slash.
    ddof : {0, 1}, default: 0
        As in `from_keras`.

    Returns
    -------
    dict
        Layers by name; empty if there are none. A layer that is in several places has the name of the first one. Of
        different layers with one name the first keeps it, and the others get a number: bn, bn_1.

    Raises
    ------
    TypeError
        If ``model`` has no layers.
    """
    if not hasattr(model, "layers"):
        raise TypeError(must("model", "have layers", type(model).__name__))
    found = list(_walk(model, "", {id(model)}))
    names = _weights.unique([name for name, _ in found])
    return {name: from_keras(layer, ddof=ddof) for name, (_, layer) in zip(names, found)}


def _walk(parent: Any, start: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Go through all batch norms, each once, by their names below those of what they are in."""
    for layer in _inside(parent):
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        if any(kind.__name__ in ("BatchNormalization", "BatchNormalizationBase") for kind in type(layer).__mro__):
            yield start + layer.name, layer
        else:
            yield from _walk(layer, f"{start}{layer.name}/", seen)


def _inside(layer: Any) -> Sequence[Any]:
    """Return what a layer holds: Keras tells layers of any class so, and other objects by `layers`, if at all."""
    if hasattr(layer, "_flatten_layers"):
        return list(layer._flatten_layers(include_self=False, recursive=False))
    return list(getattr(layer, "layers", ()))


def to_keras(bn: BatchNorm, layer: Any = None) -> Any:
    """Return a layer's weights in the order of Keras, or load them into a layer.

    Parameters
    ----------
    bn : BatchNorm
        A built layer that keeps moving statistics, with one channel axis and without activation.
    layer : layer, optional
        A live layer, built, for instance ``keras.layers.BatchNormalization.from_config(keras_config(bn))`` after its
        ``build``. It gets the values; momentum, epsilon and axis must be those of ``bn``. Axes that count from
        different ends are compared if the layer knows the rank of its inputs.

    Returns
    -------
    list of ndarray, or layer
        The layer, if there is one. Else gamma, beta, moving_mean, moving_variance, and moving_stddev, renorm_mean and
        renorm_stddev with renormalization, as far as ``bn`` has them: what ``set_weights`` takes.

    Raises
    ------
    TypeError
        If ``bn`` is not a BatchNorm, or ``layer`` not a layer.
    ValueError
        If Keras has no place for the layer, or ``layer`` differs in what it has.

    Examples
    --------
    >>> import fastbn
    >>> from fastbn.compat import to_keras
    >>> [w.tolist() for w in to_keras(fastbn.BatchNorm(1))]
    [[1.0], [0.0], [0.0], [1.0]]
    """
    state = _weights.state_of(bn)
    _check_for_keras(bn)
    found = {name: state[name] for name in _keras_config.ORDER if name in state}
    if layer is None:
        return list(found.values())
    if not (hasattr(layer, "set_weights") and hasattr(layer, "get_config")):
        raise TypeError(must("layer", "be a layer of Keras", type(layer).__name__))
    config = layer.get_config()
    for name in ("momentum", "epsilon", "center", "scale", "renorm"):
        if config.get(name, getattr(bn, name)) != getattr(bn, name):
            raise ValueError(must(f"{name} of layer", f"be {getattr(bn, name)}", config[name]))
    shapes = [tuple(v.shape) for v in layer.weights]
    if shapes != [v.shape for v in found.values()]:
        words = "be built with weights of shape " + ", ".join(str(v.shape) for v in found.values())
        raise ValueError(must("layer", words, ", ".join(map(str, shapes)) or "none"))
    _check_axis(bn, layer, _keras_config.axis(config.get("axis", bn.axis)))
    layer.set_weights(list(found.values()))
    return layer


def _check_axis(bn: BatchNorm, layer: Any, theirs: int) -> None:
    """Refuse a layer with another channel axis, if that can be known."""
    ours, rank = (_keras_config.axis(bn.axis), None) if bn.layout is None else layouts.LAYOUTS[bn.layout]
    rank = _rank(layer) or rank
    if (ours < 0) != (theirs < 0):
        if rank is None:
            return
        ours, theirs = (axis + rank if axis < 0 else axis for axis in (ours, theirs))
    if ours != theirs:
        raise ValueError(must("axis of layer", f"be {ours}", theirs))


def _rank(layer: Any) -> int | None:
    """Return how many axes the inputs of a layer have, None if it does not know."""
    if isinstance(layer, BatchNormalization):
        return layer._ndim
    rank: int | None = getattr(getattr(layer, "input_spec", None), "ndim", None)
    return rank


def keras_config(bn: BatchNorm) -> dict[str, Any]:
    """Return the configuration from which Keras makes a layer like this one.

    Parameters
    ----------
    bn : BatchNorm
        A built layer that Keras has a place for, see `to_keras`. Its ``ddof`` is not part of it.

    Returns
    -------
    dict
        For ``keras.layers.BatchNormalization.from_config``, and for `fastbn.compat.keras.BatchNormalization`. Keras 3
        refuses slashes in names: they become underscores.

    Raises
    ------
    TypeError, ValueError
        As in `to_keras`.

    Examples
    --------
    >>> import fastbn
    >>> from fastbn.compat import keras_config
    >>> keras_config(fastbn.BatchNorm(3, epsilon=1e-5))["epsilon"]
    1e-05
    """
    _weights.state_of(bn)
    _check_for_keras(bn)
    if bn.layout is not None:
        raise ValueError(must("bn", "name its channel axis by axis for Keras", f"layout {bn.layout!r}"))
    given = {name: getattr(bn, name) for name in _keras_config.DEFAULTS if name not in ("dtype", "synchronized")}
    if bn.name is not None:
        given["name"] = bn.name.replace("/", "_")
    dtype = bn.moving_mean.dtype.name
    return BatchNormalization(**given, dtype=dtype).get_config()


def _check_for_keras(bn: BatchNorm) -> None:
    _weights.one_axis(bn, "Keras")
    if not bn.track:
        raise ValueError(must("bn", "keep moving statistics for Keras", "one with track=False"))
    if bn.momentum is None:
        raise ValueError(must("bn", "have a momentum for Keras, which knows no average of all batches", None))
    if bn.renorm and bn.renorm_scheme != "keras":
        raise ValueError(must("bn", "have the renorm_scheme 'keras'", repr(bn.renorm_scheme)))
