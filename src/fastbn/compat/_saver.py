"""Files of variables by name."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import state
from ..errors import StateError, must
from ._graph import Variable
from ._variables import global_variables, load_variables

Array = NDArray[Any]


class Saver:
    """Writes variables to a file and reads them back, as ``tf.train.Saver``.

    Parameters
    ----------
    var_list : list of Variable or dict of str to Variable, optional
        What to save and restore, by its name or by the names given. By default all variables that exist at the time.

    Raises
    ------
    TypeError, ValueError
        If var_list is empty, holds something else than variables, or holds one twice.

    Notes
    -----
    The file is an .npz of fastbn's own, written whole or not at all, and read without executing anything; it is no
    TensorFlow checkpoint.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.compat import tf_layers as tf
    >>> tf.reset_default_graph()
    >>> y = tf.batch_normalization(np.eye(2), training=True, gamma_initializer=np.array([2.0, 3.0]))
    >>> path = tf.Saver().save("model.npz")
    >>> tf.reset_default_graph()
    >>> tf.Saver().restore(path)
    >>> y = tf.batch_normalization(np.eye(2), training=True)
    >>> tf.global_variables("batch_normalization/gamma")[0].value
    array([2., 3.])
    """

    def __init__(self, var_list: Iterable[Variable] | Mapping[str, Variable] | None = None) -> None:
        self._given: dict[str, Variable] | None = None
        if var_list is not None:
            named = var_list.items() if isinstance(var_list, Mapping) else [(None, v) for v in var_list]
            self._given = {}
            for name, variable in named:
                if not isinstance(variable, Variable):
                    raise TypeError(must("var_list", "hold variables", type(variable).__name__))
                key = variable.op_name if name is None else str(name)
                if key in self._given or variable in self._given.values():
                    raise ValueError(must("var_list", "hold each variable once, under one name", repr(variable.name)))
                self._given[key] = variable
            if not self._given:
                raise ValueError(must("var_list", "hold a variable to save", "none"))

    def _variables(self) -> dict[str, Variable]:
        return {v.op_name: v for v in global_variables()} if self._given is None else self._given

    def save(self, path: str | os.PathLike[str]) -> str:
        """Write the variables to a file, atomically: it is whole, or as it was before.

        Parameters
        ----------
        path : path
            The file; no extension is added.

        Returns
        -------
        str
            The path.

        Raises
        ------
        ValueError
            If there are no variables.
        OSError
            If the file cannot be written.
        """
        values = {name: variable.eval() for name, variable in self._variables().items()}
        if not values:
            raise ValueError(must("var_list", "hold a variable to save", "none"))
        # One array per dtype: a network has more variables than a file may have entries.
        arrays = {
            dtype: np.concatenate([v.reshape(-1) for v in values.values() if v.dtype == dtype])
            for dtype in ("float32", "float64")
            if any(v.dtype == dtype for v in values.values())
        }
        listed = [[name, value.dtype.name, list(value.shape)] for name, value in values.items()]
        state.write_state(path, "variables", {"variables": listed}, arrays)
        return os.fspath(path)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Read the variables from a file, all of them or none.

        Parameters
        ----------
        path : path
            The file. Without a var_list, variables in it that do not exist yet get their values when they are made, in
            place of their initializers. With one, other variables in the file are left.

        Raises
        ------
        StateError
            If the file is damaged or foreign, a variable is missing in it, or a shape differs.
        OSError
            If it cannot be read.
        """
        saved = _read(path)
        variables = self._variables()
        for name, variable in variables.items():
            if name not in saved:
                raise StateError(f"{os.fspath(path)}: has no variable {name!r}")
            if saved[name].shape != variable.shape:
                raise StateError(f"{os.fspath(path)}: {name} must have shape {variable.shape}, got {saved[name].shape}")
        if self._given is None:
            load_variables(saved)
        else:
            for name, variable in variables.items():
                variable.assign(saved[name])


def _read(path: str | os.PathLike[str]) -> dict[str, Array]:
    """Return the variables in a file by name."""
    fields, arrays = state.read_state(
        path, "variables", required=(), optional=("float32", "float64"), fields=("variables",)
    )
    offsets = dict.fromkeys(arrays, 0)
    values: dict[str, Array] = {}
    try:
        for name, dtype, shape in fields["variables"]:
            size = math.prod(shape)
            part = arrays[dtype][offsets[dtype] : offsets[dtype] + size]
            offsets[dtype] += size
            if not isinstance(name, str) or name in values or min(shape, default=0) < 0:
                raise ValueError("a name or a shape makes no sense")
            values[name] = part.reshape(shape)
        if any(offsets[dtype] != array.size or array.dtype != dtype for dtype, array in arrays.items()):
            raise ValueError("the arrays do not hold what it lists")
    except (KeyError, TypeError, ValueError) as error:
        raise StateError(f"{os.fspath(path)}: has a list of variables that makes no sense ({error})") from error
    return values
