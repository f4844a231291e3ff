"""fastbn beside the bandwidth limit and its peers: `make compare`, or `python -m benchmarks.compare`.

Peers are what can be imported of PyTorch, JAX, ONNX Runtime, scikit-learn; NumPy always. All work on the same
arrays in one process, and take turns in blocks, with a pause in between in which the idle threads of the one
before fall asleep. Times are lower quartiles in microseconds. `limit` is the time merely to move the data.

    python -m benchmarks.compare --ops train,backward --cases conv2,32x512x7x7 --seconds 1
    python -m benchmarks.compare --sweep --plots docs/images
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import limit
from .cases import Case
from .operations import PEERS, prepare
from .table import measure


@dataclass(frozen=True)
class Entry:
    """A row of the table for each case: an operation, what it is asked beside, and what it has to move."""

    operation: str
    dtype: str = "float32"
    reads: int = 1  # arrays like x
    writes: float = 1  # bytes for each byte of x
    options: Callable[[Case], dict[str, Any]] = field(default=lambda case: {})  # for fastbn


# Rows that this version of fastbn has no parameter or no type for, which it says by a TypeError, are left out.
ENTRIES = {
    "train": Entry("train"),
    "inference": Entry("inference"),
    "backward": Entry("backward", reads=2),
    "moments": Entry("moments", writes=0),
    "inference-relu": Entry("inference", options=lambda case: {"activation": "relu"}),
    "inference-residual": Entry("inference", reads=2, options=lambda case: {"residual": case.dy}),
    "train-relu": Entry("train", options=lambda case: {"activation": "relu"}),
    "train-residual-relu": Entry("train", reads=2, options=lambda case: {"residual": case.dy, "activation": "relu"}),
    "backward-relu": Entry("backward", reads=2, options=lambda case: {"activation": "relu"}),
    "inference-silu": Entry("inference", options=lambda case: {"activation": "silu"}),
    "inference-silu-float16": Entry("inference", dtype="float16", options=lambda case: {"activation": "silu"}),
    "train-silu": Entry("train", options=lambda case: {"activation": "silu"}),
    "backward-silu": Entry("backward", reads=2, options=lambda case: {"activation": "silu"}),
    "inference-float16": Entry("inference", dtype="float16"),
    "inference-bfloat16": Entry("inference", dtype="bfloat16"),
    "inference-uint8": Entry("inference", dtype="uint8", writes=4),
    "train-float16": Entry("train", dtype="float16"),
    "train-bfloat16": Entry("train", dtype="bfloat16"),
    "train-uint8": Entry("train", dtype="uint8", writes=4),
    "backward-float16": Entry("backward", dtype="float16", reads=2),
    "backward-bfloat16": Entry("backward", dtype="bfloat16", reads=2),
    "backward-relu-float16": Entry("backward", dtype="float16", reads=2, options=lambda case: {"activation": "relu"}),
    "backward-silu-float16": Entry("backward", dtype="float16", reads=2, options=lambda case: {"activation": "silu"}),
}

# (batch, channels, *spatial), and where the channels are.
BOTH = ("planar", "interleaved")
ROWS = ("interleaved",)
Cases = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
CASES: Cases = {
    "conv2": ((32, 64, 56, 56), BOTH),
    "conv3": ((32, 256, 28, 28), BOTH),
    "conv4": ((32, 1024, 14, 14), BOTH),  # planar: larger than a cache, and planes that share lines of memory
    "conv5": ((32, 512, 7, 7), BOTH),
    "wide": ((8, 64, 112, 112), BOTH),
    "single": ((1, 64, 56, 56), BOTH),
    "big": ((64, 256, 56, 56), BOTH),
    "rgb": ((16, 3, 224, 224), BOTH),
    "prime": ((31, 61, 37, 41), BOTH),
    "mlp512": ((1024, 512), ROWS),
    "mlp4096": ((128, 4096), ROWS),
    "table64": ((65536, 64), ROWS),
    "table10": ((1_000_000, 10), ROWS),
    "prime101": ((10_007, 101), ROWS),
    "tiny": ((32, 16), ROWS),
    "channel1": ((1_000_000, 1), ROWS),
    "row1": ((1, 100_000), ROWS),
}


def contenders(entry: Entry, case: Case, threads: int, peers: list[str]) -> dict[str, Callable[[], Any]]:
    """Return a call for the limit, for fastbn and for each peer that has the operation.

    Raises
    ------
    TypeError
        If this version of fastbn does not have it.
    """
    calls = limit.calls(case.x.nbytes, pair=entry.reads == 2, writes=entry.writes, threads=threads)
    calls["fastbn"] = prepare(entry.operation, "fastbn", case, **entry.options(case))
    calls["fastbn"]()
    for peer in peers if entry.dtype == "float32" else [peer for peer in peers if peer == "torch"]:
        try:
            calls[peer] = prepare(entry.operation, peer, case, **entry.options(case))
            calls[peer]()
        except NotImplementedError:
            calls.pop(peer, None)
    return calls


def row(
    name: str, shape: tuple[int, ...], layout: str, seconds: float, threads: int, peers: list[str]
) -> dict[str, Any]:
    """Measure one entry on one case: times in microseconds, and what follows from them."""
    entry = ENTRIES[name]
    case = Case(shape, layout, entry.dtype)
    times = measure(contenders(entry, case, threads, peers), seconds)
    least, ours = limit.least(times), times.pop("fastbn")
    best = min(times, key=lambda peer: times[peer]) if times else None
    moved = case.x.nbytes * (entry.reads + entry.writes)
    return {
        "operation": name,
        "shape": shape,
        "layout": layout,
        "bytes": moved,
        "limit": least if math.isfinite(least) else None,
        "fastbn": ours,
        "peers": times,
        "best": best,
        "limits": ours / least,
        "speedup": times[best] / ours if best else None,
    }


def set_threads(threads: int) -> None:
    """Give fastbn and PyTorch so many threads."""
    import fastbn

    fastbn.set_num_threads(threads)
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)


def available(entry: Entry) -> bool:
    """Whether this fastbn has the operation, found by trying it."""
    try:
        case = Case((4, 3), "interleaved", entry.dtype)
        prepare(entry.operation, "fastbn", case, **entry.options(case))()
    except (TypeError, ImportError):
        return False
    return True


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def table(operations: list[str], cases: Cases, seconds: float, threads: int, peers: list[str]) -> list[dict[str, Any]]:
    """Measure and print all rows; return them."""
    print("| operation | case | layout | limit | fastbn | limits | best peer | speed-up | peers |")
    print("|---|---|---|---:|---:|---:|---|---:|---|")
    rows = []
    for name in operations:
        if not available(ENTRIES[name]):
            print(f"| {name} | not in this version | | | | | | | |")
            continue
        for case, (shape, layouts) in cases.items():
            for layout in layouts:
                r = row(name, shape, layout, seconds, threads, peers) | {"case": case}
                rows.append(r)
                least = "" if r["limit"] is None else f"{r['limit']:,.1f}"
                limits = "" if r["limit"] is None else f"{r['limits']:.2f}"
                speedup = "" if r["best"] is None else f"{r['speedup']:.2f}x"
                others = ", ".join(f"{peer} {t:,.0f}" for peer, t in sorted(r["peers"].items(), key=lambda p: p[1]))
                cells = [name, case, layout, least, f"{r['fastbn']:,.1f}", limits, r["best"] or "", speedup, others]
                print("| " + " | ".join(cells) + " |", flush=True)
    print()
    for name in operations:
        mine = [r for r in rows if r["operation"] == name]
        if mine:
            limits = geometric_mean([r["limits"] for r in mine if r["limit"]])
            speedups = [r["speedup"] for r in mine if r["best"]]
            print(
                f"{name}: geometric means {limits:.2f} limits, {geometric_mean(speedups):.2f}x the best peer; "
                f"behind a peer in {sum(s < 1 for s in speedups)} of {len(speedups)}"
            )
    return rows


def names(wanted: str, known: dict[str, Any], what: str) -> list[str]:
    """Split a list of names, and refuse unknown ones."""
    chosen = wanted.split(",") if wanted else list(known)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SystemExit(f"unknown {what} {', '.join(unknown)}: choose from {', '.join(known)}")
    return chosen


def shaped(name: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the case of a shape such as 32x512x7x7: batch, channels, positions, in the layouts that it may have."""
    shape = tuple(int(n) for n in name.split("x"))
    return shape, BOTH if len(shape) > 2 else ROWS


def cases_of(wanted: str, named: Cases = CASES) -> Cases:
    """Return the cases of a list of names and shapes; of none, all that have a name."""
    known = named | {name: shaped(name) for name in wanted.split(",") if re.fullmatch(r"\d+(x\d+)+", name)}
    return {name: known[name] for name in names(wanted, known, "case")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="", metavar="A,B", help="default: all that this fastbn has")
    parser.add_argument("--cases", default="", metavar="A,B", help=", ".join(CASES) + ", or shapes")
    parser.add_argument("--peers", default=",".join(PEERS), metavar="A,B")
    parser.add_argument("--seconds", type=float, default=0.25, help="for each contender on each row")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there too")
    parser.add_argument(
        "--sweep",
        nargs="?",
        const="sizes,threads,shapes",
        metavar="A,B",
        help="instead of the table, how speed depends on these of sizes, threads, shapes (default: all)",
    )
    parser.add_argument("--smallest", type=float, default=0.0, metavar="GB", help="array of the sweep")
    parser.add_argument(
        "--largest", type=float, default=2.0, metavar="GB", help="array of the sweep, if memory permits"
    )
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the sweep there (needs matplotlib)")
    args = parser.parse_args(arguments)
    operations, cases = names(args.ops, ENTRIES, "operation"), cases_of(args.cases)
    peers = names(args.peers, dict.fromkeys(PEERS), "peer")
    set_threads(args.threads)

    import fastbn

    print(f"fastbn {fastbn.__version__}, NumPy {np.__version__}, {args.threads} threads\n")
    if limit.compiled() is None:
        print("no C compiler with OpenMP: no limit\n")
    if args.sweep or args.plots:
        from . import sweep

        parts = names(args.sweep or "", dict.fromkeys(sweep.PARTS), "part of the sweep")
        some = [name for name in sweep.OPERATIONS if name in operations]
        results = sweep.run(parts, some, args.seconds, args.threads, (args.smallest, args.largest), peers)
        if args.plots:
            sweep.draw(results, args.plots)
    else:
        results = table(operations, cases, args.seconds, args.threads, peers)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
