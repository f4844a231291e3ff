"""``tf.layers.batch_normalization`` of TensorFlow 1 on NumPy arrays: the same names, numbers and variables, at once.

The parts of TensorFlow around it that its users need are here under their own names: `variable_scope`,
`get_variable`, `global_variables`, `get_collection`, `Saver`, `reset_default_graph`. So
``from fastbn.compat import tf_layers as tf`` stands for both ``tf`` and ``tf.layers``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import checks, modes
from .. import layout as layouts
from .. import renorm as renorms
from ..errors import must
from . import _graph, _scopes, _warnings
from ._graph import (
    Constraint,
    GraphKeys,
    Initializer,
    RegularizationLoss,
    Regularizer,
    Reuse,
    Update,
    Variable,
    VariableScope,
    add_to_collection,
    get_collection,
    get_layer,
    reset_default_graph,
)
from ._layer_variables import LayerVariables
from ._normalization import backward, checked_options, normalize
from ._saver import Saver
from ._scopes import AUTO_REUSE, get_variable_scope, variable_scope
from ._variables import (
    apply_constraints,
    constant_initializer,
    get_variable,
    global_variables,
    load_variables,
    ones_initializer,
    trainable_variables,
    zeros_initializer,
)

__all__ = [
    "batch_normalization",
    "BatchNormalization",
    "get_layer",
    "variable_scope",
    "get_variable_scope",
    "VariableScope",
    "AUTO_REUSE",
    "get_variable",
    "Variable",
    "global_variables",
    "trainable_variables",
    "load_variables",
    "Saver",
    "GraphKeys",
    "get_collection",
    "add_to_collection",
    "Update",
    "RegularizationLoss",
    "apply_constraints",
    "set_renorm_scheme",
    "zeros_initializer",
    "ones_initializer",
    "constant_initializer",
    "reset_default_graph",
]

Array = NDArray[Any]
Adjustment = Callable[[tuple[int, ...]], tuple[ArrayLike, ArrayLike]]


class BatchNormalization(LayerVariables):
    """The layer ``tf.layers.BatchNormalization`` of TensorFlow 1.

    Parameters
    ----------
    axis : int or list of ints, default: -1
        The channel axis. With several, parameters have the rank of the inputs, and extent 1 on the other axes.
    momentum : float, default: 0.99
        Share of the OLD moving value that is kept.
    epsilon : float, default: 1e-3
        Added to the variance; at least 1.001e-5 on the fused path.
    center, scale : bool, default: True
        Whether there is a beta, a gamma.
    beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer : str, array or callable
        First values: "zeros", "ones", an array, or a function of (shape, dtype), which may come from a class that
        was not called.
    beta_regularizer, gamma_regularizer : callable, optional
        Penalties, which go into the collection "regularization_losses", unless they are None.
    beta_constraint, gamma_constraint : callable, optional
        Projections, which `apply_constraints` carries out.
    renorm : bool, default: False
        Batch renormalization.
    renorm_clipping : dict, optional
        Bounds "rmin", "rmax" and "dmax" of its correction.
    renorm_momentum : float, default: 0.99
        Momentum of its own statistics.
    fused : bool, optional
        None and True: inputs of rank 4 with channel axis 1 or 3 take the path that TensorFlow 1 called fused, unless
        renorm, virtual_batch_size or adjustment is in the way. On it the variance that goes into `moving_variance` is
        divided by m - 1, and epsilon is at least 1.001e-5. False: never.
    trainable : bool, default: True
        False: gamma and beta are not among `trainable_variables`, and training normalizes with the batch but leaves
        the moving statistics alone (in Keras it would infer).
    virtual_batch_size : int, optional
        Normalizes with the statistics of ghost batches of so many samples; parameters have a rank one higher.
    adjustment : callable, optional
        Takes the shape of the inputs and returns (scale, bias), which training applies before gamma and beta.
    name : str, optional
        Scope of the variables; numbered where it repeats.
    dtype : {"float32", "float64"}, optional
        Of the variables; by default float64 if the first inputs are, else float32.
    _scope : str or VariableScope, optional
        Scope of the variables, as it is, without a number.
    _reuse : {None, True, False, "auto"}
        Whether the variables have to exist, must not exist, or either.

    Attributes
    ----------
    grads : dict
        "gamma" and "beta" after `backward`, as far as the layer has them.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.compat import tf_layers as tf
    >>> tf.reset_default_graph()
    >>> layer = tf.BatchNormalization(momentum=0.5)
    >>> y = layer(np.array([[1.0], [3.0]]), training=True)
    >>> [variable.name for variable in layer.variables]  # doctest: +NORMALIZE_WHITESPACE
    ['batch_normalization/gamma:0', 'batch_normalization/beta:0',
     'batch_normalization/moving_mean:0', 'batch_normalization/moving_variance:0']
    >>> for update in tf.get_collection("update_ops"):
    ...     _ = update()
    >>> layer.moving_mean.value
    array([1.])
    """

    _update_suffix = ""

    def __init__(
        self,
        axis: int | Sequence[int] = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Initializer = "zeros",
        gamma_initializer: Initializer = "ones",
        moving_mean_initializer: Initializer = "zeros",
        moving_variance_initializer: Initializer = "ones",
        beta_regularizer: Regularizer | None = None,
        gamma_regularizer: Regularizer | None = None,
        beta_constraint: Constraint | None = None,
        gamma_constraint: Constraint | None = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, float] | None = None,
        renorm_momentum: float = 0.99,
        fused: bool | None = None,
        trainable: bool = True,
        virtual_batch_size: int | None = None,
        adjustment: Adjustment | None = None,
        name: str | None = None,
        *,
        dtype: DTypeLike | None = None,
        _scope: str | VariableScope | None = None,
        _reuse: Reuse = None,
    ) -> None:
        self.axis = layouts.checked_axis(axis, None)
        self.momentum = checks.momentum(momentum)
        self.epsilon = checks.epsilon(epsilon)
        self.center = checks.flag(center, "center")
        self.scale = checks.flag(scale, "scale")
        self.beta_initializer = beta_initializer
        self.gamma_initializer = gamma_initializer
        self.moving_mean_initializer = moving_mean_initializer
        self.moving_variance_initializer = moving_variance_initializer
        self.beta_regularizer = beta_regularizer
        self.gamma_regularizer = gamma_regularizer
        self.beta_constraint = beta_constraint
        self.gamma_constraint = gamma_constraint
        self.renorm = checks.flag(renorm, "renorm")
        self.renorm_scheme = _graph.graph().renorm_scheme
        self._options = checked_options(
            renorm=self.renorm,
            renorm_clipping=renorm_clipping if self.renorm else None,
            renorm_momentum=renorm_momentum,
            renorm_scheme=self.renorm_scheme,
            virtual_batch_size=virtual_batch_size,
            adjustment=adjustment,
        )
        self.renorm_clipping = self._options.renorm_clipping
        self.renorm_momentum = self._options.renorm_momentum
        self.fused = True if fused is None else checks.flag(fused, "fused")
        self.trainable = checks.flag(trainable, "trainable")
        self.virtual_batch_size = self._options.virtual_batch_size
        self.adjustment = adjustment
        if adjustment is not None and self.virtual_batch_size is not None:
            raise ValueError(must("adjustment", "be None with virtual_batch_size", repr(adjustment)))
        self._reuse = _scopes.checked_reuse(_reuse)
        self._activation = None
        self._function: Callable[[Array], Any] | None = None  # applied to the result; nobody knows its gradient
        self._collections = lambda name: None
        self._dtype = None if dtype is None else np.dtype(dtype)
        self.grads: dict[str, Array] = {}
        unnamed = name is None or name == ""
        self._base_name = "batch_normalization" if unnamed else _scopes.checked_name(name)
        self.name = _graph.graph().number(self._base_name) if unnamed else self._base_name
        self._scope = None
        if _scope is not None and _scope != "":
            with variable_scope(_scope) as scope:
                self._scope = scope
        self._variables = {}
        self._settings = None
        self._graph = None
        self._ndim = 0
        self._updates: dict[Update, None] = {}
        self._losses = []
        self._last = threading.local()

    @property
    def updates(self) -> list[Update]:
        """Updates of the moving statistics that this layer's training calls deferred, and that still wait."""
        return list(self._updates) if self.trainable else []

    # -- calling -------------------------------------------------------------------------------------------------

    def mode(self, training: bool = False) -> modes.Mode:
        """Return the mode of a call.

        Parameters
        ----------
        training : bool, default: False
            As in a call.

        Returns
        -------
        {"train", "batch", "inference"}
            A layer that is not trainable trains in mode "batch": with the statistics of the batch, without updates.
        """
        return modes.TF_LAYERS[checks.flag(training, "training"), self.trainable]

    def __call__(self, inputs: ArrayLike, training: bool = False) -> Array:
        """Normalize a batch.

        Parameters
        ----------
        inputs : array_like of float16, bfloat16, float32, float64, uint8 or int8
            The batch.
        training : bool, default: False
            Whether to normalize with the statistics of the batch. The updates of the moving statistics go into the
            collection "update_ops", and change nothing before they are called.

        Returns
        -------
        ndarray
            Of the shape of inputs.

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
        """
        return self._call(inputs, self.mode(training), GraphKeys.UPDATE_OPS)

    apply = __call__

    def _call(self, inputs: ArrayLike, mode: modes.Mode, collections: Any, sample_weight: Array | None = None) -> Array:
        """Call in a given mode; updates go into collections, or are carried out where that is None."""
        x = checks.data(inputs, "inputs")
        home = _graph.graph()
        built = self.built
        if built and self._graph is not home:
            raise ValueError(must("the layer", "be called before reset_default_graph", "a call after it"))
        try:
            with home.attempt():
                if self._settings is None:
                    self._build(x.shape, checks.parameter_dtype(x.dtype))
                elif x.ndim != self._ndim:
                    raise ValueError(must("inputs", f"have {self._ndim} dimensions, as the first ones", x.ndim))
                assert self._settings is not None
                y, cache, actions = normalize(x, self._settings, self._variables, mode, sample_weight)
                if self._function is not None:
                    y = np.asarray(self._function(y))
                if mode == "inference":
                    _warnings.at_inference(self._variables["moving_mean"], self._variables["moving_variance"])
        except BaseException:
            if not built:
                self._settings, self._variables, self._losses = None, {}, []
            raise
        self._defer(actions, collections)
        self._last.cache = cache
        home.layers[self.scope_name] = home.local.layers[self.scope_name] = self
        return y

    def _defer(self, actions: list[tuple[Variable, Callable[[], None]]], collections: Any) -> None:
        for number, (variable, action) in enumerate(actions):
            name = f"AssignMovingAvg{'_1' if number else ''}{self._update_suffix}"
            update = Update(_scopes.full_name(self.scope_name, name), variable, action)
            with variable._lock:
                variable._pending.append(update)
            if collections is None:
                update()
            else:
                update._waiting = self._updates
                self._updates[update] = None
                _graph.graph().add(collections, update)

    def backward(self, dy: ArrayLike) -> Array:
        """Return the gradient of this thread's last call, and set `grads`.

        Parameters
        ----------
        dy : array_like of the result's shape and dtype
            Gradient with respect to the result.

        Returns
        -------
        ndarray
            Gradient with respect to the inputs.

        Raises
        ------
        ValueError
            If there was no call before in this thread.
        """
        cache = getattr(self._last, "cache", None)
        if cache is None:
            raise ValueError("backward must follow a call of the layer in the same thread, got none")
        if self._function is not None:
            raise ValueError(must("activation_fn", "be a name of fastbn's for a gradient", "another function"))
        dx, *grads = backward(dy, cache)
        self.grads = {
            name: gradient.reshape(self._variables[name].shape)
            for name, gradient in zip(("gamma", "beta"), grads)
            if name in self._variables
        }
        return dx

    def __repr__(self) -> str:
        """Show the name and the shape of the parameters."""
        mean = self.moving_mean
        return f"<fastbn tf_layers.BatchNormalization {self.name!r}, {mean.shape if mean else 'not built'}>"


def set_renorm_scheme(scheme: str) -> None:
    """Choose the averages that new layers with ``renorm=True`` keep, until `reset_default_graph`.

    Parameters
    ----------
    scheme : {"tf1", "keras"}
        "tf1", the default, is that of TensorFlow 1.2 to 1.13: renorm_mean, renorm_mean_weight, renorm_stddev and
        renorm_stddev_weight, which are debiased by their weights. "keras" is that of TensorFlow 1.14, 1.15 and
        ``tf.compat.v1``: moving_stddev, renorm_mean and renorm_stddev.

    Raises
    ------
    ValueError
        If it is neither.
    """
    _graph.graph().renorm_scheme = checks.one_of(scheme, "scheme", renorms.SCHEMES)


def batch_normalization(
    inputs: ArrayLike,
    axis: int | Sequence[int] = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-3,
    center: bool = True,
    scale: bool = True,
    beta_initializer: Initializer = "zeros",
    gamma_initializer: Initializer = "ones",
    moving_mean_initializer: Initializer = "zeros",
    moving_variance_initializer: Initializer = "ones",
    beta_regularizer: Regularizer | None = None,
    gamma_regularizer: Regularizer | None = None,
    beta_constraint: Constraint | None = None,
    gamma_constraint: Constraint | None = None,
    training: bool = False,
    trainable: bool = True,
    name: str | None = None,
    reuse: Reuse = None,
    renorm: bool = False,
    renorm_clipping: Mapping[str, float] | None = None,
    renorm_momentum: float = 0.99,
    fused: bool | None = None,
    virtual_batch_size: int | None = None,
    adjustment: Adjustment | None = None,
) -> Array:
    """Normalize a batch, with variables that are kept by name: ``tf.layers.batch_normalization`` of TensorFlow 1.

    Parameters
    ----------
    inputs : array_like of float16, bfloat16, float32, float64, uint8 or int8
        The batch.
    axis, momentum, epsilon, center, scale
        As in `BatchNormalization`.
    beta_initializer, gamma_initializer, moving_mean_initializer, moving_variance_initializer
        As in `BatchNormalization`.
    beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint
        As in `BatchNormalization`.
    training : bool, default: False
        Whether to normalize with the statistics of the batch. The updates of the moving statistics go into the
        collection "update_ops", and change nothing before they are called.
    trainable : bool, default: True
        As in `BatchNormalization`.
    name : str, optional
        Scope of the variables. By default "batch_normalization", numbered where that repeats in a scope.
    reuse : {None, True, False, "auto"}
        Whether variables of this name have to exist (True), or are found or made ("auto"). By default as the scope
        around says; outside of all scopes they must be new.
    renorm, renorm_clipping, renorm_momentum, fused, virtual_batch_size, adjustment
        As in `BatchNormalization`.

    Returns
    -------
    ndarray
        Of the shape of inputs. `get_layer` has the gradient.

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

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.compat import tf_layers as tf
    >>> tf.reset_default_graph()
    >>> for x in (np.array([[1.0], [3.0]]), np.array([[5.0], [7.0]])):
    ...     y = tf.batch_normalization(x, training=True, momentum=0.5, name="bn", reuse=tf.AUTO_REUSE)
    ...     for update in tf.get_collection(tf.GraphKeys.UPDATE_OPS):
    ...         _ = update()
    >>> for variable in tf.global_variables("bn/moving"):
    ...     print(variable.name, variable.value)
    bn/moving_mean:0 [3.5]
    bn/moving_variance:0 [1.]
    """
    with _graph.graph().attempt():
        layer = BatchNormalization(
            axis=axis,
            momentum=momentum,
            epsilon=epsilon,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            renorm=renorm,
            renorm_clipping=renorm_clipping,
            renorm_momentum=renorm_momentum,
            fused=fused,
            trainable=trainable,
            virtual_batch_size=virtual_batch_size,
            adjustment=adjustment,
            name=name,
            _scope=name,
            _reuse=reuse,
        )
        return layer(inputs, training)
