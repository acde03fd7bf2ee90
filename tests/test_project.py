"""The repository itself: its layout, its pins, and a wheel that holds what is tracked."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

TOP_LEVEL = {
    ".ci", ".gitignore", "LICENSE", "README.md", "constraints.txt", "docs", "passes", "plugins", "pyproject.toml",
    "qdexport", "tests", "tools",
}  # fmt: skip
LARGEST_FILE_BYTES = 12_000_000
# what only the machine of one developer can know
PRIVATE = re.compile(
    r"/work/(main|shared|team|lab)|/root/|/home/\w+/|/opt/pypi|artifactory|\bnexus\b|devpi|index-url|--trusted-host"
    r"|file:///",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def tracked(repository: Path) -> list[str]:
    """Paths of all tracked files (a clone without its history has none, and nothing can be said)."""
    if not (repository / ".git").exists():
        pytest.skip("not a git clone")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    return [name for name in listed if name and (repository / name).exists()]


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def pins(repository: Path) -> dict[str, str]:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(item.name): str(item.specifier) for item in requirements}


def test_the_top_level_holds_what_it_should(tracked: list[str]) -> None:
    assert {name.partition("/")[0] for name in tracked} == TOP_LEVEL


@pytest.mark.parametrize("package", ["passes", "plugins"])
def test_passes_and_plugins_are_links(repository: Path, tracked: list[str], package: str) -> None:
    link = repository / "qdexport" / package
    assert link.is_symlink()
    assert link.readlink() == Path("..") / package
    assert f"qdexport/{package}" in tracked
    mode = subprocess.run(
        ["git", "ls-files", "-s", f"qdexport/{package}"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout.split()[0]
    assert mode == "120000"


def test_no_folder_of_tests_is_left_out(pytestconfig: pytest.Config, tracked: list[str]) -> None:
    """pytest's own default passes folders called `build` over."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = {part for name in tracked if name.startswith("tests/") for part in Path(name).parent.parts}
    assert "build" in folders
    assert [folder for folder in folders for pattern in patterns if fnmatch.fnmatch(folder, pattern)] == []


def test_no_tracked_file_is_large(repository: Path, tracked: list[str]) -> None:
    sizes = {name: (repository / name).lstat().st_size for name in tracked}
    assert {name: size for name, size in sizes.items() if size > LARGEST_FILE_BYTES} == {}


def test_nothing_names_the_machine_it_was_written_on(repository: Path, tracked: list[str]) -> None:
    found = []
    for name in tracked:
        path = repository / name
        if path.is_symlink() or path == Path(__file__):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and pictures
        found += [f"{name}: {match.group()}" for match in PRIVATE.finditer(text)]
    assert found == []


def test_every_dependency_is_pinned(project: dict[str, Any], pins: dict[str, str]) -> None:
    extras = project["optional-dependencies"]
    for text in project["dependencies"] + extras["cpu"] + extras["dev"]:
        requirement = Requirement(text)
        pin = pins[canonicalize_name(requirement.name)]
        assert pin.startswith("=="), f"{text} is pinned as {pin!r}"
        assert requirement.specifier.contains(pin.removeprefix("==")), f"{text} does not allow {pin}"


def test_pins_fit_every_machine(pins: dict[str, str]) -> None:
    """One exact version each, without local suffixes (+cpu): pip takes the build that its index has."""
    assert all(re.fullmatch(r"==[0-9][0-9a-z.]*", pin) for pin in pins.values()), pins
    assert pins["torch"] == "==2.13.0"


def test_every_indirect_dependency_is_pinned(project: dict[str, Any], pins: dict[str, str]) -> None:
    """Follows what is installed here; what belongs to other platforms cannot be seen."""
    import importlib.metadata as metadata

    extras = project["optional-dependencies"]
    queue = [Requirement(text) for text in project["dependencies"] + extras["cpu"] + extras["dev"]]
    seen, missing = set(), set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        wanted = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
        for text in [] if name in seen else metadata.requires(name) or []:
            inner = Requirement(text)
            if inner.marker is None or any(inner.marker.evaluate(extra) for extra in wanted):
                queue.append(inner)
        seen.add(name)
        if name not in pins:
            missing.add(name)
    # NVIDIA's CUDA libraries come with the CUDA build of torch only
    assert {name for name in missing if not name.startswith(("nvidia-", "cuda-", "triton"))} == set()


def test_the_version_is_stated_once(project: dict[str, Any]) -> None:
    import qdexport

    assert project["version"] == qdexport.__version__


@pytest.mark.parametrize("script", ["tools/setup", "tools/test", "tools/demo", ".ci/run"])
def test_scripts_are_legal_and_executable(repository: Path, script: str) -> None:
    path = repository / script
    assert path.stat().st_mode & 0o111
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_setup_refuses_a_python_that_does_not_run(repository: Path, tmp_path: Path) -> None:
    """In a copy of its own: the environment of this clone is not touched."""
    (tmp_path / "tools").mkdir()
    for name in ("tools/setup", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((repository / name).read_bytes())
    child = subprocess.run(
        ["bash", str(tmp_path / "tools/setup")],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(tmp_path / "no-python")},
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert child.returncode == 1
    assert "no-python does not run" in child.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.slow
def test_the_wheel_holds_what_is_tracked(repository: Path, tracked: list[str], tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in tracked:
        original, copy = repository / name, source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if original.is_symlink():
            copy.symlink_to(original.readlink())
        else:
            copy.write_bytes(original.read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(source)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.partition("/")[0].endswith(".dist-info")}
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
        entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "qdexport = qdexport.cli.main:main" in archive.read(entry).decode()
    links = ("qdexport/passes", "qdexport/plugins")
    expected = {name for name in tracked if name.startswith("qdexport/") and name not in links}
    expected |= {f"qdexport/{name}" for name in tracked if name.startswith(("passes/", "plugins/"))}
    assert held == expected
    assert {"qdexport/py.typed", "qdexport/passes/__init__.py", "qdexport/recipes/w8a8.yaml"} <= held
