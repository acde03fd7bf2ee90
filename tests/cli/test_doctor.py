from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from qdexport.cli.doctor import doctor
from qdexport.core import diagnosis
from qdexport.core.environment import Inventory

READY = Inventory(
    packages=dict.fromkeys(
        ["torch", "diffusers", "transformers", "accelerate", "safetensors", "onnx", "onnx-ir", "onnxscript"],
        "1.0",
    )
    | {"onnxruntime": "1.31.1", "tensorrt-rtx": "1.7.1"},
    providers=("CPUExecutionProvider",),
)


def test_code_0_when_the_default_target_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "survey", lambda: READY)
    result = CliRunner().invoke(doctor, [])
    assert result.exit_code == 0
    assert "build for tensorrt-rtx" in result.stdout
    assert "pip install -e '.[cpu]'" in result.stdout


def test_code_9_and_advice_when_something_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "survey", lambda: Inventory(packages={}))
    result = CliRunner().invoke(doctor, [])
    assert result.exit_code == 9
    assert "pip install 'qdexport[cpu]'" in result.stdout


def test_json_is_one_object_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "survey", lambda: Inventory(packages={}))
    result = CliRunner().invoke(doctor, ["--json"])
    assert result.exit_code == 9
    told = json.loads(result.stdout)
    assert told["can_compile"] is False
    assert told["default_target"] == "tensorrt-rtx"
    assert {"name", "status", "detail", "advice"} == set(told["findings"][0])
    assert told["environment"]["python"]


def test_this_machine() -> None:
    result = CliRunner().invoke(doctor, ["--json"])
    told = json.loads(result.stdout)
    assert result.exit_code == (0 if told["can_compile"] else 9)


def test_importing_the_commands_loads_nothing_heavy() -> None:
    code = (
        "import sys, qdexport.cli.doctor, qdexport.cli.progress; "
        "print([m for m in ('torch', 'matplotlib', 'onnx', 'onnxruntime', 'jinja2') if m in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"
