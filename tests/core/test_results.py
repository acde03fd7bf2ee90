"""What is written can be read back, and what others wrote is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qdexport.core.results import (
    Artifact,
    Coverage,
    EndToEnd,
    EngineFacts,
    KernelFact,
    LayerParity,
    Manifest,
    Parity,
    Plan,
    Quality,
    QualityScores,
    Report,
    StageFacts,
)
from qdexport.errors import DamagedError, ModelError


def report() -> Report:
    return Report(
        tool_version="0.1.0",
        model="shapes",
        recipe="w8a8",
        target="tensorrt-rtx",
        body="fp32",
        quality=Quality(
            images=2,
            steps=25,
            seed=0,
            fp=QualityScores(alignment=0.98, frechet=240.0),
            quantized=QualityScores(mse=1e-4, psnr_db=42.0, ssim=0.99, alignment=0.97, frechet_fp=0.9),
            error_per_step=[{"step": 0.0, "latent_mse": 1e-6}],
        ),
        coverage=Coverage(planned={"a": "int8"}, onnx={"a": "int8"}, bits={"a": [8, 8]}),
        parity=Parity(
            reference="ONNX Runtime",
            layers=[LayerParity(name="a", sqnr_db=130.0, code_flip_rate=0.0, steps=3)],
            end_to_end=EndToEnd(sqnr_db=70.0, noise_floor_db=69.0),
            verdict="pass",
        ),
        engine=EngineFacts(
            target="tensorrt-rtx", compute_capabilities=["8.9"], bytes=1, kernels=2,
            kernels_by_type={"gemm": 2},
            int8_compute=1, fp_compute=0, attention_kernels=1, build_seconds=1.0, peak_rss_mb=2.0,
        ),
        stages={"quantize": StageFacts(seconds=1.0, peak_rss_mb=2.0, cached=False)},
    )  # fmt: skip


def test_the_threads_of_a_calibration_stay_with_its_checkpoint() -> None:
    first, later = manifest(), manifest()
    first.calibrated_with((2, 1))
    assert first.environment["calibration_threads"] == "2, then 1"
    later.continues(first)
    assert later.environment == first.environment
    later.calibrated_with(())  # given ranges
    assert later.environment == {"python": "3.11"}
    later.continues(manifest())
    assert later.environment == {"python": "3.11"}


def manifest() -> Manifest:
    return Manifest(
        tool_version="0.1.0",
        model="shapes",
        recipe_digest="ab",
        target="tensorrt-rtx",
        environment={"python": "3.11"},
        artifacts=[
            Artifact(
                kind="onnx", path="onnx/model.onnx", sha256="01", stage="emit", inputs={"checkpoint": "ff"}
            ),
            Artifact(kind="images", path="images/fp", sha256="02", stage="check"),
            Artifact(kind="images", path="images/onnx", sha256="03", stage="check"),
        ],
    )


def plan() -> Plan:
    return Plan(target="tensorrt-rtx", kernels=[KernelFact(index=0, name="k", kind="gemm", modules=["a"])])


@pytest.mark.parametrize("make", [report, manifest, plan])
def test_round_trip(tmp_path: Path, make) -> None:
    value = make()
    value.save(tmp_path / "file.json")
    assert type(value).load(tmp_path / "file.json") == value
    assert json.loads((tmp_path / "file.json").read_text())["schema_version"] == 1


def test_a_report_holds_the_keys_of_the_stages_that_ran(tmp_path: Path) -> None:
    Report(tool_version="1", model="m", recipe="r", target="t").save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert not {"quality", "coverage", "parity", "engine"} & set(data)
    report().save(tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert "onnx" not in data["quality"]
    assert data["quality"]["fp"] == {"alignment": 0.98, "frechet": 240.0, "not_finite": 0}


@pytest.mark.parametrize(
    ("value", "written"),
    [(float("inf"), 999.0), (float("-inf"), -999.0), (float("nan"), -999.0), (1e6, 999.0), (131.5, 131.5)],
)
def test_json_has_no_infinite_decibels(tmp_path: Path, value: float, written: float) -> None:
    full = report()
    assert full.parity is not None
    full.parity.layers[0].sqnr_db = value
    full.parity.end_to_end.noise_floor_db = value
    full.save(tmp_path / "report.json")
    parity = json.loads((tmp_path / "report.json").read_text())["parity"]
    assert parity["layers"][0]["sqnr_db"] == written
    assert parity["end_to_end"]["noise_floor_db"] == written


def test_the_last_artifact_of_a_kind() -> None:
    found = manifest().artifact("images")
    assert found is not None
    assert found.path == "images/onnx"
    assert manifest().artifact("engine") is None


def test_an_artifact_describes_a_file_or_folder(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "fp"
    folder.mkdir(parents=True)
    (folder / "000.png").write_bytes(b"1")
    made = Artifact.of(tmp_path, folder, "images", "check", {"checkpoint": "ff"})
    assert made.path == "images/fp"
    before = made.sha256
    (folder / "000.png").write_bytes(b"2")
    assert Artifact.of(tmp_path, folder, "images", "check", {}).sha256 != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a report file of qdexport: .*Invalid JSON"),
        ("[]", "is not a report file of qdexport"),
        ('{"tool_version": "1", "model": "m", "recipe": "r"}', "target: Field required"),
        (
            '{"tool_version": "1", "model": "m", "recipe": "r", "target": "t", "sped": 1}',
            "sped: Extra inputs",
        ),
        (
            '{"schema_version": 2, "tool_version": "1", "model": "m", "recipe": "r", "target": "t"}',
            "schema_version: ",
        ),
    ],
    ids=["broken", "list", "incomplete", "foreign key", "newer"],
)
def test_a_foreign_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(DamagedError, match=f"{message}.*; run the `qdexport compile`") as caught:
        Report.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("record", [Report, Manifest, Plan])
def test_a_missing_file_says_what_makes_it(tmp_path: Path, record) -> None:
    with pytest.raises(ModelError, match=r"gone.json does not exist; run `qdexport compile` first"):
        record.load(tmp_path / "gone.json")
