"""The child process of :mod:`qdexport.check.engine_parity`: an engine on golden inputs, through Polygraphy.

Polygraphy chooses TensorRT or TensorRT-RTX by an environment variable at import, so each needs a process.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import importlib
import json
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np

from qdexport.check.measure import sqnr_db

_FAILED: Final = 1
_NO_DEVICE: Final = 3


def main(module: str, engine: Path, files: list[Path]) -> int:
    """Prints one SQNR per file and output as JSON; returns 3 when this machine cannot run engines.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        engine: the serialized engine.
        files: golden calls.
    """
    reason = missing_device() or missing_runtime(module)
    if reason:
        sys.stderr.write(f"{reason}\n")
        return _NO_DEVICE
    from polygraphy.exception import PolygraphyException

    try:
        values = compare(engine, files)
    except PolygraphyException as error:
        sys.stderr.write(f"{str(error).strip().splitlines()[0]}\n")
        return _FAILED
    sys.stdout.write(json.dumps(values) + "\n")
    return 0


def compare(engine: Path, files: list[Path]) -> list[float]:
    """SQNR in decibels of every output of every golden call."""
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    values = []
    with TrtRunner(EngineFromBytes(BytesFromPath(str(engine)))) as runner:
        for file in files:
            inputs, outputs = read_golden(file)
            choose_profile(runner, inputs)
            answers = runner.infer(inputs)
            values += [sqnr_db(array, np.asarray(answers[name])) for name, array in outputs.items()]
    return values


def choose_profile(runner: Any, inputs: dict[str, np.ndarray]) -> None:
    """Lets an engine use its first optimization profile that a call's shapes lie in.

    Args:
        runner: an active ``TrtRunner``.
        inputs: of the call, by name; an input that the engine does not read is left out.

    Raises:
        PolygraphyException: no profile has room for the call.
    """
    from polygraphy.exception import PolygraphyException

    engine = runner.engine
    known = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    read = {name: array.shape for name, array in inputs.items() if name in known}
    for index in range(engine.num_optimization_profiles):
        ends = {name: engine.get_tensor_profile_shape(name, index) for name in read}
        if all(
            all(low <= size <= high for low, size, high in zip(ends[name][0], shape, ends[name][2], strict=True))
            for name, shape in read.items()
        ):
            if engine.num_optimization_profiles > 1:
                runner.set_profile(index)
            return
    shapes = ", ".join(f"{name} {list(shape)}" for name, shape in read.items())
    raise PolygraphyException(f"no optimization profile of the engine has room for a golden call: {shapes}")


def read_golden(file: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs and outputs of one golden call, by name."""
    with np.load(file, allow_pickle=False) as stored:
        parts: dict[str, dict[str, np.ndarray]] = {"input": {}, "output": {}}
        for key in stored.files:
            part, _, name = key.partition("/")
            parts[part][name] = stored[key]
    return parts["input"], parts["output"]


def missing_device() -> str:
    """Why no CUDA device can be used; empty when one can."""
    try:
        driver = ctypes.CDLL(ctypes.util.find_library("cuda") or "libcuda.so.1")
    except OSError:
        return (
            "no NVIDIA driver is installed; run this on a machine with the GPU that the engine was built for"
        )
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return (
            "the NVIDIA driver finds no GPU; run this on a machine with the GPU that the engine was built for"
        )
    return ""


def missing_runtime(module: str) -> str:
    """Why the engine's runtime cannot be imported; empty when it can."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        extra = {"tensorrt": "gpu", "tensorrt_rtx": "cpu"}[module]
        return f"{module} cannot be imported ({error}); pip install 'qdexport[{extra}]'"
    return ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), [Path(item) for item in sys.argv[3:]]))
