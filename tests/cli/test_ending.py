"""How commands end: one message, a documented code, no traceback, whatever is raised; the same as JSON."""

import errno
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

import qdexport.cli.console as console
from qdexport.cli.ending import Failure, ended
from qdexport.core.reading import reading
from qdexport.errors import ModelError, RecipeError


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(console._Printed, "json", False)


def _raises(error: BaseException) -> Callable[[], Any]:
    def command() -> None:
        raise error

    return command


def _failed(error: Exception) -> Callable[[], Any]:
    def command() -> None:
        try:
            raise error
        except ModelError as caught:
            raise Failure(caught) from caught

    return command


def _logs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "state" / "qdexport").glob("*.log"))


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("division by zero"), RecursionError("deep"), AssertionError(), StopIteration(),
              OSError("x"), ExceptionGroup("two", [ValueError("a"), ValueError("b")]), GeneratorExit()]
)  # fmt: skip
def test_what_was_not_foreseen_is_a_sentence_and_a_log(
    error: BaseException, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(_raises(error), as_json=False) == 1
    out, err = capsys.readouterr()
    (log,) = _logs(tmp_path)
    assert out == ""
    assert err.startswith("Error: ")
    assert len(err.splitlines()) == 1
    assert str(log) in err
    assert type(error).__name__ in err
    assert "Traceback (most recent" not in err
    assert "Traceback" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0  # arguments and paths are the user's own


def test_the_log_goes_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ended(_raises(ZeroDivisionError()), as_json=False) == 1
    (log,) = tmp_path.glob("fault-*.log")
    assert str(log) in capsys.readouterr().err
    log.unlink()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere" / "\udcff" / ("x" * 300)))
    assert ended(_raises(ZeroDivisionError()), as_json=False) == 1
    assert "traceback: none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (Failure(RecipeError("no")), 2, "recipe"),
        (click.UsageError("no such option"), 2, "usage"),
        (click.BadParameter("no"), 2, "usage"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.exceptions.Abort(), 130, "interrupted"),
        (MemoryError(), 1, "error"),
        (KeyError("k"), 1, "unforeseen"),
        (OSError(errno.ENOSPC, "No space left on device"), 10, "output"),
    ],
)
def test_json_has_an_error_object(
    error: BaseException, code: int, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(_raises(error), as_json=True) == code
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert set(told) == {"error"}
    assert set(told["error"]) == {"code", "kind", "message", "log"}
    assert (told["error"]["code"], told["error"]["kind"]) == (code, kind)
    assert told["error"]["message"] in err


def test_nothing_follows_a_result_that_is_out(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        console.print_json({"verdict": float("nan")})
        raise Failure(ModelError("too late"))

    assert ended(command, as_json=True) == 3
    out, err = capsys.readouterr()
    assert json.loads(out) == {"verdict": "NaN"}
    assert "too late" in err


@pytest.mark.parametrize(("code", "ends"), [(None, 0), (0, 0), (8, 8), ("words", 1)])
def test_exit_codes_stay(code: Any, ends: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(_raises(SystemExit(code)), as_json=False) == ends
    assert ended(_raises(click.exceptions.Exit(9)), as_json=False) == 9
    assert capsys.readouterr().err == ("Error: words\n" if ends == 1 else "")


def test_a_message_cannot_drive_the_terminal_or_forge_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    ended(_raises(Failure(ModelError("\x1b]0;owned\x07 layer\nError: none\u202e" + "x" * 100_000))), as_json=False)
    err = capsys.readouterr().err
    assert err.replace("\n", "").isprintable()
    assert [line[:2] for line in err.splitlines()] == ["Er", "  "]
    assert len(err) < 5000


def test_a_mistake_behind_the_boundary_leaves_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        try:
            with reading("config.json"):
                console.make_progress("many", False)  # type: ignore[arg-type]  # a TypeError inside our own code
        except ModelError as error:
            raise Failure(error) from error

    assert ended(command, as_json=False) == 3
    (log,) = _logs(tmp_path)
    assert f"(traceback: {log})" in capsys.readouterr().err
    assert "make_progress" in log.read_text()


def test_a_library_behind_the_boundary_leaves_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        try:
            with reading("config.json"):
                json.loads("{")
        except ModelError as error:
            raise Failure(error) from error

    assert ended(command, as_json=False) == 3
    assert not _logs(tmp_path)
    assert "config.json cannot be read: Expecting property name" in capsys.readouterr().err


def test_warnings_of_libraries_do_not_reach_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        warnings.simplefilter("always")
        warnings.warn("invalid value encountered in divide", RuntimeWarning, stacklevel=1)

    assert ended(command, as_json=False) == 0
    assert capfd.readouterr() == ("", "")


def test_a_closed_pipe_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    kept = os.dup(1)
    try:
        assert ended(_raises(BrokenPipeError()), as_json=False) == 1
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert capfd.readouterr().err == ""


def test_what_libraries_log_is_shown_not_obeyed(capfd: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        logger = logging.Logger("some library")  # noqa: LOG001 - nobody set it up: no handler, no parent
        logger.warning("\x1b[2J a\nError: none")

    assert ended(command, as_json=False) == 0
    assert capfd.readouterr().err == "\\x1b[2J a\\nError: none\n"
