"""Arguments that are a name, a name with numbers, or a function: initializers, regularizers and constraints."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from . import checks
from .errors import must


class Number(NamedTuple):
    """A number that may follow a name, its default and its range."""

    name: str
    default: float
    low: float
    high: float
    words: str


class Named(NamedTuple):
    """What a name stands for: a function of an array or a shape, and the numbers that it takes then."""

    function: Callable[..., Any]
    numbers: tuple[Number, ...]


def _plain(name: str) -> str:
    """Return the name that Keras writes as MaxNorm as max_norm."""
    return name if name.islower() else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def checked(value: Any, argument: str, table: Mapping[str, Named]) -> Any:
    """Return the argument in its plain form: a name, a tuple of a name and its numbers, or the callable itself."""
    if callable(value):
        return value
    words = f"be callable, or one of {', '.join(table)}, or a tuple of a name and its numbers"
    given = value if isinstance(value, tuple) else (value,)
    if not given or not isinstance(given[0], str):
        raise TypeError(must(argument, words, repr(value)))
    name = _plain(given[0])
    if name not in table:
        raise ValueError(must(argument, words, repr(value)))
    known = table[name].numbers
    if len(given) - 1 > len(known):
        raise ValueError(must(argument, f"have at most {len(known)} numbers after {name!r}", repr(value)))
    numbers = tuple(checks.real(v, f"{n.name} of {argument}", n.low, n.high, n.words) for v, n in zip(given[1:], known))
    return (name, *numbers) if numbers else name


def resolved(value: Any, table: Mapping[str, Named]) -> Callable[..., Any]:
    """Return the function that a checked argument stands for."""
    if callable(value):
        return value  # type: ignore[no-any-return]
    name, *numbers = value if isinstance(value, tuple) else (value,)
    function, known = table[name]
    numbers += [n.default for n in known[len(numbers) :]]
    return lambda target: function(target, *numbers)
