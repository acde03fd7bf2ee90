"""Files are whole or absent; errors name the path and what to do."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from qdexport.core.files import (
    atomic_dir,
    atomic_path,
    digest_of,
    file_sha256,
    tree_sha256,
    write_json,
    write_text,
)
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
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
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


def test_digests_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"1" * (1 << 21))
    (tmp_path / "b.bin").write_bytes(b"2")
    assert file_sha256(tmp_path / "b.bin") == hashlib.sha256(b"2").hexdigest()
    assert tree_sha256(tmp_path / "b.bin") == file_sha256(tmp_path / "b.bin")
    first = tree_sha256(tmp_path)
    assert first == tree_sha256(tmp_path)
    (tmp_path / "b.bin").rename(tmp_path / "c.bin")
    renamed = tree_sha256(tmp_path)
    (tmp_path / "c.bin").write_bytes(b"3")
    assert len({first, renamed, tree_sha256(tmp_path)}) == 3


def test_digests_of_values() -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of("ab", "c") != digest_of("a", "bc")
    assert digest_of(1) != digest_of("1")
