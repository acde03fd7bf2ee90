from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from qdexport.core.digests import tree_sha256
from qdexport.core.results import Manifest, Report
from qdexport.pipeline.workspace import Workspace
from tests.pipeline.conftest import AS_COMPILED

pytestmark = pytest.mark.rtx


def test_every_artifact_is_there_with_its_digest(compiled):
    manifest = Manifest.load(compiled / "manifest.json")
    kinds = {item.kind for item in manifest.artifacts}
    assert {"checkpoint", "onnx", "engine", "plan", "report", "images", "golden"} <= kinds
    for item in manifest.artifacts:
        assert tree_sha256(compiled / item.path) == item.sha256, item.path
    assert manifest.environment["calibration_threads"] == str(torch.get_num_threads())
    assert (compiled / "report.html").stat().st_size > 10_000
    assert (compiled / "images" / "grid.png").is_file()


def test_planned_emitted_and_compiled_types_agree(compiled):
    coverage = Report.load(compiled / "report.json").coverage
    assert coverage is not None
    assert coverage.mismatches == []
    assert set(coverage.planned.values()) == {"int8", "folded"}
    assert coverage.onnx == coverage.planned
    assert coverage.engine == coverage.planned
    assert coverage.macs_planned_share >= 0.99
    assert [(row.first, row.last) for row in coverage.scale_rows] == [(501, 999), (168, 500), (0, 167)]
    assert [row.timestep for row in coverage.scale_rows] == [667, 334, 1]


def test_codes_are_equal_on_every_layer(compiled):
    report = Report.load(compiled / "report.json")
    assert report.parity is not None
    assert report.coverage is not None
    quantized = {name for name, kind in report.coverage.planned.items() if kind == "int8"}
    assert {layer.name for layer in report.parity.layers} == quantized
    assert report.parity.verdict == "pass"
    for layer in report.parity.layers:
        assert layer.code_flip_rate == 0, layer.name
        assert layer.weight_flip_rate == 0, layer.name
        assert layer.sqnr_db >= 100, layer.name  # the bound for an FP32 body; measured above 120


def test_golden_files_hold_inputs_and_outputs(compiled):
    files = sorted((compiled / "golden").glob("*.npz"))
    assert len(files) == 2
    stored = np.load(files[0], allow_pickle=False)
    assert {"input/sample", "input/timestep", "output/noise_pred"} <= set(stored)
    assert np.isfinite(stored["output/noise_pred"]).all()


def test_a_second_run_finds_every_stage_again(compiled, qdexport, tiny_folder):
    before = tree_sha256(compiled / "engine")
    result = qdexport("compile", tiny_folder, "--out", compiled, "--json", *AS_COMPILED)
    assert result.exit_code == 0, result.output
    stages = json.loads(result.stdout)["stages"]
    assert json.loads(result.stdout)["body"] == "fp32"  # decides by which limits the report is judged
    assert {name: stage["cached"] for name, stage in stages.items()} == dict.fromkeys(stages, True)
    assert tree_sha256(compiled / "engine") == before


def test_a_damaged_artifact_is_made_again(compiled, qdexport, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(compiled, out)
    (out / "engine" / "model.engine").write_bytes(b"damaged")
    result = qdexport("build", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["stages"]["build"]["cached"] is False
    assert (out / "engine" / "model.engine").stat().st_size > 1000


@pytest.mark.parametrize("how", ["emptied", "one bit", "removed"])
def test_an_engine_that_is_not_the_one_that_was_built_stops_the_validation(compiled, qdexport, tmp_path, how):
    out = shutil.copytree(compiled, tmp_path / "out")
    engine = out / "engine" / "model.engine"
    data = bytearray(engine.read_bytes())
    data[len(data) // 2] ^= 1
    engine.write_bytes({"emptied": b"", "removed": b""}.get(how, bytes(data)))
    if how == "removed":
        engine.unlink()
    result = qdexport("validate", out)
    assert result.exit_code == 10, result.output
    assert "engine/model.engine" in result.output.replace("\n", "")
    assert f"qdexport build {out}" in result.output.replace("\n", "")


def test_sampling_with_other_steps_than_the_time_table_is_refused(compiled, qdexport, tmp_path):
    kinds = ("--with", "fp", "--with", "quantized", "--with", "onnx")
    result = qdexport("sample", compiled, *kinds, "--steps", 7, "--out", tmp_path / "pictures", "--count", 1)
    assert result.exit_code == 3
    assert "sampling with" not in result.output  # refused before the first of them began
    assert "DDIMScheduler" in result.output
    assert "keep" in result.output
    assert not (tmp_path / "pictures").exists()


def test_sampling_side_by_side_writes_pictures(compiled, qdexport, tmp_path):
    pictures = tmp_path / "pictures"
    result = qdexport(
        "sample", compiled, "--with", "fp", "--with", "onnx", "--steps", 3, "--count", 2, "--out", pictures
    )
    assert result.exit_code == 0, result.output
    assert (pictures / "grid.png").is_file()
    assert len(list((pictures / "onnx").glob("*.png"))) == 2


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "report.html"),
        ("onnx/model.onnx", "DequantizeLinear"),
        ("engine/plan.json", "int8 compute"),
        ("checkpoint", "quantized checkpoint"),
    ],
)
def test_inspect_shows_each_artifact(compiled, qdexport, path, expected):
    result = qdexport("inspect", compiled / path)
    assert result.exit_code == 0, result.output
    assert expected in result.output
    as_json = qdexport("inspect", compiled / path, "--json")
    assert json.loads(as_json.stdout)


def test_two_processes_cannot_share_an_output_folder(compiled, qdexport, tiny_folder):
    manifest = Manifest.load(compiled / "manifest.json")
    report = Report.load(compiled / "report.json")
    with Workspace.open(compiled, manifest, report):
        result = qdexport("compile", tiny_folder, "--out", compiled, *AS_COMPILED)
    assert result.exit_code == 10
    assert "another process" in result.output


def test_explaining_a_layer(compiled, qdexport):
    result = qdexport("inspect", compiled, "--explain", "mid_block.resnets.0.conv1", "--json")
    assert result.exit_code == 0, result.output
    what = {item["pass"]: item["what"] for item in json.loads(result.stdout)}
    assert what["fold-adapters"] == what["lower-timestep-scale"] == "changed"
    assert what["precompute-bos"] == "nothing"
    wrong = qdexport("inspect", compiled, "--explain", "mid_block.resnets.0.conv3")
    assert wrong.exit_code == 2
    assert "did you mean mid_block.resnets.0.conv" in wrong.output


def test_predicted_costs_of_the_plan(compiled, qdexport, tmp_path):
    picture = tmp_path / "cost.png"
    result = qdexport("inspect", compiled, "--gpu", "rtx-4090", "--plot", picture, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["microseconds"] == pytest.approx(sum(facts["microseconds_by_role"].values()), abs=0.5)
    assert facts["microseconds"] > facts["microseconds_if_all_were_int8_and_fused"] > 0
    assert picture.stat().st_size > 10_000
    assert qdexport("inspect", compiled, "--gpu", "gtx-480").exit_code == 2
    assert qdexport("inspect", compiled, "--plot", picture).exit_code == 2
    assert qdexport("inspect", compiled / "checkpoint", "--gpu", "rtx-4090").exit_code == 3


def test_a_pass_of_the_users_runs(compiled, qdexport, tmp_path):
    """It is in the log, in its place; the cached export is not taken for it."""
    out = tmp_path / "out"
    shutil.copytree(compiled, out)
    file = tmp_path / "mine.py"
    file.write_text(
        "class Mine:\n    name = 'mine'\n    exact = True\n    runs_after = ('fold-adapters',)\n\n"
        "    def apply(self, model, context, report):\n        report.touched.append('conv_in')\n"
    )
    manifest = Manifest.load(out / "manifest.json")
    arguments = ["--out", out, "--pass", f"{file}:Mine", "--explain", "conv_in", *AS_COMPILED]
    result = qdexport("compile", manifest.model, *arguments)
    assert result.exit_code == 0, result.output
    assert "mine" in result.stderr
    assert "changed" in result.stderr
    names = [item["name"] for item in json.loads((out / "onnx" / "passes.json").read_text())["passes"]]
    assert names.index("mine") == names.index("fold-adapters") + 1
