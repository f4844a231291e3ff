"""The number of threads follows what was asked for and every limit that is set on the process."""

import asyncio
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import threadpoolctl

import fastbn
from fastbn import functional, get_num_threads, passes, set_num_threads, threads
from fastbn.kernels import _runtime
from fastbn.threads import cgroup_limit, thread_info

MODULE = sys.modules["fastbn.threads"]  # in the package, the name is that of the function
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
openmp = pytest.mark.skipif(not _runtime.openmp_version(), reason="built without OpenMP")
affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    yield
    monkeypatch.undo()
    set_num_threads(None)


def python(code, **environment):
    """Run code in a new process without our variables; what it printed, or the last line of its error."""
    ours = ("OMP_NUM_THREADS", "FASTBN_NUM_THREADS")
    variables = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**variables, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


COUNT = "import fastbn; print(fastbn.get_num_threads())"


def in_thread(function):
    """What the function returns in a new thread."""
    found = []
    worker = threading.Thread(target=lambda: found.append(function()))
    worker.start()
    worker.join()
    return found[0]


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is optional elsewhere")
def test_builds_for_linux_have_openmp():
    """A missing dependency in the build files would leave a library that works, on one thread."""
    assert _runtime.openmp_version() >= 201511


# --- what is asked for --------------------------------------------------------------------------------------


@openmp
def test_set_and_reset():
    default = get_num_threads()
    for n in (1, 2, 3, 64):
        set_num_threads(n)
        assert get_num_threads() == n
    set_num_threads(None)
    assert get_num_threads() == default


@openmp
def test_blocks_nest_and_end():
    set_num_threads(2)
    with threads(3):
        assert get_num_threads() == 3
        with threads(1):
            assert get_num_threads() == 1
            set_num_threads(5)
            assert get_num_threads() == 1
        assert get_num_threads() == 3
    assert get_num_threads() == 5
    with pytest.raises(ZeroDivisionError), threads(3):
        1 / 0
    assert get_num_threads() == 5


@openmp
def test_a_block_decorates():
    @threads(3)
    def count(depth):
        return [get_num_threads(), *(count(depth - 1) if depth else [])]

    assert count(2) == [3, 3, 3]
    assert count(0) == [3]
    assert get_num_threads() != 3 or CPUS == 3


@openmp
def test_a_block_holds_for_its_own_thread():
    set_num_threads(2)
    entered, leave = threading.Event(), threading.Event()
    inside = []

    def other():
        with threads(4):
            entered.set()
            leave.wait(10)
            inside.append(get_num_threads())

    worker = threading.Thread(target=other)
    worker.start()
    assert entered.wait(10)
    with threads(3):
        assert get_num_threads() == 3
    assert get_num_threads() == 2
    leave.set()
    worker.join()
    assert inside == [4]


@openmp
def test_a_block_holds_for_its_own_task():
    async def task(n, turn, other):
        with threads(n):
            turn.set()
            await other.wait()
            return get_num_threads()

    async def both():
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task(3, first, second), task(4, second, first))

    assert asyncio.run(both()) == [3, 4]


@openmp
def test_a_setting_holds_for_all_threads():
    set_num_threads(3)
    assert in_thread(get_num_threads) == 3


@pytest.mark.parametrize("function", [set_num_threads, threads])
@pytest.mark.parametrize(
    "n, error, message",
    [
        (0, ValueError, "n must be a positive integer, got 0"),
        (-2, ValueError, "n must be a positive integer, got -2"),
        (10**6, ValueError, "n must be at most 4096, got 1000000"),
        (2.0, TypeError, "n must be a positive integer, got 2.0"),
        ("2", TypeError, "n must be a positive integer, got '2'"),
        (True, TypeError, "n must be a positive integer, got True"),
    ],
)
def test_what_is_no_number_of_threads(function, n, error, message):
    before = get_num_threads()
    with pytest.raises(error) as caught:
        function(n)
    assert str(caught.value) == message
    assert get_num_threads() == before


def test_no_block_without_a_number():
    with pytest.raises(TypeError):
        threads(None)


# --- environment --------------------------------------------------------------------------------------------


@openmp
def test_environment():
    assert python(COUNT) == str(min(CPUS, cgroup_limit() or CPUS))
    assert python(COUNT, OMP_NUM_THREADS="1") == "1"
    assert python(COUNT, OMP_NUM_THREADS="5") == "5", "the user may ask for more than there are"
    assert python(COUNT, OMP_NUM_THREADS="3,2") == "3", "a list gives one count per level of nesting"
    assert python(COUNT, OMP_NUM_THREADS="") == python(COUNT)
    assert python(COUNT, FASTBN_NUM_THREADS="3") == "3"
    assert python(COUNT, FASTBN_NUM_THREADS="3", OMP_NUM_THREADS="1") == "3"
    assert python(COUNT, FASTBN_NUM_THREADS="") == python(COUNT)
    later = "import os, fastbn; os.environ['FASTBN_NUM_THREADS'] = '7'; print(fastbn.get_num_threads())"
    assert python(later, FASTBN_NUM_THREADS="3") == "3", "it is read at import"
    setting = "import fastbn as f; f.set_num_threads(4); print(f.get_num_threads()); f.set_num_threads(None);"
    assert python(setting + "print(f.get_num_threads())", FASTBN_NUM_THREADS="3").split() == ["4", "3"]


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", "2_0", "\u0663", "99999"])
def test_a_bad_variable(text, monkeypatch):
    monkeypatch.setenv("FASTBN_NUM_THREADS", text)
    with pytest.raises(ValueError) as caught:
        MODULE._from_environment()
    assert str(caught.value) == f"FASTBN_NUM_THREADS must be a positive integer up to 4096, got {text!r}"


def test_a_bad_variable_is_an_error_at_import():
    found = python("import fastbn", FASTBN_NUM_THREADS="two")
    assert found == "ValueError: FASTBN_NUM_THREADS must be a positive integer up to 4096, got 'two'"


def test_the_environment_is_left_alone():
    code = "import os; before = dict(os.environ); import fastbn; fastbn.set_num_threads(3); "
    assert python(code + "print(dict(os.environ) == before)") == "True"


# --- limits -------------------------------------------------------------------------------------------------


@affinity
@openmp
def test_affinity():
    one = min(os.sched_getaffinity(0))
    restrict = f"import os; os.sched_setaffinity(0, {{{one}}});"
    assert python(restrict + COUNT) == "1"
    assert python(restrict + COUNT, OMP_NUM_THREADS="2") == "2"
    # Not followed later, as the OpenMP runtime does not either; asked for, it is read anew.
    assert python(f"import fastbn; {restrict} fastbn.set_num_threads(None);" + COUNT) == "1"


@openmp
@pytest.mark.skipif(_runtime.max_threads() == 1, reason="there is nothing to limit")
def test_a_limit_of_threadpoolctl_is_honoured():
    for ask in (lambda: None, lambda: set_num_threads(4)):
        ask()
        before = get_num_threads()
        with threadpoolctl.threadpool_limits(1):
            assert get_num_threads() == 1
            with threads(3):
                assert get_num_threads() == 1
        assert get_num_threads() == before


@openmp
def test_a_limit_is_honoured_if_the_import_runs_under_one():
    code = """if True:
        import numpy, threadpoolctl, ctypes
        ctypes.CDLL("libgomp.so.1")
        with threadpoolctl.threadpool_limits(1):
            import fastbn
            inside = [fastbn.get_num_threads()]
            fastbn.set_num_threads(3)
            inside.append(fastbn.get_num_threads())
        print(*inside, fastbn.get_num_threads())
    """
    if CPUS > 1 and sys.platform == "linux":
        assert python(code) == "1 1 3"


@openmp
def test_the_library_does_not_limit_others():
    before = _runtime.max_threads()
    set_num_threads(before + 2)
    with threads(1):
        assert _runtime.max_threads() == before
    assert in_thread(_runtime.max_threads) == _runtime.max_threads() == before


# --- cgroups ------------------------------------------------------------------------------------------------


def tree(root, group, files):
    """A file system of its own, with the cgroup of the process and the files of the groups."""
    for name, content in {"proc/self/cgroup": group, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


V2, V1 = "sys/fs/cgroup/", "sys/fs/cgroup/cpu,cpuacct/"
CGROUPS = {
    "none": ("0::/\n", {}, None),
    "no limit": ("0::/a\n", {V2 + "a/cpu.max": "max 100000\n"}, None),
    "rounded up": ("0::/a\n", {V2 + "a/cpu.max": "150000 100000\n"}, 2),
    "whole": ("0::/a\n", {V2 + "a/cpu.max": "200000 100000\n"}, 2),
    "small": ("0::/a\n", {V2 + "a/cpu.max": "1000 100000\n"}, 1),
    "parent": ("0::/a/b/c\n", {V2 + "a/cpu.max": "300000 100000", V2 + "a/b/c/cpu.max": "max 100000"}, 3),
    "child": ("0::/a/b\n", {V2 + "a/cpu.max": "300000 100000", V2 + "a/b/cpu.max": "100000 100000"}, 1),
    "path of the host": ("0::/docker/1234\n", {V2 + "cpu.max": "400000 100000"}, 4),
    "namespace": ("0::/../../x\n", {V2 + "x/cpu.max": "500000 100000"}, 5),
    "other group": ("0::/a\n", {V2 + "b/cpu.max": "100000 100000"}, None),
    "version 1": (
        "5:memory:/a\n4:cpu,cpuacct:/a/b\n1:name=systemd:/\n",
        {V1 + "a/cpu.cfs_quota_us": "250000\n", V1 + "a/cpu.cfs_period_us": "100000\n"},
        3,
    ),
    "version 1 alone": (
        "4:cpu:/a\n",
        {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000"},
        2,
    ),
    "version 1 without": (
        "4:cpu,cpuacct:/a\n",
        {V1 + "a/cpu.cfs_quota_us": "-1\n", V1 + "a/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "cpuset is not cpu": ("4:cpuset:/a\n", {"sys/fs/cgroup/cpuset/a/cpu.cfs_quota_us": "100000"}, None),
    "hybrid": ("0::/a\n", {"sys/fs/cgroup/unified/a/cpu.max": "200000 100000"}, 2),
    "nonsense": ("0::/a\nx\n::\n", {V2 + "a/cpu.max": "lots\n", V2 + "cpu.max": "1 0"}, None),
}


@pytest.mark.parametrize("case", CGROUPS)
def test_cgroup_limit(tmp_path, case):
    group, files, expected = CGROUPS[case]
    assert cgroup_limit(tree(tmp_path, group, files)) == expected


def test_no_cgroups_at_all(tmp_path):
    assert cgroup_limit(tmp_path) is None


@openmp
def test_a_quota_limits_the_default(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(MODULE, "_environment", None)
    monkeypatch.setattr(MODULE, "cgroup_limit", lambda: 1)
    set_num_threads(None)
    assert get_num_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "as the runtime read it")
    set_num_threads(None)
    assert get_num_threads() == _runtime.max_threads()


# --- the report ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "training", "gradient", "taken"),
    [
        ((64, 512), False, False, True),  # so many values,
        ((56, 512), False, False, False),
        ((48, 512), True, False, True),  # or fewer whose sums are taken,
        ((40, 512), True, False, False),
        ((42, 512), True, True, True),  # or of two operands,
        ((36, 512), True, True, False),
        ((1, 8192), False, False, True),  # or few of many channels each of which has coefficients,
        ((1, 3000), True, False, False),
        ((1, 512, 7, 7), False, False, False),
        ((1, 512, 7, 7), True, False, True),  # or lanes to fold.
        ((1, 128, 7, 7), True, True, False),
    ],
)
def test_teams_follow_the_work(shape, training, gradient, taken, monkeypatch):
    """What the sums and the channels take counts as well, the same on both ways to a driver."""
    asked: list[int] = []

    def team(work):
        asked.append(work)
        return 1

    monkeypatch.setattr(functional, "team", team)
    monkeypatch.setattr(passes, "team", team)
    x = np.ones(shape, np.float32)
    statistics = {"moving_mean": np.zeros(shape[1]), "moving_variance": np.ones(shape[1])}
    if gradient:
        _, cache = fastbn.batch_norm_forward(x, training=True, axis=1)
        asked.clear()

    def call():
        if gradient:
            fastbn.batch_norm_backward(x, cache)
        else:
            fastbn.batch_norm(x, axis=1, training=training, **statistics)

    call()  # a direct call only asks where there is enough to do
    assert bool(asked) == taken
    direct = asked[:]
    asked.clear()
    monkeypatch.setattr(functional._calls, "forward", lambda *_: None)
    monkeypatch.setattr(functional._calls, "backward", lambda *_: None)
    call()
    assert direct in ([], asked)
    assert (asked[0] > passes.SERIAL) == taken


def test_thread_info():
    info = thread_info()
    assert json.loads(json.dumps(info)) == info
    assert info["threads"] == get_num_threads() == fastbn.get_num_threads()
    assert info["openmp"] == (_runtime.openmp_version() or None)
    assert info["affinity"] == CPUS
    assert info["forked"] is False
