"""What of a layer outlives it: configuration, state, files, pickles."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import numpy as np

from . import checks, state
from .errors import StateError, must
from .kernels import _channels
from .parameters import NOT_NEGATIVE, PLAIN_ARRAYS, Parameters, feature_shape, features, parameter_dtype

_BY_NAME = (
    "beta_initializer",
    "gamma_initializer",
    "moving_mean_initializer",
    "moving_variance_initializer",
    "beta_regularizer",
    "gamma_regularizer",
    "beta_constraint",
    "gamma_constraint",
)
# The arguments that layers had in version 0.1.0.
_FIRST = {"axis", "layout", "momentum", "epsilon", "center", "scale", "ddof", "dtype", "trainable", "name"}


class Persistent(Parameters):
    """The part of `BatchNorm` that can be written down, and comes back."""

    ddof: int
    activation: str | tuple[str, float] | None
    nan_policy: Literal["propagate", "omit", "raise"]
    name: str | None
    batches: int
    _may_warn: bool
    _defaults: ClassVar[dict[str, Any]]  # the arguments that an unwritten one has

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make a layer like this one, without its arrays.

        Returns
        -------
        dict
            All values fit JSON, but for functions that were given as arguments.
        """
        return {
            "axis": self.axis,
            "layout": self.layout,
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "center": self.center,
            "scale": self.scale,
            "ddof": self.ddof,
            **{n: dict(v) if isinstance(v, dict) else v for n, v in self._options._asdict().items()},
            **{name: getattr(self, name) for name in _BY_NAME},
            "activation": self.activation,
            "nan_policy": self.nan_policy,
            "dtype": None if self.dtype is None else self.dtype.name,
            "trainable": self.trainable,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return a layer that is not built, with arguments that `get_config` gave.

        Parameters
        ----------
        config : mapping
            The arguments; what is missing has its default. A list, as JSON makes of a tuple, is one.

        Returns
        -------
        BatchNorm
            A new layer.

        Raises
        ------
        TypeError, ValueError
            If an argument is unknown or does not fit.

        Examples
        --------
        >>> import fastbn
        >>> fastbn.BatchNorm.from_config(fastbn.BatchNorm(3, momentum=0.5).get_config())
        BatchNorm(momentum=0.5)
        """
        checks.mapping(config, "config")
        unknown = set(config) - set(cls._defaults)
        if unknown:
            raise TypeError(must("config", "hold arguments of a layer", ", ".join(sorted(map(str, unknown)))))
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in config.items()})

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the arrays by name, and the number of batches as "batches"; empty before building."""
        with self._lock:
            if self._arrays is None:
                return {}
            arrays = {n: v.copy() for n, v in self._named(self._arrays).items()}
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
        checks.mapping(state_dict, "state_dict")
        needed = {n for n, has in zip(PLAIN_ARRAYS, self._has) if has}
        if self._renorm is not None:
            needed |= set(self._renorm.names)
        if not state_dict and not self.built:
            return
        if set(state_dict) - {"batches"} != needed:
            names = ", ".join(sorted(map(str, state_dict))) or "none"
            raise ValueError(must("state_dict", "have the names " + ", ".join(sorted(needed)), names))
        batches = checks.count(state_dict.get("batches", 0), "batches")
        target = self._arrays
        if target is None:
            named = next((n for n in ("moving_mean", "gamma", "beta") if n in needed), None)
            if named is None:  # neither parameters nor statistics: there is nothing to build
                return
            first = checks.as_array(state_dict[named], named)
            target = self._created(feature_shape(first.shape), self.dtype or parameter_dtype(first.dtype, named))
        arrays = self._named(target)
        new = {}
        for name in sorted(needed):  # the same message in every process
            checks.writable(arrays[name], name)
            shape = arrays[name].shape
            value = checks.required(state_dict[name], name, shape).reshape(shape)
            if name in NOT_NEGATIVE:
                checks.not_negative(value, name)
            with np.errstate(over="ignore"):
                new[name] = value.astype(arrays[name].dtype)
        with self._lock:
            _channels.put([(arrays[name], value) for name, value in new.items()], [(self, batches)])
            self._arrays = target
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
            If the layer is not built, its statistics are not finite, or a variance is negative.
        TypeError
            If one of its arguments is a function, which no file can hold.
        OSError
            If the file cannot be written.
        """
        self._existing()
        for name, value in self.get_config().items():
            if callable(value):
                raise TypeError(must(name, "not be a function in a layer that is saved", repr(value)))
        arrays = self.state_dict()
        fields = {"config": self.get_config(), "batches": arrays.pop("batches")} | self._untold()
        for name in sorted(set(arrays) - {"gamma", "beta"}):
            if not np.isfinite(arrays[name]).all():  # `load` would refuse it
                raise ValueError(must(name, "be finite in a layer that is saved", "NaN or infinity"))
            if name in NOT_NEGATIVE:
                checks.not_negative(arrays[name], name, " in a layer that is saved")
        state.write_state(path, "batch_norm", fields, arrays)

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
        fields, arrays = state.read_state(
            path, "batch_norm", fields=("config", "batches"), optional_fields=("num_features",)
        )
        config = fields["config"]
        try:
            # Older files have fewer arguments; those of version 0.1.0 are in every one.
            if not isinstance(config, dict) or not _FIRST <= set(config) <= set(cls._defaults):
                raise ValueError("config must have exactly the arguments of a layer, got others")
            layer = cls.from_config(config)
            layer._build_untold(fields)
            layer.load_state_dict(arrays | {"batches": fields["batches"]})
        except (TypeError, ValueError, OverflowError) as error:
            raise StateError(f"{os.fspath(path)}: {error}") from error
        if layer.track:
            statistics = (layer.moving_mean.reshape(-1), layer.moving_variance.reshape(-1))
            state.check_statistics(path, *statistics, names=("moving_mean", "moving_variance"))
        for name, array in layer.renorm_state.items():
            if not np.isfinite(array).all():
                raise StateError(f"{os.fspath(path)}: {name} must be finite")
        return layer

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy holds: arguments and arrays, not the last batch."""
        return {"config": self.get_config(), "state": self.state_dict(), "may_warn": self._may_warn} | self._untold()

    def __setstate__(self, content: dict[str, Any]) -> None:
        """Restore from a pickle, checked like any other state."""
        self.__init__(**content["config"])  # type: ignore[misc]
        self._build_untold(content)
        self.load_state_dict(content["state"])
        self._may_warn = content["may_warn"]

    def _untold(self) -> dict[str, list[int]]:
        """Return the shape of a layer that has no array to tell it."""
        arrays = self._arrays
        return {} if arrays is None or self._named(arrays) else {"num_features": list(arrays.shape)}

    def _build_untold(self, content: Mapping[str, Any]) -> None:
        if "num_features" in content:
            if any(self._has):
                raise ValueError(must("num_features", "be told by arrays where there are any", "a number besides"))
            self.build(tuple(content["num_features"]))

    def __repr__(self) -> str:
        """Show the number of channels and every argument that is not the default."""
        shown = [] if self._arrays is None else [repr(features(self._arrays.shape))]
        shown += [f"{k}={v!r}" for k, v in self.get_config().items() if v != self._defaults[k]]
        return f"BatchNorm({', '.join(shown)})"
