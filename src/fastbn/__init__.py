"""Batch normalization for CPUs at the speed of memory, from NumPy arrays, without a framework."""

from importlib import metadata as _metadata

from .averages import update_moving
from .config import show_config
from .errors import PendingUpdatesWarning, StateError, UntrainedWarning
from .folding import fold
from .functional import (
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
)
from .layer import BatchNorm
from .moments import Moments, moments
from .normalization import denormalize, normalize
from .recompute import recompute_statistics
from .threads import get_num_threads, set_num_threads, threads

__version__ = _metadata.version("fastbn")

__all__ = [
    "BatchNorm",
    "Moments",
    "PendingUpdatesWarning",
    "StateError",
    "UntrainedWarning",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "denormalize",
    "fold",
    "get_num_threads",
    "moments",
    "normalize",
    "recompute_statistics",
    "set_num_threads",
    "show_config",
    "threads",
    "update_moving",
]
