"""What the layers of TensorFlow 1 compute, by the core: normalize now, and hand out the updates for later."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import averages, checks, composite, functional, modes
from .. import layout as layouts
from .. import options as core
from ..composite import Batch, Composite
from ..errors import must
from ..kernels import _channels
from ..passes import Cache
from ._graph import Variable

Array = NDArray[Any]
Action = tuple[Variable, Callable[[], None]]

# What an update of the mean writes; that of the variance writes the other variables.
_OF_MEAN = ("moving_mean", "renorm_mean", "renorm_mean_weight")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a layer normalizes."""

    axes: tuple[int, ...]  # ascending, not negative
    momentum: float
    epsilon: float
    ddof: int
    options: core.Options
    activation: Any = None


def checked_options(**given: Any) -> core.Options:
    """Return checked options of the core, with TensorFlow's ghost batches: every group has V samples."""
    defaults: dict[str, Any] = {
        "ddof": 0,
        "zero_debias": False,
        "track": True,
        "on_nonfinite": "propagate",
        "renorm": False,
        "renorm_clipping": None,
        "renorm_momentum": 0.99,
        "renorm_scheme": "tf1",
        "virtual_batch_size": None,
        "virtual_groups": "strided",
        "allow_incomplete": False,
        "adjustment": None,
    }
    return core.checked(**defaults | given)


def normalize(
    x: Array,
    settings: Settings,
    variables: Mapping[str, Variable],
    mode: modes.Mode,
    sample_weight: Array | None = None,
) -> tuple[Array, Cache | Composite, list[Action]]:
    """Normalize a batch.

    Parameters
    ----------
    x : ndarray
        The batch, checked.
    settings : Settings
        How.
    variables : mapping
        By their names in the layer: moving_mean and moving_variance; as far as there are such, gamma and beta, the
        averages of batch renormalization, and biased and local_step of a debiased mean.
    mode : {"train", "batch", "inference"}
        As in `fastbn.modes`.
    sample_weight : ndarray, optional
        How often each sample counts, where the batch is looked at; then there are no options but a debiased mean.

    Returns
    -------
    y : ndarray
        The result.
    cache : Cache or Composite
        For the gradient.
    updates : list of (Variable, callable)
        In mode "train", what will move the mean and the variance by this batch. Each reads its variables when called.
    """
    axes, options = settings.axes, settings.options
    shape = layouts.channel_shape(x.shape, axes)
    arrays = {n: v.value.reshape(shape) if v.value.size == np.prod(shape) else v.value for n, v in variables.items()}
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        if name in arrays and arrays[name].shape != shape:
            raise ValueError(must("inputs", f"have {arrays[name].size} channels, as {variables[name].op_name}", shape))
    gamma, beta = arrays.get("gamma"), arrays.get("beta")
    if mode == "inference":
        y, cache = functional.batch_norm_forward(
            x,
            gamma=gamma,
            beta=beta,
            moving_mean=variables["moving_mean"].eval().reshape(shape),
            moving_variance=variables["moving_variance"].eval().reshape(shape),
            epsilon=settings.epsilon,
            axis=axes,
            activation=settings.activation,
        )
        return y, cache, []
    if sample_weight is not None:
        y, cache = functional.batch_norm_forward(
            x,
            gamma=gamma,
            beta=beta,
            training=True,
            update=False,
            epsilon=settings.epsilon,
            axis=axes,
            activation=settings.activation,
            sample_weight=sample_weight,
        )
        batch = Batch(cache.statistics, cache.statistics.variance, layouts.values_per_channel(x.shape, axes))
        updates = mode == "train" and x.size > 0 and bool(np.any(sample_weight))
        return y, cache, _updates(settings, variables, batch) if updates else []
    renormalizer = options.renormalizer()
    correction = None
    if renormalizer is not None:
        before = {name: variables[name].value.copy() for name in renormalizer.names}
        correction = partial(renormalizer.correction, before, epsilon=settings.epsilon)
    with np.errstate(all="ignore"):
        y, last, batch = composite.forward(
            x,
            gamma=gamma,
            beta=beta,
            epsilon=settings.epsilon,
            axis=axes,
            layout=None,
            ddof=settings.ddof,
            activation=settings.activation,
            residual=None,
            out=None,
            groups=options.groups(x, axes, None),
            correction=correction,
            adjustment=options.adjusted(x, axes, None),
        )
    if mode != "train" or not x.size:
        return y, last, []
    return y, last, _updates(settings, variables, batch)


def _updates(settings: Settings, variables: Mapping[str, Variable], batch: Batch) -> list[Action]:
    mean, variance = variables["moving_mean"], variables["moving_variance"]
    if settings.options.renorm:
        both = partial(_renormalize, settings, variables, batch)
        return [(mean, partial(both, of_mean=True)), (variance, partial(both, of_mean=False))]
    if settings.options.zero_debias:
        move_mean: Callable[[], None] = partial(_move_debiased, settings, variables, batch.statistics.mean)
    else:
        move_mean = partial(_move, mean.value, batch.statistics.mean, settings.momentum)
    return [(mean, move_mean), (variance, partial(_move, variance.value, batch.variance, settings.momentum))]


def _move(average: Array, value: Array, share: float) -> None:
    _channels.put([(average, averages.blended(average, value, share))])


def _renormalize(settings: Settings, variables: Mapping[str, Variable], batch: Batch, *, of_mean: bool) -> None:
    """Carry out one half of the update of batch renormalization: the core finds both."""
    renormalizer = settings.options.renormalizer()
    assert renormalizer is not None
    values = {name: variables[name].value for name in ("moving_mean", "moving_variance", *renormalizer.names)}
    half = [id(value) for name, value in values.items() if (name in _OF_MEAN) == of_mean]
    moving = values["moving_mean"], values["moving_variance"]
    pairs = renormalizer.updated(values, *moving, batch.statistics, settings.epsilon, settings.momentum, None)
    _channels.put([(target, value) for target, value in pairs if id(target) in half])


def _move_debiased(settings: Settings, variables: Mapping[str, Variable], value: Array) -> None:
    step = variables["local_step"].value
    share = averages.share(settings.momentum, int(step), zero_debias=True)
    biased, mean = variables["biased"].value, variables["moving_mean"].value
    pairs = [
        (biased, averages.blended(biased, value, settings.momentum)),
        (mean, averages.blended(mean, value, share)),
        (step, np.asarray(int(step) + 1, step.dtype)),
    ]
    _channels.put(pairs)


def backward(dy: Any, cache: Cache | Composite) -> tuple[Array, ...]:
    """Return dx, dgamma and dbeta."""
    if isinstance(cache, Composite):
        return cache.backward(checks.as_array(dy, "dy"), None)
    return functional.batch_norm_backward(dy, cache)
