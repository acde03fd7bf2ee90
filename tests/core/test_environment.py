from __future__ import annotations

import subprocess
import sys

import pytest

from qdexport.core import environment
from qdexport.core.environment import Gpu, environment_facts, survey, thread_count


def test_facts_are_text_and_name_what_results_depend_on() -> None:
    facts = environment_facts()
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"platform", "cpu_count", "threads", "ram_gib", "numpy", "onnx"} <= facts.keys()
    assert all(isinstance(value, str) and value for value in facts.values())
    assert int(facts["cpu_count"]) >= 1
    assert float(facts["ram_gib"]) > 0


@pytest.mark.parametrize(("asked", "threads"), [("3", 3), (" 2,1", 2), ("", 7), ("0", 7), ("many", 7)])
def test_threads_are_those_asked_for_or_the_processors(
    monkeypatch: pytest.MonkeyPatch, asked: str, threads: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(7), raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert thread_count() == threads
    assert environment_facts()["threads"] == str(threads)


def test_neither_facts_nor_survey_import_torch() -> None:
    code = (
        "import sys; from qdexport.core.environment import environment_facts, survey\n"
        "environment_facts(); survey()\n"
        "print([m for m in ('torch', 'diffusers', 'onnxruntime', 'tensorrt_rtx') if m in sys.modules])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "[]"


def test_survey_tries_what_is_installed() -> None:
    found = survey()
    if "onnxruntime" in found.packages:
        assert "CPUExecutionProvider" in found.providers
    assert "onnxruntime" not in found.failures


@pytest.mark.parametrize(("code", "message"), [
    ("import does_not_exist_at_all", "No module named 'does_not_exist_at_all'"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed the process with signal 11"),
    ("raise SystemExit(3)", "exit code 3"),
])  # fmt: skip
def test_a_broken_package_is_a_finding_not_a_crash(code: str, message: str) -> None:
    failures: dict[str, str] = {}
    assert environment._in_child("module", code, failures) == ""
    assert message in failures["module"]


def test_nvidia_smi_lines() -> None:
    assert environment._parse_gpu("NVIDIA GeForce RTX 4090, 8.9, 24564, 570.86.10") == Gpu(
        name="NVIDIA GeForce RTX 4090", compute_capability="8.9", memory_mib=24564, driver="570.86.10"
    )
    assert environment._parse_gpu("Failed to initialize NVML") is None
