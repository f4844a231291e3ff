"""The command line: ``fastbn info | stats | apply | merge | demo``.

Data goes to stdout, progress and complaints to stderr. Exit codes: 0 done, 1 failed (one line says why), 2
wrong usage, 130 interrupted. Files appear complete or not at all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np

from . import __version__, layout, state, stream, weights
from .config import show_config
from .layer import BatchNorm
from .moments import Moments
from .npy import NpyFile

__all__ = ["main"]

# More channels than this are summarized: a terminal is no place for a thousand lines.
SHOWN_CHANNELS = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments after the program's name; ``sys.argv[1:]`` if None.

    Returns
    -------
    int
        The exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as request:  # argparse has printed the help, the version or the complaint
        return int(request.code or 0)
    try:
        with _terminable(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args.run(args)
            sys.stdout.flush()
    except _UsageError as error:
        return _complain(error, code=2)
    except KeyboardInterrupt:
        return _complain("interrupted", code=130)
    except BrokenPipeError:
        # The reader (head, less) has seen enough. The flush at the interpreter's exit must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        return _complain(f"{error.filename}: {error.strerror}" if error.filename else error)
    except (ValueError, TypeError, ImportError, MemoryError) as error:
        return _complain(error)
    return 0


class _UsageError(Exception):
    """A mistake in the arguments that argparse cannot see."""


def _complain(error: object, code: int = 1) -> int:
    line = " ".join(str(error).split()) or type(error).__name__
    print(f"fastbn: error: {line}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"fastbn: warning: {message}", file=sys.stderr)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that temporary files go, instead of ending the process on the spot."""

    def stop(signum: int, frame: object) -> NoReturn:
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous if previous is not None else signal.SIG_DFL)


# -- arguments -----------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastbn", description="Batch normalization for CPUs.")
    parser.add_argument("--version", action="version", version=f"fastbn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="show version, instruction set, OpenMP runtime and threads")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(run=_info)

    stats = commands.add_parser(
        "stats",
        help="statistics per channel of a .npy file of any size",
        description="Count, mean and M2 per channel of a float32 or float64 file, in constant memory.",
    )
    stats.add_argument("file", metavar="FILE.npy")
    stats.add_argument("--axis", type=int, default=-1, metavar="N", help="the channel axis (default: the last)")
    _output_options(stats, "M.npz")
    stats.set_defaults(run=_stats)

    apply = commands.add_parser(
        "apply",
        help="normalize a .npy file of any size",
        description="Normalize a .npy file by statistics or by a saved BatchNorm, in constant memory.",
    )
    apply.add_argument("moments", metavar="M.npz", help="written by stats, by merge or by BatchNorm.save")
    apply.add_argument("file", metavar="FILE.npy")
    apply.add_argument("--axis", type=int, metavar="N", help="the channel axis (default: that of M.npz)")
    added = "added to the variance (default: the layer's; 0.001 for statistics)"
    apply.add_argument("--epsilon", type=_epsilon, metavar="E", help=added)
    _output_options(apply, "OUT.npy")
    apply.set_defaults(run=_apply)

    merge = commands.add_parser(
        "merge",
        help="join the statistics of several files",
        description="Join statistics: the result is that of all the data at once.",
    )
    merge.add_argument("first", metavar="A.npz")
    merge.add_argument("others", metavar="B.npz", nargs="+")
    _output_options(merge, "C.npz")
    merge.set_defaults(run=_merge)

    demo = commands.add_parser(
        "demo",
        help="train a small network with batch norm on handwritten digits",
        description="Train a small network on the digits of scikit-learn; print tables, save plots.",
    )
    demo.add_argument("--quick", action="store_true", help="fewer epochs and timings")
    demo.add_argument("--output", default="fastbn-demo", metavar="DIR", help="for the plots (default: %(default)s)")
    demo.add_argument("--seed", type=_seed, default=0, metavar="N", help="of weights and batches (default: 0)")
    demo.add_argument("--quiet", action="store_true", help="no progress bar")
    demo.set_defaults(run=_demo)
    return parser


def _output_options(parser: argparse.ArgumentParser, metavar: str) -> None:
    parser.add_argument("-o", "--output", required=True, metavar=metavar, help="the file to write")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no summary")


def _epsilon(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be finite and not negative, got {text}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def _refuse_overwriting(output: str, *inputs: str) -> None:
    for path in inputs:
        if stream.same_file(output, path):
            raise _UsageError(f"--output must differ from the inputs, got {output} for both")


# -- commands ------------------------------------------------------------------------------------------------


def _info(args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(show_config(mode="dicts"), indent=2))
    else:
        show_config()


def _stats(args: argparse.Namespace) -> None:
    _refuse_overwriting(args.output, args.file)
    total = NpyFile.open(args.file).nbytes
    with _progress(total, "stats", args.quiet) as progress:
        moments = stream.moments_of_file(args.file, axis=args.axis, progress=progress)
    stream.save_moments(args.output, moments, args.axis)
    _print_moments(moments, args.quiet)


def _apply(args: argparse.Namespace) -> None:
    _refuse_overwriting(args.output, args.file, args.moments)
    source = NpyFile.open(args.file)
    options = _read_parameters(args.moments, len(source.shape))
    if args.axis is not None:
        options["axis"] = args.axis
    if args.epsilon is not None:
        options["epsilon"] = args.epsilon
    if options["axis"] is None:
        raise _UsageError(f"{args.moments} joins statistics of different channel axes: give --axis")
    with _progress(source.nbytes, "apply", args.quiet) as progress:
        stream.normalize_file(args.file, args.output, **options, progress=progress)


def _merge(args: argparse.Namespace) -> None:
    paths = [args.first, *args.others]
    _refuse_overwriting(args.output, *paths)
    moments, axis = stream.load_moments(args.first)
    for path in args.others:
        other, other_axis = stream.load_moments(path)
        if other.mean.shape != moments.mean.shape:
            raise ValueError(f"{path} must have {moments.mean.size} channels like {args.first}, got {other.mean.size}")
        moments.merge(other)
        axis = axis if axis == other_axis else None
    stream.save_moments(args.output, moments, axis)
    _print_moments(moments, args.quiet)


def _demo(args: argparse.Namespace) -> None:
    from . import demo

    demo.run(args.output, quick=args.quick, seed=args.seed, progress=not args.quiet)


def _read_parameters(path: str, rank: int) -> dict[str, Any]:
    """Read what `stream.normalize_file` needs for an array of this rank, from either kind of file."""
    if state.read_kind(path) == "moments":
        moments, axis = stream.load_moments(path)
        if not np.any(moments.count):
            raise ValueError(f"{path} holds statistics of no values at all")
        return {"mean": moments.mean, "variance": moments.variance(), "axis": axis}
    layer = BatchNorm.load(path)
    axes = layout.channel_axes(layer.axis, layer.layout, rank)
    if len(axes) != 1 or not layer.built:
        raise ValueError(f"{path} must hold statistics along one channel axis, got {layer!r}")
    return {
        "mean": layer.moving_mean,
        "variance": layer.moving_variance,
        "gamma": layer.gamma,
        "beta": layer.beta,
        "epsilon": layer.epsilon,
        "axis": axes[0],
    }


# -- printing ------------------------------------------------------------------------------------------------


def _print_moments(moments: Moments, quiet: bool) -> None:
    if quiet:
        return
    channels = moments.mean.size
    print(f"{channels} channels of {weights.described(moments.count)}")
    if not np.any(moments.count):
        return
    deviation = np.sqrt(moments.variance())
    print(f"{'channel':>8} {'mean':>14} {'deviation':>14}")
    for channel in range(min(channels, SHOWN_CHANNELS)):
        print(f"{channel:>8} {moments.mean[channel]:>14.7g} {deviation[channel]:>14.7g}")
    if channels > SHOWN_CHANNELS:
        print(f"{'...':>8} {channels - SHOWN_CHANNELS} more")


@contextmanager
def _progress(total: int, label: str, quiet: bool) -> Iterator[Callable[[int], object] | None]:
    """A bar on stderr where there is a terminal to draw it on and tqdm to draw it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr) as bar:
        yield bar.update
