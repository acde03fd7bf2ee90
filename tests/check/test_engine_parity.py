from __future__ import annotations

import ctypes
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Self

import numpy as np
import pytest
import torch
from polygraphy.exception import PolygraphyException

from qdexport.check import engine_child
from qdexport.check.engine_parity import engine_parity, write_golden
from qdexport.check.session import reference_session
from qdexport.core.io_spec import TensorSpec
from qdexport.core.target import target_named
from qdexport.emit.facts import read_network_facts
from qdexport.errors import MissingDependencyError, ModelError, ParityError
from tests.check.conftest import Compiled

RTX = target_named("tensorrt-rtx")


@pytest.fixture
def golden(static: Compiled, tmp_path: Path) -> Path:
    folder = tmp_path / "golden"
    write_golden(folder, static.path, static.io, static.calls[:2])
    return folder


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "model.engine"
    path.write_bytes(b"engine")
    return path


def test_golden_files_hold_a_call_and_its_answer(static: Compiled, golden: Path) -> None:
    assert sorted(path.name for path in golden.iterdir()) == ["00.npz", "01.npz"]
    inputs, outputs = engine_child.read_golden(golden / "01.npz")
    assert list(inputs) == ["sample", "timestep", "encoder_hidden_states"]
    np.testing.assert_array_equal(inputs["sample"], static.calls[1].inputs["sample"].numpy(), strict=True)
    (answer,) = reference_session(static.path).run(None, inputs)
    np.testing.assert_array_equal(outputs["noise_pred"], answer, strict=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timestep": torch.tensor([-1])}, "outside the training range"),
        ({"timestep": torch.tensor([41])}, r"has no row for timesteps \[41\]"),
        ({"timestep": torch.tensor([41.5])}, "time_embedding: keep"),
        ({"class_labels": torch.tensor([3, -1])}, r"class labels \[-1\] are outside 0\.\.9"),
        ({"class_labels": torch.tensor([10, 0])}, r"class labels \[10\] are outside 0\.\.9"),
    ],
)
def test_golden_calls_without_a_row_are_refused(
    static: Compiled, golden: Path, engine: Path, tmp_path: Path, changes: dict[str, torch.Tensor], words: str
) -> None:
    """Where golden files are written, and where an engine runs them."""
    facts = read_network_facts(static.path).model_copy(update={"labels": 10})
    label = TensorSpec(name="class_labels", role="class_labels", dtype="int64", dims=static.io.inputs[0].dims[:1])
    io = static.io.model_copy(update={"inputs": (*static.io.inputs, label)})
    call = replace(static.calls[0], inputs={**static.calls[0].inputs, "class_labels": torch.tensor([3, 3]), **changes})
    with pytest.raises(ModelError, match=words):
        write_golden(tmp_path / "other", static.path, io, [call], facts=facts)
    assert not (tmp_path / "other").exists()
    stored = {f"input/{name}": tensor.numpy() for name, tensor in call.inputs.items()}
    np.savez(golden / "01.npz", **stored)  # type: ignore[arg-type]  # numpy's stub
    with pytest.raises(ModelError, match=words):
        engine_parity(engine, golden, RTX, facts)


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has a GPU")
def test_without_a_gpu_the_message_says_where_to_go(golden: Path, engine: Path) -> None:
    with pytest.raises(MissingDependencyError, match="machine with the GPU that the engine was built for"):
        engine_parity(engine, golden, RTX)


def test_no_golden_files(engine: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no golden files; run `qdexport validate` first"):
        engine_parity(engine, tmp_path, RTX)


def test_no_engine(golden: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no engine .*absent\.engine"):
        engine_parity(tmp_path / "absent.engine", golden, RTX)


def test_a_target_without_engines(golden: Path, engine: Path) -> None:
    with pytest.raises(ModelError, match="target onnxruntime has no engine"):
        engine_parity(engine, golden, target_named("onnxruntime"))


def child_that(monkeypatch: pytest.MonkeyPatch, code: int, out: str = "", err: str = "") -> dict[str, object]:
    """Stands in for the child process; gives what it was called with."""
    seen: dict[str, object] = {}

    def run(command: list[str], *, env: dict[str, str], **_: object) -> SimpleNamespace:
        seen.update(command=command, flavour=env["POLYGRAPHY_USE_TENSORRT_RTX"])
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    monkeypatch.setattr("qdexport.check.engine_parity.subprocess.run", run)
    return seen


@pytest.mark.parametrize(("name", "flavour"), [("tensorrt-rtx", "1"), ("tensorrt", "0")])
def test_the_child_gets_the_flavour_of_the_target(
    golden: Path, engine: Path, monkeypatch: pytest.MonkeyPatch, name: str, flavour: str
) -> None:
    seen = child_that(monkeypatch, 0, out="some log line\n[40.5, 41.5]\n")
    assert engine_parity(engine, golden, target_named(name)) == [40.5, 41.5]
    assert seen["flavour"] == flavour
    assert str(engine) in str(seen["command"])


def test_an_engine_that_does_not_load_is_an_error(
    golden: Path, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_that(monkeypatch, 1, err="noise\ncould not deserialize\n")
    with pytest.raises(ParityError, match="does not run: could not deserialize"):
        engine_parity(engine, golden, RTX)
    child_that(monkeypatch, -11)
    with pytest.raises(ParityError, match="it ended with code -11"):
        engine_parity(engine, golden, RTX)


def test_the_child_compares_what_the_engine_answers(
    static: Compiled, golden: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    session = reference_session(static.path)

    class Runner:
        """In place of TensorRT: the ONNX file, one answer of which is one percent off."""

        def __init__(self, engine: object) -> None:
            self.count = 0
            self.engine = SimpleNamespace(num_io_tensors=0, num_optimization_profiles=1)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...

        def infer(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            self.count += 1
            answer = session.run(None, feed)[0]
            return {"noise_pred": answer if self.count == 1 else answer * np.float32(1.01)}

    stand_in = ModuleType("polygraphy.backend.trt")
    stand_in.__dict__.update(TrtRunner=Runner, EngineFromBytes=lambda data: data)
    monkeypatch.setitem(sys.modules, "polygraphy.backend.trt", stand_in)
    monkeypatch.setattr(engine_child, "missing_device", lambda: "")
    monkeypatch.setattr(engine_child, "missing_runtime", lambda module: "")
    assert engine_child.main("tensorrt", static.path, sorted(golden.iterdir())) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first == np.inf
    assert second == pytest.approx(40, abs=1e-2)  # 1 %


def test_a_driver_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = SimpleNamespace(cuInit=lambda flags: 100, cuDeviceGetCount=lambda count: 0)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert "finds no GPU" in engine_child.missing_device()


def test_a_runtime_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "pip install 'qdexport[gpu]'" in engine_child.missing_runtime("tensorrt")
    assert engine_child.missing_runtime("json") == ""


class _Engine:
    """Two optimization profiles of one input: batch 1 to 2, and 4 to 8."""

    num_io_tensors, num_optimization_profiles = 2, 2

    def get_tensor_name(self, index: int) -> str:
        return ("sample", "noise_pred")[index]

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, int]]:
        assert name == "sample"
        low, high = ((1, 2), (4, 8))[index]
        return [(low, 4), (low, 4), (high, 4)]


@pytest.mark.parametrize(("batch", "chosen"), [(1, [0]), (2, [0]), (4, [1]), (8, [1]), (3, None)])
def test_a_golden_call_chooses_its_profile(batch: int, chosen: list[int] | None) -> None:
    used: list[int] = []
    runner = SimpleNamespace(engine=_Engine(), set_profile=used.append)
    inputs = {"sample": np.zeros((batch, 4)), "timestep": np.zeros(1)}  # a tabled timestep may be no input at all
    if chosen is None:
        with pytest.raises(PolygraphyException, match=r"has room for a golden call: sample \[3, 4\]"):
            engine_child.choose_profile(runner, inputs)
    else:
        engine_child.choose_profile(runner, inputs)
        assert used == chosen
