"""Names as TensorFlow 1 made them: by scopes, which nest, are entered again, and number names that repeat."""

from __future__ import annotations

import re
from typing import Any, Final

from ..errors import must
from ._graph import Reuse, VariableScope, graph

AUTO_REUSE: Final = "auto"

# What tf.compat.v1 accepts of names; TensorFlow 1 itself had neither \ nor >.
_NAME: Final = re.compile(r"[A-Za-z0-9_.\\/>-]+")
_FIRST: Final = re.compile(r"[A-Za-z0-9.]")


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
