"""Ctrl-C ends a long call soon, and leaves the moving statistics as they were."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import cases
import numpy as np
import pytest

import fastbn
from fastbn import BatchNorm

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers on this system")

CHANNELS = 64
SOON = 1.0  # seconds within which a call has to end after the signal

# Arrays of zero stride: one row or one image, repeated as often as one likes, without the memory.
PATTERNS = {
    "interleaved": (lambda n: np.broadcast_to(ROW, (n, CHANNELS)), -1),
    "planar": (lambda n: np.broadcast_to(ROW[None, :, None], (n // 4096, CHANNELS, 4096)), 1),
}
ROW = np.random.default_rng(0).standard_normal(CHANNELS, dtype=np.float32)


@contextlib.contextmanager
def interrupted_after(seconds):
    """Ctrl-C after some seconds, unless the block has ended by then."""
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def rows_for(make, axis, wanted):
    """How many rows take `moments` about so many seconds."""
    n = 1 << 18
    once = min(seconds(lambda: fastbn.moments(make(n), axis=axis)) for _ in range(3))
    return int(n * max(1.0, wanted / once))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_long_call_ends_soon(pattern, threads):
    make, axis = PATTERNS[pattern]
    with fastbn.threads(threads):
        x = make(rows_for(make, axis, 8.0))
        total = fastbn.moments(make(8192), axis=axis)
        before = total.to_dict()
        start = time.perf_counter()
        with pytest.raises(KeyboardInterrupt), interrupted_after(0.1):
            total.update(x, axis=axis)
        assert time.perf_counter() - start < 0.1 + SOON
        after = total.to_dict()
    assert after["count"] == before["count"]
    assert after["mean"].tobytes() == before["mean"].tobytes()
    assert after["m2"].tobytes() == before["m2"].tobytes()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_interrupted_step_is_taken_whole_or_not_at_all(pattern):
    """Wherever the signal comes: among the sums, among the results, or after both."""
    make, axis = PATTERNS[pattern]
    x = make(1 << 20)
    out = np.empty(x.shape, x.dtype)  # 256 MB, one result for all calls
    start = np.zeros((2, CHANNELS), np.float32)

    def step(moving):
        fastbn.batch_norm(x, moving_mean=moving[0], moving_variance=moving[1], training=True, axis=axis, out=out)

    complete = start.copy()
    step(complete)  # the pages of `out` are there from now on
    duration = seconds(lambda: step(start.copy()))
    stopped = 0
    for part in (0.02, 0.2, 0.4, 0.6, 0.8):
        moving = start.copy()
        try:
            with interrupted_after(part * duration):
                step(moving)
        except KeyboardInterrupt:
            stopped += 1
        assert moving.tobytes() in (start.tobytes(), complete.tobytes())
    assert stopped
    step(again := start.copy())
    assert again.tobytes() == complete.tobytes()


def test_an_interrupted_layer_is_as_before():
    make, axis = PATTERNS["interleaved"]
    layer = fastbn.BatchNorm(CHANNELS, axis=axis)
    layer(make(4096), training=True)
    before = {name: np.array(value) for name, value in layer.state_dict().items()}
    x = make(1 << 20)
    out = np.empty(x.shape, x.dtype)
    with pytest.raises(KeyboardInterrupt), interrupted_after(0.002):
        layer(x, training=True, out=out)
    after = layer.state_dict()
    assert all(np.array_equal(after[name], value) for name, value in before.items())
    layer(make(4096), training=True)  # no lock is left held
    assert layer.state_dict()["batches"] == before["batches"] + 1


def test_ctrl_c_of_the_terminal():
    script = """if True:
        import numpy as np, fastbn
        x = np.broadcast_to(np.ones(64, np.float32), (10**9, 64))
        print("ready", flush=True)
        fastbn.moments(x)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        assert process.poll() is None
        sent = time.perf_counter()
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert time.perf_counter() - sent < SOON + 1.0  # the interpreter has to end, too
    finally:
        process.kill()
        process.communicate()
    assert "KeyboardInterrupt" in err
    assert process.returncode != 0


# -- anywhere in Python ------------------------------------------------------------------------------------------------


def interrupt(call, step: int) -> bool:
    """Make a call that is interrupted at that step of fastbn's Python; whether it ended before.

    Signal handlers run where functions begin and when they have returned.
    """
    left = step

    def look(frame, event, _):
        nonlocal left
        if event in ("call", "return", "c_return") and f"{os.sep}fastbn{os.sep}" in frame.f_code.co_filename:
            left -= 1
            if left < 0:
                sys.setprofile(None)
                raise KeyboardInterrupt

    sys.setprofile(look)
    try:
        call()
    except KeyboardInterrupt:
        return False
    finally:
        sys.setprofile(None)
    return True


LAYERS = [
    {},
    {"momentum": None},
    {"axis": 1},
    {"axis": (2, 0)},
    {"zero_debias": True},
    {"on_nonfinite": "skip"},
    {"virtual_batch_size": 3},
    {"renorm": True},
    {"renorm": True, "renorm_scheme": "tf1"},
]


@pytest.mark.parametrize("what", ["training", "load_state_dict", "recompute_statistics"])
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_all_of_an_update_or_nothing(options, what):
    """Whichever step of Python a signal comes at: statistics, averages and counter belong together."""
    x, other = cases.normal((6, 4, 3)), cases.normal((6, 4, 3), mean=3)
    if options.get("axis") == (2, 0):
        x = np.asfortranarray(x)
    source = BatchNorm(**options)
    source(other, True)

    def made():
        layer = BatchNorm(**options)
        layer(other, True)
        state = layer.state_dict()
        layer.load_state_dict(
            {name: value if name == "batches" else np.abs(value) / 2 for name, value in state.items()}
        )
        return layer

    def call(layer):
        if what == "training":
            layer(x, True)
        elif what == "load_state_dict":
            layer.load_state_dict(source.state_dict())
        else:
            fastbn.recompute_statistics(layer, [x, other])

    before, after = made(), made()
    call(after)
    states = [str(layer.state_dict()) for layer in (before, after)]
    assert states[0] != states[1]
    step = 0
    while True:
        layer = made()
        ended = interrupt(lambda: call(layer), step)  # noqa: B023
        assert str(layer.state_dict()) in states, f"torn at step {step}"
        if ended:
            break
        step += 1
    assert str(layer.state_dict()) == states[1]
    assert step


def test_layers_learn_again_after_an_interrupted_recomputation():
    x = cases.normal((6, 4))
    step, ended = 0, False
    while not ended:
        layers = BatchNorm(4), BatchNorm(4)
        ended = interrupt(
            lambda both=layers: fastbn.recompute_statistics(
                both, [x], forward=lambda batch: both[1](both[0](batch, True), True)
            ),
            step,
        )
        step += 1
        for layer in layers:
            before = layer.batches
            layer(x, True)
            assert layer.batches == before + 1, f"{step} steps"
