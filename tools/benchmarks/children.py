"""Runs one part of a benchmark in a process of its own, so that its memory is its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from qdexport.errors import QdExportError

__all__ = ["ChildError", "answer", "run_module"]

_TOOLS = Path(__file__).resolve().parents[1]
_SHOWN_LINES = 12


class ChildError(QdExportError):
    """A part of a benchmark failed in its process; the message ends with what it last said."""


def run_module(module: str, spec: dict[str, Any], folder: Path, python: Path | None = None) -> dict[str, Any]:
    """Runs ``python -m module SPEC.json`` and returns what it answered.

    Args:
        module: a module of this folder, by its full name.
        spec: what to do; the child also finds the key ``answer``, the file that it writes.
        folder: for the specification, the answer and the log ``<module>.log``.
        python: the interpreter; default: this one.

    Raises:
        ChildError: it failed, or was killed (for lack of memory, for instance).
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = module.rpartition(".")[2]
    spec_path, answer_path, log_path = (folder / f"{name}.{end}" for end in ("spec.json", "answer.json", "log"))
    answer_path.unlink(missing_ok=True)
    spec_path.write_text(json.dumps({**spec, "answer": str(answer_path)}), encoding="utf-8")
    roots = [str(_TOOLS), str(_TOOLS.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(root for root in roots if root)}
    command = [str(python or sys.executable), "-P", "-m", module, str(spec_path)]
    with log_path.open("wb") as log:
        code = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            check=False,
        ).returncode
    if code != 0 or not answer_path.is_file():
        said = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-_SHOWN_LINES:]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        raise ChildError("\n".join([f"{module} {how}; it last said:", *said]))
    result: dict[str, Any] = json.loads(answer_path.read_bytes())
    return result


def answer(spec: dict[str, Any], result: dict[str, Any]) -> None:
    """Writes a child's answer."""
    Path(spec["answer"]).write_text(json.dumps(result), encoding="utf-8")
