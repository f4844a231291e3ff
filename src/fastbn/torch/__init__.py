"""Batch normalization for PyTorch on CPUs: its modules, its results, fastbn's kernels.

::

    import fastbn.torch

    fastbn.torch.convert(model)  # in place; revert(model) undoes it

What fastbn does not take (other devices, dtypes, transforms of torch.func) goes to PyTorch's own implementation, which
computes it or raises its own error.
"""

from __future__ import annotations

try:
    import torch as _torch
except ImportError as _error:
    raise ImportError('fastbn.torch needs PyTorch: pip install "fastbn[torch]"') from _error

from .conversion import convert, convert_sync_batchnorm, revert
from .functional import batch_norm
from .fusion import fuse
from .modules import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    BatchNormAct1d,
    BatchNormAct2d,
    BatchNormAct3d,
    BatchNormReLU1d,
    BatchNormReLU2d,
    BatchNormReLU3d,
)
from .synchronized import SyncBatchNorm

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
    "SyncBatchNorm",
    "batch_norm",
    "convert",
    "convert_sync_batchnorm",
    "fuse",
    "revert",
]

del _torch
