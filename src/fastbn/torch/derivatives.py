"""Derivatives in PyTorch's own operations: what its transforms see through, and what can be differentiated further.

In float64, and of x itself where the batch's statistics are functions of x. With w the weight, xh the normalized batch,
r = 1 / sqrt(variance + eps), and P(z) what comes through a batch norm of weight 1::

    P(z) = r * (z - mean(z) - xh * mean(z * xh))      through the statistics of the batch
    P(z) = r * z                                      where they were given
    dx = w * P(dy),  dweight = sum(dy * xh),  dbias = sum(dy)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activation import _FIXED


class _Normalized(NamedTuple):
    """A batch, and how a gradient comes through its normalization."""

    xh: Tensor
    r: Tensor
    frozen: bool

    def through(self, z: Tensor) -> Tensor:
        """Return P(z)."""
        if self.frozen:
            return self.r * z
        return self.r * (z - _average(z) - self.xh * _average(z * self.xh))


def _normalized(x: Tensor, mean: Tensor, variance: Tensor, eps: float, frozen: bool) -> _Normalized:
    wide = x.to(torch.float64)
    if frozen:
        r = (_per_channel(variance, x) + eps).rsqrt()
        return _Normalized((wide - _per_channel(mean, x)) * r, r, frozen)
    deviation = wide - _average(wide)
    r = (_average(deviation * deviation) + eps).rsqrt()
    return _Normalized(deviation * r, r, frozen)


def _total(z: Tensor, keepdim: bool = False) -> Tensor:
    """Return sums per channel."""
    return z.sum([axis for axis in range(z.dim()) if axis != 1], keepdim=keepdim)


def _values(z: Tensor) -> int:
    """Return how many values a channel has, at least 1."""
    return max(math.prod(n for axis, n in enumerate(z.shape) if axis != 1), 1)


def _average(z: Tensor) -> Tensor:
    return _total(z, keepdim=True) / _values(z)


def _per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """Return a number per channel in float64, as it broadcasts to x."""
    return vector.to(torch.float64).reshape([-1 if axis == 1 else 1 for axis in range(x.dim())])


def first(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: str,
    slope: float,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dx, dweight, dbias and dresidual; dy may be a batch of gradients, or have a tangent."""
    norm = _normalized(x, mean, variance, eps, frozen)
    w = 1.0 if weight is None else _per_channel(weight, x)
    dz = dy.to(torch.float64)
    if activation:
        if y is not None:  # it tells on which side of a bend z lay
            z = y.to(torch.float64)
        else:
            z = norm.xh * w
            z = z if bias is None else z + _per_channel(bias, x)
            z = z if residual is None else z + residual
        dz = _before(dz, z, activation, slope)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    dweight, dbias = (_total(t).to(dtype) for t in (dz * norm.xh, dz))
    return (w * norm.through(dz)).to(x.dtype), dweight, dbias, dz.to(x.dtype)


def _before(dy: Tensor, z: Tensor, activation: str, slope: float) -> Tensor:
    """Return dy times the derivative of an activation at z."""
    if activation == "leaky_relu":
        return torch.where(z > 0, dy, dy * slope)
    if not is_smooth(activation):  # between bounds, of which the upper one may be NaN, none
        return torch.where((z > 0) & ~(z >= _FIXED[activation].bend[1][1]), dy, 0.0)
    s, inner = _sigmoid(z, activation)
    return dy * (s + z * s * (1.0 - s) * inner)


def is_smooth(activation: str) -> bool:
    """Whether an activation is not made of straight lines."""
    return activation in _FIXED and not _FIXED[activation].from_output


def _sigmoid(z: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return s = sigmoid(k1 z + k3 z^3) of z * s, and the derivative of what it is taken of."""
    k1, k3, _ = _FIXED[activation].bend[1]
    return torch.sigmoid(z * (k1 + k3 * z * z)), k1 + 3.0 * k3 * z * z


def of_slope(z: Tensor, activation: str) -> Tensor:
    """Return the second derivative of a smooth activation at z."""
    s, inner = _sigmoid(z, activation)
    slope, k3 = s * (1.0 - s), _FIXED[activation].bend[1][1]
    return 2.0 * slope * inner + z * slope * ((1.0 - 2.0 * s) * inner * inner + 6.0 * k3 * z)


def second(
    gx: Tensor,
    gweight: Tensor,
    gbias: Tensor,
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    eps: float,
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Differentiate the gradient by dy, x and weight.

    With u the gradients that come in, and M values per channel::

        L = sum(gx * dx) + gweight * dweight + gbias * dbias
        dL/ddy = w * P(gx) + gweight * xh + gbias
        dL/dw = sum(gx * P(dy)) =: S
        dL/dx = P(h) - w * S * r * xh / M,  h = (gweight - w * r * mean(gx * xh)) * dy - w * r * mean(dy * xh) * gx

    The means in h, and what has S, come through the statistics: they are not there where these were given.
    """
    norm = _normalized(x, mean, variance, eps, frozen)
    wide, gx = dy.to(torch.float64), gx.to(torch.float64)
    w: Any = 1.0 if weight is None else _per_channel(weight, x)
    gw, gb = _per_channel(gweight, x), _per_channel(gbias, x)
    dw = _total(gx * norm.through(wide))
    ddy = w * norm.through(gx) + gw * norm.xh + gb
    if frozen:
        dx = norm.through(gw * wide)
    else:
        scale = w * norm.r
        h = (gw - scale * _average(gx * norm.xh)) * wide - scale * _average(wide * norm.xh) * gx
        dx = norm.through(h) - scale * _per_channel(dw, x) * norm.xh / _values(x)
    return ddy.to(dy.dtype), dx.to(x.dtype), None if weight is None else dw.to(weight.dtype)
