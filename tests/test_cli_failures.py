"""The command line where something is wrong: exit codes, bad files, signals, nothing half written left behind."""

import os
import shlex
import signal
import subprocess
import time

import numpy as np
import pytest
from commands import COMMAND, args, saved

import fastbn
from fastbn import cli, state, stream
from fastbn.cli import main


@pytest.fixture
def data(tmp_path, rng):
    return saved(tmp_path, rng)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["what"],
        ["stats"],
        ["stats", "x.npy"],
        ["stats", "x.npy", "-o", "m.npz", "--axis", "one"],
        ["stats", "x.npy", "-o", "x.npy"],
        ["apply", "m.npz", "x.npy", "-o", "./x.npy"],
        ["apply", "m.npz", "x.npy", "-o", "m.npz"],
        ["apply", "m.npz", "x.npy", "-o", "y.npy", "--epsilon", "-1"],
        ["apply", "m.npz", "x.npy", "-o", "y.npy", "--epsilon", "nan"],
        ["merge", "m.npz", "-o", "c.npz"],
        ["merge", "m.npz", "n.npz", "-o", "n.npz"],
        ["demo", "--seed", "-1"],
    ],
    ids=" ".join,
)
def test_wrong_usage(command, tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["stats", "x.npy", "-o", "m.npz", "--quiet"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert main(command) == 2
    output = capsys.readouterr()
    assert output.err
    assert not output.out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (["apply", "m.npz", "x.npy", "-o", "y.npy", "--epsilon", "small"], "--epsilon: invalid float value: 'small'"),
        (["demo", "--seed", "0.5"], "--seed: invalid int value: '0.5'"),
    ],
)
def test_what_is_no_number_is_named(command, complaint, capsys):
    assert main(command) == 2
    assert capsys.readouterr().err.endswith(f"error: argument {complaint}\n")


def test_an_output_linked_to_the_input_is_refused(tmp_path, data, capsys):
    path, x = data
    os.symlink(path, tmp_path / "link.npy")
    os.link(path, tmp_path / "hard.npy")
    main(args("stats", path, "-o", tmp_path / "m.npz", "--quiet"))
    for name in ("link.npy", "hard.npy"):
        assert main(args("apply", tmp_path / "m.npz", path, "-o", tmp_path / name)) == 2
    np.testing.assert_array_equal(np.load(path), x)


def header_only(path, count):
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (count, 4)})


def archive(path):
    with open(path, "wb") as file:
        np.savez(file, x=np.ones(3))


HALF = b"{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4"
BAD_FILES = {
    "missing": (lambda path: None, "No such file"),
    "folder": (lambda path: path.mkdir(), "Is a directory"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "text": (lambda path: path.write_text("1,2,3\n"), "is not a .npy file"),
    "magic only": (lambda path: path.write_bytes(b"\x93NUMPY"), "damaged .npy header"),
    "half a magic": (lambda path: path.write_bytes(b"\x93NU"), "damaged .npy header"),
    "half a header": (
        lambda path: path.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'"),
        "damaged .npy header",
    ),
    "half a shape": (
        lambda path: path.write_bytes(np.lib.format.magic(1, 0) + b"\x46\x00" + HALF.ljust(69) + b"\n"),
        "damaged .npy header",
    ),
    "no dictionary": (
        lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x0a\x00import os\n" + bytes(100)),
        "damaged .npy header",
    ),
    "version 3": (lambda path: path.write_bytes(b"\x93NUMPY\x03\x00\x02\x00\x00\x00{}"), "version (3, 0)"),
    "archive": (archive, "archive"),
    "pickle": (lambda path: path.write_bytes(b"\x80\x04K\x01."), "is not a .npy file"),
    "objects": (lambda path: np.save(path, np.array([{}, None]), allow_pickle=True), "got object"),
    "integers": (
        lambda path: np.save(path, np.ones((3, 4), int)),
        "must hold float32 or float64 values, got int64",
    ),
    "complex": (lambda path: np.save(path, np.ones((3, 4), complex)), "got complex128"),
    "half": (lambda path: np.save(path, np.ones((3, 4), np.float16)), "got float16"),
    "record": (lambda path: np.save(path, np.ones(3, [("a", "f4"), ("b", "f4")])), "float32 or float64"),
    "a number": (lambda path: np.save(path, np.float32(3)), "channel axis"),
    "truncated": (lambda path: header_only(path, 1000), "is truncated"),
    "hostile": (lambda path: header_only(path, 10**17), "is truncated"),
    "negative": (lambda path: header_only(path, -5), "damaged .npy header"),
}


@pytest.mark.parametrize("command", ["stats", "apply"])
@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_data_file(kind, command, tmp_path, capsys):
    make, message = BAD_FILES[kind]
    path = tmp_path / "bad.npy"
    make(path)
    stream.save_moments(tmp_path / "m.npz", fastbn.Moments(4).update(np.ones((2, 4))), -1)
    before = set(os.listdir(tmp_path))
    source = [path] if command == "stats" else [tmp_path / "m.npz", path]
    assert main(args(command, *source, "-o", tmp_path / "out")) == 1
    output = capsys.readouterr()
    assert output.err.startswith("fastbn: error: ")
    assert output.err.count("\n") == 1
    assert message in output.err
    assert "bad.npy" in output.err
    assert not output.out
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("text", ["", "nonsense", "PK\x03\x04"])
def test_bad_statistics_file(text, tmp_path, data, capsys):
    (tmp_path / "m.npz").write_text(text)
    assert main(args("apply", tmp_path / "m.npz", data[0], "-o", tmp_path / "y.npy")) == 1
    assert main(args("merge", tmp_path / "m.npz", tmp_path / "m.npz", "-o", tmp_path / "y.npy")) == 1
    assert "m.npz" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["m.npz", "x.npy"]


@pytest.mark.parametrize(
    ("header", "arrays"),
    [
        ({"count": 3}, {}),
        ({"count": "3", "axis": -1}, {}),
        ({"count": -3, "axis": -1}, {}),
        pytest.param({"count": 10**400, "axis": -1}, {}, id="count of 401 digits"),
        ({"count": 2**53 + 1, "axis": -1}, {}),
        ({"count": None, "axis": -1}, {"count": np.full(5, 2**62)}),
        ({"count": 3, "axis": "last"}, {}),
        ({"count": 3, "axis": True}, {}),
        ({"count": 3, "axis": -1}, {"m2": -np.ones(5)}),
        ({"count": 3, "axis": -1}, {"m2": np.ones(6)}),
        ({"count": 3, "axis": -1}, {"mean": np.ones((5, 1)), "m2": np.ones((5, 1))}),
        ({"count": 3, "axis": -1}, {"other": np.ones(5)}),
        ({"count": 0, "axis": -1}, {}),
    ],
    ids=repr,
)
def test_unsound_statistics(header, arrays, tmp_path, data, capsys):
    arrays = {"mean": np.zeros(5), "m2": np.ones(5)} | arrays
    state.write_state(tmp_path / "m.npz", "moments", header, arrays)
    assert main(args("apply", tmp_path / "m.npz", data[0], "-o", tmp_path / "y.npy")) == 1
    assert "m.npz" in capsys.readouterr().err
    assert not (tmp_path / "y.npy").exists()


def test_what_does_not_fit(tmp_path, data, capsys):
    path, _ = data
    main(args("stats", path, "-o", tmp_path / "m.npz", "--quiet"))
    np.save(tmp_path / "other.npy", np.ones((10, 4)))
    main(args("stats", tmp_path / "other.npy", "-o", tmp_path / "other.npz", "--quiet"))
    before = set(os.listdir(tmp_path))
    for command, message in [
        (args("stats", path, "--axis", 2, "-o", tmp_path / "n.npz"), "axis must lie in [-2, 1]"),
        (args("apply", tmp_path / "m.npz", tmp_path / "other.npy", "-o", tmp_path / "y.npy"), "(5,)"),
        (args("apply", tmp_path / "m.npz", path, "--axis", 0, "-o", tmp_path / "y.npy"), "(1000,)"),
        (args("merge", tmp_path / "m.npz", tmp_path / "other.npz", "-o", tmp_path / "n.npz"), "5 channels"),
        (args("stats", path, "-o", tmp_path / "no" / "m.npz"), "No such file"),
        (args("stats", path, "-o", tmp_path), "Is a directory"),
        (args("stats", path, "-o", f"{tmp_path}/new/"), f"{tmp_path}/new/: Is a directory"),
        (args("stats", path, "-o", f"{tmp_path}/new/."), f"{tmp_path}/new/.: Is a directory"),
        (args("stats", path, "-o", f"{tmp_path}/m.npz/"), f"{tmp_path}/m.npz/: Is a directory"),
        (args("stats", path, "-o", ""), "'': No such file"),
        (args("stats", "", "-o", tmp_path / "n.npz"), "'': No such file"),
        (args("apply", "", path, "-o", tmp_path / "y.npy"), "'': No such file"),
        (args("apply", tmp_path / "m.npz", "", "-o", tmp_path / "y.npy"), "'': No such file"),
    ]:
        assert main(command) == 1
        assert message in capsys.readouterr().err
    assert set(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 1), (MemoryError(), 1)],
    ids=repr,
)
def test_interrupted_halfway(error, code, tmp_path, data, monkeypatch, capsys):
    path, _ = data
    main(args("stats", path, "-o", tmp_path / "m.npz", "--quiet"))
    (tmp_path / "y.npy").write_bytes(b"precious")

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(stream, "normalize", fail)
    assert main(args("apply", tmp_path / "m.npz", path, "-o", tmp_path / "y.npy")) == code
    assert capsys.readouterr().err.startswith("fastbn: error: ")
    assert (tmp_path / "y.npy").read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["m.npz", "x.npy", "y.npy"]


def test_counts_that_are_too_many_together(tmp_path, capsys):
    total = fastbn.Moments.from_dict({"count": np.array([2**53, 1]), "mean": np.zeros(2), "m2": np.ones(2)})
    stream.save_moments(tmp_path / "m.npz", total, -1)
    assert main(args("merge", tmp_path / "m.npz", tmp_path / "m.npz", "-o", tmp_path / "c.npz")) == 1
    assert "2**53" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["m.npz"]


def test_a_pipe_as_the_input(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    stream.save_moments(tmp_path / "m.npz", fastbn.Moments(4).update(np.ones((2, 4))), -1)
    for command in (["stats"], ["apply", tmp_path / "m.npz"]):
        assert main(args(*command, tmp_path / "pipe", "-o", tmp_path / "out")) == 1
        assert capsys.readouterr().err == f"fastbn: error: {tmp_path / 'pipe'} is not a regular file\n"


def test_a_full_disk_is_named(tmp_path, data):
    path, _ = data
    main(args("stats", path, "-o", tmp_path / "m.npz", "--quiet"))
    apply = shlex.join([*COMMAND, *args("apply", tmp_path / "m.npz", path, "-o", tmp_path / "y.npy")])
    limited = f"ulimit -f 8; {apply}"  # blocks of 512 or 1024 bytes: less than the output
    done = subprocess.run(limited, shell=True, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stderr == f"fastbn: error: {tmp_path / 'y.npy'}: File too large\n"
    assert sorted(os.listdir(tmp_path)) == ["m.npz", "x.npy"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_is_named(tmp_path, data, unbuffered):
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    for parts in (["info"], ["stats", data[0], "-o", tmp_path / "m.npz"]):
        with open("/dev/full", "w") as full:
            command = [*COMMAND, *args(*parts)]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment)
        assert done.returncode == 1
        assert done.stderr == "fastbn: error: standard output: No space left on device\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is full")
@pytest.mark.parametrize("command", [["--help"], ["--version"], ["apply", "--help"]], ids=" ".join)
def test_help_that_nobody_can_read(command):
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    with open("/dev/full", "w") as full:
        options = {"stdout": full, "stderr": subprocess.PIPE, "text": True, "env": environment}
        done = subprocess.run([*COMMAND, *command], check=False, **options)
    assert (done.returncode, done.stderr) == (1, "fastbn: error: standard output: No space left on device\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_complaints_that_nobody_can_read(tmp_path, data, unbuffered):
    """The exit code is what it would be."""
    path, _ = data
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    for parts, code in (
        (["stats", path], 2),
        (["stats", path, "-o", path], 2),
        (["stats", tmp_path / "no.npy", "-o", tmp_path / "m"], 1),
    ):
        with open("/dev/full", "w") as full:
            command = [*COMMAND, *args(*parts)]
            assert subprocess.run(command, stderr=full, check=False, env=environment).returncode == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_nothing_behind(number, tmp_path):
    size = 1 << 30  # sparse: takes no room, but some time to normalize
    with open(tmp_path / "x.npy", "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (size // 16, 4)}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + size)
    stream.save_moments(tmp_path / "m.npz", fastbn.Moments(4).update(np.ones((2, 4))), -1)
    command = [*COMMAND, *args("apply", tmp_path / "m.npz", tmp_path / "x.npy", "-o", tmp_path / "y.npy")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while len(os.listdir(tmp_path)) < 3 and time.monotonic() < deadline:  # the temporary file
            time.sleep(0.005)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert sorted(os.listdir(tmp_path)) == ["m.npz", "x.npy"]


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_info", lambda _: signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        assert main(["info"]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("name", "code"), [("SIGHUP", 129), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_second_signal_does_not_end_the_cleaning_up(name, code, monkeypatch, capsys):
    number, cleaned = getattr(signal, name), []

    def interrupted(_):
        try:
            signal.raise_signal(number)
        finally:
            for another in (number, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(another)
            cleaned.append(True)

    monkeypatch.setattr(cli, "_info", interrupted)
    before = signal.getsignal(number)
    if name == "SIGINT":  # which is told
        assert main(["info"]) == code
        assert capsys.readouterr().err == "fastbn: error: interrupted\n"
    else:
        with pytest.raises(SystemExit) as caught:
            main(["info"])
        assert caught.value.code == code
    assert cleaned
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("command", ["info", "--help"])
def test_a_reader_that_leaves_early(command):
    with subprocess.Popen([*COMMAND, command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(60) == 0
    assert errors == ""
