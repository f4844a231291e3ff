"""What synchronized batch norm costs at 2 to 10,000 ranks, simulated: ``python -m benchmarks.ranks``.

One forward step of one layer: how its statistics get to all ranks. Two ways are compared.

allgather   every rank gets the 2 C + 1 float64 of every other, and merges them in rank order. This is what fastbn does:
            one exchange, and the same bits on every rank whatever the MPI library does.
allreduce   two sums, one after the other: (count, count * mean), C + 1 numbers; then C numbers, the sums of
            m2 + count * (mean - pooled mean)^2. Less is sent where ranks are many, in the MPI library's order.

The model: sending a message of b bytes takes ``latency + b / bandwidth``, in rounds in which every rank sends one
message and gets one (no contention, all ranks arrive at once). Allgather is Bruck's: ceil(log2 p) rounds, in which what
is sent doubles. Allreduce is the better of recursive doubling (log2 p rounds of everything, two more where p is no
power of 2) and of reduce-scatter with allgather (2 log2 p rounds, 2 (p - 1) / p of everything). To that comes the
arithmetic: the merge of p rows, measured on this machine with fastbn's own function, and a billion additions per second
in the sums.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import numpy as np

RANKS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10000)
NETWORKS = {"shared memory": (0.5e-6, 10e9), "InfiniBand": (2e-6, 12e9), "Ethernet": (30e-6, 1.2e9)}
ADDITIONS = 1e9  # per second
SIZE = 8  # bytes of a number


def allgather(ranks: int, numbers: int, latency: float, bandwidth: float) -> float:
    """Seconds until every rank has the numbers of all (Bruck, round by round)."""
    seconds, held = 0.0, 1
    while held < ranks:
        sent = min(held, ranks - held)
        seconds += latency + sent * numbers * SIZE / bandwidth
        held += sent
    return seconds


def allreduce(ranks: int, numbers: int, latency: float, bandwidth: float) -> float:
    """Seconds until every rank has the sum of all, by the faster of two algorithms."""
    if ranks == 1:
        return 0.0
    rounds = math.floor(math.log2(ranks))
    extra = 2 if 2**rounds < ranks else 0
    data, adding = numbers * SIZE / bandwidth, numbers / ADDITIONS
    doubling = (rounds + extra) * (latency + data) + (rounds + min(extra, 1)) * adding
    share = (2**rounds - 1) / 2**rounds
    halving = 2 * rounds * latency + share * (2 * data + adding) + extra * (latency + data) + min(extra, 1) * adding
    return min(doubling, halving)


def merging(channels: int, rows: int = 64) -> float:
    """Seconds per row of the merge, measured."""
    from fastbn import synchronized

    rng = np.random.default_rng(0)
    parts = rng.random((rows, 2 * channels + 1))
    parts[:, 0] = 32
    synchronized.merged(parts)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        synchronized.merged(parts)
        times.append(time.perf_counter() - start)
    return min(times) / rows


def simulate(channels: int, latency: float, bandwidth: float, merge: float) -> list[dict[str, Any]]:
    """A row of the table for each number of ranks."""
    result = []
    for p in RANKS:
        n = 2 * channels + 1
        gathered = allgather(p, n, latency, bandwidth) + p * merge
        reduced = allreduce(p, channels + 1, latency, bandwidth) + allreduce(p, channels, latency, bandwidth)
        result.append(
            {
                "ranks": p,
                "received": (p - 1) * n * SIZE,
                "allgather": gathered,
                "merge": p * merge,
                "allreduce": reduced,
            }
        )
    return result


def crossing(channels: int, latency: float, bandwidth: float, merge: float) -> int | None:
    """The smallest number of ranks from which on two allreduces are faster, up to 10,000."""
    slower = [
        p
        for p in range(2, 10001)
        if allgather(p, 2 * channels + 1, latency, bandwidth) + p * merge
        <= allreduce(p, channels + 1, latency, bandwidth) + allreduce(p, channels, latency, bandwidth)
    ]
    last = max(slower, default=1)
    return None if last == 10000 else last + 1


def main(arguments: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks")
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    merges = {c: merging(c) for c in options.channels}
    if options.json:
        tables = {
            f"{name}, {c} channels": simulate(c, *network, merges[c])
            for name, network in NETWORKS.items()
            for c in options.channels
        }
        print(json.dumps(tables, indent=1))
        return 0
    c = 256 if 256 in merges else options.channels[0]
    name = "InfiniBand"
    latency, bandwidth = NETWORKS[name]
    print(f"{c} channels, {name} ({latency * 1e6:g} us, {bandwidth / 1e9:g} GB/s); times in microseconds\n")
    print("| ranks | received by each, KB | allgather and merge | of which merge | two allreduces |")
    print("|---|---|---|---|---|")
    for row in simulate(c, latency, bandwidth, merges[c]):
        print(
            f"| {row['ranks']} | {row['received'] / 1e3:.0f} | {1e6 * row['allgather']:.0f} "
            f"| {1e6 * row['merge']:.0f} | {1e6 * row['allreduce']:.0f} |"
        )
    print("\nRanks from which on two allreduces are faster:\n")
    print("| channels | merge of a row, us | " + " | ".join(NETWORKS) + " |")
    print("|---|---|" + "---|" * len(NETWORKS))
    for c, merge in merges.items():
        found = [str(crossing(c, *network, merge) or "none to 10,000") for network in NETWORKS.values()]
        print(f"| {c} | {1e6 * merge:.2f} | " + " | ".join(found) + " |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
