"""Tier 3: the engine against golden inputs and outputs, on a machine with the GPU, through Polygraphy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import numpy as np

from qdexport.check.calls import fit_inputs
from qdexport.check.session import reference_session
from qdexport.core.files import atomic_dir
from qdexport.errors import MissingDependencyError, ModelError, ParityError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from qdexport.core.io_spec import IoSpec
    from qdexport.core.target import Target
    from qdexport.models.sampling import DenoiserCall

__all__ = ["engine_parity", "write_golden"]

_FLAVOUR: Final = {"tensorrt_rtx": "1", "tensorrt": "0"}
_CHILD: Final = "qdexport.check.engine_child"
_NO_DEVICE: Final = 3


def write_golden(folder: Path, onnx_path: Path, io: IoSpec, calls: Sequence[DenoiserCall]) -> None:
    """Stores denoiser calls and what ONNX Runtime answers, one ``NN.npz`` each, keys ``input/*`` and ``output/*``.

    Raises:
        ParityError: the file does not run.
        OutputError: the folder cannot be written.
    """
    session = reference_session(onnx_path)
    known = {item.name for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]
    with atomic_dir(folder) as partial:
        for index, call in enumerate(calls):
            feed = {name: value.numpy() for name, value in fit_inputs(call.inputs, io).items() if name in known}
            answers = session.run(None, feed)
            stored = {f"input/{name}": value for name, value in feed.items()}
            stored |= {f"output/{name}": np.asarray(value) for name, value in zip(names, answers, strict=True)}
            np.savez(partial / f"{index:02d}.npz", **stored)


def engine_parity(engine: Path, golden: Path, target: Target) -> list[float]:
    """SQNR in decibels of the engine's answers to every golden call, in a child process of the right flavour.

    Raises:
        ModelError: there are no golden files.
        MissingDependencyError: there is no GPU that can run the engine, or the runtime is not installed.
        ParityError: the engine cannot be loaded, or does not answer.
    """
    files = sorted(golden.glob("*.npz"))
    if not files:
        raise ModelError(f"{golden} holds no golden files; run `qdexport validate` first")
    if target.module is None:
        raise ModelError(f"target {target.name} has no engine; its ONNX file is what the golden outputs came from")
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": _FLAVOUR[target.module]}
    command = [sys.executable, "-m", _CHILD, str(engine), *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 our own module
    if done.returncode == _NO_DEVICE:
        raise MissingDependencyError(f"the engine cannot run here: {done.stderr.strip().splitlines()[-1]}")
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with code {done.returncode}"]
        raise ParityError(f"the engine {engine} does not run: {last[0]}")
    return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]
