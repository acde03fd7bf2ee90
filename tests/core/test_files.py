"""Files are whole or absent; errors name the path and what to do."""

from __future__ import annotations

import json
import os
import stat
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from qdexport.core.files import atomic_dir, atomic_path, write_json, write_text
from qdexport.errors import OutputError


def names(folder: Path) -> list[str]:
    return sorted(item.relative_to(folder).as_posix() for item in folder.rglob("*"))


def write_half(target: AbstractContextManager[Path], error: BaseException) -> None:
    with target as partial:
        (partial / "model.onnx" if partial.is_dir() else partial).write_text("half")
        raise error


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "model.onnx"
    with atomic_path(path) as partial:
        assert partial.parent == path.parent  # the same file system, so that the replacement is one step
        assert partial.suffix == ".onnx"  # libraries choose a format by it
        partial.write_bytes(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["deep", "deep/er", "deep/er/model.onnx"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    with pytest.raises(KeyboardInterrupt):
        write_half(atomic_path(path), KeyboardInterrupt())
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.json"]


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": 1.5, "ä": [None, True]})
    text = path.read_text(encoding="utf-8")
    assert json.loads(text) == {"a": 1.5, "ä": [None, True]}
    assert text.endswith("}\n")
    assert "ä" in text
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert path.read_text(encoding="utf-8") == text
    assert names(tmp_path) == ["report.json"]


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*"):
        write_text(tmp_path / "file" / "report.json", "text")


def test_files_and_folders_have_the_usual_permissions(tmp_path: Path) -> None:
    """Temporary files are private by default; results are not."""
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "text")
        with atomic_dir(tmp_path / "folder") as partial:
            (partial / "b").write_text("text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "stale").write_text("")
    with atomic_dir(folder) as partial:
        (partial / "model.onnx").write_text("new")
        assert names(folder) == ["stale"]
    assert names(tmp_path) == ["onnx", "onnx/model.onnx"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "old").write_text("")

    with pytest.raises(RuntimeError, match="stop"):
        write_half(atomic_dir(folder), RuntimeError("stop"))
    assert names(tmp_path) == ["onnx", "onnx/old"]
