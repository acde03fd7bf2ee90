"""Whatever stops a replacement, and wherever: the old folder or the new one is whole, and the next run tidies up."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdexport.core import replace
from qdexport.core.files import atomic_dir, atomic_path
from qdexport.core.replace import sweep
from qdexport.errors import OutputError

CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "open", "link", "chmod")


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


class User:
    """An owner of all but one file."""

    def ours(self, folder: Path) -> list[str]:
        return [name for name in tree(folder) if name != "sub/mine"]

    def claim(self, paths: Any) -> None:
        pass


def write(folder: Path) -> None:
    with atomic_dir(folder, User()) as partial:
        (partial / "a").write_text("new")
        (partial / "b").write_text("new")


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, error: Callable[[], BaseException]) -> list[int]:
    """Raises at one of the calls that change something; gives their count."""
    count = [0]

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                raise error()
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    exchange = replace._exchanged
    monkeypatch.setattr(replace, "_exchanged", counted(exchange))
    return count


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("error", [KeyboardInterrupt, lambda: OSError(errno.ENOSPC, "full")])
def test_stopped_at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Callable[[], BaseException], *, exchange: bool
) -> None:
    old, new = {"a": "old", "c": "old", "sub/mine": "user"}, {"a": "new", "b": "new", "sub/mine": "user"}
    if not exchange:
        monkeypatch.setattr(replace, "_exchanged", lambda *_: False)
    for number in range(1, 100):
        folder = tmp_path / str(number) / "onnx"
        (folder / "sub").mkdir(parents=True)
        for name, text in old.items():
            (folder / name).write_text(text)
        with monkeypatch.context() as patch:
            count = stop_at(patch, number, error)
            with contextlib.suppress(KeyboardInterrupt, OutputError, OSError):
                write(folder)
        sweep(tmp_path / str(number))
        assert tree(tmp_path / str(number)) in (
            {f"onnx/{name}": text for name, text in tree_.items()} for tree_ in (old, new)
        ), f"stopped at call {number}"
        write(folder)
        assert tree(tmp_path / str(number)) == {f"onnx/{name}": text for name, text in new.items()}
        if count[0] < number:
            break
    else:
        pytest.fail("never ran to its end")
    assert number > 10


def test_killed_between_two_renames(tmp_path: Path) -> None:
    """Nobody raises there: the process is gone, and both folders have hidden names."""
    folder = tmp_path / "OUT" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "a").write_text("old")
    folder.rename(folder.with_name(replace.OLD + "checkpoint"))
    shutil.copytree(folder.with_name(replace.OLD + "checkpoint"), folder.with_name(replace.NEW + "x.checkpoint"))
    sweep(tmp_path)
    assert tree(tmp_path) == {"OUT/checkpoint/a": "old"}


def test_only_our_leftovers_are_swept(tmp_path: Path) -> None:
    keep = {".onnx.abc": "x", ".qdexport": "x", "qdexport-new.x": "x", ".qdexport-news/x": "x", "a/.tmp": "x"}
    gone = [".qdexport-new.1.a", "a/.qdexport-new.2.b/deep/c", ".qdexport-old.kept/x"]
    elsewhere = tmp_path / "elsewhere"
    root = tmp_path / "root"
    for base, names in ((root, [*keep, *gone]), (elsewhere, ["x"])):
        for name in names:
            (base / name).parent.mkdir(parents=True, exist_ok=True)
            (base / name).write_text("x")
    (root / "kept").mkdir()
    (root / ".qdexport-new.link").symlink_to(elsewhere)
    (root / "link").symlink_to(elsewhere)
    sweep(root)
    assert tree(root) == keep
    assert tree(elsewhere) == {"x": "x"}


def test_a_file_of_the_users_is_never_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    (folder / "a").write_text("ours")
    (folder / "sub").mkdir()
    (folder / "sub" / "mine").write_text("user")

    def write_over() -> None:
        with atomic_dir(folder, User()) as partial:
            (partial / "sub").mkdir()
            (partial / "sub" / "mine").write_text("new")

    with pytest.raises(OutputError, match=r"sub/mine is in the way"):
        write_over()
    assert tree(tmp_path) == {"onnx/a": "ours", "onnx/sub/mine": "user"}


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "onnx"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "mine").write_text("user")

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no")

    monkeypatch.setattr(os, "link", refuse)
    write(folder)
    assert tree(folder) == {"a": "new", "b": "new", "sub/mine": "user"}


def test_long_names(tmp_path: Path) -> None:
    for name in ("x" * 250 + ".onnx", "ä" * 120 + ".onnx", "n" * 255):
        with atomic_path(tmp_path / name) as partial:
            partial.write_text("x")
    with atomic_dir(tmp_path / ("d" * 255)):
        pass
    assert len(list(tmp_path.iterdir())) == 4


def test_an_interrupt_while_the_old_folder_is_removed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    for name in "abcd":
        (folder / name).write_text("old")
    real, count = os.unlink, [0]

    def unlink(*args: Any, **kwargs: Any) -> None:
        real(*args, **kwargs)
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "unlink", unlink)
    with pytest.raises(KeyboardInterrupt):
        write(folder)
    assert tree(tmp_path) == {"onnx/a": "new", "onnx/b": "new"}
    assert not list(tmp_path.glob(".qdexport*"))
