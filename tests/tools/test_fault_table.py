"""The table of faults: a dozen of its rows, on the real command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fault_table.py"


@pytest.mark.slow
def test_a_dozen_faults() -> None:
    # in a process of its own: rows are forked, which only a process without threads can do
    command = [sys.executable, str(TOOL), "--few", "--jobs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 rows, 0 not green" in done.stdout
