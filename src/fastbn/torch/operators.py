"""The operators ``torch.ops.fastbn``: what compilers, exporters and tracers see, and their gradients.

Each is a function of tensors without side effects, but for `batch_norm_update`, which writes the running statistics.
An activation is a name ("" for none) and a slope, which only leaky_relu looks at. Statistics go from one operator to
the next as float64 tensors; they are functions of x that no gradient is taken of by themselves: the gradients of
`batch_norm_train` and `batch_norm_backward` go through them.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, library

from ..activation import SLOPE
from . import bridge, derivatives

Optional: TypeAlias = Tensor | None


def encoded(activation: bridge.Activation) -> tuple[str, float]:
    """Return an activation as operators take it."""
    if activation is None:
        return "", 0.0
    if isinstance(activation, tuple):
        return activation[0], float(activation[1])
    return activation, SLOPE


def decoded(activation: str, slope: float) -> bridge.Activation:
    """Return an activation as fastbn takes it."""
    if not activation:
        return None
    return ("leaky_relu", slope) if activation == "leaky_relu" else activation


def _vectors(mean: Tensor, variance: Tensor, frozen: bool) -> bridge.Statistics:
    return bridge.Statistics(mean.detach().numpy(), variance.detach().numpy(), frozen)


@library.custom_op(
    "fastbn::batch_norm_train",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str activation, float slope) "
    "-> (Tensor, Tensor, Tensor)",
)
def batch_norm_train(
    x: Tensor, weight: Optional, bias: Optional, residual: Optional, eps: float, activation: str, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, mean and variance (divided by the count) of a batch."""
    act = decoded(activation, slope)
    y, statistics = bridge.forward(x, weight, bias, residual, None, None, True, 0.0, eps, act)
    assert statistics is not None
    return y, torch.from_numpy(statistics.mean), torch.from_numpy(statistics.variance)


@batch_norm_train.register_fake
def _(
    x: Tensor, weight: Optional, bias: Optional, residual: Optional, eps: float, activation: str, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    mean, variance = (x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(2))
    return bridge.empty_like(x), mean, variance


@library.custom_op(
    "fastbn::batch_norm_eval",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, Tensor? residual, "
    "float eps, str activation, float slope) -> Tensor",
)
def batch_norm_eval(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Optional,
    bias: Optional,
    residual: Optional,
    eps: float,
    activation: str,
    slope: float,
) -> Tensor:
    """Return y with given statistics."""
    act = decoded(activation, slope)
    return bridge.forward(x, weight, bias, residual, running_mean, running_var, False, 0.0, eps, act, keep=False)[0]


@batch_norm_eval.register_fake
def _(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Optional,
    bias: Optional,
    residual: Optional,
    eps: float,
    activation: str,
    slope: float,
) -> Tensor:
    return bridge.empty_like(x)


@library.custom_op(
    "fastbn::batch_norm_update",
    mutates_args=("running_mean", "running_var"),
    device_types="cpu",
    schema="(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor variance, Tensor x, float momentum, "
    "Tensor? batches) -> ()",
)
def batch_norm_update(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    variance: Tensor,
    x: Tensor,
    momentum: float,
    batches: Optional,
) -> None:
    """Update running statistics; of x only the shape counts. `batches`: a counter, its reciprocal is the momentum."""
    if batches is not None:
        momentum = 1.0 / float(batches)
    count = bridge.values_per_channel(x)
    bridge.update(running_mean, running_var, mean.detach().numpy(), variance.detach().numpy(), count, momentum)


@batch_norm_update.register_fake
def _(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    variance: Tensor,
    x: Tensor,
    momentum: float,
    batches: Optional,
) -> None:
    return None


@library.custom_op(
    "fastbn::batch_norm_gate",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dy, Tensor x, Tensor mean, Tensor variance, Tensor? y, Tensor? weight, Tensor? bias, "
    "Tensor? residual, float eps, str activation, float slope, bool frozen) -> Tensor",
)
def batch_norm_gate(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    y: Optional,
    weight: Optional,
    bias: Optional,
    residual: Optional,
    eps: float,
    activation: str,
    slope: float,
    frozen: bool,
) -> Tensor:
    """Return the gradient before the activation: dy times the activation's derivative, found from y or from x."""
    statistics = _vectors(mean, variance, frozen)
    act = decoded(activation, slope)
    return bridge.gate(dy, x, weight, bias, residual, y, statistics, eps, act)


@batch_norm_gate.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    y: Optional,
    weight: Optional,
    bias: Optional,
    residual: Optional,
    eps: float,
    activation: str,
    slope: float,
    frozen: bool,
) -> Tensor:
    return bridge.empty_like(x)


@library.custom_op(
    "fastbn::batch_norm_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dy, Tensor x, Tensor mean, Tensor variance, Tensor? weight, float eps, bool frozen) "
    "-> (Tensor, Tensor, Tensor)",
)
def batch_norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, variance: Tensor, weight: Optional, eps: float, frozen: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias; the latter float32, or float64 for float64 data."""
    statistics = _vectors(mean, variance, frozen)
    dx, dweight, dbias, _ = bridge.backward(dy, x, weight, None, None, None, statistics, eps, None, False)
    return dx, torch.from_numpy(dweight), torch.from_numpy(dbias)


@batch_norm_backward.register_fake
def _(
    dy: Tensor, x: Tensor, mean: Tensor, variance: Tensor, weight: Optional, eps: float, frozen: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dweight, dbias = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    return bridge.empty_like(x), dweight, dbias


@library.custom_op(
    "fastbn::batch_norm_backward_fused",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor dy, Tensor x, Tensor mean, Tensor variance, Tensor? y, Tensor? weight, Tensor? bias, "
    "Tensor? residual, float eps, str activation, float slope, bool frozen, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def batch_norm_backward_fused(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    y: Optional,
    weight: Optional,
    bias: Optional,
    residual: Optional,
    eps: float,
    activation: str,
    slope: float,
    frozen: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias and, if that is to be kept (else it is empty), the gradient before the activation."""
    statistics = _vectors(mean, variance, frozen)
    act = decoded(activation, slope)
    dx, dweight, dbias, dz = bridge.backward(dy, x, weight, bias, residual, y, statistics, eps, act, keep)
    return dx, torch.from_numpy(dweight), torch.from_numpy(dbias), x.new_empty(0) if dz is None else dz


@batch_norm_backward_fused.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    y: Optional,
    weight: Optional,
    bias: Optional,
    residual: Optional,
    eps: float,
    activation: str,
    slope: float,
    frozen: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dweight, dbias = (x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))
    return bridge.empty_like(x), dweight, dbias, bridge.empty_like(x) if keep else x.new_empty(0)


def gradients(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    y: Optional,
    weight: Optional,
    bias: Optional,
    residual: Optional,
    eps: float,
    activation: str,
    slope: float,
    frozen: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias and, to be kept, dresidual, by operators: they can be differentiated again."""
    if activation:
        return batch_norm_backward_fused(
            dy, x, mean, variance, y, weight, bias, residual, eps, activation, slope, frozen, keep
        )
    return (*batch_norm_backward(dy, x, mean, variance, weight, eps, frozen), dy)


def _train_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, ctx.eps, activation, slope = inputs
    y, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.activation, ctx.slope = activation, slope
    kept = bridge.kept(decoded(activation, slope), y, bias, residual)
    ctx.types = _types(weight, bias, residual)
    ctx.save_for_backward(x, mean, variance, kept[0], weight, *kept[1:])


def _train_backward(ctx: Any, dy: Tensor, _mean: Any, _variance: Any) -> tuple[Any, ...]:
    result = _gradients(ctx, dy, False)
    return (result[0], *as_asked(result, ctx.types), None, None, None)


def _gradients(ctx: Any, dy: Tensor, frozen: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, mean, variance, y, weight, bias, residual = ctx.saved_tensors
    keep = ctx.types[2] is not None
    return gradients(dy, x, mean, variance, y, weight, bias, residual, ctx.eps, ctx.activation, ctx.slope, frozen, keep)


def _eval_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, running_mean, running_var, weight, bias, residual, ctx.eps, activation, slope = inputs
    ctx.activation, ctx.slope = activation, slope
    kept = bridge.kept(decoded(activation, slope), output, bias, residual)
    ctx.types = _types(weight, bias, residual)
    # Copies: training may change them before the gradient is taken.
    mean, variance = (t.detach().to(torch.float64, copy=True) for t in (running_mean, running_var))
    ctx.save_for_backward(x, mean, variance, kept[0], weight, *kept[1:])


def _eval_backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    result = _gradients(ctx, dy, True)
    return (result[0], None, None, *as_asked(result, ctx.types), None, None, None)


def _types(weight: Optional, bias: Optional, residual: Optional) -> tuple[torch.dtype | None, ...]:
    return tuple(None if t is None else t.dtype for t in (weight, bias, residual))


def as_asked(
    result: tuple[Tensor, Tensor, Tensor, Tensor], types: tuple[torch.dtype | None, ...]
) -> tuple[Optional, Optional, Optional]:
    """Return the gradients of weight, bias and residual in their types, None where there is none."""
    _, dweight, dbias, dresidual = result
    weight, bias, residual = types
    return (
        None if weight is None else dweight.to(weight),
        None if bias is None else dbias.to(bias),
        None if residual is None else dresidual,
    )


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, x, mean, variance, weight, ctx.eps, ctx.frozen = inputs
    ctx.save_for_backward(dy, x, mean, variance, weight)


def _double_backward(ctx: Any, gx: Tensor, gweight: Tensor, gbias: Tensor) -> tuple[Any, ...]:
    dy, x, mean, variance, weight = ctx.saved_tensors
    ddy, dx, dweight = derivatives.second(gx, gweight, gbias, dy, x, mean, variance, weight, ctx.eps, ctx.frozen)
    return ddy, dx, None, None, dweight, None, None


def _gate_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, x, mean, variance, y, weight, bias, residual, *ctx.rest = inputs
    ctx.save_for_backward(dy, x, mean, variance, y, weight, bias, residual)


def _gate_backward(ctx: Any, gz: Tensor) -> tuple[Any, ...]:
    ddy, dx, *rest = _gate_second(gz, *ctx.saved_tensors, *ctx.rest)
    return ddy, dx, None, None, None, *rest, None, None, None, None


def _gate_second(
    gz: Tensor,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    y: Optional,
    weight: Optional,
    bias: Optional,
    residual: Optional,
    eps: float,
    activation: str,
    slope: float,
    frozen: bool,
) -> tuple[Optional, ...]:
    """Differentiate dy * f'(z), z being the value before the activation f: by dy, x, weight, bias and residual."""
    ddy = batch_norm_gate(
        gz, x, mean, variance, y, weight, bias, residual, eps, activation, slope, frozen
    )  # fmt: skip
    if not derivatives.is_smooth(activation):
        return ddy, None, None, None, None
    if frozen:
        z = batch_norm_eval(x, mean, variance, weight, bias, residual, eps, "", 0.0)
    else:
        z = batch_norm_train(x, weight, bias, residual, eps, "", 0.0)[0]
    dz = (gz.to(torch.float64) * dy * derivatives.of_slope(z.to(torch.float64), activation)).to(x.dtype)
    result = gradients(dz, x, mean, variance, None, weight, bias, residual, eps, "", 0.0, frozen, True)
    return ddy, result[0], *as_asked(result, _types(weight, bias, residual))


def _fused_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, x, mean, variance, y, weight, bias, residual, *ctx.rest = inputs
    ctx.save_for_backward(dy, x, mean, variance, y, weight, bias, residual)


def _fused_double_backward(ctx: Any, gx: Tensor, gweight: Tensor, gbias: Tensor, gz: Tensor) -> tuple[Any, ...]:
    """Differentiate the two steps, the gate and the gradient, one after the other."""
    dy, x, mean, variance, y, weight, bias, residual = ctx.saved_tensors
    *options, keep = ctx.rest
    eps, frozen = options[0], options[-1]
    before = batch_norm_gate(dy, x, mean, variance, y, weight, bias, residual, *options)
    dbefore, dx, dweight = derivatives.second(gx, gweight, gbias, before, x, mean, variance, weight, eps, frozen)
    if keep:
        dbefore = dbefore + gz
    ddy, dx2, dweight2, dbias, dresidual = _gate_second(
        dbefore, dy, x, mean, variance, y, weight, bias, residual, *options
    )
    if dx2 is not None:
        dx = dx + dx2
    if dweight2 is not None:
        dweight = dweight2 if dweight is None else dweight + dweight2
    return ddy, dx, None, None, None, dweight, dbias, dresidual, *(5 * [None])


batch_norm_train.register_autograd(_train_backward, setup_context=_train_context)
batch_norm_eval.register_autograd(_eval_backward, setup_context=_eval_context)
batch_norm_gate.register_autograd(_gate_backward, setup_context=_gate_context)
batch_norm_backward.register_autograd(_double_backward, setup_context=_backward_context)
batch_norm_backward_fused.register_autograd(_fused_double_backward, setup_context=_fused_context)
