"""Wall time of the operations on arrays that are bound by memory."""

from __future__ import annotations

from time import perf_counter

import numpy as np

from . import limit
from .cases import DTYPES, LAYOUTS, Case
from .operations import LIBRARIES, OPERATIONS, prepare
from .table import measure


class _Operation:
    params = (LIBRARIES, LAYOUTS, ["conv2", "conv5", "rgb", "dense", "table"], DTYPES)
    param_names = ("library", "layout", "shape", "dtype")
    operation = ""

    def setup(self, library: str, layout: str, shape: str, dtype: str) -> None:
        self.case = Case(shape, layout, dtype)
        self.call = prepare(self.operation, library, self.case)


class TrainForward(_Operation):
    """Normalize with the batch's statistics and update the moving ones."""

    operation = "train"

    def time_train(self, *params: str) -> None:
        self.result = self.call()


class Inference(_Operation):
    """Normalize with the moving statistics."""

    operation = "inference"

    def time_inference(self, *params: str) -> None:
        self.result = self.call()


class Backward(_Operation):
    """The three gradients, through the batch's statistics."""

    operation = "backward"

    def time_backward(self, *params: str) -> None:
        self.result = self.call()


class Moments(_Operation):
    """Mean and variance of each channel."""

    operation = "moments"

    def time_moments(self, *params: str) -> None:
        self.result = self.call()


class Bandwidth:
    """The memory traffic that an operation cannot avoid over its time, beside a copy. Higher is better."""

    params = (["copy", *OPERATIONS], LAYOUTS, ["conv2", "table"])
    param_names = ("operation", "layout", "shape")
    # Arrays of x's size that have to be read or written once.
    traffic = {"copy": 2, "train": 2, "inference": 2, "backward": 3, "moments": 1}
    repeats = 7

    def setup(self, operation: str, layout: str, shape: str) -> None:
        self.case = case = Case(shape, layout, "float32")
        if operation == "copy":
            self.call = lambda: np.copyto(case.out, case.x)
        else:
            self.call = prepare(operation, "fastbn", case)

    def track_bandwidth(self, operation: str, layout: str, shape: str) -> float:
        times = []
        for _ in range(self.repeats):
            start = perf_counter()
            self.result = self.call()
            times.append(perf_counter() - start)
        return self.traffic[operation] * self.case.x.nbytes / min(times) / 1e9

    track_bandwidth.unit = "GB/s"  # type: ignore[attr-defined]


class Limits:
    """The time of an operation in times of what the machine needs merely to move its data. 1 is the best there is."""

    params = (OPERATIONS, LAYOUTS, ["conv2", "conv4", "conv5", "rgb", "table"])
    param_names = ("operation", "layout", "shape")
    seconds = 0.3

    def setup(self, operation: str, layout: str, shape: str) -> None:
        import fastbn

        self.case = Case(shape, layout, "float32")
        self.call = prepare(operation, "fastbn", self.case)
        pair, writes = operation == "backward", 0 if operation == "moments" else 1
        threads = fastbn.get_num_threads()
        self.limits = limit.calls(self.case.x.nbytes, pair=pair, writes=writes, threads=threads)
        if not self.limits:
            raise NotImplementedError("no C compiler with OpenMP is installed")

    def track_limits(self, operation: str, layout: str, shape: str) -> float:
        def call() -> None:
            self.result = self.call()

        times = measure({"fastbn": call, **self.limits}, self.seconds)
        return times["fastbn"] / limit.least(times)

    track_limits.unit = "limits"  # type: ignore[attr-defined]
