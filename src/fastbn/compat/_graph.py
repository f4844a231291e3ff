"""What TensorFlow 1 called the default graph: variables by name, the scopes that name them, and collections.

TensorFlow 1 built a graph once and ran it many times. Here every call computes at once, and what stays of the graph is
this: a variable is made once and found again by its name; names come from scopes and are numbered where they repeat,
by the same rules; and collections hold what is to be done later, above all the updates of moving statistics.

As in TensorFlow, scopes and the counts behind numbered names belong to a thread, variables and collections to all.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .. import checks, constraints, initializers, regularizers
from ..errors import must

Array = NDArray[Any]
Reuse = bool | Literal["auto"] | None
Initializer = initializers.Initializer | ArrayLike
Regularizer = regularizers.Regularizer
Constraint = constraints.Constraint

AUTO_REUSE: Final = "auto"

# What tf.compat.v1 accepts of names; TensorFlow 1 itself had neither \ nor >.
_NAME: Final = re.compile(r"[A-Za-z0-9_.\\/>-]+")
_FIRST: Final = re.compile(r"[A-Za-z0-9.]")


class GraphKeys:
    """Names of collections, as in ``tf.GraphKeys``."""

    GLOBAL_VARIABLES: Final = "variables"
    TRAINABLE_VARIABLES: Final = "trainable_variables"
    MODEL_VARIABLES: Final = "model_variables"
    REGULARIZATION_LOSSES: Final = "regularization_losses"
    LOSSES: Final = "losses"
    UPDATE_OPS: Final = "update_ops"


class Variable:
    """An array with a name; `get_variable` and the layers make them.

    Attributes
    ----------
    name : str
        As TensorFlow writes it, such as ``"batch_normalization/gamma:0"``.
    value : ndarray
        The live array: updates write into it, and what you write into it counts.
    trainable : bool
        Whether it is among `trainable_variables`.
    regularizer, constraint : callable or None
        As given where the variable was made.
    """

    def __init__(
        self,
        name: str,
        value: Array,
        *,
        trainable: bool,
        regularizer: Regularizer | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.name = f"{name}:0"
        self.value = value
        self.trainable = trainable
        self.regularizer = regularizer
        self.constraint = constraint
        self._lock = threading.RLock()
        # What the warnings about statistics look at.
        self._pending: list[Update] = []
        self._written = False
        self._warned = False

    @property
    def op_name(self) -> str:
        """The name without ``:0``, which is its name in files."""
        return self.name.removesuffix(":0")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return self.value.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the value."""
        return self.value.dtype

    def eval(self) -> Array:
        """Return a copy of the value."""
        with self._lock:
            return self.value.copy()

    def assign(self, value: ArrayLike) -> Array:
        """Write a value into the array.

        Parameters
        ----------
        value : array_like
            Of the variable's shape; converted to its dtype.

        Returns
        -------
        ndarray
            The live array.
        """
        source = checks.required(value, self.op_name, self.shape).reshape(self.shape)
        with self._lock:
            self.value[...] = source
            self._written = True
        return self.value

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        """Return the value, the live array unless a dtype or a copy is asked for."""
        return np.array(self.value, dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        """Show name, shape and dtype."""
        return f"<fastbn variable {self.name!r} shape={self.shape} dtype={self.dtype}>"


class Update:
    """One deferred update of a moving statistic. Call it to carry it out; once done, it does nothing any more.

    Attributes
    ----------
    name : str
        As TensorFlow's operation, such as ``"batch_normalization/AssignMovingAvg"``.
    done : bool
        Whether it was carried out.
    """

    def __init__(self, name: str, variable: Variable, action: Callable[[], None]) -> None:
        self.name = name
        self.variable = variable
        self._action: Callable[[], None] | None = action
        self._graph = graph()
        self._keys: list[str] = []
        self._waiting: dict[Update, None] = {}  # those of its layer, in order

    @property
    def done(self) -> bool:
        """Whether it was carried out."""
        return self._action is None

    def __call__(self) -> Array:
        """Carry the update out, unless that has happened, and return the value of the variable.

        Warns
        -----
        PendingUpdatesWarning
            If it has happened, and newer updates of the same variable wait: `get_collection` has to be asked again
            after each training call.
        """
        from . import _warnings

        variable = self.variable
        with variable._lock:
            action, self._action = self._action, None
            if action is not None:
                try:
                    action()
                except BaseException:
                    self._action = action
                    raise
                variable._written = True
                variable._warned = False
                variable._pending.remove(self)
                self._waiting.pop(self, None)
        if action is None:
            _warnings.repeated(self)
        else:
            self._graph.discard(self, self._keys)
        return variable.value

    run = __call__

    def __repr__(self) -> str:
        """Show name and state."""
        return f"<fastbn update {self.name!r}, {'done' if self.done else 'pending'}>"


class RegularizationLoss:
    """The penalty of one variable; call it, or turn it into a float, to evaluate it as the variable is now.

    Attributes
    ----------
    name : str
        That of the variable, with ``/Regularizer``.
    """

    def __init__(self, variable: Variable) -> None:
        self.variable = variable
        self.name = f"{variable.op_name}/Regularizer:0"

    def __call__(self) -> float:
        """Return the penalty."""
        variable = self.variable
        return regularizers.loss(variable.regularizer, variable.value, f"regularizer of {variable.op_name}")

    __float__ = __call__

    def __repr__(self) -> str:
        """Show the name."""
        return f"<fastbn regularization loss {self.name!r}>"


class VariableScope:
    """A scope that was entered; give it to `variable_scope` to enter it again.

    Attributes
    ----------
    name : str
        With those of the scopes around it.
    reuse : bool or "auto"
        Whether variables of this scope have to exist, must not exist, or either.
    """

    def __init__(self, name: str, reuse: Reuse) -> None:
        self.name = name
        self.reuse = reuse

    def reuse_variables(self) -> None:
        """From now on, find variables again instead of making them."""
        self.reuse = True

    def __repr__(self) -> str:
        """Show name and reuse."""
        return f"<fastbn variable scope {self.name!r} reuse={self.reuse!r}>"


class _Local(threading.local):
    def __init__(self) -> None:
        self.scope = VariableScope("", False)
        self.opened: dict[str, int] = {}  # how often each scope was entered: what numbers names
        # By a call that may still fail, with the values that had waited for them.
        self.created: list[tuple[Variable, Array | None]] | None = None
        self.layers: dict[str, Any] = {}


class Graph:
    """Variables, collections, layers, and each thread's scope."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.variables: dict[str, Variable] = {}
        self.waiting: dict[str, Array] = {}  # values loaded for variables that do not exist yet
        self.collections: dict[str, list[Any]] = {}
        self.layers: dict[str, Any] = {}
        self.numbers: dict[str, int] = {}  # of layer objects
        self.renorm_scheme = "tf1"
        self.local = _Local()

    def add(self, keys: str | Iterable[str] | None, item: Any) -> None:
        """Put something into collections."""
        names = collection_names(keys, "collections")
        if isinstance(item, Update):
            item._keys += names
        with self.lock:
            for key in names:
                self.collections.setdefault(key, []).append(item)

    def complete(self, keys: Iterable[str], item: Any) -> None:
        """Put something into the collections that do not hold it."""
        with self.lock:
            self.add([key for key in keys if not any(i is item for i in self.collections.get(key, ()))], item)

    def discard(self, item: Any, keys: Iterable[str]) -> None:
        """Take something out of collections."""
        with self.lock:
            for key in keys:
                self.collections[key] = [other for other in self.collections.get(key, ()) if other is not item]

    def number(self, name: str) -> str:
        """Return the name of a new layer object: TensorFlow counts them from 1."""
        with self.lock:
            self.numbers[name] = self.numbers.get(name, 0) + 1
            return f"{name}_{self.numbers[name]}"

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Take back new variables and numbers of names if what is tried raises."""
        local = self.local
        if local.created is not None:  # a call within a call: the outer one takes back
            yield
            return
        opened, local.created = dict(local.opened), []
        try:
            yield
        except BaseException:
            local.opened = opened
            with self.lock:
                for variable, loaded in local.created:
                    del self.variables[variable.op_name]
                    if loaded is not None:
                        self.waiting[variable.op_name] = loaded
                    for key in self.collections:
                        self.discard_variable(variable, key)
            raise
        finally:
            local.created = None

    def discard_variable(self, variable: Variable, key: str) -> None:
        """Take a variable and its penalty out of a collection."""
        self.collections[key] = [
            item
            for item in self.collections[key]
            if item is not variable and not (isinstance(item, RegularizationLoss) and item.variable is variable)
        ]


_default = Graph()


def graph() -> Graph:
    """Return the default graph."""
    return _default


def reset_default_graph() -> None:
    """Forget all variables, collections, layers and numbers of names.

    Raises
    ------
    ValueError
        If it is called inside of a `variable_scope`.
    """
    global _default
    if _default.local.scope.name:
        raise ValueError(
            must("reset_default_graph", "be called outside of every variable_scope", repr(_default.local.scope.name))
        )
    _default = Graph()


def collection_names(keys: Any, what: str) -> list[str]:
    """Return names of collections as users write them, each once."""
    if keys is None:
        return []
    try:
        return list(dict.fromkeys([keys] if isinstance(keys, str) else keys))
    except TypeError:
        raise TypeError(must(what, "be a string, a sequence of strings or None", repr(keys))) from None


# -- scopes --------------------------------------------------------------------------------------------------------


def checked_reuse(reuse: Any) -> Reuse:
    """Return what reuse may be: None, a bool or "auto"."""
    if reuse is None or reuse is True or reuse is False or (isinstance(reuse, str) and reuse == AUTO_REUSE):
        return reuse  # type: ignore[return-value]
    raise ValueError(must("reuse", 'be None, True, False or "auto" (AUTO_REUSE)', repr(reuse)))


def checked_name(name: Any, what: str = "name") -> str:
    """Return a name that TensorFlow would accept for a scope inside of another one."""
    if not isinstance(name, str):
        raise TypeError(must(what, "be a string", repr(name)))
    if not _NAME.fullmatch(name):
        raise ValueError(must(what, "hold nothing but letters, digits, ., _, -, /, > and a backslash", repr(name)))
    return name


def full_name(scope: str, name: str) -> str:
    """Return a name with that of its scope; TensorFlow restricts its first character."""
    full = f"{scope}/{name}" if scope else name
    if full and not _FIRST.match(full):
        raise ValueError(must("name", "begin with a letter, digit or dot outside of all scopes", repr(full)))
    return full


class variable_scope:
    """A context in which names of variables begin with a name; scopes nest.

    Parameters
    ----------
    name_or_scope : str, VariableScope or None
        The name, which is put behind that of the scope around it, or ""; or a scope that was entered before.
    default_name : str, optional
        Used where the name is None, with a number if it was used in this scope before.
    values : optional
        Ignored, as TensorFlow 1 had it.
    reuse : {None, True, False, "auto"}
        True: variables have to exist. "auto" (AUTO_REUSE): they are found or made. None and False: that of the scope
        around it, at whose root variables must not exist.

    Raises
    ------
    TypeError, ValueError
        If there is neither name nor default name, a name is not one, or reuse is given with a default name alone.
    RuntimeError
        If the same object is entered again before it is left, or left before a scope that was entered in it.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.compat import tf_layers as tf
    >>> tf.reset_default_graph()
    >>> with tf.variable_scope("net"):
    ...     y = tf.batch_normalization(np.eye(3), training=True)
    >>> [v.name for v in tf.trainable_variables()]
    ['net/batch_normalization/gamma:0', 'net/batch_normalization/beta:0']
    """

    def __init__(
        self,
        name_or_scope: str | VariableScope | None,
        default_name: str | None = None,
        values: Any = None,
        *,
        reuse: Reuse = None,
    ) -> None:
        self._reuse = checked_reuse(reuse)
        if name_or_scope is None:
            if default_name is None:
                raise TypeError(must("name_or_scope", "be given without a default_name", "None"))
            if self._reuse:
                raise ValueError(must("reuse", "be None where the scope has no name of its own", repr(reuse)))
            checked_name(default_name, "default_name")
        elif not isinstance(name_or_scope, VariableScope) and name_or_scope != "":
            checked_name(name_or_scope, "name_or_scope")
        self._given = name_or_scope
        self._default_name = default_name
        self._entered: VariableScope | None = None

    def __enter__(self) -> VariableScope:
        """Enter the scope and return it."""
        if self._entered is not None:
            raise RuntimeError(must("variable_scope", "be left before it is entered again", repr(self._entered.name)))
        local = self._local = graph().local
        outer = self._outer = local.scope
        if isinstance(self._given, VariableScope):
            scope = VariableScope(self._given.name, self._reuse or self._given.reuse)
        else:
            name = self._given
            if name is None:
                assert self._default_name is not None
                name = self._numbered(self._default_name)
            scope = VariableScope(full_name(outer.name, name), self._reuse or outer.reuse)
        local.opened[scope.name] = local.opened.get(scope.name, 0) + 1
        self._opened = dict(local.opened) if isinstance(self._given, VariableScope) else None
        local.scope = self._entered = scope
        return scope

    def _numbered(self, name: str) -> str:
        """Return the name, or name_1, name_2, ...: the first one that was not entered in this scope."""
        prefix, opened = f"{self._outer.name}/" if self._outer.name else "", self._local.opened
        number, candidate = 0, name
        while opened.get(prefix + candidate, 0):
            number += 1
            candidate = f"{name}_{number}"
        return candidate

    def __exit__(self, *exception: object) -> None:
        """Leave the scope; entered again, it numbers its names from the start."""
        local, scope = self._local, self._entered
        if scope is None or local.scope is not scope:
            raise RuntimeError(must("variable_scope", "be left once, after those inside of it", repr(local.scope.name)))
        local.scope, self._entered = self._outer, None
        if self._opened is not None:
            local.opened = self._opened
            return
        for name in [n for n in local.opened if n.startswith(scope.name + "/")]:
            del local.opened[name]


def get_variable_scope() -> VariableScope:
    """Return the scope that this thread is in; its name is "" outside of all.

    Returns
    -------
    VariableScope
        Of the innermost `variable_scope`.
    """
    return graph().local.scope


# -- variables -----------------------------------------------------------------------------------------------------


def get_variable(
    name: str,
    shape: int | Sequence[int] | None = None,
    dtype: DTypeLike = np.float32,
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
    dtype : {"float32", "float64"}
        Of a new variable.
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
    wanted = None if shape is None else tuple(np.atleast_1d(np.asarray(shape, dtype=np.int64)).tolist())
    if shape is not None and np.ndim(shape) == 1 and not len(wanted or ()):
        wanted = ()
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
        kind: np.dtype[Any] = np.dtype(dtype)
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
    if isinstance(initializer, str | tuple) or callable(initializer):
        what = f"initializer of {name}"
        return initializers.create(initializers.checked(initializer, what), what, shape, dtype)
    value = checks.as_array(initializer, f"initializer of {name}")
    if value.dtype.kind not in "iuf":
        raise TypeError(must(f"initializer of {name}", "have a real dtype", value.dtype))
    if value.shape not in (shape, ()):
        raise ValueError(must(f"initializer of {name}", f"have shape {shape}", value.shape))
    return np.array(np.broadcast_to(value, shape), dtype=dtype)


def zeros_initializer() -> Initializer:
    """Return the initializer of zeros, as ``tf.zeros_initializer()``.

    Returns
    -------
    str
        "zeros".
    """
    return "zeros"


def ones_initializer() -> Initializer:
    """Return the initializer of ones, as ``tf.ones_initializer()``.

    Returns
    -------
    str
        "ones".
    """
    return "ones"


def constant_initializer(value: ArrayLike = 0.0) -> Initializer:
    """Return an initializer of one number, or of an array of the variable's shape.

    Parameters
    ----------
    value : array_like
        The value.

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


# -- collections ---------------------------------------------------------------------------------------------------


def get_collection(key: str, scope: str | None = None) -> list[Any]:
    """Return what is in a collection: variables, updates to carry out, regularization losses.

    Parameters
    ----------
    key : str
        One of `GraphKeys`, or a name of your own. "update_ops" holds the updates that training calls have deferred and
        nobody has carried out yet: call each.
    scope : str, optional
        Only items whose name this regular expression matches from its start; items without a name are left out then.

    Returns
    -------
    list
        A new list; empty for an unknown collection.

    Examples
    --------
    >>> import numpy as np
    >>> from fastbn.compat import tf_layers as tf
    >>> tf.reset_default_graph()
    >>> y = tf.batch_normalization(np.array([[1.0], [3.0]]), training=True, momentum=0.5)
    >>> [update.name for update in tf.get_collection("update_ops")]
    ['batch_normalization/AssignMovingAvg', 'batch_normalization/AssignMovingAvg_1']
    >>> for update in tf.get_collection("update_ops"):
    ...     print(update())
    [1.]
    [1.]
    """
    home = graph()
    with home.lock:
        items = list(home.collections.get(key, ()))
    if scope is None:
        return items
    return [item for item in items if isinstance(getattr(item, "name", None), str) and re.match(scope, item.name)]


def add_to_collection(key: str, value: Any) -> None:
    """Put something into a collection.

    Parameters
    ----------
    key : str
        The collection.
    value : object
        Anything.
    """
    graph().add(key, value)


def get_layer(name: str) -> Any:
    """Return the layer behind a functional call, for its gradient: that of the last call with its variables.

    A call of this thread comes before those of others. The layer refers to the last batch until its next call.

    Parameters
    ----------
    name : str
        Its scope, such as ``"batch_normalization_1"`` or ``"net/bn"``.

    Returns
    -------
    BatchNormalization
        With `backward`, `grads` and its variables.

    Raises
    ------
    ValueError
        If no call has this name.
    """
    layers = graph().layers | graph().local.layers
    if name not in layers:
        raise ValueError(must("name", "be the scope of a layer: " + (", ".join(layers) or "there is none"), repr(name)))
    return layers[name]
