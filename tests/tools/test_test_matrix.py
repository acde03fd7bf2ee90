"""The tool that runs the tests under every setting."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEPENDS = """
import os

def test_first():
    pass

def test_threads():
    assert os.environ["OMP_NUM_THREADS"] == "1"
"""


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "test_matrix.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_test_that_depends_on_the_threads_is_found(tmp_path: Path) -> None:
    file = tmp_path / "test_depends.py"
    file.write_text(DEPENDS)
    ran = run_tool("--setting", "threads-1", "--setting", "threads-2", "--seed", "5", str(file), "-n0")
    assert ran.returncode == 1
    assert "--seed 5" in ran.stdout
    summary = ran.stdout.partition("== summary")[2].split()
    assert [summary[summary.index(f"threads-{count}") + 1] for count in (1, 2)] == ["ok", "FAILED"]


def test_settings_run_together_in_one_run(tmp_path: Path) -> None:
    file = tmp_path / "test_depends.py"
    file.write_text(DEPENDS)
    ran = run_tool("--together", "--setting", "threads-1", "--setting", "order-2", "--seed", "5", str(file), "-n0")
    assert ran.returncode == 0, ran.stdout
    assert "--random-order-seed=6" in ran.stdout
    assert ran.stdout.partition("== summary")[2].split()[:2] == ["threads-1+order-2", "ok"]


def test_help_has_examples() -> None:
    shown = run_tool("--help")
    assert shown.returncode == 0
    assert "python tools/test_matrix.py --setting threads-2 tests/quant" in shown.stdout
