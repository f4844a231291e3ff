"""Modules: subclasses of PyTorch's own that differ in who computes.

They add no attribute to what a `torch.nn.BatchNorm` has (those with an activation add its name), so state
dictionaries, pickles of state and `convert` by change of class all fit.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx, nn

from ..activation import named
from . import _eager, bridge
from .functional import dispatch

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchNormReLU1d",
    "BatchNormReLU2d",
    "BatchNormReLU3d",
]


class _Fast(nn.modules.batchnorm._BatchNorm):
    """What all of them do. PyTorch's checks of the rank come with the class that this one is mixed into."""

    activation: bridge.Activation = None
    # Numbers of axes that `_check_input_dim` lets pass, as bits.
    ranks: ClassVar[int] = 0

    def __init_subclass__(cls, **keywords: Any) -> None:
        """Leave the checks to a class that brings its own, or inherits another's."""
        super().__init_subclass__(**keywords)
        known: Any = next(kind for kind in cls.__mro__ if "ranks" in vars(kind))
        if known is not cls and cls._check_input_dim is not known._check_input_dim:
            cls.ranks = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize a batch."""
        return self._normalize(input, None)

    def _normalize(self, input: torch.Tensor, residual: Any) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            y = _eager.call(self, input, residual)
            if y is not None:
                return y
        # What is traced itself has no place in the graph: that is recorded, or refused, as with PyTorch's own.
        if type(input) is not torch.Tensor and isinstance(input, fx.Proxy) and _root(input) is not self:
            return _leaf(self, input, residual)
        self._check_input_dim(input)
        running_mean, running_var, training = self.running_mean, self.running_var, bool(self.training)
        momentum, batches = self.momentum, None
        if training:
            if not self.track_running_stats:
                running_mean = running_var = None
            else:
                counter = self.num_batches_tracked
                if counter is not None:
                    counter.add_(1)
                    if momentum is None:
                        batches = counter
        elif running_mean is None and running_var is None:
            training = True
        return dispatch(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            training,
            0.0 if momentum is None else momentum,
            self.eps,
            self.activation,
            residual,
            batches,
        )


def _root(input: fx.Proxy) -> Any:
    tracer: Any = input.tracer
    return tracer.root


def _leaf(module: nn.Module, input: fx.Proxy, residual: Any) -> Any:
    """Record a call of the module instead of its insides, as torch.fx does with PyTorch's own."""
    tracer: Any = input.tracer
    path = tracer.path_of_module(module)
    arguments = (input,) if residual is None else (input, residual)
    if module._forward_pre_hooks or module._forward_hooks:  # recorded before and after this, and not to be run twice
        itself = tracer.create_proxy("get_attr", path, (), {})
        return tracer.create_proxy("call_method", "forward", (itself, *arguments), {})
    return tracer.create_proxy("call_module", path, arguments, {})


class BatchNorm1d(_Fast, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` (N, C) or (N, C, L), computed by fastbn.

    The arguments, the state dictionary, results within float error and errors are PyTorch's, and ``isinstance(module,
    torch.nn.BatchNorm1d)`` holds. Also under torch.compile, torch.export, DistributedDataParallel, and in forked
    processes.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As in PyTorch, where momentum is the share of the NEW value.

    Examples
    --------
    >>> import torch
    >>> import fastbn.torch
    >>> bn = fastbn.torch.BatchNorm1d(2, momentum=0.5)
    >>> _ = bn(torch.tensor([[0.0, 10.0], [2.0, 30.0]]))
    >>> bn.running_mean
    tensor([ 0.5000, 10.0000])
    """

    ranks = 1 << 2 | 1 << 3


class BatchNorm2d(_Fast, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` (N, C, H, W), contiguous or channels_last, computed by fastbn. See `BatchNorm1d`."""

    ranks = 1 << 4


class BatchNorm3d(_Fast, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` (N, C, D, H, W), contiguous or channels_last_3d, computed by fastbn. See `BatchNorm1d`."""

    ranks = 1 << 5


class _Activated(_Fast):
    def __init__(self, *args: Any, activation: str | tuple[str, float], **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.activation = named(activation)

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Normalize a batch, add the residual and apply the activation."""
        return self._normalize(input, residual)

    def extra_repr(self) -> str:
        """Describe the module."""
        return f"{super().extra_repr()}, activation={self.activation!r}"


class BatchNormAct1d(_Activated, BatchNorm1d):
    """Batch norm and what follows it, in one pass over memory: ``activation(batch_norm(input) + residual)``.

    The state dictionary is that of `torch.nn.BatchNorm1d`.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As in `torch.nn.BatchNorm1d`.
    activation : str or tuple
        relu, relu6, silu, gelu_tanh, leaky_relu (slope 0.01) or ("leaky_relu", slope).

    Examples
    --------
    >>> import torch
    >>> import fastbn.torch
    >>> bn = fastbn.torch.BatchNormAct1d(1, activation="relu", eps=1e-12)
    >>> bn(torch.tensor([[0.0], [2.0]]), residual=torch.tensor([[0.0], [5.0]]))
    tensor([[0.],
            [6.]], grad_fn=<FastBatchNormBackward>)
    """


class BatchNormAct2d(_Activated, BatchNorm2d):
    """``activation(batch_norm(input) + residual)`` of (N, C, H, W). See `BatchNormAct1d`."""


class BatchNormAct3d(_Activated, BatchNorm3d):
    """``activation(batch_norm(input) + residual)`` of (N, C, D, H, W). See `BatchNormAct1d`."""


class _Rectified(_Activated):
    def __init__(self, *args: Any, activation: str | tuple[str, float] = "relu", **keywords: Any) -> None:
        super().__init__(*args, activation=activation, **keywords)


class BatchNormReLU1d(_Rectified, BatchNormAct1d):
    """`BatchNormAct1d` whose activation is relu unless another is given."""


class BatchNormReLU2d(_Rectified, BatchNormAct2d):
    """`BatchNormAct2d` whose activation is relu unless another is given."""


class BatchNormReLU3d(_Rectified, BatchNormAct3d):
    """`BatchNormAct3d` whose activation is relu unless another is given."""
