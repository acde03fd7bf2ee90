"""What this machine can do with qdexport, and what to install next."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from qdexport.core.environment import Inventory, survey
from qdexport.core.target import TARGETS

__all__ = ["DEFAULT_TARGET", "Finding", "can_compile", "diagnose"]

DEFAULT_TARGET = "tensorrt-rtx"

Status = Literal["ok", "missing", "warning"]

_QUANTIZE = ("torch", "diffusers", "transformers", "accelerate", "safetensors")
_EXPORT = ("torch", "onnx", "onnx-ir", "onnxscript")
_CPU_PROVIDERS = {"CPUExecutionProvider", "AzureExecutionProvider"}
_COMPILE = f"compile for {DEFAULT_TARGET}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a diagnosis: ``advice`` is what to do next, empty when there is nothing to do."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def diagnose(inventory: Inventory | None = None) -> list[Finding]:
    """Says what a machine can do and what to install next.

    Args:
        inventory: what to judge; by default, this machine.
    """
    found = inventory or survey()
    needed = [
        _packages(found, "quantize and sample", _QUANTIZE),
        _packages(found, "export to ONNX", _EXPORT),
        _onnxruntime(found),
        _build_rtx(found),
    ]
    others = [_dependencies(found), _build_tensorrt(found), _run_engines(found)]
    missing = [item for item in needed if item.status == "missing"]
    if missing:
        names = ", ".join(item.name for item in missing)
        return [
            *needed,
            *others,
            Finding(_COMPILE, "missing", f"not possible without: {names}", missing[0].advice),
        ]
    return [*needed, *others, Finding(_COMPILE, "ok", "everything that `qdexport compile` needs is here")]


def can_compile(findings: list[Finding]) -> bool:
    """Whether ``qdexport compile`` for the default target is possible."""
    return any(item.name == _COMPILE and item.status == "ok" for item in findings)


def _packages(found: Inventory, name: str, wanted: tuple[str, ...]) -> Finding:
    missing = [package for package in wanted if package not in found.packages]
    if missing:
        listed = " ".join(missing)
        return Finding(name, "missing", f"not installed: {listed}", f"pip install {listed}")
    return Finding(name, "ok", ", ".join(f"{item} {found.packages[item]}" for item in wanted))


def _dependencies(found: Inventory) -> Finding:
    name = "package versions"
    if not found.minimums:
        detail = "qdexport runs from its sources: the versions it asks for are unknown"
        return Finding(name, "warning", detail, "pip install -e '.[cpu]'")
    wrong = []
    for package, minimum in found.minimums.items():
        version = found.packages.get(package)
        if version is None:
            wrong.append(f"{package} is missing")
        elif _release(version) < _release(minimum):
            wrong.append(f"{package} {version} is older than {minimum}")
    if wrong:
        return Finding(name, "warning", "; ".join(wrong), "pip install --upgrade qdexport")
    return Finding(name, "ok", f"all {len(found.minimums)} required packages are recent enough")


def _onnxruntime(found: Inventory) -> Finding:
    name = "compare with ONNX Runtime"
    extra = _extra("gpu" if found.gpus else "cpu")
    installed = [item for item in ("onnxruntime", "onnxruntime-gpu") if item in found.packages]
    if not installed:
        return Finding(name, "missing", "onnxruntime is not installed", extra)
    if "onnxruntime" in found.failures:
        detail = f"{installed[0]} is installed, but: {found.failures['onnxruntime']}"
        return Finding(name, "missing", detail, f"pip install --force-reinstall {installed[0]}")
    if len(installed) == 2:
        detail = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files"
        return Finding(name, "warning", detail, f"pip uninstall -y {' '.join(installed)} && {extra}")
    detail = f"{installed[0]} {found.packages[installed[0]]} with {', '.join(found.providers)}"
    if found.gpus and set(found.providers) <= _CPU_PROVIDERS:
        return Finding(name, "warning", f"{detail}; the GPU is not used", f"pip uninstall -y {installed[0]} && {extra}")
    return Finding(name, "ok", detail)


def _build_rtx(found: Inventory) -> Finding:
    name = f"build for {DEFAULT_TARGET}"
    version = found.packages.get("tensorrt-rtx")
    if version is None:
        return Finding(name, "missing", "tensorrt-rtx is not installed", _extra("cpu"))
    if "tensorrt_rtx" in found.failures:
        detail = f"tensorrt-rtx {version} is installed, but: {found.failures['tensorrt_rtx']}"
        return Finding(name, "missing", detail, "pip install --force-reinstall tensorrt-rtx")
    targets = ", ".join(TARGETS["tensorrt-rtx"].compute_capabilities)
    return Finding(name, "ok", f"tensorrt-rtx {version}, on this CPU, for compute capability {targets}")


def _build_tensorrt(found: Inventory) -> Finding:
    name = "build for tensorrt"
    version = found.packages.get("tensorrt")
    if not found.gpus:
        advice = f"on a machine with the GPU that will run the engine: {_extra('gpu')}"
        return Finding(name, "missing", "full TensorRT builds only where there is an NVIDIA GPU", advice)
    if version is None:
        return Finding(name, "missing", "tensorrt is not installed", _extra("gpu"))
    if "tensorrt" in found.failures:
        detail = f"tensorrt {version} is installed, but: {found.failures['tensorrt']}"
        return Finding(name, "missing", detail, "pip install --force-reinstall tensorrt")
    return Finding(name, "ok", f"tensorrt {version} for {found.gpus[0].name}")


def _run_engines(found: Inventory) -> Finding:
    name = "run engines"
    if not found.gpus:
        advice = "compile here, then copy the output folder to the machine that has the GPU"
        return Finding(name, "missing", "nvidia-smi finds no NVIDIA GPU", advice)
    gpu = found.gpus[0]
    here = f"{gpu.name}, compute capability {gpu.compute_capability}, driver {gpu.driver}"
    usable = [
        item
        for item in ("tensorrt-rtx", "tensorrt")
        if item in found.packages and TARGETS[item].module not in found.failures
    ]
    if gpu.compute_capability not in TARGETS["tensorrt-rtx"].compute_capabilities:
        usable = [item for item in usable if item != "tensorrt-rtx"]
        here += " (no TensorRT-RTX engine is built for it)"
    if not usable:
        return Finding(name, "missing", f"{here}: no runtime for it is installed", _extra("gpu"))
    return Finding(name, "ok", f"{here}: {' and '.join(usable)}")


def _extra(name: str) -> str:
    return f"pip install 'qdexport[{name}]'"


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
