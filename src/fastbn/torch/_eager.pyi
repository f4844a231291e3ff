from typing import Any

from torch import Tensor, nn

class Call:
    eps: float
    activation: str | tuple[str, float] | None
    statistics: Any
    frozen: bool
    has_residual: bool
    @property
    def bias_type(self) -> Any: ...

def team(size: int) -> int: ...
def connect(**given: Any) -> None: ...
def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    counter: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | tuple[str, float] | None,
    ranks: int = ...,
) -> Tensor | None: ...
def call(module: nn.Module, x: Tensor, residual: Tensor | None) -> Tensor | None: ...
def forward(
    ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, call: Call
) -> Tensor: ...
def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]: ...
