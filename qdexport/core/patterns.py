"""Patterns over names of layers, matched within a limit of time: a pattern from a file must not hang a run.

Python's ``re`` tries every way in which nested repetition (``re:([a-z]+)+!``) can match, which takes years on a name of
thirty letters. The matcher looks for signals while it works, so a timer of the process's own computing time ends it;
a busy machine does not.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import re
import signal
import threading
import time
from typing import TYPE_CHECKING, Any, Final

from qdexport.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["check_pattern", "limited", "matches"]

_LONGEST: Final = 1000  # letters of a pattern
_SECONDS = 2.0  # for all names together; 1000 names take a sane pattern some milliseconds
_SLOW: Final = 0.01  # a single match that counts against the limit

_spent: dict[str, float] = {}


class _TimeUp(Exception):  # noqa: N818 - never leaves this module
    pass


def check_pattern(pattern: str) -> str:
    """Returns a pattern that can be used.

    Raises:
        ValueError: it is too long, or ``re:`` stands before what is no regular expression.
    """
    if len(pattern) > _LONGEST:
        raise ValueError(f"a pattern of {len(pattern)} letters ({pattern[:20]!r}...); write several shorter ones")
    if pattern.startswith("re:"):
        try:
            with limited(pattern):
                _compiled(pattern)
        except (re.error, OverflowError, RecursionError, RecipeError) as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
    return pattern


def matches(pattern: str, name: str) -> bool:
    """Whether a glob, or ``re:`` and a regular expression, means the whole name.

    Raises:
        RecipeError: the pattern takes too long.
    """
    with limited(pattern):
        return _compiled(pattern).fullmatch(name) is not None


@contextlib.contextmanager
def limited(pattern: str) -> Iterator[None]:
    """Ends the block when matching this pattern has taken too much computing time in all.

    Only the main thread can be stopped so; elsewhere the limit is looked at after the block.

    Raises:
        RecipeError: the time is up.
    """
    left = _SECONDS - _spent.get(pattern, 0.0)
    if left <= 0:
        raise _refusal(pattern)
    started = time.thread_time()
    try:
        with _timer(left):
            yield
    except _TimeUp:
        _spent[pattern] = _SECONDS
        raise _refusal(pattern) from None
    finally:
        seconds = time.thread_time() - started
        if seconds > _SLOW:
            _spent[pattern] = _spent.get(pattern, 0.0) + seconds


@contextlib.contextmanager
def _timer(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def up(_signal: int, _frame: Any) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGVTALRM, up)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:
        signal.signal(signal.SIGVTALRM, before)


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern))


def _refusal(pattern: str) -> RecipeError:
    return RecipeError(
        f"pattern {pattern!r} takes more than {_SECONDS:g} s to match the names of layers; write it without repetition "
        "inside repetition, as (a+)+, or as a glob (*.attn2.to_k)"
    )
