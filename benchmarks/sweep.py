"""How speed depends on the size of an array, on threads and on the shape: `python -m benchmarks.compare --sweep`.

A sweep can be measured in parts, each with --json, and drawn from what they wrote:

    python -m benchmarks.compare --sweep sizes --threads 1 --largest 0.1 --json small.json
    python -m benchmarks.compare --sweep sizes --threads 1 --smallest 0.1 --json large.json
    python -m benchmarks.sweep docs/images small.json large.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from . import limit
from .cases import Case
from .compare import ENTRIES, contenders, set_threads
from .table import measure

PARTS = ("sizes", "threads", "shapes")
OPERATIONS = ("train", "inference", "backward")
ARRAYS = 6  # that a case and its limits hold, as large as x
CHANNELS = (1, 4, 16, 64, 256, 1024)
INNER = (1, 7, 49, 196, 784, 3136, 12544)
MAP_VALUES = 1 << 20  # of an array of the map
BY_THREADS = (32, 64, 56, 56)


def sizes(smallest: float, largest: float) -> Iterator[int]:
    """Yield bytes of float32 arrays of 1 KB and more, by factors of 4: within these GB, and what memory permits."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    nbytes = 1024
    while nbytes <= min(largest * 2**30, 0.8 * free / ARRAYS):
        if nbytes >= smallest * 2**30:
            yield nbytes
        nbytes *= 4 if nbytes < 2**28 else 2


def shape_of(nbytes: int) -> tuple[int, ...]:
    """Return a shape of so many bytes: up to 64 channels, and planes of up to 64 x 64 values."""
    values = nbytes // 4
    channels = min(64, max(4, values // 64))
    inner = min(4096, values // channels)
    return max(1, values // channels // inner), channels, inner


def measured(name: str, shape: tuple[int, ...], layout: str, seconds: float, threads: int, peers: list[str]) -> Any:
    """Return microseconds of the limit, fastbn and peers, and bytes moved."""
    entry = ENTRIES[name]
    case = Case(shape, layout, entry.dtype)
    times = measure(contenders(entry, case, threads, peers), seconds)
    return {"limit": limit.least(times), **times}, case.x.nbytes * (entry.reads + entry.writes)


def by_size(
    operations: list[str], seconds: float, threads: int, between: tuple[float, float], peers: list[str]
) -> list[dict[str, Any]]:
    """Measure and print operations on arrays of sizes between two, in GB."""
    rows = []
    for nbytes in sizes(*between):
        for name in operations:
            # NumPy takes half a minute for the largest: it stands where that is seconds.
            some = [peer for peer in peers if peer != "numpy" or nbytes < 2**26]
            times, moved = measured(name, shape_of(nbytes), "planar", seconds, threads, some)
            rows.append({"operation": name, "threads": threads, "nbytes": nbytes, "moved": moved, "times": times})
            rates = ", ".join(f"{who} {moved / t / 1e3:.1f}" for who, t in times.items())
            print(f"{name:9} {nbytes / 1024:12,.0f} KB  GB/s: {rates}", flush=True)
    return rows


def by_threads(operations: list[str], seconds: float, threads: int) -> list[dict[str, Any]]:
    """Measure and print operations with 1 to so many threads."""
    rows = []
    for count in range(1, threads + 1):
        set_threads(count)
        for name in operations:
            for layout in ("planar", "interleaved"):
                times, moved = measured(name, BY_THREADS, layout, seconds, count, [])
                rows.append({"operation": name, "layout": layout, "threads": count, "moved": moved, "times": times})
                microseconds = f"{times['fastbn']:,.0f} us, limit {times['limit']:,.0f} us"
                print(f"{name:9} {layout:11} {count} threads: {microseconds}", flush=True)
    set_threads(threads)
    return rows


def by_shape(seconds: float, threads: int, peer: str) -> list[dict[str, Any]]:
    """Measure and print training beside a peer, on arrays of one size and many shapes."""
    rows = []
    for layout in ("planar", "interleaved"):
        for channels in CHANNELS:
            for inner in INNER:
                outer = max(1, MAP_VALUES // (channels * inner))
                if channels * inner > 4 * MAP_VALUES:
                    continue
                times, _ = measured("train", (outer, channels, inner, 1), layout, seconds, threads, [peer])
                if peer not in times:
                    continue
                rows.append(
                    {"layout": layout, "channels": channels, "inner": inner, "threads": threads, "peer": peer}
                    | {"times": times}
                )
                speedup = f"{times[peer] / times['fastbn']:6.2f}x {peer}"
                print(f"train {layout:11} {channels:5} channels, inner {inner:6}: {speedup}", flush=True)
    return rows


def peak(seconds: float, n: int = 1024) -> float:
    """Return giga operations per second of a product of float32 matrices, with the threads that BLAS takes."""
    a, b, out = np.ones((n, n), np.float32), np.ones((n, n), np.float32), np.empty((n, n), np.float32)
    times = measure({"product": lambda: np.matmul(a, b, out=out)}, seconds)
    return float(2e-3 * n**3 / times["product"])


def run(
    parts: list[str],
    operations: list[str],
    seconds: float,
    threads: int,
    between: tuple[float, float],
    peers: list[str],
) -> dict[str, Any]:
    """Measure and print.

    Parameters
    ----------
    parts : list of str
        Of PARTS.
    operations : list of str
        Of OPERATIONS, for sizes and threads.
    seconds : float
        For each contender of each measurement; a third of it for shapes, of which there are many.
    threads : int
        As many as there are at most.
    between : pair of float
        The least and the largest array of the sizes, in GB.
    peers : list of str
        PyTorch and NumPy are taken of them.

    Returns
    -------
    dict
        A list of rows for each part; with "threads" also "peak".
    """
    peers = [peer for peer in ("torch", "numpy") if peer in peers and find_spec(peer)]
    results: dict[str, Any] = {}
    if "sizes" in parts:
        results["sizes"] = by_size(operations, seconds, threads, between, peers)
    if "threads" in parts:
        results["threads"] = by_threads(operations, seconds, threads)
        results["peak"] = peak(seconds)
    if "shapes" in parts and peers:
        results["shapes"] = by_shape(seconds / 3, threads, peers[0])
    return results


def together(files: list[Path]) -> dict[str, Any]:
    """Return what `run` would have returned, had it measured all that stands in these files."""
    results: dict[str, Any] = {}
    for file in files:
        for part, found in json.loads(file.read_text()).items():
            results[part] = [*results.get(part, []), *found] if isinstance(found, list) else found
    results.get("sizes", []).sort(key=lambda row: row["nbytes"])
    return results


def draw(results: dict[str, Any], folder: Path) -> list[Path]:
    """Draw a sweep.

    Parameters
    ----------
    results : dict
        Of `run`.
    folder : Path
        Where the PNG files go.

    Returns
    -------
    list of Path
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    if results.get("sizes"):
        files += [_bandwidth(results["sizes"], folder / "bandwidth.png")]
        files += [_growth(results["sizes"], folder / "growth.png")]
    if results.get("threads"):
        files += [_threads(results["threads"], folder / "threads.png")]
        files += [_roofline(results["threads"], results.get("peak"), folder / "roofline.png")]
    if results.get("shapes"):
        files += [_shapes(results["shapes"], folder / "shapes.png")]
    return files


NAMES = {"fastbn": "fastbn", "torch": "PyTorch", "numpy": "NumPy"}


def figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Return a figure that needs no display, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    new = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(new)
    return new, new.subplots(1, columns, **options)


def series(rows: list[dict[str, Any]], operation: str, value: Any) -> tuple[list[int], dict[str, list[float]]]:
    """Return the sizes of one operation's rows, and a line for each contender: NaN where it was not measured."""
    mine = [r for r in rows if r["operation"] == operation]
    lines = {
        name: [value(r, who) if who in r["times"] else math.nan for r in mine]
        for who, name in {"limit": "limit", **NAMES}.items()
        if any(who in r["times"] for r in mine)
    }
    return [r["nbytes"] for r in mine], lines


def rate(row: dict[str, Any], who: str) -> float:
    """GB/s of unavoidable traffic."""
    return float(row["moved"] / row["times"][who] / 1e3)


def _by_size(rows: list[dict[str, Any]], path: Path, ylabel: str, value: Any, title: str) -> Path:
    """Draw one panel per operation, with the array's size across."""
    from fastbn import plot

    image, panels = figure(12, 4.2, len(OPERATIONS), sharey=True)
    for panel, name in zip(panels, OPERATIONS, strict=True):
        nbytes, lines = series(rows, name, value)
        limits = lines.pop("limit", None)
        plot.bandwidth(nbytes, lines, limit=limits, ylabel=ylabel if panel is panels[0] else "", ax=panel)
        panel.set_title(name)
        if panel is not panels[-1]:
            panel.get_legend().remove()
    image.suptitle(f"{title}, threads: {rows[0]['threads']}")
    image.savefig(path, dpi=110)
    return path


def _bandwidth(rows: list[dict[str, Any]], path: Path) -> Path:
    title = "How much of the machine's bandwidth an operation uses (higher is better)"
    return _by_size(rows, path, "GB/s of unavoidable traffic", rate, title)


def _growth(rows: list[dict[str, Any]], path: Path) -> Path:
    title = "Cost per value as the array grows (lower is better)"
    return _by_size(rows, path, "ns per value", lambda r, who: r["times"][who] * 4000 / r["nbytes"], title)


def _threads(rows: list[dict[str, Any]], path: Path) -> Path:
    from fastbn import plot

    image, panel = figure(6.5, 4.2)
    counts = sorted({r["threads"] for r in rows})
    times: dict[str, list[float]] = {}
    limits = []
    for r in rows:
        times.setdefault(f"{r['operation']} {r['layout']}", []).append(r["times"]["fastbn"])
        if (r["operation"], r["layout"]) == ("inference", "planar"):
            limits.append(r["times"]["limit"])
    plot.scaling(counts, times, limit=limits, ax=panel)
    panel.set_title("32 x 64 x 56 x 56 float32; the limit is that of inference")
    image.savefig(path, dpi=110)
    return path


# Additions, multiplications and the like for each value: sums, then *apply*.
FLOPS = {"train": 3 + 3, "inference": 3, "backward": 4 + 6}


def _roofline(rows: list[dict[str, Any]], peak: float | None, path: Path) -> Path:
    """Draw what the most threads reach on a large array, below what memory and the processor allow."""
    from fastbn import plot

    image, panel = figure(6.5, 4.2)
    mine = [r for r in rows if r["threads"] == max(row["threads"] for row in rows)]
    points: dict[str, tuple[list[float], list[float]]] = {}
    for r in mine:
        intensity = FLOPS[r["operation"]] / (12 if r["operation"] == "backward" else 8)
        at, rates = points.setdefault(f"{r['operation']} {r['layout']}", ([], []))
        at.append(intensity)
        rates.append(intensity * rate(r, "fastbn"))
    plot.roofline(points, bandwidth=max(rate(r, "limit") for r in mine), peak=peak, ax=panel)
    panel.set_title(f"32 x 64 x 56 x 56 float32, threads: {mine[0]['threads']}")
    image.savefig(path, dpi=110)
    return path


def _shapes(rows: list[dict[str, Any]], path: Path) -> Path:
    from fastbn import plot

    image, panels = figure(12, 4.6, 2, sharey=True)
    peer = NAMES[rows[0]["peer"]]
    for panel, layout in zip(panels, ("planar", "interleaved"), strict=True):
        grid = np.full((len(CHANNELS), len(INNER)), np.nan)
        for r in rows:
            if r["layout"] == layout:
                speedup = r["times"][r["peer"]] / r["times"]["fastbn"]
                grid[CHANNELS.index(r["channels"]), INNER.index(r["inner"])] = speedup
        last = panel is panels[-1]
        label = f"times as fast as {peer}"
        plot.speedups(grid, rows=CHANNELS, columns=INNER, colorbar=last, label=label, ax=panel)
        panel.set(title=f"{layout}, train", xlabel="inner size (values of a channel in one image)")
    panels[0].set_ylabel("channels")
    millions, threads = MAP_VALUES / 1e6, rows[0]["threads"]
    image.suptitle(f"Training on about {millions:.0f} million values, threads: {threads}; blue where fastbn is faster")
    image.savefig(path, dpi=110)
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the PNG files to write")
    parser.add_argument("files", type=Path, nargs="+", help="of benchmarks.compare --sweep --json")
    args = parser.parse_args(arguments)
    draw(together(args.files), args.folder)


if __name__ == "__main__":
    main()
