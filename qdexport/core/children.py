"""Processes that are started from here import nothing from the current folder, which can be a downloaded model."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["child_environment", "safe_path", "use_safe_path"]

_SAFE = "PYTHONSAFEPATH"
_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a child that runs a module of this package, which may only be importable through our path."""
    paths = [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, _SAFE: "1", "PYTHONPATH": os.pathsep.join(path for path in paths if path), **more}


def use_safe_path() -> None:
    """Keeps the current folder out of the import path of every Python that this process starts from now on.

    Matplotlib reads its settings from the current folder first, when it is imported, and they can name modules: where
    such a file lies there, the import happens elsewhere.
    """
    os.environ.setdefault(_SAFE, "1")
    if "matplotlib" not in sys.modules and os.path.lexists("matplotlibrc"):
        here = os.open(".", os.O_RDONLY)
        try:
            os.chdir("/")
            importlib.import_module("matplotlib")
        finally:
            os.fchdir(here)
            os.close(here)


@contextlib.contextmanager
def safe_path() -> Iterator[None]:
    """As :func:`use_safe_path`, inside the block."""
    before = os.environ.get(_SAFE)
    os.environ[_SAFE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE]
        else:
            os.environ[_SAFE] = before
