"""Single files that commands write among those of users: what is not known as ours stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdexport.core.lock import locked
from qdexport.core.owned import refuse_overwriting, written_into
from qdexport.errors import OutputError


def make(folder: Path, text: str, *names: str) -> None:
    with written_into(folder, names):
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)


def test_ours_is_replaced_and_the_users_is_not(tmp_path: Path) -> None:
    make(tmp_path, "1", "a", "sub/b")
    make(tmp_path, "2", "a")
    assert (tmp_path / "a").read_text() == "2"
    (tmp_path / "mine").write_text("user")
    with pytest.raises(OutputError, match="mine was not written by qdexport"):
        make(tmp_path, "3", "a", "mine")
    (tmp_path / "a").write_text("edited")
    with pytest.raises(OutputError, match="changed since"):
        make(tmp_path, "3", "a")
    make(tmp_path, "3", "sub/b")
    assert [(tmp_path / name).read_text() for name in ("a", "mine", "sub/b")] == ["edited", "user", "3"]


def test_nothing_is_left_in_a_folder_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("user")
    with pytest.raises(OutputError):
        make(tmp_path, "1", "a")
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_what_a_killed_run_wrote_is_ours(tmp_path: Path) -> None:
    def killed() -> None:
        with written_into(tmp_path, ["a", "b"]):
            (tmp_path / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    make(tmp_path, "1", "a", "b")


@pytest.mark.parametrize("listing", ["", "[]", "{}", '{"written": 3}', '{"written": {"a": null}}'])
def test_a_damaged_listing_lets_nothing_be_overwritten(tmp_path: Path, listing: str) -> None:
    make(tmp_path, "1", "a")
    (tmp_path / ".qdexport.json").write_text(listing)
    with pytest.raises(OutputError, match="a was"):
        make(tmp_path, "2", "a")


def test_links_are_not_written_through(tmp_path: Path) -> None:
    target, folder = tmp_path / "target", tmp_path / "folder"
    target.mkdir()
    folder.mkdir()
    (folder / "sub").symlink_to(target)
    with pytest.raises(OutputError, match="is a link"):
        make(folder, "1", "sub/b")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match="not there"):
        make(tmp_path / "nowhere", "1", "a")
    (tmp_path / "link").symlink_to(target)
    make(tmp_path / "link", "1", "a")
    assert (target / "a").read_text() == "1"


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(OutputError, match="another process"):
        make(tmp_path, "1", "a")


def test_single_files(tmp_path: Path) -> None:
    path = tmp_path / "a"
    refuse_overwriting(path, lambda _: False)
    path.write_text("")
    refuse_overwriting(path, lambda _: True)
    with pytest.raises(OutputError, match="not written by qdexport"):
        refuse_overwriting(path, lambda _: False)
    with pytest.raises(OutputError, match="is a folder"):
        refuse_overwriting(tmp_path, lambda _: True)
