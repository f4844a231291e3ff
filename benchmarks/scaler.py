"""BatchNormScaler beside scikit-learn's StandardScaler, in one run: ``python -m benchmarks.scaler``.

Every round goes through all methods, with a block of calls of each scaler, one after the other, and a rest before each
block: idle workers, of fastbn's team or of the BLAS that StandardScaler calls for weights, spin for a while. A time is
the lower quartile of all calls. How many times as fast is the median over rounds of what the two blocks of a round say:
a machine that is slower or busier for a while then changes little. fastbn uses all the threads it is given;
StandardScaler has one.

Both return new arrays, each from where its library gets them; in the lines with copy=False nobody allocates.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

SHAPES = ((65536, 64), (1_000_000, 10))
GOALS = {"partial_fit": 8.0, "transform": 3.0}
BLOCK = 3  # calls that are timed at a time
REST = 0.05  # seconds
MISSING = 0.01  # share of values


class Case(NamedTuple):
    """A method and its argument; what goes before each call is not timed."""

    call: Callable[[], Any]
    before: Callable[[], Any] | None = None

    def timed(self) -> float:
        """Seconds of a call."""
        if self.before is not None:
            self.before()
        start = time.perf_counter()
        self.call()
        return time.perf_counter() - start


def quartile(times: list[float]) -> float:
    """The lower quartile."""
    return sorted(times)[len(times) // 4]


def measure(cases: dict[str, tuple[Case, Case]], rounds: int) -> dict[str, tuple[float, float, float]]:
    """Seconds of both cases by name, and how many times as long the second takes as the first."""
    times: dict[str, list[tuple[list[float], list[float]]]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, pair in cases.items():
            blocks = []
            for case in pair:
                time.sleep(REST)
                case.timed()
                blocks.append([case.timed() for _ in range(BLOCK)])
            times[name].append((blocks[0], blocks[1]))
    result = {}
    for name, pairs in times.items():
        ours, theirs = (quartile([seconds for pair in pairs for seconds in pair[i]]) for i in range(2))
        result[name] = ours, theirs, statistics.median(quartile(b) / quartile(a) for a, b in pairs)
    return result


def operations(scaler: Any, x: np.ndarray) -> dict[str, Case]:
    """What is timed, on a scaler that was fitted."""
    rng = np.random.default_rng(1)
    weight = rng.uniform(0.5, 2, len(x)).astype(x.dtype)
    holes = x.copy(order="K")
    holes[rng.random(x.shape) < MISSING] = np.nan
    buffer = x.copy(order="K")

    def restore() -> None:
        buffer[...] = x

    new = type(scaler)
    return {
        "partial_fit": Case(lambda: scaler.partial_fit(x)),
        "partial_fit, NaN": Case(lambda: new().partial_fit(holes)),
        "partial_fit, sample_weight": Case(lambda: new().partial_fit(x, sample_weight=weight)),
        "partial_fit, NaN and sample_weight": Case(lambda: new().partial_fit(holes, sample_weight=weight)),
        "fit": Case(lambda: new().fit(x)),
        "transform": Case(lambda: scaler.transform(x)),
        "transform, copy=False": Case(lambda: scaler.transform(buffer, copy=False), restore),
        "transform, NaN": Case(lambda: scaler.transform(holes)),
        "fit_transform": Case(lambda: new().fit_transform(x)),
        "inverse_transform": Case(lambda: scaler.inverse_transform(x)),
    }


def compare(shape: tuple[int, int], dtype: str, rounds: int, order: str = "C") -> list[dict[str, Any]]:
    """Rows of the table for one array."""
    from sklearn.preprocessing import StandardScaler

    from fastbn.sklearn import BatchNormScaler

    x = np.asarray(np.random.default_rng(0).normal(3, 2, shape), dtype, order=order)
    ours = operations(BatchNormScaler().fit(x), x)
    theirs = operations(StandardScaler().fit(x), x)
    measured = measure({name: (ours[name], theirs[name]) for name in ours}, rounds)
    about = {"shape": list(shape), "dtype": dtype, "order": order}
    return [
        {**about, "method": name, "fastbn": a, "scikit-learn": b, "ratio": ratio}
        for name, (a, b, ratio) in measured.items()
    ]


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
