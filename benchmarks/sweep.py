"""How speed depends on the size of an array, on threads and on the shape: `python -m benchmarks.compare --sweep`."""

from __future__ import annotations

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


def sizes(largest: float) -> Iterator[int]:
    """Yield bytes of float32 arrays from 1 KB up to `largest` GB and what memory permits, by factors of 4."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    nbytes = 1024
    while nbytes <= min(largest * 2**30, 0.8 * free / ARRAYS):
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


def by_size(seconds: float, threads: int, largest: float, peers: list[str]) -> list[dict[str, Any]]:
    """Measure and print each operation on arrays from 1 KB to `largest` GB."""
    rows = []
    for nbytes in sizes(largest):
        for name in OPERATIONS:
            # NumPy takes half a minute for the largest: it stands where that is seconds.
            some = [peer for peer in peers if peer != "numpy" or nbytes < 2**26]
            times, moved = measured(name, shape_of(nbytes), "planar", seconds, threads, some)
            rows.append({"operation": name, "threads": threads, "nbytes": nbytes, "moved": moved, "times": times})
            rates = ", ".join(f"{who} {moved / t / 1e3:.1f}" for who, t in times.items())
            print(f"{name:9} {nbytes / 1024:12,.0f} KB  GB/s: {rates}", flush=True)
    return rows


def by_threads(seconds: float, threads: int) -> list[dict[str, Any]]:
    """Measure and print each operation with 1 to so many threads."""
    rows = []
    for count in range(1, threads + 1):
        set_threads(count)
        for name in OPERATIONS:
            for layout in ("planar", "interleaved"):
                times, moved = measured(name, (32, 64, 56, 56), layout, seconds, count, [])
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


def run(parts: list[str], seconds: float, threads: int, largest: float, peers: list[str]) -> dict[str, Any]:
    """Measure and print.

    Parameters
    ----------
    parts : list of str
        Of PARTS.
    seconds : float
        For each contender of each measurement; a third of it for shapes, of which there are many.
    threads : int
        As many as there are at most.
    largest : float
        Array, in GB.
    peers : list of str
        PyTorch and NumPy are taken of them.

    Returns
    -------
    dict
        A list of rows for each part.
    """
    peers = [peer for peer in ("torch", "numpy") if peer in peers and find_spec(peer)]
    results = {}
    if "sizes" in parts:
        results["sizes"] = by_size(seconds, threads, largest, peers)
    if "threads" in parts:
        results["threads"] = by_threads(seconds, threads)
    if "shapes" in parts and peers:
        results["shapes"] = by_shape(seconds / 3, threads, peers[0])
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
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    if results.get("sizes"):
        files += [_bandwidth(results["sizes"], folder / "bandwidth.png")]
        files += [_growth(results["sizes"], folder / "growth.png")]
    if results.get("threads"):
        files += [_threads(results["threads"], folder / "threads.png")]
    if results.get("shapes"):
        files += [_shapes(results["shapes"], folder / "shapes.png")]
    return files


STYLE = {
    "limit": {"color": "black", "linestyle": "--", "linewidth": 1.2, "label": "bandwidth limit"},
    "fastbn": {"color": "tab:blue", "marker": "o", "markersize": 4, "linewidth": 2.2, "label": "fastbn", "zorder": 3},
    "torch": {"color": "tab:orange", "marker": "s", "markersize": 3, "label": "PyTorch"},
    "numpy": {"color": "tab:green", "marker": "^", "markersize": 3, "label": "NumPy"},
}


def _by_size(rows: list[dict[str, Any]], path: Path, ylabel: str, value: Any, title: str) -> Path:
    """Draw one panel per operation, with the array's size across."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(OPERATIONS), figsize=(12, 4.2), sharey=True, layout="constrained")
    for panel, name in zip(panels, OPERATIONS, strict=True):
        mine = [r for r in rows if r["operation"] == name]
        for who, style in STYLE.items():
            points = [(r["nbytes"], value(r, who)) for r in mine if who in r["times"]]
            if points:
                panel.plot(*zip(*points, strict=True), **style)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        ticks = [2**k for k in (10, 14, 18, 22, 26, 30)]
        panel.set_xticks(ticks, ["1 KB", "16 KB", "256 KB", "4 MB", "64 MB", "1 GB"])
        panel.set_title(name)
        panel.set_xlabel("size of x (float32)")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel(ylabel)
    panels[-1].legend()
    figure.suptitle(f"{title}, threads: {rows[0]['threads']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _bandwidth(rows: list[dict[str, Any]], path: Path) -> Path:
    return _by_size(
        rows,
        path,
        "GB/s of unavoidable traffic",
        lambda r, who: r["moved"] / r["times"][who] / 1e3,
        "How much of the machine's bandwidth an operation uses (higher is better)",
    )


def _growth(rows: list[dict[str, Any]], path: Path) -> Path:
    return _by_size(
        rows,
        path,
        "ns per value",
        lambda r, who: r["times"][who] * 4000 / r["nbytes"],
        "Cost per value as the array grows (lower is better)",
    )


def _threads(rows: list[dict[str, Any]], path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure, panel = plt.subplots(figsize=(6.5, 4.2), layout="constrained")
    most = max(r["threads"] for r in rows)
    colors = dict(zip(OPERATIONS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for name in OPERATIONS:
        for layout, line in (("planar", "-"), ("interleaved", "--")):
            mine = [r for r in rows if (r["operation"], r["layout"]) == (name, layout)]
            speedups = [mine[0]["times"]["fastbn"] / r["times"]["fastbn"] for r in mine]
            panel.plot(
                [r["threads"] for r in mine], speedups, line, color=colors[name], marker="o", label=f"{name} {layout}"
            )
    limits = [r for r in rows if (r["operation"], r["layout"]) == ("inference", "planar")]
    ratios = [limits[0]["times"]["limit"] / r["times"]["limit"] for r in limits]
    panel.plot([r["threads"] for r in limits], ratios, color="black", label="the limit itself (inference)")
    panel.plot([1, most], [1, most], color="gray", linewidth=0.8, linestyle=":", label="linear")
    panel.set_xticks(range(1, most + 1))
    panel.set_xlabel("threads")
    panel.set_ylabel("times as fast as one thread")
    panel.set_title("32 x 64 x 56 x 56 float32")
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _shapes(rows: list[dict[str, Any]], path: Path) -> Path:
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    figure, panels = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained", sharey=True)
    for panel, layout in zip(panels, ("planar", "interleaved"), strict=True):
        grid = np.full((len(CHANNELS), len(INNER)), np.nan)
        for r in rows:
            if r["layout"] == layout:
                speedup = r["times"][r["peer"]] / r["times"]["fastbn"]
                grid[CHANNELS.index(r["channels"]), INNER.index(r["inner"])] = speedup
        image = panel.imshow(grid, norm=LogNorm(1 / 16, 16), cmap="RdBu", aspect="auto", origin="lower")
        for (i, j), speedup in np.ndenumerate(grid):
            if np.isfinite(speedup):
                dark = speedup > 6 or speedup < 1 / 6
                panel.text(j, i, f"{speedup:.1f}", ha="center", va="center", color="white" if dark else "black")
        panel.set_xticks(range(len(INNER)), INNER)
        panel.set_yticks(range(len(CHANNELS)), CHANNELS)
        panel.set_xlabel("inner size (values of a channel in one image)")
        panel.set_title(f"{layout}, train")
    panels[0].set_ylabel("channels")
    peer = {"torch": "PyTorch", "numpy": "NumPy"}[rows[0]["peer"]]
    figure.colorbar(image, ax=panels, label=f"times as fast as {peer}")
    millions, threads = MAP_VALUES / 1e6, rows[0]["threads"]
    figure.suptitle(f"Training on about {millions:.0f} million values, threads: {threads}; blue where fastbn is faster")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
