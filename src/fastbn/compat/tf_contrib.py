"""``tf.contrib.layers.batch_norm`` of TensorFlow 1, and of tf_slim, on NumPy arrays: same names and numbers, at once.

What of TensorFlow is around it (`variable_scope`, `get_collection`, `Saver`, ...) is in `fastbn.compat.tf_layers`; both
share their variables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import activation as activations
from .. import checks, modes
from ..errors import must
from . import _graph, tf_layers, tf_nn
from ._graph import GraphKeys, Initializer, Regularizer, Reuse, VariableScope
from ._scopes import variable_scope
from ._variables import get_variable

__all__ = ["batch_norm", "l1_regularizer", "l2_regularizer"]

Array = NDArray[Any]
Collections = str | Sequence[str] | None

_PARAMETERS: Final = ("beta", "gamma", "moving_mean", "moving_variance")
# Functions that the core applies in the same pass.
_ACTIVATIONS: Final = {tf_nn.relu: "relu", tf_nn.relu6: "relu6"}


class _ContribLayer(tf_layers.BatchNormalization):
    """The two paths that contrib had of its own: fused, also for rank 2, and the older one."""

    _order = ("beta", "gamma")
    _update_suffix = ":0"
    _own_fused = False
    _debias = False

    def mode(self, training: bool = False) -> modes.Mode:
        """Return the mode of a call: is_training decides alone."""
        return modes.TF_CONTRIB[checks.flag(training, "is_training"), self.trainable]

    def _fusable(self, axes: tuple[int, ...], ndim: int) -> bool:
        return self._own_fused

    def _made(self, shape: tuple[int, ...], dtype: np.dtype[Any], scope: VariableScope) -> Any:
        made, losses = super()._made(shape, dtype, scope)
        if self._debias:
            # TensorFlow opens a scope with the whole name of the variable inside of the layer's.
            with variable_scope(scope, reuse=self._reuse), variable_scope(made["moving_mean"].op_name):
                for name, extent in (("biased", shape), ("local_step", ())):
                    collections = self._collections(name)
                    made[name] = get_variable(name, extent, dtype, "zeros", trainable=False, collections=collections)
        return made, losses


def batch_norm(
    inputs: ArrayLike,
    decay: float = 0.999,
    center: bool = True,
    scale: bool = False,
    epsilon: float = 0.001,
    activation_fn: str | tuple[str, float] | Callable[[Array], Array] | None = None,
    param_initializers: Mapping[str, Initializer] | None = None,
    param_regularizers: Mapping[str, Regularizer | None] | None = None,
    updates_collections: Collections = GraphKeys.UPDATE_OPS,
    is_training: bool = True,
    reuse: Reuse = None,
    variables_collections: Collections | Mapping[str, Collections] = None,
    outputs_collections: Collections = None,
    trainable: bool = True,
    batch_weights: ArrayLike | None = None,
    fused: bool | None = None,
    data_format: str = "NHWC",
    zero_debias_moving_mean: bool = False,
    scope: str | VariableScope | None = None,
    renorm: bool = False,
    renorm_clipping: Mapping[str, float] | None = None,
    renorm_decay: float = 0.99,
    adjustment: tf_layers.Adjustment | None = None,
) -> Array:
    """Normalize a batch, with variables that are kept by name: ``tf.contrib.layers.batch_norm`` of TensorFlow 1.

    Parameters
    ----------
    inputs : array_like of float16, bfloat16, float32, float64, uint8 or int8
        The batch.
    decay : float, default: 0.999
        Share of the OLD moving value that is kept.
    center : bool, default: True
        Whether there is a beta.
    scale : bool, default: False
        Whether there is a gamma.
    epsilon : float, default: 0.001
        Added to the variance; at least 1.001e-5 on the fused path.
    activation_fn : str, tuple or callable, optional
        Applied to the result. The names that `fastbn.batch_norm` knows, `tf_nn.relu` and `tf_nn.relu6` have a
        gradient and are part of the pass; after any other function, take its gradient yourself, and call without it.
    param_initializers : dict, optional
        First values of beta, gamma, moving_mean and moving_variance.
    param_regularizers : dict, optional
        Penalties of beta and gamma; TensorFlow ignored them with batch_weights and some other options, see Notes.
    updates_collections : str or sequence of str, optional
        Where training puts the updates of the moving statistics; with None they are carried out at once.
    is_training : bool, default: True
        Whether to normalize with the statistics of the batch, and to update. It may change from call to call with the
        same variables: with False nothing is moved.
    reuse : {None, True, False, "auto"}
        Whether variables of this scope have to exist (True, which needs a scope), or are found or made ("auto").
    variables_collections : str, sequence of str, or dict of these by variable, optional
        Where to put the variables besides "variables" and "model_variables", when they are made; on the path layer, see
        Notes, also those that are found.
    outputs_collections : str or sequence of str, optional
        Where to put the result.
    trainable : bool, default: True
        Whether beta and gamma are among `trainable_variables`.
    batch_weights : array_like of shape (samples,), optional
        How often each sample counts in the statistics.
    fused : bool, optional
        None and True: rank 2 and 4 take the fused path unless batch_weights, renorm or adjustment is in the way. On it
        the variance that goes into the moving one is divided by m - 1. False: never.
    data_format : {"NHWC", "NCHW"}
        Whether the channel axis is the last or the second one.
    zero_debias_moving_mean : bool, default: False
        Keeps the moving mean, and not the variance, without the bias towards its initial 0, by two more variables.
    scope : str or VariableScope, optional
        Scope of the variables. By default "BatchNorm", numbered where that repeats.
    renorm, renorm_clipping, renorm_decay, adjustment
        As renorm, renorm_clipping, renorm_momentum and adjustment of `tf_layers.BatchNormalization`.

    Returns
    -------
    ndarray
        Of the shape of inputs. ``tf_layers.get_layer(scope)`` has the gradient.

    Raises
    ------
    TypeError, ValueError
        If an argument or a variable does not fit. Nothing has changed then.

    Warns
    -----
    UntrainedWarning
        If inference uses statistics that no batch ever reached.
    PendingUpdatesWarning
        If inference uses statistics whose updates wait and were never carried out.

    Notes
    -----
    TensorFlow took one of three paths, which differ in what is not written in its documentation:

    =======  ============================================  ========  =========  ===================  =============
    path     when                                          variance  order      trainable=False      regularizers
    =======  ============================================  ========  =========  ===================  =============
    fused    rank 2, or rank 4 with a collection of one's  m - 1     beta       updates all the      used
             own, None, or zero_debias_moving_mean                   first      same
    layer    else, the default collection                  m - 1     gamma      no updates           used
                                                           (rank 4)  first
    older    else: batch_weights, ...                      m         beta       updates all the      ignored
                                                                     first      same
    =======  ============================================  ========  =========  ===================  =============

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.compat import tf_contrib, tf_layers as tf
    >>> tf.reset_default_graph()
    >>> def tower(x, is_training):
    ...     return tf_contrib.batch_norm(
    ...         x, decay=0.5, is_training=is_training, updates_collections=None, scope="bn", reuse=tf.AUTO_REUSE
    ...     )
    >>> y = tower(np.array([[1.0], [3.0]]), True)
    >>> for variable in tf.global_variables("bn"):
    ...     print(variable.name, variable.value)
    bn/beta:0 [0.]
    bn/moving_mean:0 [1.]
    bn/moving_variance:0 [1.5]
    """
    training = checks.flag(is_training, "is_training")
    checks.one_of(data_format, "data_format", ("NHWC", "NCHW"))
    x = checks.data(inputs, "inputs")
    debias = checks.flag(zero_debias_moving_mean, "zero_debias_moving_mean")
    fuses = (fused is None or checks.flag(fused, "fused")) and x.ndim in (2, 4)
    fuses = fuses and batch_weights is None and not renorm and adjustment is None
    default = isinstance(updates_collections, str) and updates_collections == GraphKeys.UPDATE_OPS
    by_fused = fuses and (debias or x.ndim == 2 or not default)
    by_layer = not by_fused and batch_weights is None and default and not debias
    if renorm and not by_layer:
        raise ValueError(
            must(
                "renorm",
                "be False with batch_weights, zero_debias_moving_mean or updates_collections of your own",
                renorm,
            )
        )
    if adjustment is not None and not by_layer:
        raise ValueError(
            must(
                "adjustment",
                "be None with batch_weights, zero_debias_moving_mean or updates_collections of your own",
                repr(adjustment),
            )
        )
    first = _parameters(param_initializers, "param_initializers", _PARAMETERS)
    penalties = _parameters(param_regularizers, "param_regularizers", ("beta", "gamma"))
    if not by_fused and not by_layer:
        penalties = {}
    activation, function = _activation(activation_fn)
    weights = None if batch_weights is None else _weights(batch_weights, x)
    updates = (
        None if updates_collections is None else _graph.collection_names(updates_collections, "updates_collections")
    )
    outputs = _graph.collection_names(outputs_collections, "outputs_collections")
    own = _by_variable(variables_collections)

    def collections(name: str) -> list[str] | None:
        """Return where a new variable goes."""
        if by_fused and name not in _PARAMETERS:
            return None
        return [GraphKeys.GLOBAL_VARIABLES, GraphKeys.MODEL_VARIABLES, *([] if by_layer else own.get(name, []))]

    home = _graph.graph()
    with home.attempt(), variable_scope(scope, "BatchNorm", reuse=reuse) as inner:
        layer = (tf_layers.BatchNormalization if by_layer else _ContribLayer)(
            axis=1 if data_format == "NCHW" else -1,
            momentum=decay,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=first.get("beta", "zeros"),
            gamma_initializer=first.get("gamma", "ones"),
            moving_mean_initializer=first.get("moving_mean", "zeros"),
            moving_variance_initializer=first.get("moving_variance", "ones"),
            beta_regularizer=penalties.get("beta"),
            gamma_regularizer=penalties.get("gamma"),
            trainable=trainable,
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            renorm_momentum=renorm_decay,
            adjustment=adjustment,
            fused=fused,
            # Contrib's own paths made no layer object, which would take a number for a name.
            name=inner.name or (None if by_layer else "BatchNorm"),
            _scope=inner,
            _reuse=reuse,
        )
        layer._activation = activation
        layer._function = function
        layer._collections = collections
        if isinstance(layer, _ContribLayer):
            layer._own_fused = by_fused
            if debias:
                layer._debias = True
                layer._options = layer._options._replace(zero_debias="mean")
        y = layer._call(x, layer.mode(training), updates, weights)
    if by_layer:
        for variable, name in (
            (layer.moving_mean, "moving_mean"),
            (layer.moving_variance, "moving_variance"),
            (layer.beta, "beta"),
            (layer.gamma, "gamma"),
        ):
            if variable is not None:
                home.complete(own[name], variable)
    home.add(outputs, y)
    return y


def _parameters(given: Any, name: str, known: tuple[str, ...]) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise TypeError(must(name, "be a dict or None", type(given).__name__))
    if not set(given) <= set(known):
        raise ValueError(must(name, "have no keys but " + ", ".join(known), ", ".join(map(str, given))))
    return dict(given)


def _activation(value: Any) -> tuple[Any, Callable[[Array], Any] | None]:
    """Return an activation of the core, or a function to apply afterwards."""
    if callable(value):
        known = _ACTIVATIONS.get(value)
        return (None, value) if known is None else (known, None)
    return activations.named(value), None


def _weights(value: ArrayLike, x: Array) -> Array:
    array = checks.as_array(value, "batch_weights")
    if array.shape != x.shape[:1]:
        raise ValueError(must("batch_weights", f"have shape {x.shape[:1]}", array.shape))
    return array


def _by_variable(given: Any) -> Mapping[str, list[str]]:
    """Return the collections of each variable."""
    what = "variables_collections"
    if not isinstance(given, Mapping):
        return dict.fromkeys(_PARAMETERS, _graph.collection_names(given, what))
    return {name: _graph.collection_names(given.get(name), what) for name in _PARAMETERS}


def l1_regularizer(scale: float) -> Regularizer | None:
    """Return the penalty ``scale * sum(abs(weights))``: ``tf.contrib.layers.l1_regularizer``.

    Parameters
    ----------
    scale : float
        Not negative.

    Returns
    -------
    tuple or None
        For param_regularizers, or the regularizers of `tf_layers`; None, which adds no penalty, for a scale of 0.
    """
    factor = checks.real(scale, "scale", 0.0, math.inf, "finite and at least 0")
    return ("l1", factor) if factor else None


def l2_regularizer(scale: float) -> Regularizer | None:
    """Return the penalty ``scale * sum(weights**2) / 2``: ``tf.contrib.layers.l2_regularizer``.

    Parameters
    ----------
    scale : float
        Not negative. Keras's l2 has no half.

    Returns
    -------
    tuple or None
        For param_regularizers, or the regularizers of `tf_layers`; None, which adds no penalty, for a scale of 0.
    """
    factor = checks.real(scale, "scale", 0.0, math.inf, "finite and at least 0")
    return ("l2", factor / 2) if factor else None
