"""Compare two builds of fastbn in one run: `python -m benchmarks.regress FOLDER`.

FOLDER is where another build was installed, by `pip install --target FOLDER ...`; it is compared with the
fastbn that is installed here (or with `--new FOLDER`). Each build has a process of its own. They are told
to work in turns, never at once, on arrays of the same sizes, in blocks whose order changes: a machine that
is busy for a while slows both down alike. Before each turn the other build's threads are given time to
fall asleep. Where arrays happen to lie in memory makes a difference that stays as long as a process
lives (measured: up to 12 % between two copies of one build), so there are several pairs of processes,
each of which counts once, and in which either begins in turn. With `--cold MB` calls go round arrays of
so many MB together, so that none finds its own in a cache: as in a training step, where other layers
come in between. With `--between` x (dy for a gradient) is copied to its place before each call, and
moments of the result are taken after it: all three are timed. With `--of N` arrays are the first
channels of arrays that have N of them. With `--past BYTES` all begin so far behind the beginning of a
cache line: NumPy's large arrays do 16 bytes behind it, small ones anywhere. What is printed is how
long the new build takes, in times of what the other takes: the median over pairs, with a 95 %
confidence interval. The exit code is 1 where the whole interval of a row lies above the threshold.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import builds
from .cases import Case
from .compare import CASES, ENTRIES, available, cases_of, names
from .operations import prepare

ROOT = Path(__file__).resolve().parent.parent
# Seconds until threads that wait for work have stopped to look for it: libgomp's look 300,000 times. They do not sleep
# at once (OMP_WAIT_POLICY=passive), as no user's do: waking them took 100 us, and hid what a build does in between.
ASLEEP = 0.03
LINE = 64  # bytes


class Build:
    """A process that has imported one build, and works when it is asked to."""

    def __init__(self, folder: str, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.regress", "--serve", folder]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.location = self.ask({"do": "locate"})

    def ask(self, message: dict[str, Any]) -> Any:
        """Send a message and wait for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process of a build ended with code {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.communicate(timeout=60)


def between_layers(call: Callable[[], Any], case: Case, operation: str) -> Callable[[], Any]:
    """Return a call between one that writes what it reads and one that reads what it writes."""
    import fastbn

    given = case.dy if operation == "backward" else case.x
    source = given.copy()

    def chain() -> None:
        np.copyto(given, source)
        call()
        fastbn.moments(case.out, axis=case.axis)

    return chain


def take_channels(case: Case, channels: int) -> None:
    """Let the arrays of a case be the first channels of arrays that have so many."""
    for name in ("x", "dy", "out"):
        given = getattr(case, name)
        shape = list(given.shape)
        shape[case.axis] = channels
        view = np.moveaxis(np.zeros(shape, given.dtype), case.axis, 0)[: given.shape[case.axis]]
        setattr(case, name, np.moveaxis(view, 0, case.axis))
        getattr(case, name)[...] = given


def behind_lines(case: Case, past: int) -> None:
    """Let the arrays of a case begin so many bytes behind the beginning of a cache line."""
    for name in ("x", "dy", "out"):
        given = getattr(case, name)
        raw = np.empty(given.nbytes + LINE + past, np.uint8)
        begin = -raw.ctypes.data % LINE + past
        array = raw[begin : begin + given.nbytes].view(given.dtype).reshape(given.shape)
        array[...] = given
        setattr(case, name, array)


def serve(folder: str) -> None:
    """Answer messages on standard input, one JSON line each."""
    builds.use(folder)
    import fastbn

    calls: Iterator[Callable[[], Any]] = iter(())
    for line in sys.stdin:
        message = json.loads(line)
        answer: Any = None
        if message["do"] == "locate":
            answer = str(Path(fastbn.__file__).parent)
        elif message["do"] == "prepare":
            entry = ENTRIES[message["entry"]]
            if available(entry):
                case = Case(tuple(message["shape"]), message["layout"], entry.dtype, message["mean"])
                copies = 1 + int(message["cold"] * 1e6) // (case.x.nbytes + case.dy.nbytes + case.out.nbytes)
                cases = [case] + [copy.deepcopy(case) for _ in range(copies - 1)]
                for c in cases if message["of"] else ():
                    take_channels(c, message["of"])
                for c in cases if message["past"] is not None else ():
                    behind_lines(c, message["past"])
                prepared = [prepare(entry.operation, "fastbn", c, **entry.options(c)) for c in cases]
                if message["between"]:
                    pairs = zip(prepared, cases, strict=True)
                    prepared = [between_layers(call, c, entry.operation) for call, c in pairs]
                calls = itertools.cycle(prepared)
                for _ in range(copies):
                    next(calls)()
                answer = True
        else:
            time.sleep(ASLEEP)
            next(calls)()
            times, end = [], time.perf_counter() + message["seconds"]
            while len(times) < 3 or time.perf_counter() < end:
                call = next(calls)
                start = time.perf_counter()
                call()
                times.append(time.perf_counter() - start)
            answer = statistics.quantiles(times, n=4)[0]
        print(json.dumps(answer), flush=True)


def compare(new: Build, old: Build, seconds: float, blocks: int = 4) -> tuple[float, float]:
    """Return the new build's time in microseconds, and its ratio to the old one's, of one pair of processes."""
    ratios, times = [], []
    block = {"do": "measure", "seconds": seconds / blocks}
    for i in range(blocks):
        if i % 2:
            b, a = old.ask(block), new.ask(block)
        else:
            a, b = new.ask(block), old.ask(block)
        ratios.append(a / b)
        times.append(a * 1e6)
    return statistics.median(times), statistics.median(ratios)


def interval(ratios: list[float]) -> tuple[float, float]:
    """Return the 95 % interval of the median, by resampling: such ratios have no distribution to rely on."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (4000, len(ratios))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", metavar="FOLDER", help="where the build to compare with is installed")
    parser.add_argument("--new", default="", metavar="FOLDER", help="default: the fastbn that is installed here")
    parser.add_argument("--ops", default="train,inference,backward", metavar="A,B", help=", ".join(ENTRIES))
    parser.add_argument(
        "--cases",
        default="conv2,conv4,conv5,rgb,mlp512,table10,tiny",
        metavar="A,B",
        help=", ".join(CASES) + ", or shapes",
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each build on each row")
    parser.add_argument("--pairs", type=int, default=10, help="of processes")
    parser.add_argument("--threshold", type=float, default=1.1, help="ratio above which a row has become slower")
    parser.add_argument("--cold", type=float, default=0, metavar="MB", help="of arrays to go round")
    parser.add_argument("--between", action="store_true", help="time what writes x, and reads the result, too")
    parser.add_argument("--of", type=int, default=0, metavar="CHANNELS", help="arrays are the first of so many")
    parser.add_argument("--past", type=int, metavar="BYTES", help="from the beginning of a cache line to arrays")
    parser.add_argument("--mean", type=float, default=1, help="of x, whose deviation is 1")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args(arguments)
    operations, cases = names(args.ops, ENTRIES, "operation"), cases_of(args.cases)
    folders = [str(Path(f).resolve()) if f else "" for f in (args.new, args.old)]
    found: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for pair in range(args.pairs):
        # Who comes first gets what was given back last. With 13 to 26 MB other pages alone were up to a quarter between
        # two copies of one build, so each gets either in turn.
        first, second = (Build(folder, args.threads) for folder in folders[:: -1 if pair % 2 else 1])
        new, old = (second, first) if pair % 2 else (first, second)
        if pair == 0:
            print(f"new: {new.location}\nold: {old.location}\n")
        for name in operations:
            for case, (shape, layouts) in cases.items():
                for layout in layouts:
                    rows = found.setdefault((name, case, layout), [])
                    about = {"shape": shape, "layout": layout}
                    about |= {"cold": args.cold, "between": args.between, "of": args.of, "mean": args.mean}
                    about["past"] = args.past
                    wanted = {"do": "prepare", "entry": name} | about
                    if first.ask(wanted) and second.ask(wanted):
                        rows.append(compare(new, old, args.seconds / args.pairs))
        second.close()
        first.close()
    print("| operation | case | layout | new, us | new / old | 95 % interval | |")
    print("|---|---|---|---:|---:|---|---|")
    slower = 0
    for key, rows in found.items():
        if not rows:
            print("| " + " | ".join(key) + " | not in both | | | |")
            continue
        times, ratios = zip(*rows, strict=True)
        low, high = interval(list(ratios))
        verdict = "slower" if low > args.threshold else "faster" if high < 1 / args.threshold else ""
        slower += verdict == "slower"
        numbers = [f"{statistics.median(times):,.1f}", f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}"]
        print("| " + " | ".join([*key, *numbers, verdict]) + " |")
    print(f"\n{slower} rows slower by more than {100 * (args.threshold - 1):.0f} %")
    return int(slower > 0)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        sys.exit(main())
