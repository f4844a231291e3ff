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
from typing import Any, NoReturn, TextIO, TypeVar

import numpy as np

from . import __version__, layout, state, stream, weights
from .config import show_config
from .layer import BatchNorm
from .moments import Moments
from .npy import NpyFile

__all__ = ["main"]

N = TypeVar("N", int, float)

# More channels than this are summarized: a terminal is no place for a thousand lines.
SHOWN_CHANNELS = 8
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


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
        try:
            args = _parser().parse_args(argv)
        except SystemExit as request:  # argparse has printed the help, the version or the complaint
            _flush()
            _say()
            return int(request.code or 0)
        with _terminable(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args.run(args)
            _flush()
    except _UsageError as error:
        return _complain(error, code=2)
    except KeyboardInterrupt:
        return _complain("interrupted", code=130)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        _drop(sys.stdout)
    except OSError as error:
        return _complain(error if error.filename is None else f"{error.filename or repr('')}: {error.strerror}")
    except (ValueError, TypeError, ImportError, MemoryError) as error:
        return _complain(error)
    return 0


@contextmanager
def _printing() -> Iterator[None]:
    """Let errors that name no file say that it is stdout, which takes no more then."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        _drop(sys.stdout)
        raise OSError(error.errno, error.strerror, "standard output") from None


def _drop(output: TextIO) -> None:
    """Send what is left to print nowhere: the flush at the interpreter's exit would fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())


@_printing()
def _flush() -> None:
    if sys.stdout is not None:  # as it is in a process that was started with it closed
        sys.stdout.flush()


class _UsageError(Exception):
    """A mistake in the arguments that argparse cannot see."""


def _complain(error: object, code: int = 1) -> int:
    line = " ".join(str(error).split()) or type(error).__name__
    _say(f"fastbn: error: {line}")
    return code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say(f"fastbn: warning: {message}")


def _say(line: str = "") -> None:
    """Write a line to stderr, and what others have left there."""
    if sys.stderr is None:  # which print would take for stdout
        return
    try:
        print(line, end="\n" if line else "", file=sys.stderr, flush=True)
    except OSError:  # full, or a pipe that nobody reads
        _drop(sys.stderr)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let signals unwind the stack, so that temporary files go, instead of ending the process on the spot."""

    def stop(signum: int, frame: object) -> NoReturn:
        # A terminal that closes sends several, people press Ctrl-C twice: another one must not end the cleaning up.
        for number in previous:
            signal.signal(number, signal.SIG_IGN)
        if signum == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + signum)

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    handlers = {number: signal.getsignal(number) for number in ENDING}
    previous = {n: h for n, h in handlers.items() if h != signal.SIG_IGN}  # what nohup ignores stays ignored
    if previous.get(signal.SIGINT) is not signal.default_int_handler:  # a program around this one has its own
        previous.pop(signal.SIGINT, None)
    for number in previous:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


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
        description="Normalize a .npy file by statistics or by a saved BatchNorm, in constant memory. A layer does "
        "what it does in inference: its activation is applied, and nan_policy='raise' refuses NaN.",
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
    value = _number(float, text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be finite and not negative, got {text}")
    return value


def _seed(text: str) -> int:
    value = _number(int, text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def _number(kind: type[N], text: str) -> N:
    """Return a number; argparse's own complaint would name the function that it calls."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text!r}") from None


def _refuse_overwriting(output: str, *inputs: str) -> None:
    for path in inputs:
        if stream.same_file(output, path):
            raise _UsageError(f"--output must differ from the inputs, got {output} for both")


# -- commands ------------------------------------------------------------------------------------------------


@_printing()
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
    options = _read_parameters(args.moments, len(source.shape), args.axis)
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


def _read_parameters(path: str, rank: int, axis: int | None) -> dict[str, Any]:
    """Read what `stream.normalize_file` needs for an array of this rank, from either kind of file.

    An axis that is given stands for that of the file, which then need not fit the array.
    """
    if state.read_kind(path) == "moments":
        moments, stored = stream.load_moments(path)
        if not np.any(moments.count):
            raise ValueError(f"{path} holds statistics of no values at all")
        return {"mean": moments.mean, "variance": moments.variance(), "axis": stored if axis is None else axis}
    layer = BatchNorm.load(path)
    axes = layout.channel_axes(layer.axis, layer.layout, rank) if axis is None else (axis,)
    if not layer.built or np.ndim(layer.moving_mean) != 1:
        raise ValueError(f"{path} must hold statistics along one channel axis, got {layer!r}")
    return {
        "mean": layer.moving_mean,
        "variance": layer.moving_variance,
        "gamma": layer.gamma,
        "beta": layer.beta,
        "epsilon": layer.epsilon,
        "axis": axes[0],
        "activation": layer.activation,
        "nan_policy": layer.nan_policy,
    }


# -- printing ------------------------------------------------------------------------------------------------


@_printing()
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
    if quiet or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, unit_divisor=1024, file=sys.stderr) as bar:
        yield bar.update
