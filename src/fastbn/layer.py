"""The layer: parameters, moving statistics, modes, and their life."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import activation as activations
from . import checks, functional, modes, passes, state
from . import layout as layouts
from .errors import StateError, UntrainedWarning, must
from .kernels import _calls

Array = NDArray[Any]


class _Arrays(NamedTuple):
    gamma: Array | None
    beta: Array | None
    moving_mean: Array
    moving_variance: Array


# In a forked child another thread's lock would stay locked for ever.
_alive: weakref.WeakSet[BatchNorm] = weakref.WeakSet()


def _unlock_after_fork() -> None:
    for layer in _alive:
        layer._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_after_fork)


class BatchNorm:
    """Batch normalization with parameters and moving statistics.

    Follows Keras: a layer with ``trainable=False`` infers, whatever ``training`` says.

    =============  ====================  =========================  =====================================
    mode           normalizes with       writes moving statistics   when
    =============  ====================  =========================  =====================================
    ``train``      this batch            yes                        ``training=True``, ``trainable=True``
    ``inference``  moving statistics     no                         otherwise
    =============  ====================  =========================  =====================================

    Parameters
    ----------
    num_features : int or tuple of ints, optional
        Number of channels (the shape of the parameters, with several channel axes); by default that of the first
        batch.
    axis : int or tuple of ints, default: -1
        The channel axis.
    layout : str, optional
        Names the channel axis instead, as in `batch_norm`.
    momentum : float, default: 0.99
        Share of the OLD moving value that is kept. PyTorch's momentum is the other share.
    epsilon : float, default: 1e-3
        Added to the variance.
    center, scale : bool, default: True
        Whether there is a beta, a gamma.
    ddof : {0, 1}, default: 0
        The variance that goes into ``moving_variance`` is divided by m - ddof.
    activation : str or tuple, optional
        Applied to the result in the same pass, as in `batch_norm`.
    dtype : {"float32", "float64"}, optional
        Of parameters and statistics. By default float32, or float64 if the layer is built by a float64 batch.
    trainable : bool, default: True
        False freezes the layer.
    name : str, optional
        For the user.

    Attributes
    ----------
    grads : dict
        "gamma" and "beta" after `backward`, as far as the layer has them, and "residual" if the call had one.
    batches : int
        Batches that reached the moving statistics.

    Notes
    -----
    Threads may share a layer: no update is lost, and each thread has the gradient of its own last call. To that end
    the layer refers to the last batch of each thread until its next call.

    Examples
    --------
    >>> import numpy as np
    >>> import fastbn
    >>> bn = fastbn.BatchNorm(momentum=0.5, epsilon=0.0)
    >>> bn(np.array([[1.0], [3.0]]), training=True)
    array([[-1.],
           [ 1.]])
    >>> bn.moving_mean, bn.moving_variance
    (array([1.]), array([1.]))
    """

    def __init__(
        self,
        num_features: int | tuple[int, ...] | None = None,
        *,
        axis: int | tuple[int, ...] = -1,
        layout: str | None = None,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        ddof: int = 0,
        activation: str | tuple[str, float] | None = None,
        dtype: DTypeLike | None = None,
        trainable: bool = True,
        name: str | None = None,
    ) -> None:
        self.axis = layouts.checked_axis(axis, layout)
        self.layout = layout
        self.momentum = checks.momentum(momentum)
        self.epsilon = checks.epsilon(epsilon)
        self.center = checks.flag(center, "center")
        self.scale = checks.flag(scale, "scale")
        self.ddof = checks.ddof(ddof)
        self.activation = activations.named(activation)
        self.dtype = None if dtype is None else _parameter_dtype(dtype)
        self._trainable = checks.flag(trainable, "trainable")
        if name is not None and not isinstance(name, str):
            raise TypeError(must("name", "be a string or None", repr(name)))
        self.name = name
        self.grads: dict[str, Array] = {}
        self.batches = 0
        self._arrays: _Arrays | None = None
        self._may_warn = True
        self._lock = threading.Lock()
        _alive.add(self)
        self._last = threading.local()  # the cache of each thread's last call
        if num_features is not None:
            self.build(num_features)

    @property
    def trainable(self) -> bool:
        """Whether the layer learns; False freezes it."""
        return self._trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._trainable = checks.flag(value, "trainable")

    # -- building ----------------------------------------------------------------------------------------------------

    @property
    def built(self) -> bool:
        """Whether the arrays exist."""
        return self._arrays is not None

    def build(self, num_features: int | tuple[int, ...], dtype: DTypeLike | None = None) -> None:
        """Create parameters and statistics; the first call does that by itself.

        Parameters
        ----------
        num_features : int or tuple of ints
            Number of channels, or the shape of the parameters.
        dtype : {"float32", "float64"}, optional
            For a layer that has none of its own.

        Raises
        ------
        ValueError
            If the layer is built already.
        """
        shape = _feature_shape(num_features)
        arrays = self._created(shape, np.dtype(np.float32) if dtype is None else _parameter_dtype(dtype))
        with self._lock:
            if self._arrays is not None:
                raise ValueError(must("num_features", "not be given to a layer that is built", num_features))
            self._arrays = arrays

    def _created(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Arrays:
        dtype = self.dtype or dtype
        return _Arrays(
            np.ones(shape, dtype) if self.scale else None,
            np.zeros(shape, dtype) if self.center else None,
            np.zeros(shape, dtype),
            np.ones(shape, dtype),
        )

    def _existing(self) -> _Arrays:
        if self._arrays is None:
            raise ValueError("the layer must be built by a call or by build(num_features), got one that is not")
        return self._arrays

    @property
    def gamma(self) -> Array | None:
        """Scale, initially 1. Assigning writes into the array."""
        return None if self._arrays is None else self._arrays.gamma

    @gamma.setter
    def gamma(self, value: ArrayLike) -> None:
        self._assign("gamma", value)

    @property
    def beta(self) -> Array | None:
        """Shift, initially 0. Assigning writes into the array."""
        return None if self._arrays is None else self._arrays.beta

    @beta.setter
    def beta(self, value: ArrayLike) -> None:
        self._assign("beta", value)

    @property
    def moving_mean(self) -> Array:
        """Moving mean, initially 0. Assigning writes into the array."""
        return self._existing().moving_mean

    @moving_mean.setter
    def moving_mean(self, value: ArrayLike) -> None:
        self._assign("moving_mean", value)

    @property
    def moving_variance(self) -> Array:
        """Moving variance, initially 1. Assigning writes into the array."""
        return self._existing().moving_variance

    @moving_variance.setter
    def moving_variance(self, value: ArrayLike) -> None:
        self._assign("moving_variance", value)

    def _assign(self, name: str, value: ArrayLike) -> None:
        target = getattr(self._existing(), name)
        if target is None:
            raise ValueError(must(name, "not be set in a layer built without it", "an array"))
        if value is not target:  # `layer.gamma -= step` has written already
            source = checks.required(value, name, target.shape)
            with self._lock:
                target[...] = source.reshape(target.shape)

    @property
    def variables(self) -> list[Array]:
        """gamma, beta, moving_mean and moving_variance, in this order, as far as the layer has them."""
        return [v for v in self._arrays or () if v is not None]

    # -- calling -----------------------------------------------------------------------------------------------------

    def mode(self, training: bool | None = None) -> modes.Mode:
        """Return the mode of a call.

        Parameters
        ----------
        training : bool, optional
            None means False.

        Returns
        -------
        {"train", "inference"}
            The core layer follows Keras, which never is in mode "batch".
        """
        return modes.KERAS[training is not None and checks.flag(training, "training"), self.trainable]

    def __call__(
        self,
        x: ArrayLike,
        training: bool | None = None,
        *,
        residual: ArrayLike | None = None,
        out: Array | None = None,
    ) -> Array:
        """Normalize a batch.

        Parameters
        ----------
        x : array_like of float16, bfloat16, float32, float64, uint8 or int8
            The batch.
        training : bool, optional
            Whether to normalize with, and learn from, the statistics of this batch. None means False.
        residual : array_like of x's shape and dtype, optional
            Added before the activation.
        out : array, optional
            Where to write the result. If that is x itself there is no gradient of this call, nor if it is a residual
            that the gradient of the activation needs, as in `batch_norm_forward`.

        Returns
        -------
        ndarray
            y, of x's shape, dtype and order of axes in memory, but float32 for uint8 and int8.

        Raises
        ------
        TypeError, ValueError
            As in `batch_norm`; nothing has changed then.

        Warns
        -----
        UntrainedWarning
            If inference uses statistics that no batch ever reached.
        """
        arrays = self._arrays
        plain = self.activation is None and residual is None
        if plain and arrays is not None and type(x) is np.ndarray and x.size <= passes.SERIAL:
            y = self._call_small(x, training, arrays, out)
            if y is not None:
                return y
        mode = self.mode(training)
        data = checks.data(x, "x")
        if arrays is None:
            axes = layouts.channel_axes(self.axis, self.layout, data.ndim)
            arrays = self._created(layouts.channel_shape(data.shape, axes), checks.parameter_dtype(data.dtype))
        with self._lock:  # a mean and a variance of the same moment
            mean, variance = arrays.moving_mean.copy(), arrays.moving_variance.copy()
        y, cache = passes.forward(
            data,
            gamma=arrays.gamma,
            beta=arrays.beta,
            moving_mean=mean,
            moving_variance=variance,
            training=mode == "train",
            momentum=self.momentum,
            epsilon=self.epsilon,
            axis=self.axis,
            layout=self.layout,
            ddof=self.ddof,
            update=False,
            activation=self.activation,
            residual=residual,
            out=out,
            keep="unless in place",
        )
        assert cache is not None
        if mode == "inference":
            self._warn_if_untrained(mean, variance)
        with self._lock:
            if self._arrays is None:
                self._arrays = arrays
            if mode == "train" and data.size:
                kept = self._arrays
                count = layouts.values_per_channel(data.shape, cache.axes)
                passes.store_moving(
                    kept.moving_mean, kept.moving_variance, cache.statistics, count, self.momentum, self.ddof
                )
                self.batches += 1
        self._last.cache = cache
        return y

    def _call_small(self, x: Array, training: Any, arrays: _Arrays, out: Any) -> Array | None:
        """Call, where everything plainly fits; otherwise return None, and nothing has happened.

        A small batch holds the lock all the time: two more copies of the statistics would cost more than that.
        """
        train = training is True and self._trainable
        if not (training is None or type(training) is bool) or (not train and self._may_warn and not self.batches):
            return None
        gamma, beta, mean, variance = arrays
        axis = layouts.plain_axis(self.axis, self.layout, x)
        with self._lock:
            if self._arrays is not arrays:
                return None
            result = _calls.forward(
                x, gamma, beta, mean, variance, train, self.momentum, self.epsilon, axis, self.ddof, True, out,
                True, True, passes.team, passes.SERIAL,
            )  # fmt: skip
            if result is None:
                return None
            self.batches += train
        y: Array
        y, self._last.cache = result
        return y

    def backward(self, dy: ArrayLike, *, out: Array | None = None) -> Array:
        """Return the gradient of this thread's last call, and set `grads`.

        Parameters
        ----------
        dy : array_like of y's shape and dtype
            Gradient with respect to y.
        out : array, optional
            Where to write the result; may be dy itself.

        Returns
        -------
        ndarray
            dx. A frozen layer, or one that inferred, gives ``gamma / sqrt(moving_variance + epsilon) * dy``.

        Raises
        ------
        ValueError
            If there was no call before, or it overwrote what its gradient needs.
        """
        cache = getattr(self._last, "cache", None)
        if cache is None:
            raise ValueError("backward must follow a call of the layer in the same thread, got none")
        if type(cache) is tuple:  # of a small call, which does not wait for it to be built
            cache = passes.Cache(*cache)
        dx, dgamma, dbeta, *others = functional.batch_norm_backward(dy, cache, out=out)
        grads = {"gamma": dgamma if self.scale else None, "beta": dbeta if self.center else None}
        self.grads = {name: g for name, g in grads.items() if g is not None}
        if others:
            self.grads["residual"] = others[0]
        return dx

    def _warn_if_untrained(self, mean: Array, variance: Array) -> None:
        if self._may_warn and not self.batches and not mean.any() and (variance == 1).all() and mean.size:
            self._may_warn = False
            warnings.warn(
                f"{self!r} normalizes with moving statistics that no batch has reached: mean 0, variance 1. "
                "Call it with training=True first, or load a state.",
                UntrainedWarning,
                stacklevel=3,
            )

    # -- state -------------------------------------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make a layer like this one, without its arrays; all values fit JSON."""
        return {
            "axis": self.axis,
            "layout": self.layout,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            "ddof": self.ddof,
            "activation": self.activation,
            "dtype": None if self.dtype is None else self.dtype.name,
            "trainable": self.trainable,
            "name": self.name,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the arrays by name, and the number of batches as "batches"; empty before building."""
        with self._lock:
            if self._arrays is None:
                return {}
            arrays = {n: v.copy() for n, v in zip(_Arrays._fields, self._arrays) if v is not None}
            return arrays | {"batches": self.batches}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, all of it or nothing.

        Parameters
        ----------
        state_dict : mapping
            As `state_dict` returns it; "batches" may be missing. A layer that is not built is built by it.

        Raises
        ------
        TypeError
            If a value has no fitting dtype.
        ValueError
            If a name is missing or unknown, a shape differs, or a variance is negative.
        """
        needed = {n for n, has in zip(_Arrays._fields, (self.scale, self.center, True, True)) if has}
        if not state_dict and not self.built:
            return
        if set(state_dict) - {"batches"} != needed:
            names = ", ".join(sorted(map(str, state_dict))) or "none"
            raise ValueError(must("state_dict", "have the names " + ", ".join(sorted(needed)), names))
        batches = checks.count(state_dict.get("batches", 0), "batches")
        first = checks.as_array(state_dict["moving_mean"], "moving_mean")
        target = self._arrays or self._created(
            _feature_shape(first.shape), _parameter_dtype(first.dtype, "moving_mean")
        )
        new = {}
        for name in needed:
            shape = getattr(target, name).shape
            new[name] = checks.required(state_dict[name], name, shape).reshape(shape)
        if (new["moving_variance"] < 0).any():
            raise ValueError(must("moving_variance", "not be negative", new["moving_variance"].min()))
        with self._lock:
            for name, value in new.items():
                getattr(target, name)[...] = value
            self._arrays = target
            self.batches = batches
            self._may_warn = False

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write arguments and arrays to an .npz file, atomically: it is whole, or as it was before.

        Parameters
        ----------
        path : path
            The file; no extension is added.

        Raises
        ------
        ValueError
            If the layer is not built.
        OSError
            If the file cannot be written.
        """
        self._existing()
        arrays = self.state_dict()
        batches = arrays.pop("batches")
        state.write_state(path, "batch_norm", {"config": self.get_config(), "batches": batches}, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return the layer that `save` wrote.

        Parameters
        ----------
        path : path
            The file. It is read with suspicion: nothing in it is executed.

        Returns
        -------
        BatchNorm
            A new layer.

        Raises
        ------
        StateError
            If the file is damaged, foreign, or makes no sense.
        OSError
            If it cannot be read.
        """
        fields, arrays = state.read_state(path, "batch_norm", fields=("config", "batches"))
        config = fields["config"]
        try:
            # Files of version 0.1.0 have no activation.
            if not isinstance(config, dict) or {"activation", *config} != set(_DEFAULTS):
                raise ValueError("config must have exactly the arguments of a layer, got others")
            for field in ("axis", "activation"):
                if isinstance(config.get(field), list):
                    config[field] = tuple(config[field])
            layer = cls(**config)
            layer.load_state_dict(arrays | {"batches": fields["batches"]})
        except (TypeError, ValueError, OverflowError) as error:
            raise StateError(f"{os.fspath(path)}: {error}") from error
        state.check_statistics(path, layer.moving_mean.reshape(-1), layer.moving_variance.reshape(-1))
        return layer

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy holds: arguments and arrays, not the last batch."""
        return {"config": self.get_config(), "state": self.state_dict(), "may_warn": self._may_warn}

    def __setstate__(self, content: dict[str, Any]) -> None:
        """Restore from a pickle, checked like any other state."""
        self.__init__(**content["config"])  # type: ignore[misc]
        self.load_state_dict(content["state"])
        self._may_warn = content["may_warn"]

    def __repr__(self) -> str:
        """Show the number of channels and every argument that is not the default."""
        shown = [] if self._arrays is None else [repr(_features(self._arrays.moving_mean.shape))]
        shown += [f"{k}={v!r}" for k, v in self.get_config().items() if v != _DEFAULTS[k]]
        return f"BatchNorm({', '.join(shown)})"


_DEFAULTS = BatchNorm().get_config()


def _features(shape: tuple[int, ...]) -> int | tuple[int, ...]:
    return shape[0] if len(shape) == 1 else shape


def _feature_shape(num_features: Any) -> tuple[int, ...]:
    sizes = num_features if isinstance(num_features, tuple) else (num_features,)
    if not sizes:
        raise ValueError(must("num_features", "have at least one axis", "()"))
    return tuple(checks.count(n, "num_features") for n in sizes)


def _parameter_dtype(dtype: Any, name: str = "dtype") -> np.dtype[Any]:
    given: np.dtype[Any] = np.dtype(dtype)
    if given not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(must(name, "be float32 or float64", given))
    return given
