"""What long work may say about its progress; the command line shows it, the library stays silent."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

__all__ = ["Advance", "ProgressSink", "SilentProgress"]


class Advance(Protocol):
    """Says that ``count`` more steps of a loop are done; ``note`` names the last one where that helps."""

    def __call__(self, count: int, note: str = "") -> None: ...


class ProgressSink(Protocol):
    """Where stages and loops report; ``qdexport.cli.progress.Progress`` shows them on a terminal."""

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Marks the block as one stage of the pipeline."""

    def track(self, total: int, description: str) -> AbstractContextManager[Advance]:
        """Yields ``advance(n)``, to be called when ``n`` more of ``total`` steps are done; it may name the last one."""


class SilentProgress:
    """Says nothing: the default of library calls."""

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Runs the block."""
        del name
        yield

    @contextlib.contextmanager
    def track(self, total: int, description: str) -> Iterator[Advance]:
        """Yields an ``advance`` that does nothing."""
        del total, description
        yield _ignore


def _ignore(count: int, note: str = "") -> None:
    del count, note
