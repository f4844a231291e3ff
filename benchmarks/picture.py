"""The pictures of the start page, from what runs wrote: speed, and accuracy.

python -m benchmarks.compare --sweep sizes --threads 1 --json sizes.json
python -m benchmarks.accuracy --json accuracy.json
python -m benchmarks.picture docs/images accuracy.json sizes.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .sweep import figure, rate, series, together


def draw(sizes: list[dict[str, Any]], accuracy: dict[str, Any], folder: Path) -> list[Path]:
    """Draw both as PNG files, of one size.

    Parameters
    ----------
    sizes : list of dict
        The rows "sizes" of `benchmarks.sweep.run`.
    accuracy : dict
        Of `benchmarks.accuracy.measure`.
    folder : Path
        Where they go.

    Returns
    -------
    list of Path
        The files.
    """
    from fastbn import plot

    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "speed.png", folder / "error.png"]
    (speed, left), (error, right) = figure(5.6, 4.2), figure(5.6, 4.2)
    nbytes, lines = series(sizes, "train", rate)
    plot.bandwidth(nbytes, lines, limit=lines.pop("limit", None), ylabel="GB/s", ax=left)
    threads = "one thread" if sizes[0]["threads"] == 1 else f"{sizes[0]['threads']} threads"
    left.set_title(f"Fast: training on {threads}")
    plot.accuracy(accuracy["condition"], accuracy["y"], ax=right)
    right.set_title("Accurate: largest error of outputs")
    right.set_xlabel("condition number (mean / deviation)")
    for image, file in zip((speed, error), files, strict=True):
        image.savefig(file, dpi=150)
    return files


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the PNG files to write")
    parser.add_argument("accuracy", type=Path, help="of benchmarks.accuracy --json")
    parser.add_argument("sizes", type=Path, nargs="+", help="of benchmarks.compare --sweep sizes --json")
    args = parser.parse_args(arguments)
    draw(together(args.sizes)["sizes"], json.loads(args.accuracy.read_text()), args.folder)


if __name__ == "__main__":
    main()
