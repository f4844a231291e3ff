"""Tensors as arrays, and the kernels on them.

A tensor in main memory and its array are the same memory: nothing is copied on the way in or out. Results are allocated
by PyTorch, in the memory format that its own batch norm gives them, so that whatever follows in a model (a `view`, a
convolution that looks at strides) finds what it would have found.

A batch whose channels come last in memory is handed over as (..., C) in C order: the short way of fastbn takes it then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from .. import activation as activations
from .. import averages, checks, functional, kernels, layout, passes
from ..checks import BFLOAT16_BITS
from ..kernels import _calls
from ..passes import SERIAL, Cache
from ..threads import get_num_threads, threads

Array = NDArray[Any]
Result = TypeVar("Result")
Activation = str | tuple[str, float] | None

# dtype of x -> dtypes that its parameters and running statistics may have, all of them the same.
PARAMETER_TYPES: Final = {
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
    torch.float16: (torch.float32, torch.float16),
    torch.bfloat16: (torch.float32, torch.bfloat16),
}
_HALVES: Final = (torch.float16, torch.bfloat16)
_TO_LAST: Final = {3: (0, 2, 1), 4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}


class Statistics(NamedTuple):
    """What normalized a batch, per channel in float64, and what the gradient needs to know besides."""

    mean: Array
    variance: Array
    frozen: bool


def array(tensor: torch.Tensor) -> Array:
    """Return the memory of a tensor as an array."""
    if tensor.dtype is torch.bfloat16:
        bits: Array = tensor.detach().view(torch.int16).numpy()
        return bits.view(BFLOAT16_BITS)
    return tensor.detach().numpy()


def vector(tensor: torch.Tensor | None) -> Array | None:
    """Return a parameter as an array that fastbn takes: of 16-bit ones a float32 copy."""
    if tensor is None:
        return None
    if tensor.dtype in _HALVES:
        return tensor.detach().float().numpy()
    return tensor.detach().numpy()


def empty_like(x: torch.Tensor) -> torch.Tensor:
    """Return an uninitialized tensor as PyTorch's batch norm would allocate its result.

    That is channels_last where x plainly is, and contiguous otherwise; x need not be dense.
    """
    if not x.is_contiguous():
        if x.dim() == 4 and _is_channels_last(x, (1, 3, 2, 0), torch.channels_last):
            return torch.empty_like(x, memory_format=torch.channels_last)
        if x.dim() == 5 and _is_channels_last(x, (1, 4, 3, 2, 0), torch.channels_last_3d):
            return torch.empty_like(x, memory_format=torch.channels_last_3d)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _is_channels_last(x: torch.Tensor, order: tuple[int, ...], form: torch.memory_format) -> bool:
    """Whether PyTorch takes the strides for channels_last: dense so, or growing from the channels outwards."""
    if x.is_contiguous(memory_format=form):
        return True
    shape, strides = x.shape, x.stride()
    if strides[1] == 0:
        return False
    reach = 0
    for axis in order:
        if shape[axis] == 0 or strides[axis] < reach or (axis == 0 and reach == strides[1]):
            return False
        reach = strides[axis] * max(shape[axis], 1)
    return True


def in_order(x: Array) -> tuple[tuple[int, ...] | None, int]:
    """Return how to transpose x so that its channels come last in C order, if they do, and its channel axis then."""
    if not x.flags.c_contiguous and x.ndim in _TO_LAST:
        order = _TO_LAST[x.ndim]
        if x.transpose(order).flags.c_contiguous:
            return order, x.ndim - 1
    return None, 1


def learn_apart(running: list[torch.Tensor], operands: list[torch.Tensor]) -> bool:
    """Whether running statistics have an aligned place for every value, which is no other one's and no operand's."""
    if any((t.stride(0) == 0 and t.shape[0] > 1) or t.data_ptr() % t.element_size() for t in running):
        return False
    stores = [t.untyped_storage()._cdata for t in (*running, *operands)]
    if len({*stores}) == len(stores):
        return True
    arrays = [array(t) for t in (*running, *operands)]
    return not any(checks.overlap(a, b) for i, a in enumerate(arrays[: len(running)]) for b in arrays[i + 1 :])


def limited(call: Callable[[], Result]) -> Result:
    """Make a call with no more threads than PyTorch uses.

    Where both share an OpenMP runtime, fastbn knows of `torch.set_num_threads` by itself; elsewhere it does not.
    """
    if torch.get_num_threads() < get_num_threads():
        with threads(torch.get_num_threads()):
            return call()
    return call()


def team(work: int) -> int:
    """Return how many threads a call uses for so much work: no more than PyTorch does."""
    return min(passes.team(work), torch.get_num_threads())


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: Activation,
    keep: bool = True,
) -> tuple[torch.Tensor, Statistics | None]:
    """Normalize a checked batch and update the running statistics; `momentum` is PyTorch's, the share of the new.

    Parameters
    ----------
    keep : bool
        Whether statistics are returned.
    """
    y = empty_like(x)
    source, target = array(x), array(y)
    order, axis = in_order(source)
    if order is not None:
        source, target = source.transpose(order), target.transpose(order)
    # 16-bit running statistics are read as float32 copies, and are written after the call.
    later = training and running_mean is not None and running_mean.dtype in _HALVES
    gamma, beta = vector(weight), vector(bias)
    mean = None if later else vector(running_mean)
    variance = None if later else vector(running_var)
    if activation is None and residual is None:
        plain = _calls.forward(
            source, gamma, beta, mean, variance, training, 1.0 - momentum, eps, axis, 1, True, target,
            keep or later, True, team, SERIAL,
        )  # fmt: skip
        if plain is not None and not later:
            return y, Statistics(plain[1][3][0], plain[1][3][1], not training) if keep else None
    added = None
    if residual is not None:
        added = array(residual) if order is None else array(residual).transpose(order)
    arguments: dict[str, Any] = {
        "gamma": gamma,
        "beta": beta,
        "moving_mean": mean,
        "moving_variance": variance,
        "training": training,
        "momentum": 1.0 - momentum,
        "epsilon": eps,
        "axis": axis,
        "ddof": 1,
        "activation": activation,
        "residual": added,
        "out": target,
    }

    def call() -> Statistics | None:
        if not (keep or later):
            functional.batch_norm(source, **arguments)
            return None
        _, cache = functional.batch_norm_forward(source, **arguments)
        return Statistics(cache.statistics.mean, cache.statistics.variance, not training)

    statistics = limited(call)
    if later and source.size:
        assert running_mean is not None
        assert running_var is not None
        assert statistics is not None
        update(running_mean, running_var, statistics.mean, statistics.variance, values_per_channel(x), momentum)
    return y, statistics


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor | None,
    statistics: Statistics,
    eps: float,
    activation: Activation,
    has_residual: bool,
) -> tuple[torch.Tensor, Array, Array, torch.Tensor | None]:
    """Return dx, dweight, dbias (float32, or float64 for float64 data) and the gradient of the residual."""
    dx = empty_like(x)
    source, gradient, target = array(x), array(dy), array(dx)
    order, axis = in_order(source)
    kept: dict[str, Any] = {}
    for name, tensor in (("y", y), ("residual", residual)):
        if tensor is not None:
            kept[name] = array(tensor) if order is None else array(tensor).transpose(order)
    if order is not None:
        source, gradient, target = source.transpose(order), gradient.transpose(order), target.transpose(order)
    gamma = vector(weight)
    if activation is None and not has_residual:
        plain = _calls.backward(
            gradient, source, axis, gamma, statistics.mean, statistics.variance, eps, statistics.frozen, target,
            team, SERIAL,
        )  # fmt: skip
        if plain is not None:
            return dx, plain[1], plain[2], None
    cache = Cache(
        source,
        (axis,),
        "inference" if statistics.frozen else "train",
        statistics[:2],
        gamma,
        eps,
        activation=activations.resolved(activation),
        has_residual=has_residual,
        beta=vector(bias),
        **kept,
    )
    _, dweight, dbias, *rest = limited(lambda: functional.batch_norm_backward(gradient, cache, out=target))
    dresidual = None
    if rest:
        dresidual = tensor_of(rest[0] if order is None else rest[0].transpose(np.argsort(order)))
    return dx, dweight, dbias, dresidual


def gate(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor | None,
    statistics: Statistics,
    eps: float,
    activation: Activation,
) -> torch.Tensor:
    """Return the gradient before the activation."""
    resolved = activations.resolved(activation)
    assert resolved is not None
    source, result = array(x), empty_like(x)
    other = residual if y is None else y
    first, second = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    if source.size:
        passes.run(
            kernels.FROZEN,
            (1,),
            source,
            dy=array(dy),
            out=layout.like(source),
            gamma=vector(weight),
            beta=vector(bias),
            mean=statistics.mean,
            variance=statistics.variance,
            epsilon=eps,
            first=first,
            second=second,
            residual=None if other is None else array(other),
            bend=resolved.bend,
            by_output=y is not None,
            kept=array(result),
        )
    return result


def update(
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    mean: Array,
    variance: Array,
    count: int,
    momentum: float,
) -> None:
    """Update running statistics of any dtype in place."""
    if not count:
        return
    half = running_mean.dtype in _HALVES
    targets = [t.detach().float() if half else t.detach() for t in (running_mean, running_var)]
    averages.update_moving(
        targets[0].numpy(), targets[1].numpy(), mean, variance, momentum=1.0 - momentum, count=count, ddof=1
    )
    if half:
        for tensor, target in zip((running_mean, running_var), targets):
            tensor.detach().copy_(target)


def tensor_of(values: Array) -> torch.Tensor:
    """Return an array that fastbn allocated as a tensor."""
    if values.dtype == BFLOAT16_BITS:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def kept(
    activation: Activation, y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return what of y, bias and residual the derivative of an activation is found from."""
    resolved = activations.resolved(activation)
    if resolved is None:
        return None, None, None
    if resolved.from_output and residual is not None:
        return y, None, None
    return None, bias, residual


def values_per_channel(x: torch.Tensor) -> int:
    """Return how many values a channel has, also for an empty batch."""
    return math.prod(x.shape[:1] + x.shape[2:])
