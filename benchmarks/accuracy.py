"""How errors grow with the condition number of the data: `python -m benchmarks.accuracy --plots docs/images`.

Data of deviation 1 and a mean from 0 to 1e7 in float32, so that the condition number sqrt(1 + mean^2 / variance) is
about the mean. Everything is compared with what exact arithmetic gives for these very numbers (extended precision,
two passes). One ulp is 2^-23: of the variance relative to itself, of outputs relative to 1, their deviation.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fastbn

ULP = 2.0**-23
ROWS, CHANNELS = 4096, 64
EPSILON = 1e-5
Result = tuple[NDArray[Any], NDArray[Any]]  # variance, y


def data(mean: float) -> NDArray[np.float32]:
    """Return a table of rows, whose channels have about this mean."""
    rng = np.random.default_rng(0)
    return (mean * rng.uniform(0.8, 1.2, CHANNELS) + rng.standard_normal((ROWS, CHANNELS))).astype(np.float32)


def exact(x: NDArray[np.float32]) -> Result:
    """Return variance and y in extended precision."""
    wide = x.astype(np.longdouble)
    centred = wide - wide.mean(axis=0)
    variance = (centred * centred).mean(axis=0)
    return variance, centred / np.sqrt(variance + EPSILON)


def ours(x: NDArray[np.float32]) -> Result:
    return fastbn.moments(x).variance(), fastbn.batch_norm(x, training=True, epsilon=EPSILON)


def two_passes(x: NDArray[np.float32]) -> Result:
    variance = x.var(axis=0)
    return variance, (x - x.mean(axis=0)) / np.sqrt(variance + np.float32(EPSILON))


def squares(x: NDArray[np.float32]) -> Result:
    """E[x^2] - E[x]^2 as it is often written, with the result folded into y = a x + b."""
    mean = x.mean(axis=0)
    variance = np.maximum((x * x).mean(axis=0) - mean * mean, 0)
    scale = 1 / np.sqrt(variance + np.float32(EPSILON))
    return variance, x * scale - mean * scale


def torch_training(x: NDArray[np.float32]) -> Result:
    import torch

    t = torch.from_numpy(x)
    momentum, running_mean, running_var = 1.0, torch.zeros(CHANNELS), torch.ones(CHANNELS)
    y = torch.nn.functional.batch_norm(t, running_mean, running_var, None, None, True, momentum, EPSILON)
    return running_var.numpy() * ((ROWS - 1) / ROWS), y.numpy()


CONTENDERS: dict[str, Callable[[NDArray[np.float32]], Result]] = {
    "fastbn": ours,
    "PyTorch": torch_training,
    "NumPy, var": two_passes,
    "E[x²] - E[x]²": squares,
}


def measure(means: NDArray[np.float64]) -> dict[str, Any]:
    """Return the condition numbers, and the largest errors of variance and y of each contender that can be imported."""
    found: dict[str, Any] = {"condition": [], "variance": {}, "y": {}}
    for mean in means:
        x = data(float(mean))
        variance, y = exact(x)
        found["condition"].append(float(np.median(np.sqrt(1 + x.mean(0, dtype=np.float64) ** 2 / variance))))
        for who, contender in CONTENDERS.items():
            try:
                others = contender(x)
            except ImportError:
                continue
            errors = np.max(abs(others[0] - variance) / variance), np.max(abs(others[1] - y))
            for name, error in zip(("variance", "y"), errors, strict=True):
                found[name].setdefault(who, []).append(float(error / ULP))
    return found


def draw(found: dict[str, Any], path: Path) -> Path:
    """Draw both errors as a PNG file."""
    from fastbn import plot

    from .sweep import figure

    path.parent.mkdir(parents=True, exist_ok=True)
    image, panels = figure(11, 4.4, 2)
    for panel, name, title in zip(panels, ("variance", "y"), ("variance", "outputs"), strict=True):
        plot.accuracy(found["condition"], found[name], ax=panel)
        panel.set_title(f"largest error of {title}")
    image.savefig(path, dpi=110)
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=15, help="means between 1 and 1e7")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw accuracy.png there (needs matplotlib)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    args = parser.parse_args(arguments)
    found = measure(np.concatenate([[0.0], np.geomspace(1, 1e7, args.points)]))
    for name in ("variance", "y"):
        print(f"largest error of {name}, in ulp")
        print(f"  {'condition':>10} " + " ".join(f"{who:>14}" for who in found[name]))
        for i, condition in enumerate(found["condition"]):
            print(f"  {condition:>10.3g} " + " ".join(f"{errors[i]:>14.3g}" for errors in found[name].values()))
    if args.plots:
        draw(found, args.plots / "accuracy.png")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
