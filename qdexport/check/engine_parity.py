"""Engine parity: an engine against golden inputs and outputs, on a machine with the GPU, through Polygraphy."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from qdexport.check.calls import fit_inputs
from qdexport.check.engine_child import read_golden
from qdexport.check.session import ort_errors, reference_session
from qdexport.core.children import child_environment
from qdexport.core.files import Owner, atomic_dir
from qdexport.core.io_spec import IoSpec
from qdexport.core.network_facts import NetworkFacts
from qdexport.core.reading import reading
from qdexport.core.target import Target
from qdexport.errors import MissingDependencyError, ModelError, ParityError
from qdexport.models.sampling import DenoiserCall

__all__ = ["engine_parity", "write_golden"]

_FLAVOUR: Final = {"tensorrt_rtx": "1", "tensorrt": "0"}
_CHILD: Final = "qdexport.check.engine_child"
_NO_DEVICE: Final = 3


def write_golden(
    folder: Path,
    onnx_path: Path,
    io: IoSpec,
    calls: Sequence[DenoiserCall],
    owner: Owner | None = None,
    facts: NetworkFacts | None = None,
) -> None:
    """Stores denoiser calls and ONNX Runtime's answers: a ``NN.npz`` each, keys ``input/*`` and ``output/*``.

    Args:
        folder: replaced as a whole.
        onnx_path: the emitted file.
        io: its inputs and outputs.
        calls: what to store.
        owner: knows which files there are ours; None: all.
        facts: what a denoiser says about itself; None for other networks, which have no timesteps.

    Raises:
        ModelError: a call's timestep or class has no row.
        ParityError: the file does not run.
        OutputError: the folder cannot be written.
    """
    session = reference_session(onnx_path)
    known = {item.name for item in session.get_inputs()}
    names = [item.name for item in session.get_outputs()]
    with atomic_dir(folder, owner) as partial:
        for index, call in enumerate(calls):
            inputs = fit_inputs(call.inputs, io)
            if facts is not None:
                facts.check_call(inputs)
            feed = {name: tensor.numpy() for name, tensor in inputs.items() if name in known}
            try:
                answers = session.run(None, feed)
            except ort_errors() as error:
                raise ParityError(f"{onnx_path} does not run: {str(error).splitlines()[0]}") from error
            stored = {f"input/{name}": array for name, array in feed.items()}
            stored |= {f"output/{name}": array for name, array in zip(names, answers, strict=True)}
            np.savez(partial / f"{index:02d}.npz", **stored)  # type: ignore[arg-type]  # numpy's stub


def engine_parity(engine: Path, golden: Path, target: Target, facts: NetworkFacts | None = None) -> list[float]:
    """Runs an engine on the golden inputs, in a child process with the right flavour of Polygraphy.

    Args:
        engine: a file that a builder made.
        golden: what :func:`write_golden` wrote.
        target: whose engine it is.
        facts: what a denoiser says about itself; None for other networks, which have no timesteps.

    Returns:
        SQNR in decibels of every output of every golden call, against ONNX Runtime's.

    Raises:
        ModelError: there are no golden files, one has a timestep or a class without a row, or the target has
            no engines.
        MissingDependencyError: there is no GPU that can run the engine, or the runtime is not installed.
        ParityError: the engine cannot be loaded, or does not answer.
    """
    files = sorted(golden.glob("*.npz"))
    if not files:
        raise ModelError(f"{golden} holds no golden files; run `qdexport validate` first")
    if target.module is None:
        raise ModelError(
            f"target {target.name} has no engine; its ONNX file is what the golden outputs came from"
        )
    if not engine.is_file():
        raise ModelError(f"there is no engine {engine}; run `qdexport build` first")
    if facts is not None:
        for file in files:
            with reading(file, ModelError, "run `qdexport validate` again"):
                facts.check_call(read_golden(file)[0])
    environment = child_environment(POLYGRAPHY_USE_TENSORRT_RTX=_FLAVOUR[target.module])
    command = [sys.executable, "-P", "-m", _CHILD, target.module, str(engine), *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    last = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
    if done.returncode == _NO_DEVICE:
        raise MissingDependencyError(f"the engine cannot run here: {last}")
    if done.returncode != 0:
        raise ParityError(f"the engine {engine} does not run: {last}")
    return [float(value) for value in json.loads(done.stdout.splitlines()[-1])]
