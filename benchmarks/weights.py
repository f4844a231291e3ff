"""What weights, masks and missing values cost: ``python -m benchmarks.weights``.

Training calls and gradients of float32 arrays, in times of the plain call. Every round times all of them, one after
the other in an order drawn anew, each for a moment; a ratio is the median over rounds of what a round says, so a
machine that is slower for a while changes little. Results are written to `out=`, or with `--fresh` to new arrays:
these may be written before all weights have been looked at, since nobody sees them if one is refused.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

import fastbn

from .cases import Case
from .compare import BOTH, ROWS, Cases, cases_of
from .regress import behind_lines
from .table import turn

CASES = {
    "dense": ((1024, 512), ROWS),
    "rows": ((16384, 64), ROWS),
    "many rows": ((65536, 64), ROWS),
    "conv2": ((32, 64, 56, 56), BOTH),
    "conv3": ((32, 256, 28, 28), BOTH),
    "conv5": ((32, 512, 7, 7), BOTH),
    "large": ((128, 64, 56, 56), BOTH),
}
FORMS = (
    "weights per sample",
    "mask per sample",
    "weights per position",
    "mask per position",
    "mask per value",
    "missing values",
    "weights per value",
)
MISSING = 0.1  # share of values
LEAST = 5  # calls of a turn


def calls(case: Case, fresh: bool = False) -> dict[str, dict[str, Callable[[], Any]]]:
    """Training and gradient, plain and in every form."""
    rng = np.random.default_rng(2)
    each = rng.uniform(0.1, 1.1, case.x.shape).astype(np.float32)
    of_sample = each.reshape(len(each), -1)[:, 0].copy()
    at_position = each.take(0, case.axis)
    holes = case.x.copy(order="K")
    holes[rng.random(case.x.shape) < MISSING] = np.nan
    given: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "plain": (case.x, {}),
        "weights per sample": (case.x, {"sample_weight": of_sample}),
        "mask per sample": (case.x, {"mask": of_sample > 0.5}),
        "weights per position": (case.x, {"sample_weight": at_position}),
        "mask per position": (case.x, {"mask": at_position > 0.5}),
        "mask per value": (case.x, {"mask": each > 0.5}),
        "missing values": (holes, {"nan_policy": "omit"}),
        "weights per value": (case.x, {"sample_weight": each}),
    }
    parameters = {"gamma": case.gamma, "beta": case.beta, "axis": case.axis, "training": True}
    moving = {"moving_mean": case.moving_mean, "moving_variance": case.moving_variance}
    out = None if fresh else case.out

    def forward(x: np.ndarray, options: dict[str, Any]) -> Callable[[], Any]:
        return lambda: fastbn.batch_norm(x, out=out, **parameters, **moving, **options)

    def backward(x: np.ndarray, options: dict[str, Any]) -> Callable[[], Any]:
        cache = fastbn.batch_norm_forward(x, **parameters, **options)[1]
        return lambda: fastbn.batch_norm_backward(case.dy, cache, out=out)

    return {
        operation: {form: of(x, options) for form, (x, options) in given.items()}
        for operation, of in (("train", forward), ("backward", backward))
    }


def measure(forms: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, float]:
    """Microseconds of the plain call, and how many times as long the others take."""
    order = random.Random(3)
    times: dict[str, list[float]] = {form: [] for form in forms}
    for _ in range(rounds):
        for form in order.sample(list(forms), len(forms)):
            times[form].append(statistics.quantiles(turn(forms[form], seconds, LEAST), n=4)[0])
    found = {"plain": statistics.median(times["plain"])}
    for form in FORMS:
        found[form] = statistics.median(t / plain for t, plain in zip(times[form], times["plain"]))
    return found


def rows(cases: Cases, rounds: int, seconds: float, fresh: bool, past: int | None) -> list[dict[str, Any]]:
    """What was measured, a row for each array and operation."""
    found = []
    for shape, layouts in cases.values():
        for layout in layouts:
            case = Case(shape, layout, "float32")
            if past is not None:
                behind_lines(case, past)
            for operation, forms in calls(case, fresh).items():
                about = {"operation": operation, "shape": list(shape), "layout": layout}
                found.append(about | measure(forms, rounds, seconds))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.weights", description=__doc__)
    parser.add_argument("--cases", default="", metavar="A,B", help=", ".join(CASES) + ", or shapes")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=0.02, help="of one call in one round")
    parser.add_argument("--fresh", action="store_true", help="results are new arrays, instead of out=")
    parser.add_argument("--past", type=int, metavar="BYTES", help="from the beginning of a cache line to arrays")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    found = rows(cases_of(options.cases, CASES), options.rounds, options.seconds, options.fresh, options.past)
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print("| operation | x | layout | plain, us | " + " | ".join(FORMS) + " |")
    print("|---" * (4 + len(FORMS)) + "|")
    for row in found:
        shape = " x ".join(map(str, row["shape"]))
        cells = [
            row["operation"],
            shape,
            row["layout"],
            f"{row['plain']:,.0f}",
            *(f"{row[form]:.2f}" for form in FORMS),
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
