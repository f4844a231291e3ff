"""What a call, an import and an operation cost beside the arithmetic."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .cases import EPSILON, LAYOUTS, MOMENTUM, Case
from .operations import LIBRARIES, OPERATIONS, prepare


class CallOverhead:
    """A (32, 16) batch: the arithmetic takes well under a microsecond, the rest is the call."""

    params = (LIBRARIES, OPERATIONS)
    param_names = ("library", "operation")

    def setup(self, library: str, operation: str) -> None:
        self.case = Case("tiny", "interleaved", "float32")
        self.call = prepare(operation, library, self.case)

    def time_call(self, *params: str) -> None:
        self.result = self.call()


class LayerOverhead:
    """The same batch through the BatchNorm layer: one training step, forward and backward."""

    def setup(self) -> None:
        import fastbn

        self.case = Case("tiny", "interleaved", "float32")
        self.bn = fastbn.BatchNorm(16, momentum=MOMENTUM, epsilon=EPSILON)
        self.bn.gamma[...] = self.case.gamma
        self.bn.beta[...] = self.case.beta

    def time_forward_backward(self) -> None:
        self.result = self.bn(self.case.x, training=True), self.bn.backward(self.case.dy)


class ImportTime:
    """`import fastbn` in a new process, beside the `import numpy` that it contains."""

    params = (["fastbn", "numpy"],)
    param_names = ("module",)

    def timeraw_import(self, module: str) -> str:
        return f"import {module}"


class PeakMemory:
    """The largest resident size of a process that holds x, dy and an output of 26 MB each, and runs once."""

    params = (LIBRARIES, OPERATIONS)
    param_names = ("library", "operation")

    def setup(self, library: str, operation: str) -> None:
        self.case = Case("conv2", "planar", "float32")
        self.call = prepare(operation, library, self.case)

    def peakmem_call(self, *params: str) -> None:
        self.result = self.call()


def resident(kind: str) -> float:
    """Read the process's resident size (VmRSS) or its peak (VmHWM) in MB."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def extra_memory(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a call, and the MB that the process had at its peak beside those it had before."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        raise NotImplementedError("the peak cannot be reset here") from None
    before = resident("VmRSS")
    result = call()
    return result, max(0.0, resident("VmHWM") - before)


class ExtraMemory:
    """What one call holds at its peak beside its arguments: temporary arrays, and results it has no output for."""

    params = (LIBRARIES, OPERATIONS, LAYOUTS)
    param_names = ("library", "operation", "layout")

    def setup(self, library: str, operation: str, layout: str) -> None:
        self.case = Case("conv2", layout, "float32")
        self.call = prepare(operation, library, self.case)

    def track_extra_memory(self, library: str, operation: str, layout: str) -> float:
        self.result, megabytes = extra_memory(self.call)
        return megabytes

    track_extra_memory.unit = "MB"  # type: ignore[attr-defined]


class ActivationMemory:
    """The same of gradients of float16, 13 MB an array: behind silu what comes through is kept in float32."""

    params = (["relu", "silu"], LAYOUTS)
    param_names = ("activation", "layout")

    def setup(self, activation: str, layout: str) -> None:
        self.case = Case("conv2", layout, "float16")
        self.call = prepare("backward", "fastbn", self.case, activation=activation)

    def track_extra_memory(self, activation: str, layout: str) -> float:
        self.result, megabytes = extra_memory(self.call)
        return megabytes

    track_extra_memory.unit = "MB"  # type: ignore[attr-defined]
