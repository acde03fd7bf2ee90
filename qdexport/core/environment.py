"""What is installed and what machine this is; heavy packages are only tried, in child processes."""

from __future__ import annotations

import contextlib
import importlib.metadata as metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil

from qdexport.core.target import TARGETS

__all__ = [
    "Gpu",
    "Inventory",
    "available_bytes",
    "environment_facts",
    "memory_bytes",
    "survey",
    "thread_count",
]

# what a result may depend on, in the order of the pipeline
_RECORDED = (
    "qdexport",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "ml_dtypes",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx",
    "tensorrt",
    "polygraphy",
    "scipy",
    "torchmetrics",
)
_CHILD_SECONDS = 300  # for what hangs: on a busy machine an import has taken a minute
_TRY_TENSORRT = "import {0} as t; t.Builder(t.Logger(t.Logger.ERROR)); print(t.__version__)"
_TRY_ONNXRUNTIME = "import json, onnxruntime as o; print(json.dumps(o.get_available_providers()))"
_REQUIREMENT = re.compile(r"^([A-Za-z0-9][\w.-]*)(?:>=([0-9.]+))?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU as ``nvidia-smi`` describes it; ``memory_mib`` is its whole memory."""

    name: str
    compute_capability: str
    memory_mib: int
    driver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What was found on this machine.

    Attributes:
        packages: installed version per distribution, of those that matter here.
        minimums: smallest version that qdexport asks for, per distribution; empty when run from its sources.
        gpus: the NVIDIA GPUs.
        providers: execution providers of ONNX Runtime; empty when it cannot be loaded.
        failures: per Python module that is installed but cannot be used, the last line of its error.
    """

    packages: dict[str, str]
    minimums: dict[str, str] = field(default_factory=dict)
    gpus: tuple[Gpu, ...] = ()
    providers: tuple[str, ...] = ()
    failures: dict[str, str] = field(default_factory=dict)


def environment_facts() -> dict[str, str]:
    """What results may depend on: Python, platform, processors, memory, GPUs and package versions."""
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_count": str(_processors()),
        "threads": str(thread_count()),
        "ram_gib": f"{memory_bytes() / 2**30:.1f}",
    }
    for number, gpu in enumerate(_gpus()):
        memory = f"{gpu.memory_mib} MiB"
        facts[f"gpu{number}"] = f"{gpu.name}, SM {gpu.compute_capability}, {memory}, driver {gpu.driver}"
    return facts | _versions(_RECORDED)


def thread_count() -> int:
    """How many threads compute: ``OMP_NUM_THREADS``, which PyTorch and numpy follow, else one for each processor that
    this process may use.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # one number for each level of nesting
    return int(asked) if asked.isdecimal() and int(asked) > 0 else _processors()


def survey() -> Inventory:
    """Looks at this machine; TensorRT and ONNX Runtime load in child processes, where a crash cannot hurt."""
    minimums = _minimums()
    packages = _versions((*_RECORDED, *minimums))
    failures: dict[str, str] = {}
    for distribution in ("tensorrt-rtx", "tensorrt"):
        module = TARGETS[distribution].module
        if distribution in packages and module is not None:
            _in_child(module, _TRY_TENSORRT.format(module), failures)
    providers: tuple[str, ...] = ()
    if "onnxruntime" in packages or "onnxruntime-gpu" in packages:
        text = _in_child("onnxruntime", _TRY_ONNXRUNTIME, failures)
        providers = tuple(json.loads(text)) if text else ()
    return Inventory(packages=packages, minimums=minimums, gpus=_gpus(), providers=providers, failures=failures)


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def _minimums() -> dict[str, str]:
    """Requirements of the installed qdexport, without its extras."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        matches = [_REQUIREMENT.match(text.replace(" ", "")) for text in metadata.requires("qdexport") or []]
        return {match.group(1): match.group(2) or "0" for match in matches if match}
    return {}


def _in_child(module: str, code: str, failures: dict[str, str]) -> str:
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=_CHILD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        failures[module] = f"loading it took more than {_CHILD_SECONDS} s"
        return ""
    if child.returncode < 0:
        failures[module] = f"loading it killed the process with signal {-child.returncode}"
        return ""
    if child.returncode > 0:
        failures[module] = next(reversed(child.stderr.strip().splitlines()), f"exit code {child.returncode}")
        return ""
    return child.stdout.strip().splitlines()[-1]


@cache
def _gpus() -> tuple[Gpu, ...]:
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    query = [
        command,
        "--query-gpu=name,compute_cap,memory.total,driver_version",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_CHILD_SECONDS, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return ()  # the tool is there, the driver is not: no GPU can be used
    return tuple(gpu for gpu in map(_parse_gpu, answer.splitlines()) if gpu is not None)


def _parse_gpu(line: str) -> Gpu | None:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 4:
        return None
    name, capability, memory, driver = parts
    return Gpu(
        name=name,
        compute_capability=capability,
        memory_mib=int(memory) if memory.isdigit() else 0,
        driver=driver,
    )


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_bytes() -> int:
    """Memory that this process can still have: what the system can free, within the container's limit."""
    free = int(psutil.virtual_memory().available)
    return min(free, max(memory_bytes() - psutil.Process().memory_info().rss, 0))


def memory_bytes() -> int:
    """Physical memory, or what the container may use of it."""
    total = int(psutil.virtual_memory().total)
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file():
        text = limit.read_text(encoding="ascii").strip()
        if text.isdigit():
            return min(total, int(text))
    return total
