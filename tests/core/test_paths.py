"""Names from files stay below their folder, whatever they hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdexport.core.paths import as_file_name, below, why_unsafe
from qdexport.errors import ModelError, OutputError

BAD = [
    "", ".", "./.", "..", "../x", "a/../../x", "a/..", "/etc/passwd", "//host/share", "C:/x", "c:x", "..\\x", "a\\b",
    "a\0b", "a\nb", "a\x1b[31mb", "a\x9bb", "\ud800", "nul", "a/CON", "com1.txt", "lpt9", "a.", "a ", ".. /x",
    "x" * 256,
]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_path_below_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"index\.json names ") as caught:
        below(tmp_path, name, "index.json")
    assert str(caught.value).isprintable()  # it goes to a terminal


@pytest.mark.parametrize("name", ["a", "a/b.c", "./a", "a//b", ".hidden", "a..b/c", "ä/模型", "console", "ab:c"])
def test_what_is_one(tmp_path: Path, name: str) -> None:
    assert why_unsafe(name) is None
    assert below(tmp_path, name, "index.json") == tmp_path / name


def test_links(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    (root / "in").mkdir(parents=True)
    other.mkdir()
    (other / "file").write_text("")
    (root / "good").symlink_to("in")
    (root / "away").symlink_to(other)
    (root / "file").symlink_to(other / "file")
    (root / "gone").symlink_to("../nowhere")
    (root / "round").symlink_to("round")
    assert below(root, "good/x", "m") == root / "good/x"
    for name in ("away", "away/file", "file", "gone", "round"):
        with pytest.raises(OutputError, match="link that leaves"):
            below(root, name, "m", error=OutputError)
    assert below(root, "file", "m", home=tmp_path) == root / "file"
    through = tmp_path / "through"
    through.symlink_to(root)
    assert below(through, "in/x", "m") == through / "in/x"  # the root itself may be a link


def test_snapshots_of_the_hub_are_links_to_blobs(tmp_path: Path) -> None:
    blob = tmp_path / "models--a--b" / "blobs" / "0123"
    blob.parent.mkdir(parents=True)
    blob.write_text("")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main" / "unet"
    snapshot.mkdir(parents=True)
    (snapshot / "w.safetensors").symlink_to("../../../blobs/0123")
    assert below(snapshot, "w.safetensors", "m").is_file()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("w8a8", "w8a8"), ("a/b", "a_b"), ("../../etc", "etc"), ("..", "x"), ("", "x"),
        ("a\x1b[0m", "a_0m"), ("nul", "_nul"), ("SD 1.5", "SD_1.5"), ("模型", "模型"), ("y" * 300, "y" * 100),
    ],
)  # fmt: skip
def test_names_of_folders_from_names_of_anything(text: str, name: str) -> None:
    assert as_file_name(text, "x") == name
    assert why_unsafe(name) is None
