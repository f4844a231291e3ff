"""Every instruction set level is what it is called, passes the kernel tests, and gives the same bits.

The same holds for a build by another compiler: `FASTBN_OTHER_BUILD` names the folder that it was installed into
(`make test-clang` makes one with Clang). Its instructions are looked at too, and its bits are compared.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from cases import LEVELS

from fastbn.kernels import dispatch

TESTS = Path(__file__).resolve().parent
OTHER = os.environ.get("FASTBN_OTHER_BUILD", "")
# Of what the build has, which is all unless it was meant to have fewer (make test-versions).
BUILT = os.environ.get("FASTBN_BUILT_LEVELS", "base v3 v4").split()
needs_other = pytest.mark.skipif(not OTHER, reason="FASTBN_OTHER_BUILD names no other build: see make test-clang")

# The registers that hold packs (lanes.h).
REGISTERS = {"base": "xmm", "v3": "ymm", "v4": "zmm"}
PACKS = {"xmm": 8, "ymm": 4, "zmm": 2}  # of doubles in all lanes
DRIVERS = ("planar", "interleaved")
BUILDS = [pytest.param("", id="this")] + [pytest.param(OTHER, id="other")] * bool(OTHER)


def module(build: str, driver: str, level: str) -> Path:
    """The compiled module, found without importing it: the processor need not have its level."""
    name = f"_{driver}_{level}"
    if build:
        return next(Path(build, "fastbn", "kernels").glob(f"{name}.*so"))
    return Path(find_spec(f"fastbn.kernels.{name}").origin)


@cache
def instructions(path: Path) -> tuple[tuple[int, str, str], ...]:
    """(address, mnemonic, operands) of each instruction of a module, in order."""
    if platform.machine() != "x86_64" or sys.platform != "linux":
        pytest.skip("levels are those of x86-64, and read from ELF files")
    if shutil.which("objdump") is None:
        pytest.skip("objdump (of binutils) is not installed")
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*([0-9a-f]+):\s+(\S+)[ \t]*(.*)$", listing, flags=re.MULTILINE)
    assert len(found) > 1000
    return tuple((int(address, 16), mnemonic, operands) for address, mnemonic, operands in found)


@cache
def inner_loops(path: Path) -> tuple[Counter, ...]:
    """Of each loop that holds no other: how often it has each (mnemonic without v, widest register)."""
    listing = instructions(path)
    place = {address: i for i, (address, _, _) in enumerate(listing)}
    ranges = []
    for i, (_, mnemonic, operands) in enumerate(listing):
        to = re.match(r"([0-9a-f]+) <", operands) if mnemonic.startswith("j") else None
        start = place.get(int(to[1], 16)) if to else None
        if start is not None and start <= i < start + 1000:
            ranges.append((start, i))
    inner = [a for a in ranges if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in ranges)]
    return tuple(
        Counter((mnemonic.removeprefix("v"), width(operands)) for _, mnemonic, operands in listing[start : end + 1])
        for start, end in inner
    )


def width(operands: str) -> str:
    return next((register for register in ("zmm", "ymm", "xmm") if register in operands), "")


SCALAR = re.compile(r"(add|sub|mul|div|sqrt|fn?m(add|sub)\d+)s[sd]")


def has(loop: Counter, pattern: str, register: str, at_least: int = 1) -> bool:
    """Whether a loop has so many instructions on the registers."""
    return sum(n for (name, of), n in loop.items() if of == register and re.fullmatch(pattern, name)) >= at_least


def is_packed(loop: Counter) -> bool:
    """No arithmetic on single values: those of a loop counter are on other registers."""
    return not any(SCALAR.fullmatch(name) for name, _ in loop)


def loops(path: Path, register: str, *patterns: str, without: str = "nothing") -> list[Counter]:
    """Packed inner loops that have all of these instructions on the registers."""
    return [
        loop
        for loop in inner_loops(path)
        if is_packed(loop)
        and all(has(loop, pattern, register) for pattern in patterns)
        and not any(re.fullmatch(without, name) for name, _ in loop)
    ]


FMA = r"fn?madd\d+pd"


def sums_as_they_are(build: str, driver: str, level: str) -> list[Counter]:
    """Loops that sum float32 data not relative to a shift, without looking for the largest weight."""
    path, register = module(build, driver, level), REGISTERS[level]
    return loops(path, register, "cvtps2pd", FMA if level != "base" else "mulpd", without="subpd|pmaxud|pcmpgtd")


def fetches(loop: Counter) -> bool:
    return any(name.startswith("prefetch") for name, _ in loop)


def sets_of_lanes(found: list[Counter], level: str) -> int:
    """How many are widened in one turn of a loop, at most."""
    widened = (sum(n for (name, _), n in loop.items() if name == "cvtps2pd") for loop in found)
    return max(widened, default=0) // PACKS[REGISTERS[level]]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("level", BUILT)
class TestInstructions:
    """What the compiler made of the loops through which all values go."""

    def test_float32_sums_are_packed(self, level, driver, build):
        """Widened, added and multiplied a pack at a time; values relative to a shift and, exactly, as they are."""
        path, register = module(build, driver, level), REGISTERS[level]
        assert loops(path, register, "cvtps2pd", "subpd", "addpd", "mulpd")
        exact = FMA if level != "base" else "mulpd"
        assert loops(path, register, "cvtps2pd", "addpd", exact, without="subpd")

    def test_sums_of_two_sets_of_lanes_are_side_by_side(self, level, driver, build):
        """Where there are 32 registers: a lane waits for its last addition, which the other set's then fill."""
        found = [loop for loop in sums_as_they_are(build, driver, level) if fetches(loop)]
        assert sets_of_lanes(found, level) == (4 if level == "v4" else 2)  # of both operands of a gradient

    def test_rows_in_the_caches_are_taken_together(self, level, driver, build):
        """Some rows without a loop of their own, and nothing is fetched."""
        found = [loop for loop in sums_as_they_are(build, driver, level) if not fetches(loop)]
        if driver == "interleaved" and not build:  # another compiler may choose not to unroll
            assert sets_of_lanes(found, level) >= 6

    def test_float64_sums_are_packed(self, level, driver, build):
        path, register = module(build, driver, level), REGISTERS[level]
        assert loops(path, register, "subpd", "addpd", "mulpd", without="cvtps2pd|movntpd")

    def test_weighted_and_masked_sums_are_packed(self, level, driver, build):
        """Values and weights are widened and multiplied a pack at a time; what does not count is cleared."""
        path, register = module(build, driver, level), REGISTERS[level]
        packs = PACKS[register]
        packed = loops(path, register, "cvtps2pd", "mulpd", "addpd")
        assert [loop for loop in packed if has(loop, "(cvtps2|mul)pd", register, 4 * packs)]
        # By masks of registers where there are some; Clang then clears while it widens, GCC by a move.
        clears = ("k(mov|shiftr)[bdqw]", "", 1) if level == "v4" else ("andp[sd]|pand", register, packs)
        exact = FMA if level != "base" else "mulpd"
        found = loops(path, register, "cvtps2pd", "addpd", exact, without="subpd")
        assert [loop for loop in found if has(loop, "cvtps2pd", register, packs) and has(loop, *clears)]

    def test_scaling_is_packed(self, level, driver, build):
        """With stores through the caches and past them."""
        path, register = module(build, driver, level), REGISTERS[level]
        for kind in "sd":
            formula = [f"{operation}p{kind}" for operation in ("sub", "mul", "add")]
            assert loops(path, register, *formula, without="movntp[sd]")
            assert loops(path, register, *formula, f"movntp{kind}")

    def test_values_of_16_bits_are_scaled_in_registers(self, level, driver, build):
        """Converted, scaled and converted back in one loop, from AVX2 on."""
        path, register = module(build, driver, level), REGISTERS[level]
        formula = ("subps", "mulps", "addps")
        bfloat16 = ("pshufb",) if level == "v3" else ("pmovzxwd", "pslld")
        for conversions in (("cvtph2ps", "cvtps2ph"), bfloat16):
            assert bool(loops(path, register, *formula, *conversions)) == (level != "base")

    def test_loops_over_data_are_packed_throughout(self, level, driver, build):
        """Almost all arithmetic in loops that widen, scale or stream is on packs: what is scalar is a remainder."""
        path = module(build, driver, level)
        hot = [
            loop for loop in inner_loops(path) if any(re.fullmatch(r"(mul|sub)ps|movntp[sd]", name) for name, _ in loop)
        ]
        packed = sum(n for loop in hot for (name, _), n in loop.items() if re.fullmatch(r"(add|sub|mul)p[sd]", name))
        scalar = sum(n for loop in hot for (name, _), n in loop.items() if SCALAR.fullmatch(name))
        assert packed >= 24
        assert packed >= 20 * scalar

    def test_multiplications_are_fused_only_where_the_product_is_exact(self, level, driver, build):
        """Never on single values or floats, and on doubles only by `fastbn_add_exact_product`."""
        fused = {m.removeprefix("v") for _, m, _ in instructions(module(build, driver, level)) if re.match("vfn?m", m)}
        assert all(re.fullmatch(r"fmadd\d+pd", name) for name in fused)
        assert bool(fused) == (level != "base")

    def test_nothing_above_the_level(self, level, driver, build):
        listing = instructions(module(build, driver, level))
        # Registers from 16 on, and masks, are AVX-512 as well.
        above = {"base": r"[yz]mm", "v3": r"zmm|%k[0-7]|mm(1[6-9]|[23]\d)", "v4": "tmm"}[level]
        assert not [line for line in listing if re.search(above, line[2])]
        if level == "base":  # the VEX and EVEX encodings of vector instructions are all called v...
            assert not [line for line in listing if re.match("v(?!er[rw])", line[1])]


def run_kernel_tests(level: str, expression: str) -> str:
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "-m", expression, TESTS]
    environment = os.environ | {"FASTBN_ISA": level, "PYTHONHASHSEED": "0"}
    run = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    return run.stdout


def passed(output: str) -> int:
    return int(re.search(r"(\d+) passed", output)[1])


def skip_if_part_of(test, request) -> None:
    """Skip what another test does as well, where that is run."""
    if any(getattr(item, "function", None) is test for item in request.session.items):
        pytest.skip(f"part of {test.__name__}")


@pytest.mark.parametrize("level", REGISTERS)
def test_kernel_tests_at_other_levels(level, request):
    """This process runs all tests at one level; a part of them, for the time it takes, is run at the others here."""
    skip_if_part_of(test_all_kernel_tests_at_other_levels, request)
    if level not in LEVELS:
        pytest.skip(f"the processor or the build has no level {level}")
    if level == dispatch.level:
        pytest.skip("the level of this process")
    assert passed(run_kernel_tests(level, "kernels and levels and not slow")) > 50


@pytest.mark.slow
@pytest.mark.parametrize("level", REGISTERS)
def test_all_kernel_tests_at_other_levels(level):
    if level not in LEVELS:
        pytest.skip(f"the processor or the build has no level {level}")
    if level == dispatch.level:
        pytest.skip("the level of this process")
    assert passed(run_kernel_tests(level, "kernels")) > 500


PROGRAM = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[2]]
from benchmarks import builds
builds.use(sys.argv[3])
import fastbn, test_bits, test_levels
assert not sys.argv[3] or fastbn.__file__.startswith(sys.argv[3])
for line in test_levels.digests(sys.argv[4] == "all"):
    print(line)
"""
# Every remainder of lanes, runs and rows.
REMAINDERS = [
    case for n in range(1, 71) for case in (((3, n), -1), ((n, 3), -1), ((2, 3, n), 1), ((3, n, 4), 1), ((2, n, 49), 1))
]


def digests(everything: bool):
    """One line per case: its digest. Run in a process of the level and the build."""
    import test_bits

    shapes = list(test_bits.BIG + test_bits.BOTH)
    for shape, axis in shapes + REMAINDERS if everything else shapes[::2] + REMAINDERS[::7]:
        for dtype in test_bits.DTYPES:
            x, dy, gamma, beta = test_bits.inputs(shape, axis, dtype)
            for mean in (0, 1e6):  # sums of values as they are, and again around their mean
                digest = test_bits.digest(test_bits.everything(x + dtype(mean), dy, gamma, beta, axis))
                yield f"{shape} {axis} {dtype.__name__} {mean:g} {digest}"


def digests_of(build: str, level: str, *, everything: bool) -> list[str]:
    build = str(Path(build).resolve()) if build else ""
    amount = "all" if everything else "some"
    command = [sys.executable, "-c", PROGRAM, str(TESTS.parent), str(TESTS), build, amount]
    environment = os.environ | {"FASTBN_ISA": level}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) > 50
    return lines


def test_levels_give_the_same_bits(request):
    skip_if_part_of(test_levels_give_the_same_bits_for_every_remainder, request)
    expected = digests_of("", LEVELS[0], everything=False)
    for level in LEVELS[1:]:
        assert digests_of("", level, everything=False) == expected, level


@pytest.mark.slow
def test_levels_give_the_same_bits_for_every_remainder():
    expected = digests_of("", LEVELS[0], everything=True)
    for level in LEVELS[1:]:
        assert digests_of("", level, everything=True) == expected, level


@needs_other
def test_another_compiler_gives_the_same_bits_at_every_level():
    expected = digests_of("", dispatch.level, everything=True)
    for level in LEVELS:
        assert digests_of(OTHER, level, everything=True) == expected, level
