"""Digests of files, folders and values; what did not change is read once."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from qdexport.core import digests
from qdexport.core.digests import digest_of, file_sha256, tree_files, tree_sha256


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


def age(path: Path) -> None:
    """As if the file had been written long ago. Its inode changes when it is told so: that is waited for."""
    os.utime(path, ns=(1, 1_600_000_000_000_000_001))
    time.sleep(0.05)


def test_a_file_that_did_not_change_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    age(file)
    opened = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args: opened.append(self) or original(self, *args))
    first = file_sha256(file)
    assert file_sha256(file) == tree_files(tmp_path)["weights"] == first
    assert opened == [file]


@pytest.mark.parametrize("how", ["in place", "replaced", "in place, with the old time"])
def test_a_change_of_equal_length_is_seen(tmp_path: Path, how: str) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    age(file)
    before = file.stat()
    assert file_sha256(file) == hashlib.sha256(b"1").hexdigest()
    if how == "replaced":
        (tmp_path / "new").write_bytes(b"2")
        (tmp_path / "new").replace(file)
    else:
        file.write_bytes(b"2")
    if how.endswith("time"):
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_sha256(file) == hashlib.sha256(b"2").hexdigest()


def test_what_was_just_written_is_read_again(tmp_path: Path) -> None:
    """Two writes within one step of the file system's clock look the same from outside."""
    file = tmp_path / "weights"
    for value in range(50):
        file.write_bytes(bytes([value]))
        assert file_sha256(file) == hashlib.sha256(bytes([value])).hexdigest()


def test_a_large_file_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_WORTH_A_WAIT", 1)
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    known = len(digests._known)
    file_sha256(file)
    assert len(digests._known) == known + 1
