from __future__ import annotations

import dataclasses

from qdexport.core.diagnosis import Finding, can_compile, diagnose
from qdexport.core.environment import Gpu, Inventory

WHOLE = Inventory(
    packages={
        "torch": "2.13.0+cpu", "diffusers": "0.42.1", "transformers": "5.23.0", "accelerate": "1.15.0",
        "safetensors": "0.8.0", "onnx": "1.23.2", "onnx-ir": "1.1.0", "onnxscript": "0.7.2",
        "onnxruntime": "1.31.1", "tensorrt-rtx": "1.7.1.116",
    },
    minimums={"torch": "2.13", "onnx": "1.23"},
    providers=("CPUExecutionProvider",),
)  # fmt: skip
ADA = Gpu(name="NVIDIA L4", compute_capability="8.9", memory_mib=23034, driver="570.86")
HOPPER = dataclasses.replace(ADA, name="NVIDIA H100", compute_capability="9.0")


def without(*names: str) -> Inventory:
    return dataclasses.replace(WHOLE, packages={k: v for k, v in WHOLE.packages.items() if k not in names})


def named(found: Inventory) -> dict[str, Finding]:
    return {item.name: item for item in diagnose(found)}


def test_a_machine_without_a_gpu_can_compile() -> None:
    findings = named(WHOLE)
    assert can_compile(diagnose(WHOLE))
    assert findings["build for tensorrt-rtx"].status == "ok"
    assert findings["package versions"].status == "ok"
    assert findings["build for tensorrt"].status == "missing"
    assert "pip install 'qdexport[gpu]'" in findings["build for tensorrt"].advice
    assert findings["run engines"].status == "missing"
    assert "copy the output folder" in findings["run engines"].advice


def test_what_is_missing_names_its_extra() -> None:
    found = without("tensorrt-rtx")
    assert not can_compile(diagnose(found))
    assert named(found)["build for tensorrt-rtx"].advice == "pip install 'qdexport[cpu]'"
    assert named(found)["compile for tensorrt-rtx"] == Finding(
        "compile for tensorrt-rtx",
        "missing",
        "not possible without: build for tensorrt-rtx",
        "pip install 'qdexport[cpu]'",
    )
    assert named(without("onnxruntime"))["compare with ONNX Runtime"].advice == "pip install 'qdexport[cpu]'"
    assert named(without("torch", "onnx"))["export to ONNX"].advice == "pip install torch onnx"


def test_an_installed_package_that_does_not_load_is_missing() -> None:
    broken = dataclasses.replace(
        WHOLE, failures={"tensorrt_rtx": "libcudart.so: cannot open shared object file"}
    )
    finding = named(broken)["build for tensorrt-rtx"]
    assert finding.status == "missing"
    assert "libcudart.so" in finding.detail
    assert not can_compile(diagnose(broken))


def test_old_and_unknown_versions_are_warnings() -> None:
    old = dataclasses.replace(WHOLE, minimums={"torch": "2.14", "scipy": "1.16"})
    finding = named(old)["package versions"]
    assert finding.status == "warning"
    assert finding.detail == "torch 2.13.0+cpu is older than 2.14; scipy is missing"
    assert named(dataclasses.replace(WHOLE, minimums={}))["package versions"].status == "warning"
    assert can_compile(diagnose(old))


def test_a_gpu_runs_the_engines_that_are_built_for_it() -> None:
    ada = dataclasses.replace(WHOLE, gpus=(ADA,))
    assert named(ada)["run engines"].status == "ok"
    assert named(ada)["build for tensorrt"].advice == "pip install 'qdexport[gpu]'"
    assert named(ada)["compare with ONNX Runtime"].status == "warning"
    hopper = named(dataclasses.replace(WHOLE, gpus=(HOPPER,)))["run engines"]
    assert hopper.status == "missing"
    assert "no TensorRT-RTX engine is built for it" in hopper.detail
    full = dataclasses.replace(WHOLE, gpus=(HOPPER,), packages=WHOLE.packages | {"tensorrt": "11.4.0"})
    assert named(full)["run engines"].status == "ok"
    assert named(full)["build for tensorrt"].status == "ok"


def test_two_onnxruntimes_are_in_each_others_way() -> None:
    both = dataclasses.replace(WHOLE, packages=WHOLE.packages | {"onnxruntime-gpu": "1.31.1"})
    finding = named(both)["compare with ONNX Runtime"]
    assert finding.status == "warning"
    assert finding.advice == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'qdexport[cpu]'"
