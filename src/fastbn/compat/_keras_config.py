"""The arguments of Keras's batch norm, as its configurations hold them, and fastbn's for the same."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from .. import constraints, initializers, regularizers
from ..errors import must

RENORM: Final = ("moving_stddev", "renorm_mean", "renorm_stddev")
ORDER: Final = ("gamma", "beta", "moving_mean", "moving_variance", *RENORM)
TRAINABLE: Final = ("gamma", "beta")
NAMED: Final = (
    "beta_initializer",
    "gamma_initializer",
    "moving_mean_initializer",
    "moving_variance_initializer",
    "beta_regularizer",
    "gamma_regularizer",
    "beta_constraint",
    "gamma_constraint",
)
# What a configuration of Keras 3 has; the values are its defaults.
DEFAULTS: Final[dict[str, Any]] = {
    "name": None,
    "trainable": True,
    "dtype": None,
    "axis": -1,
    "momentum": 0.99,
    "epsilon": 1e-3,
    "center": True,
    "scale": True,
    "beta_initializer": "zeros",
    "gamma_initializer": "ones",
    "moving_mean_initializer": "zeros",
    "moving_variance_initializer": "ones",
    "beta_regularizer": None,
    "gamma_regularizer": None,
    "beta_constraint": None,
    "gamma_constraint": None,
    "synchronized": False,
    "renorm": False,
    "renorm_clipping": None,
    "renorm_momentum": 0.99,
}
# What only other configurations have, and the values that mean nothing.
_OTHERS: Final[dict[str, tuple[Any, ...]]] = {
    "fused": (None, True, False),
    "virtual_batch_size": (None,),
    "adjustment": (None,),
    "activity_regularizer": (None,),
}
# What the first layer of a model says about the model's inputs.
_INPUTS: Final = ("batch_input_shape", "batch_shape")


class _Kind(NamedTuple):
    """One class of Keras: fastbn's name, the numbers in fastbn's order, and what else its configuration has."""

    name: str
    numbers: tuple[tuple[str, float], ...] = ()
    rest: tuple[tuple[str, Any], ...] = ()


_SEED: Final = (("seed", None),)
_AXIS: Final = (("axis", 0),)

# With the defaults of Keras 3.
_CLASSES: Final[dict[str, dict[str, _Kind]]] = {
    "initializers": {
        "Zeros": _Kind("zeros"),
        "Ones": _Kind("ones"),
        "Constant": _Kind("constant", (("value", 0.0),)),
        "RandomNormal": _Kind("random_normal", (("mean", 0.0), ("stddev", 0.05)), _SEED),
        "RandomUniform": _Kind("random_uniform", (("minval", -0.05), ("maxval", 0.05)), _SEED),
        "TruncatedNormal": _Kind("truncated_normal", (("mean", 0.0), ("stddev", 0.05)), _SEED),
    },
    "regularizers": {
        "L1": _Kind("l1", (("l1", 0.01),)),
        "L2": _Kind("l2", (("l2", 0.01),)),
        "L1L2": _Kind("l1_l2", (("l1", 0.0), ("l2", 0.0))),
    },
    "constraints": {
        "NonNeg": _Kind("non_neg"),
        "UnitNorm": _Kind("unit_norm", (), _AXIS),
        "MaxNorm": _Kind("max_norm", (("max_value", 2.0),), _AXIS),
        "MinMaxNorm": _Kind("min_max_norm", (("min_value", 0.0), ("max_value", 1.0), ("rate", 1.0)), _AXIS),
    },
}
# Other names of initializers, in Keras and in the layers of TensorFlow 1.
ALIASES: Final = {"zero": "zeros", "one": "ones", "normal": "random_normal", "uniform": "random_uniform"}
_CHECKS: Final[dict[str, Any]] = {
    "initializers": initializers.checked,
    "regularizers": regularizers.checked,
    "constraints": constraints.checked,
}


def kind_of(argument: str) -> str:
    """Return which table an argument such as beta_initializer belongs to."""
    return argument.rsplit("_", 1)[1] + "s"


def read(argument: str, value: Any) -> Any:
    """Return an argument of the core layer for what Keras takes: a name, an object, a configuration, or a function.

    Parameters
    ----------
    argument : str
        Its name, "gamma_initializer" for instance.
    value : object
        A name, a tuple of a name and its numbers, a configuration as Keras serializes it, an object of Keras or its
        class, a function, or None.

    Returns
    -------
    object
        What `BatchNorm` takes.

    Raises
    ------
    TypeError, ValueError
        If it is none of these, or of a kind that batch norm parameters have no use for.
    """
    kind = kind_of(argument)
    if value is None and kind != "initializers":
        return None
    classes = _CLASSES[kind]
    if isinstance(value, type):
        value = value()
    if isinstance(value, str):
        value = ALIASES.get(value, value) if kind == "initializers" else value
        by_name = {ours.name: ours for ours in classes.values()} | {"l1l2": _CLASSES["regularizers"]["L1L2"]}
        found = classes.get(value) or by_name.get(value.lower())
        if found in classes.values():
            assert found is not None
            return _CHECKS[kind]((found.name, *(default for _, default in found.numbers)), argument)
    if isinstance(value, Mapping):
        return _from_config(argument, value.get("class_name"), value.get("config"), value)
    if type(value).__name__ in classes and hasattr(value, "get_config"):
        return _from_config(argument, type(value).__name__, value.get_config(), value)
    return _CHECKS[kind](value, argument)


def _from_config(argument: str, name: Any, config: Any, value: Any) -> Any:
    classes = _CLASSES[kind_of(argument)]
    if name not in classes or not isinstance(config, Mapping):
        raise ValueError(must(argument, "be the configuration of one of " + ", ".join(classes), repr(value)))
    known = classes[name]
    rest = dict(known.rest) | {"dtype": None}  # of initializers in older versions
    for key, given in config.items():
        if key not in rest and key not in dict(known.numbers):
            raise ValueError(must(f"{name} of {argument}", "have no entry " + repr(key), repr(given)))
    if config.get("axis", 0) not in (0, -1, [0], [-1], (0,), (-1,)):  # of a parameter, which has one
        raise ValueError(must(f"axis of {argument}", "be 0 or -1", config["axis"]))
    numbers = (config.get(key, default) for key, default in known.numbers)
    return _CHECKS[kind_of(argument)]((known.name, *numbers), argument)


def write(argument: str, value: Any) -> Any:
    """Return the configuration that Keras serializes an argument of the core layer to; a function stays itself."""
    if value is None or callable(value):
        return value
    kind = kind_of(argument)
    name, *numbers = value if isinstance(value, tuple) else (value,)
    (cls, known) = next((cls, ours) for cls, ours in _CLASSES[kind].items() if ours.name == name)
    # A name alone has the defaults of fastbn, which are those of Keras but for l1_l2.
    if not numbers and name == "l1_l2":
        numbers = [0.01, 0.01]
    numbers += [default for _, default in known.numbers[len(numbers) :]]
    config = dict(known.rest) | {key: float(number) for (key, _), number in zip(known.numbers, numbers)}
    return {"module": f"keras.{kind}", "class_name": cls, "config": config, "registered_name": None}


def expressed(argument: str, value: Any, several: bool) -> Any:
    """Return an argument as `read` does, or its default if fastbn has nothing like it.

    Of parameters with several channel axes Keras keeps more axes, so that the norms of constraints go along others.
    """
    try:
        found = read(argument, value)
    except (TypeError, ValueError):
        return DEFAULTS[argument]
    norm = kind_of(argument) == "constraints" and found != "non_neg" and not callable(found)
    return None if several and norm else found


def own(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a live layer's configuration that are Keras's: a class made of it may have more."""
    return {key: value for key, value in config.items() if key in DEFAULTS or key in _OTHERS}


def axis(value: Any) -> int:
    """Return the channel axis from an integer, or from TensorFlow 2's list of one."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(must("axis", "be an integer", repr(value)))
    return operator.index(value)


def arguments(config: Any, without: Sequence[str] = ()) -> dict[str, Any]:
    """Return a configuration's arguments, after a check of all names but some."""
    if not isinstance(config, Mapping):
        raise TypeError(must("config", "be a mapping", type(config).__name__))
    for key, value in config.items():
        if key not in (*DEFAULTS, *_INPUTS, *without) and (key not in _OTHERS or value not in _OTHERS[key]):
            words = f"have no entry {key!r}" + (f" but {_OTHERS[key][0]}" if key in _OTHERS else "")
            raise ValueError(must("config", words, repr(value)))
    return {key: value for key, value in config.items() if key in DEFAULTS}
