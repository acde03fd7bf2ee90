from __future__ import annotations

import os
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qdexport.check.session import reference_session
from qdexport.errors import MissingDependencyError, ParityError


def model_with(weight: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[1, 2] x) => (float[1, 2] y) { y = Mul(x, w) }'
    )
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return model


def test_optimizations_stay_basic() -> None:
    import onnxruntime as ort

    options = reference_session(model_with(np.float32([2, 3])).SerializeToString()).get_session_options()
    assert options.graph_optimization_level == ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert options.intra_op_num_threads == int(os.environ["OMP_NUM_THREADS"])
    # else 4-bit weights meet activations rounded to INT8
    assert options.get_session_config_entry("session.qdq_matmulnbits_accuracy_level") == "1"


def test_external_data_of_a_serialized_model_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model_with(np.float32([2, 3])), path, save_as_external_data=True, location="data", size_threshold=0)
    session = reference_session(path.read_bytes(), tmp_path)
    np.testing.assert_array_equal(session.run(None, {"x": np.float32([[1, 10]])})[0], [[2, 30]])


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"no model")
    with pytest.raises(ParityError, match=r"cannot load .*model\.onnx"):
        reference_session(path)


def test_a_missing_onnxruntime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'qdexport\[cpu\]'"):
        reference_session(b"")


@pytest.mark.parametrize("block", [0, 16])
def test_int4_weights_meet_the_activations_as_they_are(block: int) -> None:
    """A product with activations rounded to INT8 would be off by about 1 %; FP32 sums of 64 terms by 4e-6 at most."""
    rng = np.random.default_rng(0)
    codes, x = rng.integers(-8, 8, (64, 32)), rng.standard_normal((5, 64)).astype(np.float32)
    rows = 64 // block if block else 0
    scale = rng.uniform(0.01, 0.02, (rows, 32) if block else 32).astype(np.float32)
    attributes = f"axis: int = {0 if block else 1}, block_size: int = {block}"
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[5, 64] x) => (float[5, 32] y) '
        f"{{ w = DequantizeLinear<{attributes}>(codes, scale, zero)\n y = MatMul(x, w) }}"
    )
    zero = np.zeros(scale.shape, ml_dtypes.int4)
    arrays = {"codes": codes.astype(ml_dtypes.int4), "scale": scale, "zero": zero}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    wide = codes * np.repeat(scale.astype(np.float64), block, axis=0) if block else codes * scale.astype(np.float64)
    (y,) = reference_session(model.SerializeToString()).run(None, {"x": x})
    magnitude = (np.abs(x).astype(np.float64) @ np.abs(wide)).max()
    np.testing.assert_allclose(y, x.astype(np.float64) @ wide, rtol=0, atol=66 * 2.0**-24 * magnitude)
