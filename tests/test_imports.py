"""The command line starts fast, every module imports on its own, and public names exist."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import qdexport

HEAVY = ("torch", "diffusers", "transformers", "onnxruntime", "tensorrt_rtx", "tensorrt", "matplotlib", "polygraphy")
COMPILER = ("qdexport.core", "qdexport.graph", "qdexport.passes", "qdexport.emit")
SEEN = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"


def modules() -> list[str]:
    found = pkgutil.walk_packages(qdexport.__path__, "qdexport.")
    return ["qdexport", *sorted(item.name for item in found)]


def loaded_by(code: str) -> set[str]:
    child = subprocess.run(
        [sys.executable, "-c", f"{code}\n{SEEN}"], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    assert child.returncode == 0, child.stderr
    return set(child.stdout.split())


def test_the_command_line_loads_nothing_heavy() -> None:
    assert not loaded_by("import qdexport.cli.main").intersection(HEAVY)


def test_neither_does_its_help() -> None:
    code = """
import click.testing
from qdexport.cli.main import cli
for name in ["", *cli.commands]:
    result = click.testing.CliRunner().invoke(cli, [name, "--help"] if name else ["--help"])
    assert result.exit_code == 0, (name, result.output)
"""
    assert not loaded_by(code).intersection(HEAVY)


def test_the_compiler_proper_needs_no_framework() -> None:
    names = [name for name in modules() if name.startswith(COMPILER)]
    assert len(names) > 20
    assert not loaded_by(f"import {', '.join(names)}").intersection(HEAVY)


# Several modules share one child, which forgets ours before each: a module that only works because another was imported
# before it fails, and torch loads once.
IMPORT_ALONE = """
import importlib, sys
for name in {names!r}:
    for other in [item for item in sys.modules if item.partition(".")[0] == "qdexport"]:
        if not other.startswith(("qdexport.quant.ops",)):
            del sys.modules[other]
    importlib.import_module(name)
"""


@pytest.mark.parametrize("package", sorted({".".join(name.split(".")[:2]) for name in modules()}))
def test_every_module_imports_on_its_own(package: str) -> None:
    inner = f"{package}." if "." in package else "no inner modules"
    names = [name for name in modules() if name == package or name.startswith(inner)]
    loaded_by(IMPORT_ALONE.format(names=names))


@pytest.mark.parametrize("name", modules())
def test_public_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    public = getattr(module, "__all__", [])
    assert [item for item in public if not hasattr(module, item)] == []
    assert len(set(public)) == len(public)
    assert module.__doc__
