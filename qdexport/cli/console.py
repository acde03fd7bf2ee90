"""Where the command line writes: progress and log on stderr, results on stdout."""

from __future__ import annotations

import logging

from rich.console import Console
from rich.logging import RichHandler

from qdexport.cli.progress import Progress

__all__ = ["make_progress"]

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


def make_progress(verbose: int, as_json: bool) -> Progress:
    """Sets logging up for ``-v`` and returns the progress display that shares its console."""
    console = Console(stderr=True, highlight=False)
    level = _LEVELS[min(verbose, len(_LEVELS) - 1)]
    logger = logging.getLogger("qdexport")
    logger.handlers.clear()
    logger.addHandler(RichHandler(console=console, show_path=False, show_time=verbose > 1, markup=False))
    logger.setLevel(level)
    logger.propagate = False
    return Progress(quiet=as_json, console=console)
