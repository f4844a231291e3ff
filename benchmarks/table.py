"""The table of the README: `make numbers`, or `python -m benchmarks.table --torch` with fastbn installed.

Times are lower quartiles in microseconds. The libraries take turns in blocks, after a pause in which the idle
workers of the one before fall asleep: an OpenMP runtime keeps them spinning for milliseconds, at the cost of
the next. `copy` is the time merely to read x and write an array like it.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .cases import LAYOUTS, SHAPES, Case
from .operations import LIBRARIES, prepare

ROUNDS = 5


def turn(call: Callable[[], Any], seconds: float, least: int = 2) -> list[float]:
    """Microseconds of a call, so many times at least, after one that is not counted."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    return times


def measure(calls: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Lower quartile of each call's time in microseconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            time.sleep(0.02)
            times[name] += turn(call, seconds / ROUNDS)
    return {name: statistics.quantiles(t, n=4)[0] for name, t in times.items()}


def row(operation: str, shape: str, layout: str, libraries: list[str], seconds: float) -> str:
    """One line of the table in Markdown."""
    case = Case(shape, layout, "float32")
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: np.copyto(case.out, case.x)}
    for library in libraries:
        calls[library] = prepare(operation, library, case)
    found = measure(calls, seconds)
    cells = [f"{found[library]:,.0f}" for library in calls]
    cells += [f"{found[library] / found['fastbn']:.1f}x" for library in libraries if library != "fastbn"]
    size = " x ".join(map(str, SHAPES[shape]))
    return "| " + " | ".join([operation, f"{shape} {size}", layout, *cells]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="store_true", help="PyTorch too, where it is installed")
    parser.add_argument("--operations", default="train,inference,backward", metavar="A,B")
    parser.add_argument("--shapes", default="conv2,conv5,rgb,dense,table,tiny", metavar="A,B")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each library on each row")
    args = parser.parse_args()

    import fastbn

    libraries = [name for name in LIBRARIES if name != "torch" or args.torch]
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, NumPy {np.__version__}")
    print(f"fastbn {fastbn.__version__} with {fastbn.get_num_threads()} threads")
    if args.torch:
        import torch

        print(f"PyTorch {torch.__version__} with {torch.get_num_threads()} threads")
    ratios = [f"{library} / fastbn" for library in libraries if library != "fastbn"]
    head = ["operation", "x (float32)", "layout", "copy", *libraries, *ratios]
    print("\n| " + " | ".join(head) + " |")
    print("|---|---|---|" + "---:|" * (len(head) - 3))
    for operation in args.operations.split(","):
        for shape in args.shapes.split(","):
            for layout in LAYOUTS:
                print(row(operation, shape, layout, libraries, args.seconds), flush=True)


if __name__ == "__main__":
    main()
