"""Silence for the libraries that load and run models, for the length of a block."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from qdexport.core.shown import one_line

__all__ = ["quiet_libraries"]


class _Shown(logging.Formatter):
    """What these libraries say holds names from files, which must not drive a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return one_line(super().format(record))


@contextlib.contextmanager
def quiet_libraries(*, progress_bars: bool = False) -> Iterator[None]:
    """Lets diffusers and transformers log errors only; their settings come back after the block.

    What they warn about while loading (a missing safety checker, outdated scheduler settings that they
    mend) is wanted, or checked by qdexport itself.

    Args:
        progress_bars: Whether their progress bars stay (for downloads).
    """
    from diffusers.utils import logging as diffusers_logs
    from transformers.utils import logging as transformers_logs

    libraries = (diffusers_logs, transformers_logs)
    for library in libraries:
        for handler in library.get_logger().handlers:
            handler.setFormatter(_Shown())
    levels = [library.get_verbosity() for library in libraries]
    hidden = [] if progress_bars else [library for library in libraries if library.is_progress_bar_enabled()]
    try:
        for library in libraries:
            library.set_verbosity_error()
        for library in hidden:
            library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
        for library in hidden:
            library.enable_progress_bar()
