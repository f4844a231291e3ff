"""State files come back as they were written, appear whole or not at all, and nothing in them is trusted."""

import io
import json
import os
import struct
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastbn import StateError
from fastbn.npz import PlainNpz
from fastbn.state import check_statistics, read_kind, read_state, write_state

ARRAYS = {
    "moving_mean": np.array([0.5, -1.25, 3e-40], np.float32),
    "moving_variance": np.array([1.0, 0.0, 1e30]),
    "count": np.array(7, np.int64),
    "nothing": np.empty(0, np.float32),
}
FIELDS = {"axis": -1, "epsilon": 1e-3, "name": "bn ü", "layout": None}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "layer.npz"
    write_state(path, "batch_norm", FIELDS, ARRAYS)
    return path


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


# --- a hand-made container, sound unless a test makes it otherwise ------------------------------------------


def npy(array, version=(1, 0)):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asanyarray(array), version=version, allow_pickle=True)
    return buffer.getvalue()


def container(entries, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(zipfile.ZipInfo(name), content, compress_type=compression)
    return buffer.getvalue()


def sound_entries(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_header(path, change):
    """The file of `path` with its JSON header changed by a function of the dict, or replaced by bytes."""
    entries = sound_entries(path)
    if callable(change):
        head = json.loads(np.load(path)["header"].tobytes())
        change(head)
        change = json.dumps(head).encode()
    return container({**entries, "header.npy": npy(np.frombuffer(change, np.uint8))}.items())


def with_entry(path, name, content):
    return container({**sound_entries(path), name: content}.items())


# --- round trip ---------------------------------------------------------------------------------------------


def test_round_trip(path):
    header, arrays = read_state(path, "batch_norm")
    assert header == FIELDS
    assert_same(arrays, ARRAYS)
    assert all(array.flags.writeable and array.flags.owndata for array in arrays.values())
    assert read_kind(path) == "batch_norm"
    assert_same(read_state(os.fspath(path))[1], ARRAYS)


def test_any_memory_order_is_read_back_native(tmp_path):
    grid = np.arange(12.0).reshape(3, 4)
    arrays = {"fortran": np.asfortranarray(grid), "big": grid.astype(">f4"), "steps": grid[::-2, ::3]}
    write_state(tmp_path / "s", "moments", {}, arrays)
    found = read_state(tmp_path / "s")[1]
    assert found["big"].dtype == np.float32
    assert all(np.array_equal(found[name], array) for name, array in arrays.items())


def test_numpy_opens_it_without_pickle(path):
    with np.load(path, allow_pickle=False) as opened:
        assert_same({name: opened[name] for name in ARRAYS}, ARRAYS)


def test_equal_content_gives_equal_bytes(path, tmp_path):
    write_state(tmp_path / "again", "batch_norm", dict(reversed(FIELDS.items())), ARRAYS)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_the_name_is_taken_as_it_is(tmp_path):
    write_state(str(tmp_path / "no extension"), "moments", {}, {})
    assert os.listdir(tmp_path) == ["no extension"]


@pytest.mark.parametrize(
    "arguments, error",
    [
        (("unknown", {}, {}), ValueError),
        (("moments", {"x": np.float32(1)}, {}), TypeError),
        (("moments", {"x": float("nan")}, {}), ValueError),
        (("moments", {"x": "y" * 2**20}, {}), ValueError),
        (("moments", {}, {"header": np.zeros(1)}), ValueError),
        (("moments", {}, {"../mean": np.zeros(1)}), ValueError),
        (("moments", {}, {"mean": np.zeros(1, np.float16)}), TypeError),
        (("moments", {}, {"mean": np.array([None])}), TypeError),
    ],
)
def test_what_has_no_place_in_a_file_is_not_written(path, arguments, error):
    before = path.read_bytes()
    with pytest.raises(error):
        write_state(path, *arguments)
    assert path.read_bytes() == before


# --- reading what is not sound ------------------------------------------------------------------------------


def test_errors_of_the_system_stay_what_they_are(path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        read_state(path.with_name("missing"))
    monkeypatch.setattr("builtins.open", failing(PermissionError(13, "Permission denied", str(path))))
    with pytest.raises(PermissionError):
        read_state(path)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in {tmp_path: "is a folder", tmp_path / "pipe": "not a regular file"}.items():
        with pytest.raises(StateError, match=message):
            read_state(path)


def bomb(path):
    """A zip of one deflated entry, a thousand times its size."""
    return container([("header.npy", npy(np.zeros(10**6, np.uint8)))], zipfile.ZIP_DEFLATED)


def claim(path, name, header):
    """An entry whose .npy header claims something else than what follows it."""
    head = header.encode("latin1")
    return with_entry(path, name, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + bytes(12))


def lying_size(path):
    """The zip directory says that the first entry is 4 GB long; its bytes are those of before."""
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02")
    struct.pack_into("<II", data, start + 20, 0xF0000000, 0xF0000000)
    return bytes(data)


def twice_the_same_bytes(path):
    """Two entries of the directory share one large piece of the file."""
    content = npy(np.zeros(5000))
    data = container([("mean.npy", content)])
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry = data[start:end]
    other = entry.replace(b"mean.npy", b"same.npy")
    tail = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 2, 2, 2 * len(entry), start, 0)
    return data[:start] + entry + other + tail


HEADER = "{{'descr': '{}', 'fortran_order': {}, 'shape': {}, }}\n"
HOSTILE = {
    "empty": (lambda p: b"", "is empty"),
    "text": (lambda p: b"mean,variance\n", "not a fastbn state file"),
    "png": (lambda p: b"\x89PNG\r\n\x1a\n" + bytes(100), "not a fastbn state file"),
    "pickle": (lambda p: b"\x80\x04\x95" + bytes(30), "not a fastbn state file"),
    "npy": (lambda p: npy(np.zeros(3)), "not a fastbn state file"),
    "only the magic": (lambda p: b"PK\x03\x04", "is damaged"),
    "empty zip": (lambda p: container([]), "not a fastbn state file"),
    "foreign npz": (lambda p: container([("weights.npy", npy(np.zeros(3)))]), "not a fastbn state file"),
    "other zip": (lambda p: container([("word/document.xml", b"<x/>")]), "unknown entry"),
    "cut": (lambda p: p.read_bytes()[:-30], "is damaged"),
    "prefixed": (lambda p: b"MZ" + p.read_bytes(), "not a fastbn state file"),
    "many entries": (lambda p: container((f"a{k}.npy", b"") for k in range(300)), "300 entries"),
    "bomb": (bomb, "compressed"),
    "lying size": (lying_size, "larger than the file"),
    "overlap": (twice_the_same_bytes, "larger than the file"),
    "unknown array": (lambda p: with_entry(p, "extra.npy", npy(np.zeros(3))), "unknown array 'extra'"),
    "unknown entry": (lambda p: with_entry(p, "../evil.npy", b""), "unknown entry"),
    "no .npy": (lambda p: with_entry(p, "count.npy", b"\x80\x04\x95."), "not a plain .npy"),
    "object": (lambda p: with_entry(p, "count.npy", npy(np.array([{}]))), "must have dtype"),
    "complex": (lambda p: with_entry(p, "count.npy", npy(np.zeros(2, complex))), "must have dtype"),
    "record": (lambda p: with_entry(p, "count.npy", npy(np.zeros(2, "f4,i4"))), "not a plain .npy"),
    "big-endian": (lambda p: with_entry(p, "count.npy", npy(np.array(7, ">i8"))), "must have dtype"),
    "fortran": (lambda p: with_entry(p, "count.npy", npy(np.zeros((2, 3)).T)), "C order"),
    "version 2 npy": (lambda p: with_entry(p, "count.npy", npy(np.array(7), (2, 0))), "not a plain .npy"),
    "dtype": (lambda p: with_entry(p, "count.npy", npy(np.array(7.0))), "count must have dtype <i8, got <f8"),
    "shape": (lambda p: with_entry(p, "count.npy", npy(np.array([7]))), r"must have shape \[\], got \[1\]"),
    "value": (lambda p: with_entry(p, "count.npy", npy(np.array(8))), "checksum"),
    "huge": (lambda p: claim(p, "count.npy", HEADER.format("<f8", False, "(10000000000000,)")), "must hold"),
    "vast": (lambda p: claim(p, "count.npy", HEADER.format("<f8", False, f"({10**150},)")), "must hold"),
    "negative": (lambda p: claim(p, "count.npy", HEADER.format("<f8", False, "(-1,)")), "not a plain"),
    "code": (lambda p: claim(p, "count.npy", "__import__('os').abort()\n"), "not a plain"),
    "header dtype": (lambda p: with_entry(p, "header.npy", npy(np.zeros(3))), "must have dtype"),
    "long header": (lambda p: with_header(p, b" " * 2**20), "larger than"),
    "no json": (lambda p: with_header(p, b"{'format': 'fastbn'}"), "not JSON"),
    "no text": (lambda p: with_header(p, b"\xff\xfe"), "not JSON"),
    "deep json": (lambda p: with_header(p, b"[" * 10**5), "not JSON"),
    "NaN": (lambda p: with_header(p, b'{"format": NaN}'), "not JSON"),
    "two keys": (lambda p: with_header(p, b'{"format": 1, "format": 2}'), "not JSON"),
    "list": (lambda p: with_header(p, b"[1]"), "not a fastbn state file"),
    "format": (lambda p: with_header(p, lambda h: h.update(format="other")), "not a fastbn state file"),
    "newer": (lambda p: with_header(p, lambda h: h.update(version=2)), "upgrade fastbn"),
    "version 0": (lambda p: with_header(p, lambda h: h.update(version=0)), "format version 0"),
    "version true": (lambda p: with_header(p, lambda h: h.update(version=True)), "format version True"),
    "no version": (lambda p: with_header(p, lambda h: h.pop("version")), "format version None"),
    "kind": (lambda p: with_header(p, lambda h: h.update(kind="x")), "unknown kind 'x'"),
    "odd kind": (lambda p: with_header(p, lambda h: h.update(kind=[])), "unknown kind"),
    "unknown key": (lambda p: with_header(p, lambda h: h.update(run="me")), "unknown header entry 'run'"),
    "missing key": (lambda p: with_header(p, lambda h: h.pop("fields")), "no header entry 'fields'"),
    "odd arrays": (lambda p: with_header(p, lambda h: h.update(arrays=[])), "wrong structure"),
    "odd array": (lambda p: with_header(p, lambda h: h["arrays"].update(count=1)), "structure at 'count'"),
    "missing array": (lambda p: with_header(p, lambda h: h["arrays"].update(more={})), "no array 'more'"),
    "no checksum": (lambda p: with_header(p, lambda h: h["arrays"]["count"].pop("sha256")), "structure"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file(path, case):
    make, message = HOSTILE[case]
    path.write_bytes(make(path))
    with pytest.raises(StateError, match=message) as caught:
        read_state(path, "batch_norm")
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < len(str(path)) + 300


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_duplicate_entries(path):
    path.write_bytes(container([*sound_entries(path).items(), ("count.npy", npy(np.array(8)))]))
    with pytest.raises(StateError, match=r"two entries 'count\.npy'"):
        read_state(path)


def test_nothing_is_allocated_for_a_claim(path, monkeypatch):
    """The checks of sizes come before the first array is read."""
    path.write_bytes(lying_size(path))
    monkeypatch.setattr(PlainNpz, "array", failing(AssertionError("read")))
    with pytest.raises(StateError, match="larger than the file"):
        read_state(path)


def test_what_the_caller_expects(path):
    every = list(ARRAYS)
    read_state(path, "batch_norm", required=every[:2], optional=every[2:], fields=list(FIELDS))
    for expected, message in [
        ({"kind": "moments"}, "must be of kind 'moments', got 'batch_norm'"),
        ({"required": [*every, "gamma"]}, "has no array 'gamma'"),
        ({"required": every[1:]}, "has an unknown array 'moving_mean'"),
        ({"fields": [*FIELDS, "ddof"]}, "has no header field 'ddof'"),
        ({"fields": []}, "has an unknown header field"),
    ]:
        with pytest.raises(StateError, match=message):
            read_state(path, **expected)


def test_statistics():
    check_statistics("f", [0.0, 1.0], [0.0, 2.0])
    for mean, variance, message in [
        ([0.0], [1.0, 2.0], r"one shape \(C,\), got \(1,\) and \(2,\)"),
        ([[0.0]], [[1.0]], "one shape"),
        ([np.nan], [1.0], "mean must be finite"),
        ([0.0], [np.inf], "m2 must be finite and not negative"),
        ([0.0], [-1e-300], "m2 must be finite and not negative"),
    ]:
        with pytest.raises(StateError, match=message):
            check_statistics("f", mean, variance, names=("mean", "m2"))


# --- any damage at all --------------------------------------------------------------------------------------

ONE_FILE = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_damaged(path, data):
    """The file is refused with a StateError, or it reads as before: the damage was in a date, say."""
    damaged = path.with_name("damaged")
    damaged.write_bytes(data)
    try:
        header, arrays = read_state(damaged)
    except StateError:
        return
    assert header == FIELDS
    assert_same(arrays, ARRAYS)


@ONE_FILE
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes(path, flips):
    data = bytearray(path.read_bytes())
    for position, mask in flips:
        data[position % len(data)] ^= mask
    read_damaged(path, data)


@ONE_FILE
@given(start=st.integers(0, 10**6), drop=st.integers(1, 10**6), insert=st.binary(max_size=40))
def test_cut_and_inserted_bytes(path, start, drop, insert):
    data = path.read_bytes()
    start %= len(data)
    read_damaged(path, data[:start] + insert + data[start + drop % len(data) :])


def test_every_byte_of_the_directories(path):
    """Random flips seldom hit the few bytes that zipfile believes: each gets each of some values."""
    data = path.read_bytes()
    places = [*range(30), *range(data.index(b"PK\x01\x02"), data.index(b"PK\x01\x02") + 60)]
    for position in [*places, *range(len(data) - 22, len(data))]:
        for value in (0, 1, 8, 0x7F, 0x80, 0xFF):
            read_damaged(path, data[:position] + bytes([value]) + data[position + 1 :])


def test_the_first_format_is_read_for_ever(path):
    """A file of version 1 put together by hand: it must load in every release."""
    sha256 = "252b3318179cc24998f3670913d52d39085cf65b0dfa98fa523ffeab4b6683fe"
    head = (
        f'{{"arrays": {{"mean": {{"dtype": "<f4", "sha256": "{sha256}", "shape": [2]}}}}, '
        '"fastbn": "0.0.1", "fields": {"count": 3}, "format": "fastbn", "kind": "moments", "version": 1}'
    )
    mean = np.array([1.5, -2.0], "<f4")
    entries = [("header.npy", npy(np.frombuffer(head.encode(), np.uint8))), ("mean.npy", npy(mean))]
    path.write_bytes(container(entries))
    header, arrays = read_state(path, "moments", required=["mean"], fields=["count"])
    assert header == {"count": 3}
    assert_same(arrays, {"mean": mean})
