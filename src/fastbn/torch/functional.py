"""`batch_norm` on tensors: which way a call goes.

There are four:

- *Straight*: a plain tensor of float32 or float64 in eager mode, contiguous or channels_last (_eager.pyx).
- *At once*: any other plain tensor in eager mode goes through a ``torch.autograd.Function`` to the kernels, or to them
  alone where nothing asks for a gradient.
- *By operators*, ``torch.ops.fastbn``, wherever the call is recorded rather than carried out: torch.compile,
  torch.export, torch.jit.trace, make_fx, fake tensors. An autograd.Function could be baked in as a constant there, or
  differentiated silently wrong; an operator is opaque, and says what it changes and what shape and strides come out.
- *PyTorch's own*, for what fastbn does not take: other devices and dtypes, transforms of torch.func, forward-mode
  derivatives, tensor subclasses, a momentum outside of [0, 1], running statistics that require a gradient or share
  memory with an operand, and everything that is an error, which is PyTorch's then.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad
from torch.nn import functional as F

from .. import passes
from ..activation import named, resolved
from ..threads import get_num_threads
from . import _eager, bridge, derivatives, operators

# How PyTorch says what goes on around a call. There is no public way to ask for these.
_transforms = torch._C._functorch.peek_interpreter_stack
_modes = torch._C._len_torch_dispatch_stack
# make_fx(pre_dispatch=True) has a stack of modes of its own, and one on that of functions, which is asked in no time.
_function_modes = torch._C._len_torch_function_stack
_is_pre_dispatch = functools.partial(torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch)
_trace = torch._C._get_tracing_state
_is_batched = torch._C._functorch.is_legacy_batchedtensor  # is_grads_batched=True, jacobian(vectorize=True)
_TYPES: Final = frozenset((torch.Tensor, torch.nn.Parameter))


def batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | tuple[str, float] | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalize a batch per channel: ``torch.nn.functional.batch_norm``, with an activation and a residual.

    ``y = activation((input - mean) / sqrt(variance + eps) * weight + bias + residual)``

    Parameters
    ----------
    input : Tensor of shape (N, C, ...)
        float32, float64, float16 or bfloat16 in main memory; any other goes to PyTorch.
    running_mean, running_var : Tensor of shape (C,), optional
        Updated in place by training: ``running = (1 - momentum) * running + momentum * batch``, the variance of the
        batch divided by its count less 1. Needed without training.
    weight, bias : Tensor of shape (C,), optional
        Scale and shift.
    training : bool, default: False
        Whether to normalize with the statistics of the batch.
    momentum : float, default: 0.1
        Share of the NEW value, as everywhere in PyTorch; fastbn's NumPy functions name the share of the old one.
    eps : float, default: 1e-5
        Added to the variance.
    activation : str or tuple, optional
        Applied in the same pass: relu, relu6, silu, gelu_tanh, leaky_relu (slope 0.01) or ("leaky_relu", slope).
    residual : Tensor of input's shape and dtype, optional
        Added before the activation. What broadcasts or has another dtype is added by PyTorch.

    Returns
    -------
    Tensor
        Of input's shape and dtype; channels_last where input is, else contiguous.

    Raises
    ------
    ValueError, TypeError
        If activation is none of those.
    Exception
        Whatever PyTorch raises for other arguments.

    Examples
    --------
    >>> import torch
    >>> import fastbn.torch
    >>> x = torch.tensor([[0.0, 10.0], [2.0, 30.0]])
    >>> fastbn.torch.batch_norm(x, None, None, training=True, eps=1e-12)
    tensor([[-1., -1.],
            [ 1.,  1.]])
    """
    if not torch.compiler.is_compiling():
        activation = named(activation)
        if isinstance(training, bool):
            y = _eager.normalize(
                input, weight, bias, residual, running_mean, running_var, None, training, momentum, eps, activation
            )
            if y is not None:
                return y
    return dispatch(input, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual)


def dispatch(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: bridge.Activation = None,
    residual: Tensor | None = None,
    batches: Tensor | None = None,
) -> Tensor:
    """Send a call its way; `batches` is a counter whose reciprocal stands for the momentum."""
    if not takes(x, running_mean, running_var, weight, bias, training, momentum, eps):
        return _pytorch(
            x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, batches
        )
    if residual is not None and not fits(residual, x):
        z = dispatch(x, running_mean, running_var, weight, bias, training, momentum, eps, None, None, batches)
        return activated(z + residual, activation)
    if _is_transformed():  # compiled or not: operators would lose tangents
        return _pytorch(
            x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, batches
        )
    if torch.compiler.is_compiling() or _modes() or _is_pre_dispatch() or _trace() is not None:
        return _by_operators(
            x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, batches
        )
    operands = [t for t in (x, residual, weight, bias) if t is not None]
    running = [t for t in (running_mean, running_var) if t is not None]
    if not all(map(_plain, operands + running)) or (training and not bridge.learn_apart(running, operands)):
        return _pytorch(
            x, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual, batches
        )
    if batches is not None:
        momentum = 1.0 / float(batches)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return StridedBatchNorm.apply(
            x, weight, bias, residual, (running_mean, running_var), training, momentum, eps, activation
        )
    return bridge.forward(
        x, weight, bias, residual, running_mean, running_var, training, momentum, eps, activation, keep=False
    )[0]


def takes(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> bool:
    """Whether fastbn plainly knows what to do: PyTorch decides about all else, also about what is an error."""
    if not (_is_here(x) and isinstance(training, bool) and _is_real(momentum) and _is_real(eps)):
        return False
    types = bridge.PARAMETER_TYPES.get(x.dtype)
    if types is None or x.dim() < 2:
        return False
    parameters = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if (running_mean is None) != (running_var is None) or not all(_is_here(t) for t in parameters):
        return False
    # torch.jit.trace warns of every look at a size.
    sized = torch.compiler.is_compiling() or _trace() is None
    if training:
        if eps <= 0.0 or (sized and x.numel() == x.shape[1]):
            return False
    elif running_mean is None or eps < 0.0:
        return False
    if not (eps < math.inf and 0.0 <= momentum <= 1.0):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (running_mean, running_var)):
        return False
    for tensor in parameters:
        if tensor.dtype not in types or tensor.dtype is not parameters[0].dtype or tensor.dim() != 1:
            return False
        if sized and tensor.shape != x.shape[1:2]:
            return False
    return True


@torch.compiler.assume_constant_result  # asked while torch.compile traces, and it is as then whenever the code runs
def _is_transformed() -> bool:
    return _transforms() is not None or _forward_ad._current_level >= 0


def _is_here(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_cpu and x.layout is torch.strided


def _is_real(number: Any) -> bool:
    return isinstance(number, float) or type(number) is int


def _plain(x: Tensor) -> bool:
    return type(x) in _TYPES and not x.is_neg() and not x.is_nested and not x._is_zerotensor() and _has_memory(x)


def _has_memory(x: Tensor) -> bool:
    """Whether values are a tensor's own: one that wraps another for functionalization or a transform has none."""
    try:
        return x.data_ptr() != 0 or x.numel() == 0
    except RuntimeError:
        return False


def in_memory(x: Tensor) -> Tensor:
    """Return a tensor whose values are those in memory, to be read: views may negate them, and zeros have none."""
    return x if _plain(x) else x.clone()


def fits(residual: Any, x: Tensor) -> bool:
    """Whether fastbn can add it: `fuse` cannot know whether it is a tensor, or a number from the graph."""
    return _is_here(residual) and residual.shape == x.shape and residual.dtype is x.dtype


def _by_operators(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: bridge.Activation,
    residual: Tensor | None,
    batches: Tensor | None,
) -> Tensor:
    name, slope = operators.encoded(activation)
    if not training:
        assert running_mean is not None
        assert running_var is not None
        return operators.batch_norm_eval(x, running_mean, running_var, weight, bias, residual, eps, name, slope)
    y, mean, variance = operators.batch_norm_train(x, weight, bias, residual, eps, name, slope)
    if running_mean is not None and running_var is not None:
        operators.batch_norm_update(running_mean, running_var, mean, variance, x.detach(), momentum, batches)
    return y


def _pytorch(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: bridge.Activation,
    residual: Tensor | None,
    batches: Tensor | None,
) -> Tensor:
    if batches is not None:
        momentum = 1.0 / float(batches)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return activated(y if residual is None else y + residual, activation)


def activated(z: Tensor, activation: bridge.Activation) -> Tensor:
    """Apply an activation by PyTorch."""
    name, slope = operators.encoded(activation)
    if name == "":
        return z
    if name == "leaky_relu":
        return F.leaky_relu(z, slope)
    if name == "gelu_tanh":
        return F.gelu(z, approximate="tanh")
    return {"relu": F.relu, "relu6": F.relu6, "silu": F.silu}[name](z)


class Kept(NamedTuple):
    """What a gradient needs to know besides tensors; `_eager.Call` has the same."""

    statistics: Any  # mean and variance, in float64
    frozen: bool
    eps: float
    activation: bridge.Activation
    has_residual: bool
    bias_type: torch.dtype | None


class StridedBatchNorm(torch.autograd.Function):
    """The way at once of tensors that `_eager` does not take."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running: tuple[Tensor | None, Tensor | None],
        training: bool,
        momentum: float,
        eps: float,
        activation: bridge.Activation,
    ) -> Tensor:
        y, statistics = bridge.forward(x, weight, bias, residual, *running, training, momentum, eps, activation)
        assert statistics is not None
        bias_type = None if bias is None else bias.dtype
        ctx.call = Kept(statistics[:2], statistics.frozen, eps, activation, residual is not None, bias_type)
        kept = bridge.kept(activation, y, bias, residual)
        ctx.save_for_backward(x, weight, kept[1], kept[2], kept[0])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return (*gradient(ctx, dy, *ctx.saved_tensors)[:4], *5 * [None])


def gradient(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, weight, bias, residual and None; by operators where they may be differentiated."""
    call: Kept = ctx.call
    result: tuple[Tensor, Tensor, Tensor, Tensor]
    # Compiled autograd sees through PyTorch's own operations as transforms do.
    transformed = torch.compiler.is_compiling() or _is_transformed() or _is_batched(dy)
    if transformed or torch.is_grad_enabled() or _modes() or _is_pre_dispatch():
        name, slope = operators.encoded(call.activation)
        mean, variance = (torch.from_numpy(values) for values in call.statistics)
        arguments = dy, x, mean, variance, y, weight, bias, residual, call.eps, name, slope, call.frozen
        if transformed:
            result = derivatives.first(*arguments)
        else:
            result = operators.gradients(*arguments, call.has_residual)
    else:
        statistics = bridge.Statistics(call.statistics[0], call.statistics[1], call.frozen)
        dx, dweight, dbias, dresidual = bridge.backward(
            in_memory(dy), x, weight, bias, residual, y, statistics, call.eps, call.activation, call.has_residual
        )
        result = dx, torch.from_numpy(dweight), torch.from_numpy(dbias), dresidual  # type: ignore[assignment]
    types = None if weight is None else weight.dtype, call.bias_type, x.dtype if call.has_residual else None
    given = (result[0], *operators.as_asked(result, types))
    return (*(g if wanted else None for g, wanted in zip(given, ctx.needs_input_grad)), None)


class FastBatchNorm(torch.autograd.Function):
    """The straight way."""

    forward = staticmethod(_eager.forward)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _eager.backward(ctx, dy)  # compiled autograd reads the code of this function


_eager.connect(
    tensor=torch.Tensor,
    parameter=torch.nn.Parameter,
    is_grad_enabled=torch.is_grad_enabled,
    transforms=_transforms,
    modes=_modes,
    function_modes=_function_modes,
    is_pre_dispatch=_is_pre_dispatch,
    trace=_trace,
    forward_ad=_forward_ad,
    # Without `Function.apply`, which only looks for transforms.
    apply=super(torch.autograd.Function, FastBatchNorm).apply,
    get_num_threads=get_num_threads,
    get_torch_threads=torch.get_num_threads,
    resolved=resolved,
    gradient=gradient,
    types=(torch.float32, torch.float64),
    serial=passes.SERIAL,
    values_per_thread=passes.VALUES_PER_THREAD,
    api=getattr(torch.Tensor, "__dlpack_c_exchange_api__", None),
)
