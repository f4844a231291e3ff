"""What TensorFlow 1 called the default graph: variables by name, and collections.

TensorFlow 1 built a graph once and ran it many times. Here every call computes at once, and what stays of the graph is
this: a variable is made once and found again by its name (`_variables`); names come from scopes and are numbered where
they repeat, by the same rules (`_scopes`); and collections hold what is to be done later, above all the updates of
moving statistics.

As in TensorFlow, scopes and the counts behind numbered names belong to a thread, variables and collections to all.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterable, Iterator
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
