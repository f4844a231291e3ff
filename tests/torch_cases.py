"""Data for the tests of fastbn.torch, PyTorch's functions of the same names, and how close results are."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import fastbn.torch as ft

PAIRS = {
    2: (nn.BatchNorm1d, ft.BatchNorm1d),
    3: (nn.BatchNorm1d, ft.BatchNorm1d),
    4: (nn.BatchNorm2d, ft.BatchNorm2d),
    5: (nn.BatchNorm3d, ft.BatchNorm3d),
}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Units in the last place of values around 1: half a unit for one rounding, a few for sums in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
    ("leaky_relu", -0.3): lambda z: F.leaky_relu(z, -0.3),
}


def close(got, wanted, dtype=None):
    dtype = dtype or got.dtype
    scale = max(1.0, wanted.detach().double().abs().max().item()) if wanted.numel() else 1.0
    torch.testing.assert_close(
        got.detach().double(), wanted.detach().double(), rtol=0, atol=TOLERANCE[dtype] * scale, equal_nan=True
    )


def batch(shape, dtype=torch.float32, last=False):
    x = torch.randn(shape, dtype=torch.float64).mul(2).add(1).to(dtype)
    return x.contiguous(memory_format=FORMATS[len(shape)]) if last else x
