"""Progress on stderr: bars on a terminal, a line now and then elsewhere, nothing beside ``--json``."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from qdexport.cli.console import make_console

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console

    from qdexport.core.progress import Advance

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Shows stages and loops of the pipeline; it is a ``qdexport.core.progress.ProgressSink``.

    Args:
        quiet: show nothing (``--json``).
        console: where to write; by default a new one on stderr; pass the log handler's, and lines do not mix.
        clock: seconds from any origin.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or make_console(stderr=True)
        self._clock = clock
        self._quiet = quiet
        self._bars = not quiet and self.console.is_terminal and not self.console.is_dumb_terminal

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announces the block as a stage, and says afterwards how long it took or that it failed."""
        start = self._clock()
        if self._bars:
            with self.console.status(Text(name, style="bold")), self._told(name, start):
                yield
            return
        self._line(f"{name} ...")
        with self._told(name, start):
            yield

    @contextlib.contextmanager
    def track(self, total: int, description: str) -> Iterator[Advance]:
        """Yields ``advance(n)`` for a loop of ``total`` steps, and shows the time left."""
        if self._bars:
            with self._columns() as bars:
                task = bars.add_task(description, total=total)

                def advance_bar(count: int = 1, note: str = "") -> None:
                    bars.update(task, advance=count, description=f"{description}: {note}" if note else description)

                yield advance_bar
            return
        lines = _Lines(total, description, self._clock)

        def advance(count: int = 1, note: str = "") -> None:
            text = lines.advance(count, note)
            if text:
                self._line(text)

        yield advance

    @contextlib.contextmanager
    def _told(self, name: str, start: float) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._line(f"{name}: stopped after {_duration(self._clock() - start)}", style="red")
            raise
        self._line(f"{name}: {_duration(self._clock() - start)}", style="green" if self._bars else "")

    def _line(self, text: str, style: str = "") -> None:
        if not self._quiet:
            self.console.print(Text(text, style=style), soft_wrap=True)

    def _columns(self) -> Bars:
        return Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self.console,
            transient=True,
        )


class _Lines:
    """Decides when a plain line is due: at most one in five seconds, and none for loops shorter than that."""

    def __init__(self, total: int, description: str, clock: Callable[[], float]) -> None:
        self._total, self._description, self._clock = total, description, clock
        self._start = self._last = clock()
        self._done = 0

    def advance(self, count: int, note: str = "") -> str:
        self._done += count
        now = self._clock()
        if now - self._last < _SECONDS_BETWEEN_LINES or self._done >= self._total:
            return ""
        self._last = now
        left = (now - self._start) / self._done * (self._total - self._done) if self._done else 0.0
        name = f"{self._description} ({note})" if note else self._description
        return f"  {name}: {self._done} of {self._total}, about {_duration(left)} left"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
