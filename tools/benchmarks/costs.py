"""What a stage costs: wall time, processor time, and the peak memory of the process that runs it."""

from __future__ import annotations

import contextlib
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Cost", "machine", "measured", "resident_mb"]

_MIB = 1 << 20
_RESET_PEAK = "5"  # proc(5): clear_refs


@dataclass(slots=True)
class Cost:
    """Seconds of wall time, of processor time (all threads), and the largest resident memory in MiB."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss_mb: float = 0.0


@contextlib.contextmanager
def measured(costs: dict[str, Cost], stage: str) -> Iterator[None]:
    """Measures the block as a stage of this process; the peak is the stage's own."""
    _forget_peak()
    started, cpu_started = time.perf_counter(), time.process_time()
    yield
    costs[stage] = Cost(
        seconds=round(time.perf_counter() - started, 3),
        cpu_seconds=round(time.process_time() - cpu_started, 3),
        peak_rss_mb=round(_status_mb("VmHWM"), 1),
    )


def resident_mb() -> float:
    """The resident memory of this process now, in MiB."""
    return _status_mb("VmRSS")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and how busy the machine is (the average of the last minute, and of five)."""
    load = os.getloadavg()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "load_1_min": round(load[0], 2),
        "load_5_min": round(load[1], 2),
    }


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text(_RESET_PEAK, encoding="ascii")


def _status_mb(field: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / _MIB
    raise OSError(f"/proc/self/status has no {field}; the benchmarks measure memory on Linux only")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
