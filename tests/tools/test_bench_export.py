"""What the export benchmark says about a row."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The tool's module, importable as it is for the script beside it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
        import bench_export

        yield bench_export


def answers(peak: float, onnx: int) -> Any:
    """Stands in for both child processes: a checkpoint of 100 MiB and 40 MB of constants."""

    def run(module: str, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
        assert module == "benchmarks.checkpoint_child"
        if spec["action"] == "make":
            return {"parameters": 7}
        assert spec["checkpoint"] == str(folder.parent / "checkpoint")
        cost = {"seconds": 1.0, "cpu_seconds": 2.0, "peak_rss_mb": peak}
        sizes = {"onnx_bytes": onnx, "packed_bytes": 40_000_000, "checkpoint_bytes": 100 << 20}
        return {"costs": {"load": cost, "export": cost}, "layers": 4, "nodes": 9, **sizes}

    return run


@pytest.mark.parametrize(
    ("peak", "onnx", "problems"),
    [
        (1060.0, 41_000_000, []),
        (1080.0, 41_000_000, ["sd15: 1080 MiB, more than 1069"]),
        (900.0, 80_000_000, ["sd15: a file of 80000000 bytes for 40000000 of constants"]),
    ],
)
def test_limits(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, peak: float, onnx: int, problems: list[str]
) -> None:
    monkeypatch.setattr(bench, "run_module", answers(peak, onnx))
    row = bench._measured("sd15", "sd15", {}, {}, "tensorrt-rtx")
    assert row.problems == problems
