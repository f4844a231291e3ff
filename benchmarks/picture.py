"""The picture of the start page, from what two runs wrote: speed on the left, accuracy on the right.

    python -m benchmarks.compare --sweep sizes --threads 1 --json sizes.json
    python -m benchmarks.accuracy --json accuracy.json
    python -m benchmarks.picture sizes.json accuracy.json docs/images/start.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastbn import plot

from .sweep import figure, rate, series


def draw(sizes: list[dict[str, Any]], accuracy: dict[str, Any], path: Path) -> Path:
    """Draw both panels as a PNG file.

    Parameters
    ----------
    sizes : list of dict
        The rows "sizes" of `benchmarks.sweep.run`.
    accuracy : dict
        Of `benchmarks.accuracy.measure`.
    path : Path
        Where it goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    image, (left, right) = figure(11, 4.4, 2)
    nbytes, lines = series(sizes, "train", rate)
    plot.bandwidth(nbytes, lines, limit=lines.pop("limit", None), ylabel="GB/s", ax=left)
    threads = "one thread" if sizes[0]["threads"] == 1 else f"{sizes[0]['threads']} threads"
    left.set_title(f"Fast: training on {threads} (higher is better)")
    plot.accuracy(accuracy["condition"], accuracy["y"], ax=right)
    right.set_title("Accurate: error of outputs (lower is better)")
    right.set_xlabel("condition number (mean / deviation)")
    image.savefig(path, dpi=130)
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=Path, help="of benchmarks.compare --sweep sizes --json")
    parser.add_argument("accuracy", type=Path, help="of benchmarks.accuracy --json")
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    args = parser.parse_args(arguments)
    draw(json.loads(args.sizes.read_text())["sizes"], json.loads(args.accuracy.read_text()), args.picture)


if __name__ == "__main__":
    main()
