"""Variables of the default graph: made or found by name, their first values, and all of a scope."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import checks, constraints, initializers, regularizers
from ..errors import must
from ._graph import (
    Constraint,
    GraphKeys,
    Initializer,
    RegularizationLoss,
    Regularizer,
    Variable,
    collection_names,
    get_collection,
    graph,
)
from ._keras_config import ALIASES
from ._scopes import checked_name, full_name

Array = NDArray[Any]


def get_variable(
    name: str,
    shape: int | Sequence[int] | None = None,
    dtype: DTypeLike | None = np.float32,
    initializer: Initializer | None = None,
    regularizer: Regularizer | None = None,
    trainable: bool = True,
    collections: str | Iterable[str] | None = None,
    constraint: Constraint | None = None,
) -> Variable:
    """Return a variable of this scope: make it, or find it, as the reuse of the scope says.

    Parameters
    ----------
    name : str
        Name in this scope, such as ``"gamma"`` inside of ``variable_scope("batch_normalization", reuse=True)``.
    shape : int or sequence of ints, optional
        Needed for a new variable; that of an existing one must agree.
    dtype : {"float32", "float64"}, optional
        Of a new variable; None is float32.
    initializer : str, array or callable
        Of a new variable: "zeros" or "ones", an array, or a function of (shape, dtype), which may come from a class
        that was not called.
    regularizer : callable, optional
        Penalty as a function of the value; it goes into the collection "regularization_losses", unless it is None.
    trainable : bool
        Whether a new variable is among `trainable_variables`.
    collections : str or iterable of str, optional
        Where to put a new variable, instead of "variables".
    constraint : callable, optional
        Projects the value, see `apply_constraints`.

    Returns
    -------
    Variable
        The variable.

    Raises
    ------
    TypeError, ValueError
        If it exists and must not, or does not and must; or if an argument does not fit.
    """
    home = graph()
    scope = home.local.scope
    full = full_name(scope.name, checked_name(name))
    keys = [GraphKeys.GLOBAL_VARIABLES] if collections is None else collection_names(collections, "collections")
    if trainable:
        keys = [*keys, GraphKeys.TRAINABLE_VARIABLES]
    wanted = None if shape is None else _extents(shape)
    with home.lock:
        existing = home.variables.get(full)
        if existing is not None:
            if not scope.reuse:
                raise ValueError(
                    must(
                        "name",
                        "be new, or its scope be entered with reuse=True or AUTO_REUSE",
                        f"{full!r}, which exists",
                    )
                )
            if wanted is not None and existing.shape != wanted:
                raise ValueError(must(full, f"have shape {wanted}", existing.shape))
            return existing
        if scope.reuse is True:
            raise ValueError(must("name", "exist where reuse=True", f"{full!r}, which does not"))
        if wanted is None:
            raise ValueError(must("shape", f"be given for {full!r}, which is new", "None"))
        if initializer is None:
            raise ValueError(must("initializer", f"be given for {full!r}, which is new", "None"))
        kind: np.dtype[Any] = np.dtype(np.float32 if dtype is None else dtype)  # NumPy's None is float64
        if kind not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise TypeError(must("dtype", "be float32 or float64", kind))
        penalty = regularizers.checked(regularizer, f"regularizer of {full}")
        projection = constraints.checked(constraint, f"constraint of {full}")
        loaded = home.waiting.get(full)
        value = (
            initial_value(initializer, wanted, kind, full) if loaded is None else _fitting(loaded, full, wanted, kind)
        )
        penalized = penalty is not None and not (callable(penalty) and penalty(value) is None)
        variable = Variable(full, value, trainable=trainable, regularizer=penalty, constraint=projection)
        variable._written = loaded is not None
        home.variables[full] = variable
        home.waiting.pop(full, None)
        if home.local.created is not None:
            home.local.created.append((variable, loaded))
        home.add(keys, variable)
        if penalized:
            home.add(GraphKeys.REGULARIZATION_LOSSES, RegularizationLoss(variable))
    return variable


def _extents(shape: Any) -> tuple[int, ...]:
    """Return a shape from an integer or several."""
    try:
        if isinstance(shape, bool):
            raise TypeError
        return tuple(map(operator.index, [shape] if hasattr(shape, "__index__") and not np.ndim(shape) else shape))
    except TypeError:
        raise TypeError(must("shape", "be an int or a sequence of ints", repr(shape))) from None


def _fitting(value: Array, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if value.shape != shape:
        raise ValueError(must(f"loaded {name}", f"have shape {shape}", value.shape))
    return value.astype(dtype)


def initial_value(initializer: Any, shape: tuple[int, ...], dtype: np.dtype[Any], name: str) -> Array:
    """Return a new array with the first value of a variable."""
    # In TensorFlow all of these are classes, and it makes an object of a class.
    own = (zeros_initializer, ones_initializer, constant_initializer)
    if isinstance(initializer, type) or (callable(initializer) and initializer in own):
        initializer = initializer()
    if isinstance(initializer, str):
        initializer = ALIASES.get(initializer, initializer)
    if isinstance(initializer, str | tuple) or callable(initializer):
        what = f"initializer of {name}"
        return initializers.create(initializers.checked(initializer, what), what, shape, dtype)
    value = checks.as_array(initializer, f"initializer of {name}")
    if value.dtype.kind not in "iuf":
        raise TypeError(must(f"initializer of {name}", "have a real dtype", value.dtype))
    if value.shape not in (shape, ()):
        raise ValueError(must(f"initializer of {name}", f"have shape {shape}", value.shape))
    return np.array(np.broadcast_to(value, shape), dtype=dtype)


def zeros_initializer(dtype: DTypeLike | None = None) -> Initializer:
    """Return the initializer of zeros, as ``tf.zeros_initializer()``.

    Parameters
    ----------
    dtype : optional
        Ignored: that of the variable counts.

    Returns
    -------
    str
        "zeros".
    """
    return "zeros"


def ones_initializer(dtype: DTypeLike | None = None) -> Initializer:
    """Return the initializer of ones, as ``tf.ones_initializer()``.

    Parameters
    ----------
    dtype : optional
        Ignored: that of the variable counts.

    Returns
    -------
    str
        "ones".
    """
    return "ones"


def constant_initializer(
    value: ArrayLike = 0.0, dtype: DTypeLike | None = None, verify_shape: bool = False
) -> Initializer:
    """Return an initializer of one number, or of an array of the variable's shape.

    Parameters
    ----------
    value : array_like
        The value.
    dtype, verify_shape : optional
        Ignored: the dtype of the variable counts, and a shape is always verified.

    Returns
    -------
    ndarray
        For the initializers of variables.
    """
    return np.array(value)


def global_variables(scope: str | None = None) -> list[Variable]:
    """Return all variables, in the order in which they were made.

    Parameters
    ----------
    scope : str, optional
        Only those whose name this regular expression matches from its start, as in TensorFlow.

    Returns
    -------
    list of Variable
        A new list.
    """
    found: list[Variable] = get_collection(GraphKeys.GLOBAL_VARIABLES, scope)
    return found


def trainable_variables(scope: str | None = None) -> list[Variable]:
    """Return the variables that an optimizer changes: gamma and beta of layers that are trainable.

    Parameters
    ----------
    scope : str, optional
        As in `global_variables`.

    Returns
    -------
    list of Variable
        A new list.
    """
    found: list[Variable] = get_collection(GraphKeys.TRAINABLE_VARIABLES, scope)
    return found


def load_variables(values: Mapping[str, ArrayLike]) -> None:
    """Give variables their values by name, all of them or none.

    Values of variables that do not exist yet wait for them: they take the place of the initializers.

    Parameters
    ----------
    values : mapping of str to array_like
        By names with or without ``:0``, such as the names in a checkpoint.

    Raises
    ------
    TypeError, ValueError
        If a value does not fit its variable.
    """
    home = graph()
    plain: dict[str, Array] = {}
    for given, value in values.items():
        name = full_name("", checked_name(str(given).removesuffix(":0")))
        plain[name] = checks.as_array(value, str(given))
    for name, value in plain.items():
        if value.dtype.kind not in "iuf":
            raise TypeError(must(name, "have a real dtype", value.dtype))
        if name in home.variables:
            checks.required(value, name, home.variables[name].shape)
    with home.lock:
        for name, value in plain.items():
            if name in home.variables:
                home.variables[name].assign(value)
            else:
                home.waiting[name] = np.array(value)


def apply_constraints(scope: str | None = None) -> None:
    """Project variables with a constraint, as TensorFlow's optimizers do after each step.

    Parameters
    ----------
    scope : str, optional
        As in `global_variables`.
    """
    for variable in trainable_variables(scope):
        if variable.constraint is not None:
            name = f"constraint of {variable.op_name}"
            variable.assign(constraints.projected(variable.constraint, variable.value, name))
