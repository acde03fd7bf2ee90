"""The builder's own process: ``python -m qdexport.build.child SPEC.json``.

A graph that the builder dislikes can crash it, and a large one can exhaust the memory, so it never runs in
the compiler's process. This module imports little but the standard library and the builder: what PyTorch would
occupy here is memory that the builder may need. Standard output and standard error are the build log.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Literal, NoReturn, TypedDict

from qdexport.core.processes import die_with_parent

__all__ = ["CANNOT_WRITE", "BuildResult", "BuildSpec", "NodeError", "peak_rss_mb"]

# sysexits.h: EX_IOERR
CANNOT_WRITE = 74

_CU_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR


class BuildSpec(TypedDict):
    """What the parent asks for.

    ``versions`` are the oldest and the first that is too new of the module (empty: any); each of ``profiles`` maps an
    input to its smallest, usual and largest shape.
    """

    module: str
    versions: list[list[int]]
    onnx: str
    engine: str
    result: str
    progress: str
    compute_capabilities: list[str]
    profiles: list[dict[str, list[list[int]]]]
    needs_gpu: bool


class NodeError(TypedDict):
    """One complaint of the builder; ``node`` is empty when it names none."""

    node: str
    operator: str
    text: str


class BuildResult(TypedDict):
    """How far the build came; ``errors`` is empty exactly when ``stage`` is ``done``."""

    stage: Literal["import", "gpu", "parse", "profile", "build", "done"]
    errors: list[NodeError]
    builder_version: str
    compute_capabilities: list[str]
    bytes: int
    seconds: float
    peak_rss_mb: float


class _RefusedError(Exception):
    def __init__(
        self, stage: Literal["import", "gpu", "parse", "profile", "build"], errors: list[NodeError]
    ) -> None:
        super().__init__(stage)
        self.stage = stage
        self.errors = errors


def main(spec_path: str) -> None:
    """Builds one engine and writes the result file.

    The process exits with 0 whether or not the builder refused the graph (the result file says), with
    ``CANNOT_WRITE`` when a file could not be written, and with anything else when it crashed.
    """
    # a crash of the builder is an expected outcome: no core file of its size
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    die_with_parent()  # a compiler that is killed must not leave a builder behind that fills the memory
    spec: BuildSpec = json.loads(Path(spec_path).read_text(encoding="utf-8"))
    result: BuildResult = {
        "stage": "done",
        "errors": [],
        "builder_version": "",
        "compute_capabilities": spec["compute_capabilities"],
        "bytes": 0,
        "seconds": 0.0,
        "peak_rss_mb": 0.0,
    }
    started = time.monotonic()
    try:
        _build(spec, result)
    except _RefusedError as refused:
        result["stage"], result["errors"] = refused.stage, refused.errors
    result["seconds"] = time.monotonic() - started
    result["peak_rss_mb"] = peak_rss_mb()
    _write(spec["result"], json.dumps(result).encode())


def peak_rss_mb() -> float:
    """The largest resident memory of this process in MiB.

    ``ru_maxrss`` is not it: Linux starts that counter at the size of the process that called fork or vfork,
    so a child of a large parent would report the parent. ``VmHWM`` belongs to the new program alone.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 20)


def _build(spec: BuildSpec, result: BuildResult) -> None:
    if spec["needs_gpu"]:
        result["compute_capabilities"] = [_gpu_capability()]
    try:
        trt = importlib.import_module(spec["module"])
    except (ImportError, OSError) as error:
        raise _refused("import", f"the Python package {spec['module']} does not load: {error}") from error
    result["builder_version"] = str(trt.__version__)
    _check_version(spec["module"], trt.__version__, *spec["versions"])
    builder = trt.Builder(_logger(trt))
    _write(spec["progress"], b"reading the graph")
    network = _parse(trt, builder, spec["onnx"])
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for shapes in spec["profiles"]:
        _add_profile(builder, config, network, shapes)
    _set_capabilities(trt, config, spec["compute_capabilities"])
    _write(spec["progress"], b"compiling")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _refused("build", "")
    _write(spec["progress"], b"writing the engine")
    result["bytes"] = engine.nbytes
    _write(spec["engine"], engine)


def _check_version(module: str, version: str, oldest: list[int], end: list[int]) -> None:
    numbers = [int(part) for part in version.split(".")[:2]]
    wanted, first_other = (".".join(map(str, bound)) for bound in (oldest, end))
    if oldest and numbers < oldest:
        older = ", or choose target tensorrt-10" if numbers >= [10, 3] else ""
        raise _refused("import", f"{module} {version} is too old, install {wanted} or newer{older}")
    if end and numbers >= end:
        advice = f"install {wanted} or newer, below {first_other}, or choose target tensorrt"
        raise _refused("import", f"{module} {version} is too new, {advice}")


def _parse(trt: Any, builder: Any, path: str) -> Any:
    # TensorRT 10 keeps the network's types only when told so; 11 and RTX always do, and may drop the flag
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(path):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        errors = [NodeError(node=e.node_name(), operator=e.node_operator(), text=e.desc()) for e in found]
        raise _RefusedError("parse", errors or [NodeError(node="", operator="", text="")])
    return network


def _add_profile(builder: Any, config: Any, network: Any, shapes: dict[str, list[list[int]]]) -> None:
    inputs = [network.get_input(index).name for index in range(network.num_inputs)]
    unknown = sorted(set(shapes) - set(inputs))
    if unknown:
        raise _refused("profile", f"the graph has no input {', '.join(unknown)}; it has {', '.join(inputs)}")
    profile = builder.create_optimization_profile()
    for name, (low, best, high) in shapes.items():
        profile.set_shape(name, low, best, high)
    if config.add_optimization_profile(profile) < 0:
        raise _refused("profile", f"no valid optimization profile: {shapes}")


def _set_capabilities(trt: Any, config: Any, capabilities: list[str]) -> None:
    if not capabilities:
        return
    config.num_compute_capabilities = len(capabilities)
    for index, capability in enumerate(capabilities):
        value = getattr(trt.ComputeCapability, "SM" + capability.replace(".", ""), None)
        if value is None or not config.set_compute_capability(value, index):
            raise _refused(
                "build",
                f"{trt.__name__} {trt.__version__} does not build for compute capability {capability}",
            )


def _logger(trt: Any) -> Any:
    class LogFile(trt.ILogger):  # type: ignore[misc]  # the builder ships no types
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            # unbuffered, so that nothing is lost in a crash; an exception must not travel through the builder
            try:
                os.write(1, f"{severity.name}: {message}\n".encode(errors="replace"))
            except OSError:
                os._exit(CANNOT_WRITE)

    return LogFile()


def _gpu_capability() -> str:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise _refused("gpu", f"the CUDA driver is not installed ({error})") from error
    code = cuda.cuInit(0)
    device = ctypes.c_int()
    if code == 0:
        code = cuda.cuDeviceGet(ctypes.byref(device), 0)
    if code != 0:
        raise _refused("gpu", f"the CUDA driver finds no GPU (error {code})")
    parts = []
    for attribute in _CU_COMPUTE_CAPABILITY:
        value = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        parts.append(str(value.value))
    return ".".join(parts)


def _refused(stage: Literal["import", "gpu", "parse", "profile", "build"], text: str) -> _RefusedError:
    return _RefusedError(stage, [NodeError(node="", operator="", text=text)])


def _write(path: str, data: Any) -> None:
    try:
        with Path(path).open("wb") as stream:
            stream.write(data)
    except OSError as error:
        _cannot_write(f"cannot write {path}: [Errno {error.errno}] {error.strerror}")


def _cannot_write(message: str) -> NoReturn:
    sys.stderr.write(f"ERROR: {message}\n")
    sys.exit(CANNOT_WRITE)


if __name__ == "__main__":
    main(sys.argv[1])
