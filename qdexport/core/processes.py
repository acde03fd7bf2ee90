"""How this process and those it starts end: polite signals are interrupts, and no child outlives its parent."""

from __future__ import annotations

import ctypes
import signal
import sys
from typing import Any, Final

__all__ = ["die_with_parent", "end_politely"]

_PR_SET_PDEATHSIG: Final = 1
_POLITE: Final = ("SIGTERM", "SIGHUP")  # of a batch system, a container or a terminal that is closed


def end_politely() -> None:
    """Lets SIGTERM and SIGHUP end a command as Ctrl-C does: it tidies up and ends with code 130.

    A signal that the caller ignores (``nohup``) stays ignored. When one has come, further ones are ignored, so that the
    tidying up ends; Ctrl-C still works.
    """
    numbers = [getattr(signal, name) for name in _POLITE if hasattr(signal, name)]
    wanted = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]

    def stop(_: int, __: Any) -> None:
        for number in wanted:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in wanted:
        signal.signal(number, stop)


def die_with_parent() -> None:
    """Called in a child process: it is killed when its parent dies, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
