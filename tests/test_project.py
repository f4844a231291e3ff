"""The files around the library agree with each other: what is built, installed, pinned, linked and named."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

import fastbn

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
DOCUMENTS = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")}
VERSION = re.search(r"version: '([^']+)'", (ROOT / "meson.build").read_text())[1]


def test_every_python_file_is_installed():
    """Meson installs what its lists name: a new file is easily forgotten there."""
    source, installed = ROOT / "src" / "fastbn", Path(fastbn.__file__).parent
    if installed == source:
        pytest.skip("an editable install reads the source tree")
    for pattern in ("*.py", "py.typed"):
        wanted = {p.relative_to(source) for p in source.rglob(pattern)}
        assert wanted <= {p.relative_to(installed) for p in installed.rglob(pattern)}


def test_every_compiled_module_has_a_stub():
    installed = Path(fastbn.__file__).parent
    modules = [p for suffix in EXTENSION_SUFFIXES for p in installed.rglob(f"*{suffix}")]
    if not modules:
        pytest.skip("an editable install keeps the compiled modules in its build folder")
    for module in modules:
        assert (module.parent / module.name.split(".")[0]).with_suffix(".pyi").exists()


def test_tests_run_against_the_installed_package():
    assert str(ROOT / "src") not in sys.path


def test_version_is_in_one_place():
    assert fastbn.__version__ == metadata.version("fastbn") == VERSION
    assert f"## [{VERSION}]" in DOCUMENTS["CHANGELOG.md"]


def test_numpy_is_the_only_requirement():
    assert [re.match(r"[\w-]+", r)[0] for r in PROJECT["project"]["dependencies"]] == ["numpy"]


def test_pytorch_is_never_installed_unasked():
    """It is large: only the extra of its name brings it, and no other extra brings that one."""
    assert {name for name, extra in EXTRAS.items() if any(re.match(r"torch\b", r) for r in extra)} == {"torch"}
    assert not [r for extra in EXTRAS.values() for r in extra if re.match(r"fastbn\[.*\btorch\b", r)]


def test_make_targets_and_extras_exist():
    makefile = (ROOT / "Makefile").read_text()
    documents = "\n".join(DOCUMENTS.values())
    for target in set(re.findall(r"(?:`|^ {4}|&& )make ([a-z-]+)", documents, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    for group in re.findall(r"\[([a-z0-9,]+)\]\"", documents):
        assert set(group.split(",")) <= set(EXTRAS), group


def test_hooks_have_the_pins_of_make_lint():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for requirement in EXTRAS["lint"]:
        assert requirement in hooks or requirement.startswith("numpydoc")  # which wants fastbn installed


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_to_files_exist(name):
    for target in re.findall(r"\]\(([^)#:]+)\)", DOCUMENTS[name]):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_links_between_documents_exist(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
