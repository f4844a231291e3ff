"""Import fastbn from a folder of choice, whatever else is installed: for comparisons of two builds."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any


class _Finder:
    """Answers before every other finder; that of an editable install is among them."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "fastbn":
            return None
        return PathFinder.find_spec(name, [self.folder] if path is None else path, target)


def use(folder: str | Path) -> None:
    """Let `import fastbn` take what `pip install --target FOLDER` put there.

    Parameters
    ----------
    folder : str or Path
        Holds a folder ``fastbn`` with the compiled modules. "" for whatever is installed.

    Raises
    ------
    FileNotFoundError
        If there is no installed fastbn in that folder.
    """
    if not folder:
        return
    folder = Path(folder).resolve()
    if not list(folder.glob("fastbn/kernels/_planar_base.*")):
        raise FileNotFoundError(f"no installed fastbn in {folder}: pip install --target {folder} ... makes one")
    assert "fastbn" not in sys.modules
    sys.meta_path.insert(0, _Finder(folder))  # type: ignore[arg-type]
