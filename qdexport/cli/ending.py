"""How a command ends: one message and a documented exit code, whatever happens. No traceback reaches the terminal."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from qdexport import __version__
from qdexport.cli.console import json_printed, print_json, say
from qdexport.core.reading import is_ours, reason
from qdexport.core.shown import one_line
from qdexport.core.writing import STORAGE_ERRORS, write_failure
from qdexport.errors import INTERRUPTED_EXIT_CODE, QdExportError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Failure", "ended"]

logger = logging.getLogger(__name__)

_INTERRUPTED = "Interrupted. Finished stages and calibration batches are kept: the same command continues there."
_LONGEST_LINE = 2000


class Failure(click.ClickException):
    """An error that is meant for the user, as click shows it."""

    def __init__(self, error: QdExportError) -> None:
        super().__init__(str(error))
        self.exit_code: int = error.exit_code  # type: ignore[misc]  # click's own is one for all
        self.kind = error.kind
        self.keep_traceback = error.keep_traceback
        self.cause = error.__cause__

    def show(self, file: Any = None) -> None:
        """Prints the message on stderr."""
        _tell(f"Error: {self.message}")


class _Ending(NamedTuple):
    code: int
    kind: str
    message: str
    log: str | None = None


def ended(command: Callable[[], Any], *, as_json: bool) -> int:
    """Runs a command, shows how it failed, and returns its exit code.

    Args:
        command: returns an exit code, or None for 0.
        as_json: also prints ``{"error": {"code", "kind", "message", "log"}}`` on stdout, unless the result is out.
    """
    with _readable_streams(), _quiet_warnings():
        try:
            code = int(command() or 0)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever reads has what it wanted, as `head` does
            return _without_stdout()
        except SystemExit as error:
            return _exit_code(error.code)
        except click.exceptions.Exit as error:
            return error.exit_code
        except BaseException as error:  # noqa: BLE001 - the last resort
            return _shown_ending(_ending(error), as_json=as_json)
    return code


def _ending(error: BaseException) -> _Ending:
    if isinstance(error, KeyboardInterrupt | click.exceptions.Abort):
        return _Ending(INTERRUPTED_EXIT_CODE, "interrupted", _INTERRUPTED)
    if isinstance(error, Failure):
        keep = error.keep_traceback or is_ours(error.cause) or logger.isEnabledFor(logging.DEBUG)
        log = _write_log(error) if keep else None
        return _Ending(error.exit_code, error.kind, f"Error: {error.message}", log)
    if isinstance(error, click.UsageError):
        hint = f"\n{error.ctx.get_usage()}\nTry '{error.ctx.command_path} --help'." if error.ctx is not None else ""
        return _Ending(error.exit_code, "usage", f"Error: {error.format_message()}{hint}")
    if isinstance(error, click.ClickException):
        return _Ending(error.exit_code, "error", f"Error: {error.format_message()}")
    # of a file that is only read, other things are more likely than that something cannot be written
    if not isinstance(error, OSError) or error.errno in STORAGE_ERRORS:
        failure = write_failure(error)
        if failure is not None:
            return _Ending(failure.exit_code, failure.kind, f"Error: {failure}")
    told = reason(error)
    if isinstance(error, MemoryError):
        told = f"{told}; close other programs, or ask for smaller batches and sizes"
        return _Ending(QdExportError.exit_code, QdExportError.kind, f"Error: {told}", _write_log(error))
    what = told if told.startswith(type(error).__name__) else f"{type(error).__name__}: {told}"
    message = f"Error: qdexport met what it did not foresee ({what}). Please report it, with the log file"
    return _Ending(QdExportError.exit_code, "unforeseen", message, _write_log(error))


def _shown_ending(ending: _Ending, *, as_json: bool) -> int:
    """Prints an ending; where even that is impossible the exit code remains."""
    with contextlib.suppress(OSError, ValueError):
        _tell(ending.message if ending.log is None else f"{ending.message} (traceback: {ending.log})")
    if as_json and not json_printed():
        facts = {"code": ending.code, "kind": ending.kind, "message": ending.message.removeprefix("Error: ")}
        with contextlib.suppress(OSError, ValueError):
            print_json({"error": {**facts, "log": ending.log}})
    return ending.code


def _tell(message: str) -> None:
    """Prints a message on stderr. Lines after the first are indented: no name in it can pass for a message of ours."""
    lines = [line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..." for line in message.split("\n")]
    say("\n".join([lines[0], *(f"  {line}" for line in lines[1:])]), err=True)


def _exit_code(code: Any) -> int:
    if code is None or isinstance(code, int):
        return code or 0
    _tell(f"Error: {code}")
    return 1


def _without_stdout() -> int:
    """Lets what is still to be written to a closed pipe vanish; else Python complains while it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _write_log(error: BaseException) -> str:
    """Writes a traceback where the user may write; returns where, or why there is no log."""
    lines = [
        f"qdexport {__version__}, Python {platform.python_version()}, {platform.platform()}",
        f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sys.argv!r}",
        "",
        *(line.rstrip("\n") for line in traceback.format_exception(error)),
    ]
    name = f"fault-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    problem = ""
    for folder in _log_folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / name
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write("\n".join(lines) + "\n")
        except OSError as failed:
            problem = f"none, {folder}: {failed.strerror}"
        else:
            return str(path)
    return problem


def _log_folders() -> Iterator[Path]:
    """The user's folder for such files, else the one for temporary files."""
    state = os.environ.get("XDG_STATE_HOME", "")
    with contextlib.suppress(RuntimeError):  # there is no home
        yield (Path(state) if state.startswith("/") else Path.home() / ".local" / "state") / "qdexport"
    with contextlib.suppress(OSError):  # no folder for temporary files can be written
        yield Path(tempfile.gettempdir())


@contextlib.contextmanager
def _readable_streams() -> Iterator[None]:
    """A terminal that lacks a letter gets its escape instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    yield


@contextlib.contextmanager
def _quiet_warnings() -> Iterator[None]:
    """Sends warnings of libraries to the log (-v): on the terminal they are riddles with paths of the installation."""

    def log(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        logger.info("%s: %s", category.__name__, message)

    before, logging.lastResort = logging.lastResort, _LastResort(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = log
            yield
    finally:
        logging.lastResort = before


class _LastResort(logging.Handler):
    """What a library logs that nobody set up."""

    def emit(self, record: logging.LogRecord) -> None:
        say(one_line(self.format(record)), err=True)
