"""Where the command line writes: progress and log on stderr, results on stdout.

Everything shown goes through :func:`make_console`, :func:`say` or :func:`print_json`: names in files from elsewhere
can hold what a terminal would obey, or what rich would take for markup.
"""

from __future__ import annotations

import logging
import sys
from typing import IO, TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.logging import RichHandler
from rich.segment import Segment

from qdexport.core.json_text import json_text
from qdexport.core.shown import UNSAFE, shown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import ConsoleOptions, RenderableType

    from qdexport.cli.progress import Progress

__all__ = ["json_printed", "make_console", "make_progress", "print_json", "say"]

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


class _SafeConsole(Console):
    """Shows no text as a terminal would obey it; styles and cursor movements of rich's own stay."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control is None and UNSAFE.search(segment.text):
                yield Segment(shown(segment.text), segment.style)
            else:
                yield segment


def make_console(*, stderr: bool = False, file: IO[str] | None = None, width: int | None = None) -> Console:
    """A console that takes all text for text: no markup, no emoji codes, no control characters."""
    return _SafeConsole(stderr=stderr, file=file, width=width, highlight=False, markup=False, emoji=False)


def say(text: str, *, err: bool = False, newline: bool = True) -> None:
    """Prints a line of text."""
    click.echo(shown(text), err=err, nl=newline)


def print_json(value: Any) -> None:
    """Prints the one JSON object of ``--json``."""
    click.echo(json_text(value, indent=2))
    sys.stdout.flush()
    _Printed.json = True


def json_printed() -> bool:
    """Whether the object of ``--json`` is out: nothing may follow it."""
    return _Printed.json


class _Printed:
    json = False


def make_progress(verbose: int, as_json: bool) -> Progress:
    """Sets logging up for ``-v`` and returns the progress display that shares its console."""
    from qdexport.cli.progress import Progress

    console = make_console(stderr=True)
    level = _LEVELS[min(verbose, len(_LEVELS) - 1)]
    logger = logging.getLogger("qdexport")
    logger.handlers.clear()
    logger.addHandler(RichHandler(console=console, show_path=False, show_time=verbose > 1, markup=False))
    logger.setLevel(level)
    logger.propagate = False
    return Progress(quiet=as_json, console=console)
