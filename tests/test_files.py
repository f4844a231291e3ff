"""Output files appear whole or not at all, with the permissions of any other file."""

import os
import stat
import threading

import numpy as np
import pytest

from fastbn.files import atomic_file
from fastbn.state import read_state, write_state


def write(path, content=b"new"):
    with atomic_file(path) as file:
        file.write(content)


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


ERRORS = [OSError(28, "No space left on device"), KeyboardInterrupt()]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("step", ["zipfile.ZipFile.writestr", "os.fsync", "os.replace", "os.chmod"])
def test_a_failing_step_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    (tmp_path / "s").write_bytes(b"precious")
    monkeypatch.setattr(step, failing(error))
    with pytest.raises(type(error)):
        write_state(tmp_path / "s", "moments", {}, {"mean": np.zeros(3)})
    assert os.listdir(tmp_path) == ["s"]
    assert (tmp_path / "s").read_bytes() == b"precious"


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("step", ["zipfile.ZipFile.writestr", "os.fsync", "os.replace"])
def test_a_failing_step_leaves_no_new_file(tmp_path, monkeypatch, step, error):
    monkeypatch.setattr(step, failing(error))
    with pytest.raises(type(error)):
        write_state(tmp_path / "s", "moments", {}, {"mean": np.zeros(3)})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("step", ["os.fsync", "os.replace"])
def test_a_failing_step_names_the_file(tmp_path, monkeypatch, step):
    monkeypatch.setattr(step, failing(OSError(28, "No space left on device", ".fastbn.tmp")))
    with pytest.raises(OSError) as caught:
        write(tmp_path / "out")
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "out"))


@pytest.mark.parametrize("size", [10, 1 << 20])
def test_a_full_disk_names_the_file(tmp_path, size):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            write(tmp_path / "out", bytes(size))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_an_error_of_another_file_is_left_alone(tmp_path):
    error = OSError(5, "Input/output error")
    with pytest.raises(OSError) as caught, atomic_file(tmp_path / "out"):
        raise error
    assert caught.value is error
    assert error.filename is None


@pytest.mark.parametrize("name", ["new/", "new/.", "new/..", "old/"])
def test_the_name_of_a_folder(tmp_path, name):
    (tmp_path / "old").write_bytes(b"precious")
    target = os.path.join(tmp_path, name)
    with pytest.raises(IsADirectoryError) as caught:
        write(target)
    assert caught.value.filename == target
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"precious"


def test_no_name():
    with pytest.raises(FileNotFoundError):
        write("")


def test_a_folder_that_cannot_be_flushed_does_not_matter(tmp_path, monkeypatch):
    fsync = os.fsync

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", files_only)
    write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"new"


def test_an_exception_in_the_block(tmp_path):
    def half(file):
        file.write(b"half")
        raise ZeroDivisionError

    (tmp_path / "out").write_bytes(b"precious")
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "out") as file:
        half(file)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"precious"


def test_a_memory_map_can_be_written(tmp_path):
    with atomic_file(tmp_path / "out") as file:
        assert not (tmp_path / "out").exists()
        mapped = np.memmap(file, np.float32, "r+", shape=(5,))
        mapped[:] = np.arange(5)
        mapped.flush()
    assert np.array_equal(np.fromfile(tmp_path / "out", np.float32), np.arange(5))


def test_permissions_are_those_of_open(tmp_path):
    (tmp_path / "old").write_bytes(b"")
    (tmp_path / "old").chmod(0o604)
    umask = os.umask(0o027)
    try:
        write(tmp_path / "new")
        write(tmp_path / "old")
    finally:
        os.umask(umask)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "old")] == [0o640, 0o604]


def test_a_file_that_must_not_be_written_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "out").write_bytes(b"precious")
    monkeypatch.setattr("os.access", lambda *args: False)  # permissions do not stop root, who may run this
    with pytest.raises(PermissionError, match="out"):
        write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"precious"


def test_a_link_is_followed(tmp_path):
    (tmp_path / "out").write_bytes(b"old")
    (tmp_path / "link").symlink_to("out")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "out").read_bytes() == b"new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in the file system")
def test_only_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, error in {"pipe": OSError, "": IsADirectoryError, "no/folder": FileNotFoundError}.items():
        target = tmp_path / name
        with pytest.raises(error) as caught:
            write(target)
        assert caught.value.filename == str(target)
    assert os.listdir(tmp_path) == ["pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="names of open files")
def test_a_pipe_by_the_name_of_an_open_file():
    """As /dev/stdout is one, whose real path is no path."""
    ends = os.pipe()
    try:
        with pytest.raises(OSError, match="Not a regular file"):
            write(f"/dev/fd/{ends[1]}")
    finally:
        for end in ends:
            os.close(end)


def test_threads_that_write_one_file_leave_one_of_the_versions(tmp_path):
    def version(k):
        write_state(tmp_path / "s", "moments", {"k": k}, {"mean": np.full(1000, k, np.float32)})

    workers = [threading.Thread(target=version, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    header, arrays = read_state(tmp_path / "s")
    assert (arrays["mean"] == header["k"]).all()
    assert os.listdir(tmp_path) == ["s"]
