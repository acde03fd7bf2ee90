"""The boundary to users' files: one message, whatever a library raises; a mistake of ours is told apart."""

import os
from pathlib import Path

import pytest
from pydantic import BaseModel

from qdexport.core.reading import is_ours, read_bytes, read_json_file, read_text, reading, reason
from qdexport.errors import BuildError, ModelError, RecipeError


class _OddError(Exception):
    pass


@pytest.mark.parametrize(
    "error", [_OddError("odd"), ZeroDivisionError("x"), IndexError(), StopIteration(), KeyError("k"), MemoryError(),
              RecursionError(), OverflowError("big"), AssertionError(), UnicodeDecodeError("utf-8", b"", 0, 1, "no")]
)  # fmt: skip
def test_every_error_becomes_one_message(error: Exception) -> None:
    with pytest.raises(RecipeError, match=r"^my\.yaml cannot be read: .+; mend it$") as caught, reading(
        "my.yaml", RecipeError, "mend it"
    ):
        raise error
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [BuildError("as it is"), KeyboardInterrupt(), SystemExit(3)])
def test_what_is_for_the_user_and_interrupts_pass_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, reading("x"):
        raise error
    assert caught.value is error


def test_reasons_are_sentences() -> None:
    class Model(BaseModel):
        size: int

    assert reason(MemoryError()) == "there is not enough memory"
    told = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 30000000000 bytes. Error code 12"
    assert reason(RuntimeError(told)) == "there is not enough memory for 30.0 GB more"
    assert reason(IsADirectoryError(21, "Is a directory", "x")) == "Is a directory"
    assert reason(KeyError("unet")) == "KeyError: 'unet'"
    assert reason(ZeroDivisionError()) == "ZeroDivisionError"
    assert len(reason(ValueError("x" * 10_000))) < 500
    with pytest.raises(ValueError, match="size") as caught:
        Model.model_validate({"size": "big"})
    assert reason(caught.value).startswith("size: Input should be a valid integer")


def test_a_mistake_of_ours_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        read_bytes(tmp_path / "absent")
    assert not is_ours(caught.value.__cause__)
    with pytest.raises(ModelError) as mistake:
        read_text(7)  # type: ignore[arg-type]
    assert not is_ours(None)
    assert is_ours(mistake.value.__cause__)
    with pytest.raises(KeyError) as elsewhere:
        os.environ["NO SUCH VARIABLE"]
    assert not is_ours(elsewhere.value)


def test_only_whole_regular_files_of_a_sane_length_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"a": 1}')
    assert read_json_file(file) == {"a": 1}
    with pytest.raises(ModelError, match=r"a\.json cannot be read: it has .* MB, such a file has at most"):
        read_text(file, limit=5)
    os.mkfifo(tmp_path / "pipe")
    for path, words in (
        (tmp_path / "pipe", "a pipe or a device"), (Path("/dev/zero"), "a pipe or a device"),
        (tmp_path, "directory"), (tmp_path / "absent", "absent does not exist"),
        (tmp_path / ("a" * 300), "name too long"),
        (Path("a\0b"), "null byte"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=words):
            read_bytes(path)


@pytest.mark.parametrize("text", [b"{", b"[" * 100_000, b"9" * 5000, b"\xff", b"", b"nul"])
def test_what_is_no_json_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(RecipeError, match=r"a\.json"):
        read_json_file(tmp_path / "a.json", RecipeError)
