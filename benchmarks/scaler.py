"""BatchNormScaler beside scikit-learn's StandardScaler, in one run: ``python -m benchmarks.scaler``.

The median of several rounds of a block of calls each. fastbn uses all the threads it is given; StandardScaler has one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

SHAPES = ((65536, 64), (1_000_000, 10))
GOALS = {"partial_fit": 8.0, "transform": 3.0}


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each call: rounds of a block of each, because idle workers of a team spin for a while."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            times[name] += [timed(call) for _ in range(3)]
    return {name: statistics.median(values) for name, values in times.items()}


def operations(scaler: Any, x: np.ndarray) -> dict[str, Callable[[], Any]]:
    """What is timed, on a scaler that was fitted."""
    new = type(scaler)
    return {
        "partial_fit": lambda: scaler.partial_fit(x),
        "fit": lambda: new().fit(x),
        "transform": lambda: scaler.transform(x),
        "fit_transform": lambda: new().fit_transform(x),
        "inverse_transform": lambda: scaler.inverse_transform(x),
    }


def compare(shape: tuple[int, int], dtype: str, rounds: int, order: str = "C") -> list[dict[str, Any]]:
    """Rows of the table for one array."""
    from sklearn.preprocessing import StandardScaler

    from fastbn.sklearn import BatchNormScaler

    x = np.asarray(np.random.default_rng(0).normal(3, 2, shape), dtype, order=order)
    ours = operations(BatchNormScaler().fit(x), x)
    theirs = operations(StandardScaler().fit(x), x)
    rows = []
    for name in ours:
        seconds = measure({"fastbn": ours[name], "scikit-learn": theirs[name]}, rounds)
        ratio = seconds["scikit-learn"] / seconds["fastbn"]
        rows.append({"shape": list(shape), "dtype": dtype, "order": order, "method": name, **seconds, "ratio": ratio})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status is 1 if a goal is missed and --check was given."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaler", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=["float32", "float64"])
    parser.add_argument("--check", action="store_true", help="fail if a goal is missed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    rows = [row for dtype in options.dtypes for shape in SHAPES for row in compare(shape, dtype, options.rounds)]
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print("| shape | dtype | method | StandardScaler, ms | BatchNormScaler, ms | times as fast | goal |")
        print("|---|---|---|---|---|---|---|")
        for r in rows:
            shape = " x ".join(map(str, r["shape"]))
            goal = GOALS.get(r["method"], "")
            print(
                f"| {shape} | {r['dtype']} | {r['method']} | {1e3 * r['scikit-learn']:.2f} | {1e3 * r['fastbn']:.2f} "
                f"| {r['ratio']:.1f} | {goal} |"
            )
    missed = [r for r in rows if r["dtype"] == "float32" and r["ratio"] < GOALS.get(r["method"], 0)]
    return int(options.check and bool(missed))


if __name__ == "__main__":
    raise SystemExit(main())
