"""The child process of :mod:`qdexport.check.engine_parity`: runs an engine on golden inputs through Polygraphy.

Polygraphy chooses TensorRT or TensorRT-RTX by an environment variable at import, so each flavour needs a process.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import json
import sys
from pathlib import Path

import numpy as np

from qdexport.check.measure import sqnr_db

_NO_DEVICE = 3


def main(engine: Path, files: list[Path]) -> int:
    """Prints one SQNR per file as JSON; returns 3 when this machine cannot run engines."""
    reason = _missing_device()
    if reason:
        sys.stderr.write(f"{reason}\n")
        return _NO_DEVICE
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner
    from polygraphy.exception import PolygraphyException

    values = []
    try:
        with TrtRunner(EngineFromBytes(BytesFromPath(str(engine)))) as runner:
            for file in files:
                stored = dict(np.load(file, allow_pickle=False))
                feed = {key.removeprefix("input/"): array for key, array in stored.items() if key.startswith("input/")}
                answers = runner.infer(feed)
                values.extend(
                    sqnr_db(array, np.asarray(answers[key.removeprefix("output/")]))
                    for key, array in stored.items() if key.startswith("output/")
                )
    except PolygraphyException as error:
        sys.stderr.write(f"{str(error).splitlines()[0]}\n")
        return 1
    sys.stdout.write(json.dumps(values) + "\n")
    return 0


def _missing_device() -> str:
    """Why no CUDA device can be used; empty when one can."""
    library = ctypes.util.find_library("cuda")
    if library is None:
        return "no NVIDIA driver is installed; run this on a machine with the GPU that the engine was built for"
    driver = ctypes.CDLL(library)
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver finds no GPU"
    return ""


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), [Path(item) for item in sys.argv[2:]]))
