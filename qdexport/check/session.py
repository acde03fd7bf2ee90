"""ONNX Runtime as the reference: sessions whose optimizations leave the numbers of Q/DQ graphs alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from qdexport.core.environment import thread_count
from qdexport.errors import MissingDependencyError, ParityError
from qdexport.graph.nvfp4 import DYNAMIC_QUANTIZE, executable

__all__ = ["REFERENCE", "ort_errors", "reference_session"]

REFERENCE = "ONNX Runtime at ORT_ENABLE_BASIC"


def reference_session(model: Path | bytes, data_folder: Path | None = None) -> Any:
    """An ``onnxruntime.InferenceSession`` on the CPU.

    ``ORT_ENABLE_BASIC`` gives the numbers of the unoptimized graph; the default level fuses Q/DQ pairs into
    kernels with other arithmetic (31 dB apart on a UNet), and is never a reference. 4-bit weights are
    multiplied in floating point instead of with activations rounded to INT8, which is the default. NVFP4, for which it
    has no operators, is written out in FP32 ones first.

    Args:
        model: a file, or a serialized model.
        data_folder: where the external data of a serialized model lies.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ParityError: the model cannot be loaded.
    """
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    options.intra_op_num_threads = thread_count()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # waiting threads sleep: spinning ones fight with PyTorch's for the cores
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if data_folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(data_folder)
        )
    source = _executable(model)
    if isinstance(source, bytes) and isinstance(model, Path):
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.parent))
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except ort_errors() as error:
        what = "a cut-out of the model" if isinstance(model, bytes) else str(model)
        raise ParityError(f"ONNX Runtime cannot load {what}: {str(error).splitlines()[0]}") from error


def _executable(model: Path | bytes) -> str | bytes:
    """What ONNX Runtime is given: the model itself, or with NVFP4 written out in FP32 (:mod:`qdexport.graph.nvfp4`)."""
    content = model if isinstance(model, bytes) else model.read_bytes() if model.is_file() else b""
    if DYNAMIC_QUANTIZE.encode() not in content:
        return model if isinstance(model, bytes) else str(model)
    graph = ir.from_proto(onnx.load_model_from_string(content)) if isinstance(model, bytes) else ir.load(model)
    executable(graph)
    serialized: bytes = ir.to_proto(graph).SerializeToString()
    return serialized


def ort_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises; its exceptions have no base of their own."""
    state = _onnxruntime().capi.onnxruntime_pybind11_state
    return (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NoModel,
        state.NoSuchFile,
        state.NotImplemented,
        state.RuntimeException,
    )


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "checking needs onnxruntime: pip install 'qdexport[cpu]' (or 'qdexport[gpu]')"
        ) from error
    return onnxruntime
