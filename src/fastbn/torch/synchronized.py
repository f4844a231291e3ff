"""Statistics of all processes of a group: synchronized batch norm for CPUs, over gloo.

What is sent, how it is put together and the arithmetic are those of `fastbn.synchronized`; here tensors become arrays,
and vectors travel by `torch.distributed`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed, nn

from .. import passes
from .. import synchronized as core
from ..errors import must
from ..moments import Moments
from . import bridge
from .functional import in_memory, takes
from .modules import _Fast

Array = NDArray[Any]


class SyncBatchNorm(_Fast):
    """Batch norm over the batches of all processes of a group, on CPUs, which PyTorch's own does not do.

    Each process may have another number of samples, or none. Every process of the group has to make the same calls
    in training, and backward ones as well. Outside of training, in a group of one, and without `torch.distributed`
    it is an ordinary batch norm.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As in `torch.nn.BatchNorm1d`.
    process_group : torch.distributed.ProcessGroup, optional
        The default group if None. The backend must carry CPU tensors: gloo.

    Notes
    -----
    It is no subclass of `torch.nn.SyncBatchNorm`, which DistributedDataParallel refuses on CPUs. The gradients of
    weight and bias are those of a process's own part; DistributedDataParallel averages them. There is no second
    derivative, and torch.compile leaves the graph here.

    Examples
    --------
    >>> import torch
    >>> import fastbn.torch
    >>> fastbn.torch.SyncBatchNorm(3)(torch.zeros(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    process_group: Any
    ranks = ~0b11
    # What `revert` makes of it: the name of one of PyTorch's classes.
    converted_from: str | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **keywords: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **keywords)
        self.process_group = process_group

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle and a deep copy hold: all but the process group, which belongs to this process."""
        return {**self.__dict__, "process_group": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """Copy everything but the process group, which is shared."""
        import copy

        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        other.process_group = self.process_group
        return other

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Let every batch norm of a model synchronize: `fastbn.torch.convert_sync_batchnorm`."""
        from .conversion import convert_sync_batchnorm

        return convert_sync_batchnorm(module, process_group)

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")
        if input.shape[1] == 0:
            raise ValueError("SyncBatchNorm number of input channels should be non-zero")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize a part of a batch."""
        # Without training one process may be alone at it, evaluating: also where statistics are missing.
        if not self.training or isinstance(input, torch.fx.Proxy) or self._world() == 1:
            return super().forward(input)
        return self._synchronized(input)

    def _world(self) -> int:
        if not (distributed.is_available() and distributed.is_initialized()):
            return 1
        return distributed.get_world_size(self.process_group)

    @torch.compiler.disable
    def _synchronized(self, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        tracks = self.track_running_stats
        running_mean, running_var = (self.running_mean, self.running_var) if tracks else (None, None)
        momentum = 0.0 if self.momentum is None else self.momentum
        self._check(input, running_mean, running_var, momentum)
        if tracks and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        x, running = in_memory(input), (running_mean, running_var)
        return _Synchronized.apply(x, self.weight, self.bias, running, momentum, self.eps, self.process_group)

    def _check(self, x: torch.Tensor, running_mean: Any, running_var: Any, momentum: float) -> None:
        if not x.is_cpu:
            raise TypeError(must("input", "be in main memory (for others: torch.nn.SyncBatchNorm)", x.device))
        if x.shape[1] != self.num_features:
            raise ValueError(must("input", f"have {self.num_features} channels", x.shape[1]))
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(must("momentum", "be in [0, 1]", momentum))
        if self.eps <= 0.0:
            raise ValueError(must("eps", "be positive", self.eps))
        # A batch of two values per channel stands for this one: a process may have one value, or none.
        two = x.new_empty((2, x.shape[1])) if x.dtype in bridge.PARAMETER_TYPES else x
        if not takes(two, running_mean, running_var, self.weight, self.bias, True, momentum, self.eps):
            raise TypeError(
                must(
                    "input",
                    "be float16, bfloat16, float32 or float64, and parameters of its type or, for 16 bits, float32",
                    f"{x.dtype} and {None if self.weight is None else self.weight.dtype}",
                )
            )


def _gather(group: Any) -> core.Gather:
    """Return what sends a vector to all processes of a group, and gives the vectors of all, in the order of ranks."""

    def gather(numbers: Array) -> Array:
        mine = torch.from_numpy(numbers)
        rows = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(rows, mine, group=group)
        return np.stack([row.numpy() for row in rows])

    return gather


class _Synchronized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running: tuple[torch.Tensor | None, torch.Tensor | None],
        momentum: float,
        eps: float,
        group: Any,
    ) -> torch.Tensor:
        def check(pooled: Moments) -> None:
            if pooled.count == 1:
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")

        y = bridge.empty_like(x)
        _, _, pooled = bridge.limited(
            lambda: core.forward(
                bridge.array(x),
                _gather(group),
                gamma=bridge.vector(weight),
                beta=bridge.vector(bias),
                epsilon=eps,
                axis=1,
                out=bridge.array(y),
                keep="nothing",
                check=check,
            ),
        )
        variance = pooled.variance() if pooled.count else pooled.m2
        if running[0] is not None and running[1] is not None:
            bridge.update(running[0], running[1], pooled.mean, variance, int(pooled.count), momentum)
        ctx.save_for_backward(x, weight)
        ctx.statistics, ctx.count, ctx.eps, ctx.group = (pooled.mean, variance), int(pooled.count), eps, group
        ctx.bias_type = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("SyncBatchNorm has no second derivative: take the gradient without create_graph=True")
        x, weight = ctx.saved_tensors
        dx, dy = bridge.empty_like(x), in_memory(dy)
        cache = passes.Cache(bridge.array(x), (1,), "batch", ctx.statistics, bridge.vector(weight), ctx.eps)
        _, dweight, dbias = bridge.limited(
            lambda: core.backward(bridge.array(dy), cache, _gather(ctx.group), ctx.count, out=bridge.array(dx)),
        )
        result = dx, torch.from_numpy(dweight), torch.from_numpy(dbias)
        types = (x.dtype, None if weight is None else weight.dtype, ctx.bias_type)
        given = (g.to(dtype) if w else None for g, w, dtype in zip(result, ctx.needs_input_grad, types))
        return (*given, None, None, None, None)
